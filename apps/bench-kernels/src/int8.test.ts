// The rounding against its description, and the blocks of q8_0 against a reader of them.
import { toFloat32 } from "@switchyard/models";
import { expect, it } from "vitest";
import { q8 } from "./gguf.ts";
import { groupSize, quantize } from "./int8.ts";

const values = Float32Array.from({ length: 4 * groupSize }, (_, i) => {
  const group = Math.floor(i / groupSize);
  return ([1, 1e-6, 0, 300][group] ?? 0) * Math.sin(1 + i * 1.7);
});
const widened = (scales: Uint16Array): Float32Array =>
  toFloat32(new Uint8Array(scales.slice().buffer), "F16", "scales");

it("keeps every number within half a step of its group", () => {
  const { codes, scales } = quantize(values);
  const steps = widened(scales);
  for (const [i, x] of values.entries()) {
    const step = steps[Math.floor(i / groupSize)] as number;
    // The scale is rounded to a half (11 bits, below 2^-14 to multiples of 2^-24) after the codes are chosen.
    const slack = 127 * Math.max(step * 2 ** -11, 2 ** -25);
    expect(Math.abs((codes[i] as number) * step - x)).toBeLessThanOrEqual(0.5 * step * 1.001 + slack);
  }
  expect(Math.max(...codes.subarray(0, groupSize))).toBe(127);
  expect([...codes.subarray(2 * groupSize, 3 * groupSize)]).toEqual(new Array(groupSize).fill(0));
  expect(steps[2]).toBe(0);
});

it("rounds ties away from zero", () => {
  const group = Float32Array.from({ length: groupSize }, (_, i) => (i === 0 ? 127 : i % 2 ? 2.5 : -2.5));
  const { codes, scales } = quantize(group);
  expect(widened(scales)[0]).toBe(1);
  expect([...codes.subarray(0, 4)]).toEqual([127, 3, -3, 3]);
});

it("refuses numbers that are no whole groups", () => {
  expect(() => quantize(new Float32Array(33))).toThrow("33 numbers, expected a multiple of 32");
});

it("writes a half and 32 codes for each block of q8_0", () => {
  const { codes, scales } = quantize(values);
  const blocks = q8(values);
  expect(blocks.length).toBe((values.length / groupSize) * 34);
  const view = new DataView(blocks.buffer);
  for (const [block, scale] of scales.entries()) {
    expect(view.getUint16(34 * block, true)).toBe(scale);
    for (let i = 0; i < groupSize; i++) expect(view.getInt8(34 * block + 2 + i)).toBe(codes[block * groupSize + i]);
  }
});
