// The Mixture-of-Experts kernels: dispatch, combination, and whole SwiGLU experts in a few passes.
import type { Kernel } from "@switchyard/core";
import { at, type Device, elementBytes, type Input, lastOf, only, rowsOf, sizeOf } from "../device.ts";
import type { Block } from "../heap.ts";
import { FEW_ROWS, kindOf, MAX_COLUMNS, multiply, PANEL, rowsPerTask } from "./matmul.ts";

/** Hidden units of a task of the SwiGLU kernels: the gate and up columns of a packed block; rows of dot products. */
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

        // Blocks of rows, one per expert that has any. `inner` holds silu(gate) * up: rows for experts with few rows, panels for the others.
        const closed = Array.from(device.heap.i32().subarray(ends / 4, ends / 4 + count));
        const blocks = closed
          .map((end, e) => ({ e, from: e === 0 ? 0 : at(closed, e - 1), m: end - (e === 0 ? 0 : at(closed, e - 1)) }))
          .filter(({ m }) => m > 0)
          .map((b) => ({ ...b, few: b.m <= FEW_ROWS, inner: 0 }));
        const panelRows = (m: number): number => Math.ceil(m / PANEL) * PANEL;
        let address = device.temporary(blocks.reduce((n, b) => n + panelRows(b.m), 0) * units * 4).ptr;
        for (const block of blocks) {
          block.inner = address;
          address += panelRows(block.m) * units * 4;
        }
        const [few, many] = [blocks.filter((b) => b.few), blocks.filter((b) => !b.few)];
        const [lineG, lineD] = [width * elementBytes(gateUp.dtype), units * elementBytes(down.dtype)];
        const expertG = 2 * units * lineG;
        const half = units * lineG;
        const flops = (b: readonly { readonly m: number }[]): number =>
          b.reduce((n, { m }) => n + 4 * m * width * units, 0);

        if (few.length > 0) {
          const tasks: number[] = [];
          for (const { e, from, m, inner } of few) {
            for (let j = 0; j < units; j += DOT_UNITS) {
              const w = gateUp.handle.ptr + e * expertG + j * lineG;
              tasks.push(rows + from * 4, m, width, w, Math.min(DOT_UNITS, units - j), inner + 4 * j, 0);
            }
          }
          const job = [device.table(tasks), lineG, units * 4, kindOf(gateUp), 0, half, width * 4, hidden.handle.ptr];
          device.launch("dotsSwiglu", job, tasks.length / 7, flops(few) / 10);
        }
        if (many.length > 0) {
          const packed = packGathered(device, many, { rows, hidden, width });
          const tasks: number[] = [];
          many.forEach(({ e, m, inner }, i) => {
            const step = rowsPerTask(device, m, 2 * units, many.length);
            for (let r = 0; r < m; r += step) {
              for (let j = 0; j < units; j += PACKED_UNITS) {
                const a = at(packed, i) + r * width * 4;
                const w = gateUp.handle.ptr + e * expertG + j * lineG;
                const c = inner + r * units * 4 + j * PANEL * 4;
                tasks.push(a, Math.min(step, m - r), width, w, Math.min(PACKED_UNITS, units - j), c, 0);
              }
            }
          });
          const job = [device.table(tasks), lineG, units * PANEL * 4, kindOf(gateUp), 0, half, 0, 0];
          device.launch("multiplySwiglu", job, tasks.length / 7, flops(many) / 30);
        }

        const out = device.temporary(bound * width * 4).ptr;
        const products = (b: typeof blocks) =>
          b.map(({ e, from, m, inner }) => ({
            a: inner,
            b: down.handle.ptr + e * width * lineD,
            c: out + from * width * 4,
            m,
            k: units,
          }));
        const layout = {
          n: width,
          lda: units * 4,
          ldb: lineD,
          ldc: width * 4,
          transposedA: false,
          columnsB: false,
          kindB: kindOf(down),
          bias: 0,
        };
        multiply(device, products(few), layout);
        multiply(device, products(many), { ...layout, packedA: true });
        combine(out, weights, slots, bound, y.ptr, width);
        return [y];
      },
      only("fwwif"),
    ),
  };
}

/** Packs the rows of each block, named by their ids; gives the address of each block's first panel. */
function packGathered(
  device: Device,
  blocks: readonly { readonly from: number; readonly m: number }[],
  { rows, hidden, width }: { readonly rows: number; readonly hidden: Input; readonly width: number },
): number[] {
  const floats = blocks.reduce((n, { m }) => n + Math.ceil(m / PANEL) * PANEL * width, 0);
  let to = device.temporary(floats * 4).ptr;
  const panels: number[] = [];
  const starts = blocks.map(({ from, m }) => {
    const start = to;
    for (let r = 0; r < m; r += PANEL) {
      panels.push(rows + (from + r) * 4, Math.min(PANEL, m - r), width, to);
      to += PANEL * width * 4;
    }
    return start;
  });
  device.launch("packGathered", [device.table(panels), hidden.handle.ptr, width * 4], panels.length / 4, floats / 2);
  return starts;
}
