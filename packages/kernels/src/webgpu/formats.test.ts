// Conversions on the host, against the reference backend's and against decoding by hand.
import { engine } from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import { expect, it } from "vitest";
import { decodeData, encodeData } from "./formats.ts";

const bits = (data: Float64Array, dtype: "f16" | "bf16"): Uint16Array =>
  new Uint16Array(encodeData(data, dtype).buffer);

function half(code: number): number {
  const sign = code & 0x8000 ? -1 : 1;
  const exponent = (code >> 10) & 31;
  const fraction = code & 1023;
  if (exponent === 31) return fraction ? Number.NaN : sign * Number.POSITIVE_INFINITY;
  return sign * (exponent === 0 ? fraction * 2 ** -24 : (1 + fraction / 1024) * 2 ** (exponent - 15));
}

it("every half that is a number survives f16", () => {
  const codes = Uint16Array.from({ length: 65_536 }, (_, i) => i).filter((code) => !Number.isNaN(half(code)));
  expect([...bits(Float64Array.from(codes, half), "f16")]).toEqual([...codes]);
});

it("between two halves the nearer one is taken, and of two equally near the even one", () => {
  for (const code of [0, 1, 2, 3, 1022, 1023, 1024, 1025, 0x3bff, 0x3c00, 0x7bfe]) {
    const [low, high] = [half(code), half(code + 1)];
    const quarter = (high - low) / 4;
    const even = code % 2 === 0 ? code : code + 1;
    expect([...bits(Float64Array.of(low + quarter, low + 2 * quarter, low + 3 * quarter), "f16")]).toEqual([
      code,
      even,
      code + 1,
    ]);
  }
  expect([...bits(Float64Array.of(65_519.99, 65_520, -1e9, Number.NaN), "f16")]).toEqual([
    0x7bff, 0x7c00, 0xfc00, 0x7e00,
  ]);
});

it.each(["f16", "bf16"] as const)("%s agrees with the reference backend on many magnitudes", async (dtype) => {
  const data = Float64Array.from({ length: 4000 }, (_, i) => Math.sin(i * 12.9898) * 2 ** ((i % 60) - 30));
  const reference = engine(cpu()).tensor(data, [4000], dtype);
  expect([...bits(data, dtype)]).toEqual([...(await reference.data())]);
});

it("bf16 keeps infinities and NaN", () => {
  const found = bits(Float64Array.of(Number.POSITIVE_INFINITY, -1 / 0, Number.NaN, 3.4e38), "bf16");
  expect([...found]).toEqual([0x7f80, 0xff80, 0x7fc0, 0x7f80]);
});

it("views of larger arrays are taken at their offset", () => {
  const whole = Float32Array.of(1, 2, 3, 4);
  const bytes = encodeData(whole.subarray(1, 3), "f32");
  expect([...decodeData(bytes.slice(), "f32")]).toEqual([2, 3]);
});
