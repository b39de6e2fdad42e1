// Weights of few bits against codes taken apart by hand: widths that suit every fetch and none, groups, zeros, both
// kernels of products, ragged blocks, split buffers.
import { describe, expect, it } from "vitest";
import { call, type Host, hasGpu, host, ints, testGpu, uniform } from "../call.test-util.ts";
import { numberOf, worst } from "./products.test-util.ts";
import { quantizedKernels } from "./quantized.ts";

type Name = "int8" | "int4" | "mxfp4";
const f32 = (...shape: number[]) => ({ shape, dtype: "f32" as const });
const bytes = (seed: number, shape: readonly number[], low: number, high: number): Host =>
  host(
    Uint8Array.from(uniform(seed, shape).data, (x) => Math.floor(low + ((x + 1) / 2) * (high - low))),
    shape,
    "u8",
  );

interface Weights {
  readonly codes: Host;
  readonly scales: Host;
  readonly zeros?: Host;
  /** [lines, inner] as numbers. */
  readonly values: Float64Array;
}
function draw(format: Name, lead: readonly number[], inner: number, group: number, withZeros: boolean): Weights {
  const lines = lead.reduce((n, d) => n * d, 1);
  const groups = inner / group;
  const codes = bytes(1, [...lead, format === "int8" ? inner : inner / 2], 0, 256);
  const scales = format === "mxfp4" ? bytes(2, [...lead, groups], 120, 130) : uniform(2, [...lead, groups]);
  const zeros = withZeros ? bytes(3, [...lead, groups], 0, format === "int8" ? 256 : 16) : undefined;
  const signed = (byte: number): number => (byte > 127 ? byte - 256 : byte);
  const values = Float64Array.from({ length: lines * inner }, (_, at) => {
    const [line, i] = [Math.floor(at / inner), at % inner];
    const g = line * groups + Math.floor(i / group);
    if (format === "int8") {
      return (signed(Number(codes.data[at])) - (zeros ? signed(Number(zeros.data[g])) : 0)) * numberOf(scales, g);
    }
    const byte = Number(codes.data[line * (inner / 2) + (i >> 1)]);
    const nibble = i % 2 === 0 ? byte & 15 : byte >> 4;
    if (format === "int4") return (nibble - (zeros ? Number(zeros.data[g]) : 8)) * numberOf(scales, g);
    const magnitude = [0, 0.5, 1, 1.5, 2, 3, 4, 6][nibble & 7] ?? 0;
    return (nibble > 7 ? -magnitude : magnitude) * 2 ** (Number(scales.data[g]) - 127);
  });
  return zeros ? { codes, scales, zeros, values } : { codes, scales, values };
}
const inputsOf = ({ codes, scales }: Weights): Host[] => [codes, scales];
const zerosOf = ({ zeros }: Weights): Host[] => (zeros ? [zeros] : []);

// [format, inner, group, zeros]: 128-bit fetches, 64, 32, 16, and element by element.
const cases = [
  ["int8", 1024, 32, true],
  ["int8", 520, 520, false],
  ["int8", 36, 12, true],
  ["int8", 7, 7, false],
  ["int4", 512, 64, true],
  ["int4", 72, 8, false],
  ["int4", 12, 4, true],
  ["int4", 18, 3, true],
  ["mxfp4", 576, 32, false],
  ["mxfp4", 32, 32, false],
] as const;

describe.skipIf(!hasGpu).each([true, false])("quantised weights, software %s", (software) => {
  if (!hasGpu) return;
  const on = testGpu({ maxComputeWorkgroupsPerDimension: 5 });
  const kernels = quantizedKernels({ ...on, software });

  it.each(cases)("%s of %i in groups of %i, zeros %s", async (format, inner, group, zeros) => {
    const attrs = { format, group };
    const out = 5;
    const w = draw(format, [out], inner, group, zeros);
    const [values] = await call(on, kernels.dequantize, [...inputsOf(w), ...zerosOf(w)], [f32(out, inner)], attrs);
    expect(worst(values, w.values)).toBeLessThan(2e-7);
    // One row by the few-row kernel, more by tiles.
    for (const rows of [1, 37]) {
      const x = uniform(5, [rows, inner]);
      const [y] = await call(on, kernels.quantizedLinear, [x, ...inputsOf(w), ...zerosOf(w)], [f32(rows, out)], attrs);
      const expected = new Float64Array(rows * out);
      expected.forEach((_, at) => {
        const [i, j] = [Math.floor(at / out), at % out];
        for (let l = 0; l < inner; l++)
          expected[at] = (expected[at] ?? 0) + numberOf(x, i * inner + l) * (w.values[j * inner + l] ?? 0);
      });
      expect(worst(y, expected)).toBeLessThan(1e-6);
    }
  });

  it.each([
    ["int8", 64, 16, true, 4096],
    ["int4", 36, 12, true, 2048],
    ["mxfp4", 64, 32, false, 4096],
  ] as const)("blocks of rows, %s, whole and split between experts", async (format, inner, group, zeros, limit) => {
    const [experts, out, n] = [9, 24, 14];
    const sizes = [1, 0, 9, 0, 0, 2, 0, 0, 1];
    const w = draw(format, [experts, out], inner, group, zeros);
    const rows = uniform(6, [n, inner]);
    let end = 0;
    const ends = ints(
      [experts],
      sizes.map((size) => {
        end += size;
        return end;
      }),
    );
    const expected = new Float64Array(n * out);
    for (let i = 0; i < end; i++) {
      const e = ends.data.findIndex((last: number) => i < last);
      for (let j = 0; j < out; j++) {
        for (let l = 0; l < inner; l++) {
          const value = w.values[(e * out + j) * inner + l] ?? 0;
          expected[i * out + j] = (expected[i * out + j] ?? 0) + numberOf(rows, i * inner + l) * value;
        }
      }
    }
    // Codes and scales are split at different experts.
    const small = testGpu({ maxStorageBufferBindingSize: limit });
    for (const device of [on, small]) {
      const table = quantizedKernels({ ...device, software });
      const attrs = { format, group };
      const inputs = [rows, ...inputsOf(w), ends, ...zerosOf(w)];
      const [y] = await call(device, table.quantizedGroupedMatmul, inputs, [f32(n, out)], attrs);
      expect(worst(y, expected)).toBeLessThan(1e-6);
    }
  });

  it("a linear layer split between rows of weights, and their values", async () => {
    const [out, inner, group] = [45, 64, 4];
    const w = draw("int8", [out], inner, group, true);
    const x = uniform(7, [3, inner]);
    // 45 rows of 64 codes, of 16 scales and of 16 zeros: two buffers, two, one.
    const small = testGpu({ maxStorageBufferBindingSize: 2048 });
    const { quantizedLinear, dequantize } = quantizedKernels({ ...small, software });
    const inputs = [x, ...inputsOf(w), ...zerosOf(w)];
    const [y] = await call(small, quantizedLinear, inputs, [f32(3, out)], { format: "int8", group });
    const expected = new Float64Array(3 * out);
    expected.forEach((_, at) => {
      const [i, j] = [Math.floor(at / out), at % out];
      for (let l = 0; l < inner; l++) {
        expected[at] = (expected[at] ?? 0) + numberOf(x, i * inner + l) * (w.values[j * inner + l] ?? 0);
      }
    });
    expect(worst(y, expected)).toBeLessThan(1e-6);
    // Values are split at other rows than codes.
    const [values] = await call(small, dequantize, inputs.slice(1), [f32(out, inner)], { format: "int8", group });
    expect(worst(values, w.values)).toBeLessThan(2e-7);
  });
});
