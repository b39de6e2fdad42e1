// Bit patterns of 16-bit floats against known ones, and each pattern against its own value.
import { describe, expect, it } from "vitest";
import { fromBits, toBits } from "./half.ts";

describe("16-bit floats", () => {
  it.each([
    ["f16", 1, 0x3c00],
    ["f16", -2, 0xc000],
    ["f16", 65504, 0x7bff],
    ["f16", 65519.99, 0x7bff],
    ["f16", 65520, 0x7c00],
    ["f16", 2 ** -14, 0x0400],
    ["f16", 2 ** -24, 0x0001],
    ["f16", 2 ** -25, 0x0000],
    ["f16", 1.5 * 2 ** -25, 0x0001],
    ["f16", 1 + 2 ** -11, 0x3c00],
    ["f16", 1 + 3 * 2 ** -11, 0x3c02],
    ["f16", 1 / 3, 0x3555],
    ["bf16", 1, 0x3f80],
    ["bf16", 1 + 2 ** -8, 0x3f80],
    ["bf16", 1 + 3 * 2 ** -8, 0x3f82],
    ["bf16", 3.4e38, 0x7f80],
    ["bf16", -(2 ** -126), 0x8080],
    ["bf16", -0, 0x8000],
    ["bf16", Number.NEGATIVE_INFINITY, 0xff80],
  ] as const)("%s of %f", (dtype, x, bits) => {
    expect(toBits(x, dtype).toString(16)).toBe(bits.toString(16));
  });

  it.each(["f16", "bf16"] as const)("every pattern of %s comes back", (dtype) => {
    const wrong: number[] = [];
    for (let bits = 0; bits < 2 ** 16; bits++) {
      const value = fromBits(bits, dtype);
      const again = toBits(value, dtype);
      // There are many NaN, and one is written.
      if (Number.isNaN(value) ? !Number.isNaN(fromBits(again, dtype)) : again !== bits) wrong.push(bits);
    }
    expect(wrong).toEqual([]);
  });
});
