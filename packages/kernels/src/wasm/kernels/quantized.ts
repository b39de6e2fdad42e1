// Weights of few bits: their values, and products that widen them on the way (../../../assembly/quantized.ts). As in matmul.ts, how a block of
// rows is computed depends on its own size alone; activations stay f32.
import type { Kernel, Quantized, Spec } from "@switchyard/core";
import { at, type Device, type Input, lastOf, type Refusal, rowsOf, sizeOf } from "../device.ts";
import type { Block } from "../heap.ts";
import { blocks, FEW_ROWS, MAX_COLUMNS, rowsPerTask } from "./matmul.ts";

/** Lines of weights of a task of few rows. */
const DOT_LINES = 32;
/** Words of a task: a, m, k, b, n, c, and the first line of b among those of all matrices. */
const TASK = 7;

interface Stored {
  readonly codes: Input;
  /** Lines of one matrix, elements of a line, bytes of a line. */
  readonly lines: number;
  readonly length: number;
  readonly bytes: number;
  /** Number of the format, scales, zeros or 0, group, rows, lines, scales of a line: as the wasm kernels take them. */
  readonly kind: number;
  readonly words: readonly number[];
}

/** As in assembly/quantized.ts. */
function kindOf(format: Quantized["format"], zeros: boolean): number {
  switch (format) {
    case "int8":
      return zeros ? 1 : 0;
    case "int4":
      return 2;
    case "mxfp4":
      return 3;
    case "fp8":
      return 4;
    default:
      return format satisfies never;
  }
}

function stored(codes: Input, scales: Input, zeros: Input | undefined, { format, group, rows = 1 }: Quantized): Stored {
  const lines = at(codes.shape, codes.shape.length - 2);
  const bytes = lastOf(codes);
  const length = format === "int8" || format === "fp8" ? bytes : 2 * bytes;
  return {
    codes,
    lines,
    length,
    bytes,
    kind: kindOf(format, zeros !== undefined),
    words: [scales.handle.ptr, zeros?.handle.ptr ?? 0, group, rows, lines, lastOf(scales)],
  };
}

/** Rows from..to of x times matrix e, for each of the list; x, y row-major. */
function multiply(
  device: Device,
  x: number,
  w: Stored,
  y: number,
  list: readonly { readonly from: number; readonly to: number }[],
): void {
  const { lines, length, bytes } = w;
  const [few, many]: [number[], number[]] = [[], []];
  const work = { few: 0, many: 0 };
  list.forEach(({ from, to }, e) => {
    const m = to - from;
    if (m === 0) return;
    const dots = m <= FEW_ROWS;
    const step = dots ? m : rowsPerTask(device, m, lines, list.length);
    const columns = dots ? DOT_LINES : MAX_COLUMNS;
    for (let r = from; r < to; r += step) {
      for (let j = 0; j < lines; j += columns) {
        const line = e * lines + j;
        const b = w.codes.handle.ptr + line * bytes;
        const c = y + (r * lines + j) * 4;
        const task = [x + r * length * 4, Math.min(step, to - r), length, b, Math.min(columns, lines - j), c, line];
        (dots ? few : many).push(...task);
      }
    }
    work[dots ? "few" : "many"] += 2 * m * length * lines;
  });
  const run = (kernel: string, tasks: readonly number[], cost: number): void => {
    if (tasks.length === 0) return;
    const job = [device.table(tasks), length * 4, bytes, lines * 4, w.kind, 0, 0, 0, 0, 0, 1, ...w.words];
    device.launch(kernel, job, tasks.length / TASK, cost);
  };
  run("storedDots", few, work.few / 6);
  run("storedMultiply", many, work.many / 20);
}

/** Refuses layouts of their own, and rows (the first input, where there are any) that are not f32. */
const plain =
  (rows: boolean): Refusal =>
  (inputs: readonly Spec[]) => {
    const packed = inputs.findIndex((x) => x.format !== undefined);
    if (packed >= 0) return `input ${packed} has the format ${inputs[packed]?.format}`;
    return rows && inputs[0]?.dtype !== "f32" ? `input 0 is ${inputs[0]?.dtype}` : undefined;
  };

type Family = "dequantize" | "quantizedLinear" | "quantizedGroupedMatmul";

export function quantizedKernels(device: Device): { readonly [F in Family]: Kernel<Block> } {
  return {
    dequantize: device.kernel(
      "dequantize",
      ([codes, scales, zeros], [spec], attrs: Quantized) => {
        if (!codes || !scales || !spec) return [];
        const y = device.result(spec);
        const w = stored(codes, scales, zeros, attrs);
        if (w.length === 0) return [y];
        const job = [0, 0, w.bytes, 0, w.kind, 0, 0, 0, 0, 0, 1, ...w.words, codes.handle.ptr, w.length, y.ptr];
        device.launch("widenLines", job, rowsOf(codes), sizeOf(spec.shape));
        return [y];
      },
      plain(false),
    ),

    quantizedLinear: device.kernel(
      "quantizedLinear",
      ([x, codes, scales, zeros], [spec], attrs: Quantized) => {
        if (!x || !codes || !scales || !spec) return [];
        const y = device.result(spec);
        const w = stored(codes, scales, zeros, attrs);
        multiply(device, x.handle.ptr, w, y.ptr, [{ from: 0, to: rowsOf(x) }]);
        return [y];
      },
      plain(true),
    ),

    quantizedGroupedMatmul: device.kernel(
      "quantizedGroupedMatmul",
      ([rows, codes, scales, ends, zeros], [spec], attrs: Quantized) => {
        if (!rows || !codes || !scales || !ends || !spec) return [];
        const y = device.result(spec);
        const w = stored(codes, scales, zeros, attrs);
        const total = at(rows.shape, 0);
        const list = blocks(device, ends, total);
        const filled = list.at(-1)?.to ?? 0;
        device.heap.u8().fill(0, y.ptr + filled * w.lines * 4, y.ptr + total * w.lines * 4);
        multiply(device, rows.handle.ptr, w, y.ptr, list);
        return [y];
      },
      plain(true),
    ),
  };
}
