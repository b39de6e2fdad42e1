// Attention and its gradient: units of eight rows (query, head) that share a key/value head. See ../../../assembly/attention.ts.
import type { Kernel, Spec } from "@switchyard/core";
import { at, bits, type Device, only, sizeOf } from "../device.ts";
import type { Block } from "../heap.ts";
import { SCRATCH } from "./matmul.ts";

interface Attrs {
  readonly causal: boolean;
  readonly scale: number;
  readonly window?: number;
  readonly probabilities?: boolean;
  readonly mask?: boolean;
}

const padded = (n: number): number => Math.ceil(n / 8) * 8;

/** Sizes of a call, from the specs of q, k and v. */
function sizes([q, k, v]: readonly Spec[]): Readonly<
  Record<"batch" | "sequence" | "heads" | "d" | "total" | "kvHeads" | "dv", number>
> {
  const [batch, sequence, heads, d] = (q?.shape ?? []) as readonly [number, number, number, number];
  const [, total, kvHeads] = (k?.shape ?? []) as readonly [number, number, number];
  return { batch, sequence, heads, d, total, kvHeads, dv: v?.shape[3] ?? 0 };
}

/** The scratch of a thread must hold the packed rows; heads wider than about 400 do not fit. */
const forwardBytes = (d: number, dv: number): number => 32 * padded(d) + 512 * 32 + 32 * padded(dv) + 64;
const backwardBytes = (d: number, dv: number): number =>
  32 * Math.max(padded(d), padded(dv)) + 128 * (padded(d) + padded(dv)) + 2 * 128 * 128 + 32 * padded(d) + 3 * 128;

export function attentionKernels(device: Device): Readonly<Record<string, Kernel<Block>>> {
  const refusal =
    (bytes: (d: number, dv: number) => number) =>
    (inputs: readonly Spec[]): string | undefined => {
      const { d, dv } = sizes(inputs);
      return only("f")(inputs, {}) ?? (bytes(d, dv) > SCRATCH ? `heads of ${d} channels are too wide` : undefined);
    };

  return {
    attention: device.kernel(
      "attention",
      (inputs, specs, attrs: Attrs) => {
        const results = specs.map((spec) => device.result(spec));
        const [q, k, v, mask] = inputs;
        const { batch, sequence, heads, d, total, kvHeads, dv } = sizes(inputs);
        if (!q || !k || !v || batch * sequence * heads === 0) return results;
        const [out, lse, probabilities] = results;
        const tiles = Math.ceil((sequence * heads) / kvHeads / 8);
        const pointers = [q, k, v].map((x) => x.handle.ptr);
        const job = [...pointers, mask?.handle.ptr ?? 0, out?.ptr ?? 0, lse?.ptr ?? 0, probabilities?.ptr ?? 0];
        job.push(
          sequence,
          total,
          heads,
          kvHeads,
          d,
          dv,
          bits(attrs.scale),
          attrs.causal ? 1 : 0,
          attrs.window ?? 0,
          tiles,
        );
        const cost = (batch * heads * sequence * total * (d + dv)) / 15;
        device.launch("attention", job, batch * kvHeads * tiles, cost);
        if (probabilities) {
          device.heap.u8().fill(0, probabilities.ptr, probabilities.ptr + sizeOf(at(specs, 2).shape) * 4);
          device.launch("attentionProbabilities", job, batch * kvHeads * tiles, cost);
        }
        return results;
      },
      refusal(forwardBytes),
    ),

    attentionGrad: device.kernel(
      "attentionGrad",
      (inputs, specs, attrs: Attrs) => {
        const results = specs.map((spec) => device.result(spec));
        const [q, k, v] = inputs;
        const mask = attrs.mask ? inputs[3] : undefined;
        const [out, lse, dout] = inputs.slice(-3);
        const { batch, sequence, heads, d, total, kvHeads, dv } = sizes(inputs);
        if (!q || !k || !v || !out || !lse || !dout) return results;
        const pointers = [q, k, v].map((x) => x.handle.ptr);
        const job = [...pointers, mask?.handle.ptr ?? 0, out.handle.ptr, lse.handle.ptr, 0];
        job.push(sequence, total, heads, kvHeads, d, dv, bits(attrs.scale), attrs.causal ? 1 : 0, attrs.window ?? 0, 0);
        job.push(dout.handle.ptr, ...results.map((y) => y.ptr));
        device.launch(
          "attentionGrad",
          job,
          batch * kvHeads,
          (batch * heads * sequence * total * (3 * d + 2 * dv)) / 15,
        );
        return results;
      },
      refusal(backwardBytes),
    ),
  };
}
