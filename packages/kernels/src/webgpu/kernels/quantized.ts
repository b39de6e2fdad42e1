// Weights of few bits: their values, and products that widen codes while loading them. Products are those of matmul.ts
// and experts.ts, with another loader (operands.ts).
import type { Kernel, Spec, Quantized as Stored } from "@switchyard/core";
import type { Gpu, WebgpuHandle } from "../device.ts";
import { type Program, program } from "../program.ts";
import { recordGrouped } from "./experts.ts";
import { cuts, type Matrix, operandOf, partAt, quantizedReads, recordLinear } from "./matmul.ts";
import { keyOf, type Operand, operandParams, operandReads, operandText, type QuantizedFormat } from "./operands.ts";
import { at, type Input, lastOf, type Refusal } from "./parts.ts";

/** The formats that are not refused. */
interface Quantized {
  readonly format: QuantizedFormat;
  readonly group: number;
}

/** Stored weights [..., lines, length]. */
function weightsOf(codes: Input, scales: Input, zeros: Input | undefined, { format, group }: Quantized): Matrix {
  const length = lastOf(codes) * (format === "int8" ? 1 : 2);
  const groups = lastOf(scales);
  const lines = at(codes.shape, codes.shape.length - 2);
  return {
    handle: codes.handle,
    layout: "k",
    format,
    length,
    lines,
    lineBytes: lastOf(codes),
    quantized: {
      scales: { handle: scales.handle, lineBytes: groups * (format === "mxfp4" ? 1 : 4) },
      ...(zeros ? { zeros: { handle: zeros.handle, lineBytes: groups } } : {}),
      group,
    },
  };
}

/** An invocation per fetch of four, or per element where rows of codes do not end on whole words. */
const widen = (() => {
  const known = new Map<string, Program>();
  return (x: Operand): Program => {
    const key = `dequantize ${keyOf(x)}`;
    let made = known.get(key);
    if (!made) {
      const four = x.step > 1;
      const value = four ? "b_four(line + p.code_line, i, p.b_length)" : "b_one(line + p.code_line, i)";
      made = program({
        key,
        reads: operandReads(x),
        writes: { y: four ? "vec4<f32>" : "f32" },
        params: { ...operandParams(x), total: "u32", code_line: "u32", y_line: "u32" },
        lanes: 64,
        code: () => `${operandText(x)}
fn main(group: u32, lane: u32) {
  let item = group * 64u + lane;
  if (item >= p.total) { return; }
  let each = p.b_length${four ? " / 4u" : ""};
  let line = item / each;
  let i = item % each${four ? " * 4u" : ""};
  y[(line + p.y_line) * each + item % each] = ${value};
}`,
      });
      known.set(key, made);
    }
    return made;
  };
})();

type Family = "dequantize" | "quantizedLinear" | "quantizedGroupedMatmul";

const dtypesOf =
  (codes: number): Refusal =>
  (inputs: readonly Spec[], { format }: Stored) => {
    if (format === "fp8") return "weights in fp8 have no kernel yet";
    const packed = inputs.findIndex((x) => x.format !== undefined);
    if (packed >= 0) return `input ${packed} has the format ${inputs[packed]?.format}`;
    if (codes > 0 && inputs[0]?.dtype !== "f32") return `input 0 is ${inputs[0]?.dtype}`;
    return undefined;
  };

export function quantizedKernels(gpu: Gpu): { readonly [F in Family]: Kernel<WebgpuHandle> } {
  const dequantize: Kernel<WebgpuHandle> = ([codes, scales, zeros], [result], attrs: Quantized) => {
    if (!codes || !scales || !result) return [];
    const y = gpu.alloc(result);
    const w = weightsOf(codes, scales, zeros, attrs);
    const lines = codes.handle.bytes / Math.max(w.lineBytes, 1);
    const { quantized } = w;
    if (!quantized || lines * w.length === 0) return [y];
    const operand = operandOf(gpu, "b", w, 4, true);
    const target = { handle: y, lineBytes: 4 * w.length };
    const besides = quantized.zeros ? [quantized.zeros] : [];
    for (const { start, end } of cuts(lines, [target, w, quantized.scales, ...besides])) {
      const [from, to] = [partAt(w, start), partAt(target, start)];
      const { reads, params } = quantizedReads(w, "b", start, from.first);
      const total = ((end - start) * w.length) / (operand.step > 1 ? 4 : 1);
      gpu.run(
        widen(operand),
        { b: from.part, ...reads },
        { y: to.part },
        { ...params, b_length: w.length, total, code_line: start - from.first, y_line: start - to.first },
        Math.ceil(total / 64),
      );
    }
    return [y];
  };

  const quantizedLinear: Kernel<WebgpuHandle> = ([x, codes, scales, zeros], [result], attrs: Quantized) => {
    if (!x || !codes || !scales || !result) return [];
    const y = gpu.alloc(result);
    recordLinear(gpu, x, weightsOf(codes, scales, zeros, attrs), lastOf(result), y);
    return [y];
  };

  const quantizedGroupedMatmul: Kernel<WebgpuHandle> = (
    [rows, codes, scales, ends, zeros],
    [result],
    attrs: Quantized,
  ) => {
    if (!rows || !codes || !scales || !ends || !result) return [];
    const y = gpu.alloc(result);
    recordGrouped(gpu, rows, weightsOf(codes, scales, zeros, attrs), ends, lastOf(result), y);
    return [y];
  };

  return {
    dequantize: Object.assign(dequantize, { unsupported: dtypesOf(0) }),
    quantizedLinear: Object.assign(quantizedLinear, { unsupported: dtypesOf(1) }),
    quantizedGroupedMatmul: Object.assign(quantizedGroupedMatmul, { unsupported: dtypesOf(1) }),
  };
}
