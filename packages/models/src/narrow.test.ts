import { describe, expect, it } from "vitest";
import { fromFloat32 } from "./narrow.ts";
import { toFloat32 } from "./safetensors.ts";

/** Every value that 16 bits can hold, and the midpoints between neighbours. */
const everyBit = Uint16Array.from({ length: 65_536 }, (_, i) => i);

describe("fromFloat32", () => {
  it.each(["BF16", "F16"])("keeps every %s value and rounds midpoints to even", (dtype) => {
    const values = toFloat32(new Uint8Array(everyBit.buffer), dtype, "x");
    const back = toFloat32(fromFloat32(values, dtype), dtype, "x");
    expect(back.every((x, i) => Object.is(x, values[i]))).toBe(true);
    // Bits grow with the magnitude: neighbours are bits apart by one. F16 sums of neighbours are exact in f32.
    for (let i = 0; i < 65_535; i++) {
      const [a, b] = [values[i] as number, values[i + 1] as number];
      if (!Number.isFinite(a) || !Number.isFinite(b)) continue;
      const middle = (a + b) / 2;
      if (Math.fround(middle) !== middle) continue;
      const bits = new Uint16Array(fromFloat32(Float32Array.of(middle), dtype).buffer)[0];
      if (bits !== (i % 2 === 0 ? i : i + 1)) expect([dtype, i, bits]).toEqual([dtype, i, i % 2 === 0 ? i : i + 1]);
    }
  });

  it("knows infinity and what is too large for a half, and copies nothing of f32", () => {
    const edges = Float32Array.of(
      65_504,
      65_519.99,
      65_520,
      -1e30,
      Number.POSITIVE_INFINITY,
      2 ** -25,
      2 ** -24 * 0.75,
    );
    expect([...toFloat32(fromFloat32(edges, "F16"), "F16", "x")]).toEqual([
      65_504,
      65_504,
      Number.POSITIVE_INFINITY,
      Number.NEGATIVE_INFINITY,
      Number.POSITIVE_INFINITY,
      0,
      2 ** -24,
    ]);
    expect(fromFloat32(edges, "F32").buffer).toBe(edges.buffer);
    expect(() => fromFloat32(edges, "I64")).toThrow(/cannot store floats as I64/);
  });
});
