// Attention in all its forms against the formula in float64: tiles, stretches of keys that are joined, one row per invocation; groups of
// heads, windows, padding, queries that see nothing, odd and wide heads.
import { describe, expect, it } from "vitest";
import { call, floats, type Host, hasGpu, uniform } from "../call.test-util.ts";
import { createGpu, type OwnedGpu } from "../device.ts";
import { requestDevice } from "../request.ts";
import { attentionKernels } from "./attention.ts";

interface Case {
  readonly what: string;
  readonly batch: number;
  readonly sequence: number;
  readonly total: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly d: number;
  readonly dv: number;
  readonly causal: boolean;
  readonly window?: number;
  /** How many keys at the front are padding, per batch row. */
  readonly padding?: readonly number[];
}

const cases: readonly Case[] = [
  { what: "groups, odd heads", batch: 2, sequence: 19, total: 19, heads: 4, kvHeads: 2, d: 5, dv: 7, causal: true },
  {
    ...{ what: "padding, no causality", batch: 2, sequence: 40, total: 71, heads: 1, kvHeads: 1 },
    ...{ d: 6, dv: 3, causal: false, padding: [0, 60] },
  },
  {
    ...{ what: "window over a cache", batch: 1, sequence: 45, total: 110, heads: 1, kvHeads: 1 },
    ...{ d: 72, dv: 68, causal: true, window: 11 },
  },
  {
    ...{ what: "window both ways", batch: 1, sequence: 50, total: 50, heads: 2, kvHeads: 2 },
    ...{ d: 3, dv: 5, causal: false, window: 9 },
  },
  {
    ...{ what: "rows that see nothing", batch: 2, sequence: 18, total: 18, heads: 1, kvHeads: 1 },
    ...{ d: 2, dv: 2, causal: true, padding: [3, 18] },
  },
  { what: "decode", batch: 2, sequence: 1, total: 6, heads: 3, kvHeads: 1, d: 1, dv: 2, causal: true, padding: [6, 2] },
  { what: "long decode", batch: 1, sequence: 1, total: 300, heads: 3, kvHeads: 1, d: 8, dv: 12, causal: true },
  {
    ...{ what: "decode of several tokens, a window", batch: 2, sequence: 3, total: 401, heads: 6, kvHeads: 2 },
    ...{ d: 7, dv: 5, causal: true, window: 260, padding: [0, 399] },
  },
];
/** Their sums take more rounds than the others', and dk and dv a pass each. */
const wideHeads: Case = {
  ...{ what: "wide heads", batch: 1, sequence: 20, total: 35, heads: 1, kvHeads: 1 },
  ...{ d: 196, dv: 132, causal: true },
};
const scale = 0.7;
const n = (x: Host, i: number): number => Number(x.data[i] ?? 0);

function inputs(c: Case): { q: Host; k: Host; v: Host; mask?: Host; dout: Host } {
  const { batch, sequence, total, heads, kvHeads, d, dv, padding } = c;
  const kept = padding?.flatMap((hidden) => Array.from({ length: total }, (_, j) => (j < hidden ? 0 : 1)));
  return {
    q: uniform(1, [batch, sequence, heads, d]),
    k: uniform(2, [batch, total, kvHeads, d]),
    v: uniform(3, [batch, total, kvHeads, dv]),
    dout: uniform(4, [batch, sequence, heads, dv]),
    ...(kept ? { mask: floats([batch, total], kept) } : {}),
  };
}

type Name = "out" | "lse" | "p" | "dq" | "dk" | "dv";
/** Everything from the definition; gradients by the chain rule through the softmax, row by row. */
function oracle(c: Case): Record<Name, Float64Array> {
  const { batch, sequence, total, heads, kvHeads, d, dv: width, causal, window } = c;
  const { q, k, v, mask, dout } = inputs(c);
  const out = new Float64Array(batch * sequence * heads * width);
  const lse = new Float64Array(batch * heads * sequence);
  const all = new Float64Array(lse.length * total);
  const dq = new Float64Array(q.data.length);
  const dk = new Float64Array(k.data.length);
  const dv = new Float64Array(v.data.length);
  const add = (to: Float64Array, i: number, x: number): void => {
    to[i] = (to[i] ?? 0) + x;
  };
  for (let b = 0; b < batch; b++) {
    for (let h = 0; h < heads; h++) {
      const kv = Math.floor(h / (heads / kvHeads));
      for (let i = 0; i < sequence; i++) {
        const position = total - sequence + i;
        const query = (b * sequence + i) * heads + h;
        const row = (b * heads + h) * sequence + i;
        const key = (j: number): number => (b * total + j) * kvHeads + kv;
        const s = Array.from({ length: total }, (_, j) => {
          const late = causal && j > position;
          const early = window !== undefined && position - j >= window;
          if (late || early || (mask && n(mask, b * total + j) === 0)) return Number.NEGATIVE_INFINITY;
          let dot = 0;
          for (let e = 0; e < d; e++) dot += n(q, query * d + e) * n(k, key(j) * d + e);
          return dot * scale;
        });
        const top = Math.max(...s);
        const sum = top === Number.NEGATIVE_INFINITY ? 0 : s.reduce((t, x) => t + Math.exp(x - top), 0);
        lse[row] = sum === 0 ? Number.NEGATIVE_INFINITY : top + Math.log(sum);
        const p = s.map((x) => (sum === 0 ? 0 : Math.exp(x - top) / sum));
        const dp = p.map((x, j) => {
          all[row * total + j] = x;
          let dot = 0;
          for (let e = 0; e < width; e++) {
            add(out, query * width + e, x * n(v, key(j) * width + e));
            add(dv, key(j) * width + e, x * n(dout, query * width + e));
            dot += n(dout, query * width + e) * n(v, key(j) * width + e);
          }
          return dot;
        });
        const mean = p.reduce((t, x, j) => t + x * (dp[j] ?? 0), 0);
        p.forEach((x, j) => {
          const ds = x * ((dp[j] ?? 0) - mean) * scale;
          for (let e = 0; e < d; e++) {
            add(dq, query * d + e, ds * n(k, key(j) * d + e));
            add(dk, key(j) * d + e, ds * n(q, query * d + e));
          }
        });
      }
    }
  }
  return { out, lse, p: all, dq, dk, dv };
}

/** The largest difference, over the largest expected value; infinite where one is finite and the other not. */
function distance(found: ArrayLike<number> | undefined, expected: Float64Array): number {
  let [error, largest] = [0, 1e-30];
  expected.forEach((y, i) => {
    const x = found?.[i] ?? Number.NaN;
    if (x === y) return;
    if (Number.isFinite(y)) largest = Math.max(largest, Math.abs(y));
    error = Math.max(error, Number.isFinite(x) && Number.isFinite(y) ? Math.abs(x - y) : Number.POSITIVE_INFINITY);
  });
  return error / largest;
}

/**
 * A device that does not zero workgroup memory: no kernel here counts on zeros, and SwiftShader takes ten times as long to compile the
 * tiles with them.
 */
async function bareGpu(): Promise<OwnedGpu> {
  const { create } = await import("webgpu");
  const gpu = create(["enable-dawn-features=allow_unsafe_apis,disable_workgroup_init"]);
  return createGpu(await requestDevice({ gpu }), { idle: 2 ** 24, limits: { maxComputeWorkgroupsPerDimension: 3 } });
}
const bare = hasGpu ? await bareGpu() : undefined;

describe.skipIf(!hasGpu).each([true, false])("attention, software %s", (software) => {
  if (!bare) return;
  const on = bare;
  const kernels = attentionKernels({ ...on, software });

  async function check(c: Case): Promise<void> {
    const { batch, sequence, total, heads, causal, window, dv: width } = c;
    const { q, k, v, mask, dout } = inputs(c);
    const attrs = { causal, scale, ...(window === undefined ? {} : { window }) };
    const expected = oracle(c);
    const f32 = (...shape: number[]) => ({ shape, dtype: "f32" as const });
    const specs = [f32(batch, sequence, heads, width), f32(batch, heads, sequence), f32(batch, heads, sequence, total)];
    const given = mask ? [q, k, v, mask] : [q, k, v];
    const [out, lse, p] = await call(on, kernels.attention, given, specs, { ...attrs, probabilities: true });
    expect(distance(out, expected.out), "out").toBeLessThan(3e-6);
    expect(distance(lse, expected.lse), "lse").toBeLessThan(3e-6);
    expect(distance(p, expected.p), "p").toBeLessThan(3e-6);
    const forward = [floats(specs[0]?.shape ?? [], out ?? []), floats(specs[1]?.shape ?? [], lse ?? [])];
    const all = [...given, ...forward, dout];
    const grads = await call(on, kernels.attentionGrad, all, [q, k, v], { ...attrs, mask: mask !== undefined });
    for (const [i, name] of (["dq", "dk", "dv"] as const).entries()) {
      expect(distance(grads[i], expected[name]), name).toBeLessThan(1e-5);
    }
  }

  it.each(cases.map((c) => [c.what, c] as const))("%s", async (_, c) => check(c));
  it("wide heads", async () => check(wideHeads), 60_000);

  it("gives keys that no query sees zero gradients, also without queries", async () => {
    const f32 = (...shape: number[]) => ({ shape, dtype: "f32" as const });
    const [q, out, lse] = [floats([1, 0, 2, 5], []), floats([1, 0, 2, 7], []), floats([1, 2, 0], [])];
    const [k, v] = [uniform(1, [1, 6, 2, 5]), uniform(2, [1, 6, 2, 7])];
    const attrs = { causal: true, scale, mask: false };
    const found = await call(
      on,
      kernels.attentionGrad,
      [q, k, v, out, lse, out],
      [q, k, v].map((x) => f32(...x.shape)),
      attrs,
    );
    expect(found.map((x) => Array.from(x))).toEqual([[], new Array(60).fill(0), new Array(84).fill(0)]);
  });

  it.each([2, 18])("brings out NaN instead of hiding it, %i queries", async (queries) => {
    const f32 = (...shape: number[]) => ({ shape, dtype: "f32" as const });
    const q = uniform(1, [1, queries, 1, 5]);
    q.data[0] = Number.NaN;
    const given = [q, uniform(2, [1, queries, 1, 5]), uniform(3, [1, queries, 1, 7])];
    const specs = [f32(1, queries, 1, 7), f32(1, 1, queries)];
    const [out, lse] = await call(on, kernels.attention, given, specs, { causal: false, scale });
    expect(Array.from(lse ?? []).map(Number.isNaN)).toEqual(Array.from({ length: queries }, (_, i) => i === 0));
    expect(Array.from(out ?? []).map(Number.isNaN)).toEqual(Array.from({ length: 7 * queries }, (_, i) => i < 7));
  });

  it("refuses heads that do not fit registers", () => {
    const spec = (width: number) => ({ shape: [1, 1, 1, width], dtype: "f32" as const });
    expect(kernels.attention.unsupported?.([spec(300), spec(300), spec(4)], {})).toBe(
      "heads of 300 channels are too wide, at most 256",
    );
    expect(kernels.attentionGrad.unsupported?.([spec(256), spec(256), spec(256)], {})).toBeUndefined();
  });
});
