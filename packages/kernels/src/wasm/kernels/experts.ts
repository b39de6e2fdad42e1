// The Mixture-of-Experts kernels: dispatch, combination, and whole SwiGLU experts in a few passes.
import type { Kernel } from "@switchyard/core";
import { at, type Device, elementBytes, type Input, lastOf, only, rowsOf, sizeOf } from "../device.ts";
import type { Block } from "../heap.ts";
import { FEW_ROWS, type Job, kindOf, MAX_COLUMNS, multiply, rowsPerTask, runTasks } from "./matmul.ts";

/** Hidden units of a task of the packed SwiGLU kernel, its gate and up columns being one block; of a unit of the one of dot products. */
const PACKED_UNITS = MAX_COLUMNS / 2;
const DOT_UNITS = 16;

/** Stable counting sort of the slots of ids [t, k]; the results are addresses. */
function dispatch(
  device: Device,
  ids: Input,
  count: number,
  bound: number,
  to: Readonly<Record<"rows" | "slots" | "ends", number>>,
): void {
  const m = sizeOf(ids.shape);
  const job = [ids.handle.ptr, to.ends, to.rows, to.slots, m, count, bound, lastOf(ids)];
  device.launch("dispatch", job, 1, 0);
}

/** Units own tokens, and each looks through all slots: few units. */
function tokenBlock(device: Device, tokens: number): number {
  return Math.max(1, Math.ceil(tokens / (4 * device.threads)));
}

type Primitive = "blockEnds";

export function expertKernels(
  device: Device,
): Readonly<Record<string, Kernel<Block>>> & { readonly [P in Primitive]: Kernel<Block> } {
  const combine = (out: number, weights: Input, slots: number, bound: number, y: number, n: number): void => {
    const [tokens, k] = [rowsOf(weights), lastOf(weights)];
    const block = tokenBlock(device, tokens);
    const job = [out, weights.handle.ptr, slots, y, n, k, bound, tokens, block, 0, 0];
    device.launch("combineRows", job, Math.ceil(tokens / block), bound * n * 0.5);
  };

  return {
    blockEnds: device.kernel(
      "blockEnds",
      ([ids], [spec], { count }: { count: number }) => {
        if (!ids || !spec) return [];
        const ends = device.result(spec);
        device.launch("blockEnds", [ids.handle.ptr, ends.ptr, 0, 0, sizeOf(ids.shape), count, 0, 1], 1, 0);
        return [ends];
      },
      only("i"),
    ),

    dispatch: device.kernel(
      "dispatch",
      ([ids], specs, { count, bound }: { count: number; bound: number }) => {
        if (!ids) return [];
        const results = specs.map((spec) => device.result(spec));
        const [rows, slots, ends] = results.map((y) => y.ptr) as [number, number, number];
        dispatch(device, ids, count, bound, { rows, slots, ends });
        return results;
      },
      only("i"),
    ),

    combineRows: device.kernel(
      "combineRows",
      ([out, weights, slots], [spec]) => {
        if (!out || !weights || !slots || !spec) return [];
        const y = device.result(spec);
        combine(out.handle.ptr, weights, slots.handle.ptr, at(out.shape, 0), y.ptr, lastOf(out));
        return [y];
      },
      only("ffi"),
    ),

    combineRowsGrad: device.kernel(
      "combineRowsGrad",
      ([out, weights, slots, dy], specs) => {
        if (!out || !weights || !slots || !dy) return [];
        const results = specs.map((spec) => device.result(spec));
        const [bound, n] = [at(out.shape, 0), lastOf(out)];
        const [tokens, k] = [rowsOf(weights), lastOf(weights)];
        const block = tokenBlock(device, tokens);
        const pointers = [out, weights, slots, dy].map((x) => x.handle.ptr);
        const job = [...pointers, n, k, bound, tokens, block, ...results.map((y) => y.ptr)];
        device.launch("combineRowsGrad", job, Math.ceil(tokens / block), bound * n);
        return results;
      },
      only("ffif"),
    ),

    moeExperts: device.kernel(
      "moeExperts",
      ([hidden, gateUp, down, ids, weights], [spec], { bound = sizeOf(ids?.shape ?? []) }: { bound?: number }) => {
        if (!hidden || !gateUp || !down || !ids || !weights || !spec) return [];
        const y = device.result(spec);
        const [count, units, width] = [at(gateUp.shape, 0), at(gateUp.shape, 1) / 2, lastOf(hidden)];
        const list = device.temporary((2 * bound + count) * 4).ptr;
        const [rows, slots, ends] = [list, list + bound * 4, list + 2 * bound * 4];
        dispatch(device, ids, count, bound, { rows, slots, ends });

        // Blocks of rows, one per expert that has any. inner [bound, units] = silu(gates) * ups, out [bound, width].
        const closed = Array.from(device.heap.i32().subarray(ends / 4, ends / 4 + count));
        const blocks = closed
          .map((end, e) => ({ e, from: closed[e - 1] ?? 0, m: end - (closed[e - 1] ?? 0) }))
          .filter(({ m }) => m > 0);
        const inner = device.temporary(bound * units * 4).ptr;
        const out = device.temporary(bound * width * 4).ptr;
        const [lineG, lineD] = [width * elementBytes(gateUp.dtype), units * elementBytes(down.dtype)];
        const job: Job = {
          lda: width * 4,
          ldb: lineG,
          ldc: units * 4,
          kind: kindOf(gateUp),
          gathered: hidden.handle.ptr,
          half: units * lineG,
        };
        const [few, many]: [number[], number[]] = [[], []];
        let flops = 0;
        for (const { e, from, m } of blocks) {
          const w = gateUp.handle.ptr + 2 * e * units * lineG;
          const [a, c] = [rows + from * 4, inner + from * units * 4];
          if (m <= FEW_ROWS) few.push(a, m, width, w, units, c, 0);
          else {
            const step = rowsPerTask(device, m, 2 * units, blocks.length);
            for (let r = 0; r < m; r += step) {
              for (let j = 0; j < units; j += PACKED_UNITS) {
                const [own, columns] = [Math.min(step, m - r), Math.min(PACKED_UNITS, units - j)];
                many.push(a + r * 4, own, width, w + j * lineG, columns, c + (r * units + j) * 4, 0);
              }
            }
          }
          flops += 4 * m * width * units;
        }
        runTasks(device, "dotsSwiglu", few, { ...job, split: { columns: units, part: DOT_UNITS } }, flops / 8);
        runTasks(device, "multiplySwiglu", many, job, flops / 30);
        multiply(
          device,
          blocks.map(({ e, from, m }) => ({
            a: inner + from * units * 4,
            b: down.handle.ptr + e * width * lineD,
            c: out + from * width * 4,
            m,
            k: units,
          })),
          {
            n: width,
            lda: units * 4,
            ldb: lineD,
            ldc: width * 4,
            transposedA: false,
            columnsB: false,
            kindB: kindOf(down),
            bias: 0,
          },
        );
        combine(out, weights, slots, bound, y.ptr, width);
        return [y];
      },
      only("fwwif"),
    ),
  };
}
