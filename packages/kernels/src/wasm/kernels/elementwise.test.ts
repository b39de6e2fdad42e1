// Precision of the polynomials in units in the last place, conversions bit by bit, broadcasting in many dimensions, results in place.
import type { Spec, TypedArray } from "@switchyard/core";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { type WasmBackend, wasm } from "../backend.ts";
import { call, f32, floats, type Host, integers, size, ulps, uniform, worst } from "../call.test-util.ts";

/** erf in float64: the series near 0, the continued fraction of erfc beyond. */
function erf(x: number): number {
  const a = Math.abs(x);
  if (a < 2.5) {
    let term = x;
    let sum = x;
    for (let n = 1; n < 80; n++) {
      term *= -(x * x) / n;
      sum += term / (2 * n + 1);
    }
    return (2 / Math.sqrt(Math.PI)) * sum;
  }
  if (a > 6) return Math.sign(x);
  let fraction = 0;
  for (let n = 60; n > 0; n--) fraction = n / 2 / (a + fraction);
  return Math.sign(x) * (1 - Math.exp(-a * a) / Math.sqrt(Math.PI) / (a + fraction));
}

const grid = (low: number, high: number, n: number): Host =>
  floats(
    Float32Array.from({ length: n }, (_, i) => low + ((high - low) * i) / (n - 1)),
    n,
  );
/** Every magnitude: 2^-149 to 2^127, both signs. */
const everyMagnitude = floats(
  Float32Array.from({ length: 5_540 }, (_, i) => (i % 2 ? -1 : 1) * 2 ** (-149 + i / 20) * (1 + (i % 7) / 8)),
  5_540,
);

describe.each(["relaxed", "plain"] as const)("elementwise, %s", (variant) => {
  let backend: WasmBackend;
  beforeAll(async () => {
    backend = await wasm({ threads: 1, variant });
  });
  afterAll(() => backend.dispose());

  const table: readonly [string, (x: number) => number, Host, number][] = [
    ["exp", Math.exp, grid(-104, 88.8, 40_001), 1.5],
    ["exp", Math.exp, grid(-1, 1, 20_001), 1.5],
    ["log", Math.log, { ...everyMagnitude, data: Float32Array.from(everyMagnitude.data, Math.abs) }, 1.5],
    ["log", Math.log, grid(0.5, 2, 20_001), 1.5],
    ["tanh", Math.tanh, grid(-10, 10, 40_001), 2],
    ["tanh", Math.tanh, everyMagnitude, 2],
    ["erf", erf, grid(-6, 6, 40_001), 2],
    ["erf", erf, everyMagnitude, 2],
    ["recip", (x) => 1 / x, everyMagnitude, 0.51],
    ["sqrt", Math.sqrt, grid(0, 100, 5_001), 0.51],
    ["sigmoid", (x) => 1 / (1 + Math.exp(-x)), grid(-80, 80, 20_001), 3],
  ];
  it.each(table)("%s", (name, exact, x, most) => {
    const [y] = call(backend, name, [x], [f32(...x.shape)]);
    let error = 0;
    let where = 0;
    x.data.forEach((value, i) => {
      const e = ulps(Number(y?.[i]), exact(value));
      if (!(e <= error)) [error, where] = [e, value];
    });
    expect(error, `at ${where}`).toBeLessThan(most);
  });

  it("special values", () => {
    const special = [Number.NaN, Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY, 0, -0, 1e-45, -1, 200, -200];
    const x = floats(special, special.length);
    for (const [name, f] of [
      ["exp", Math.exp],
      ["log", Math.log],
      ["tanh", Math.tanh],
      ["erf", (v: number) => (Number.isNaN(v) ? v : erf(v))],
      ["recip", (v: number) => 1 / v],
      ["floor", Math.floor],
    ] as const) {
      const [y] = call(backend, name, [x], [f32(special.length)]);
      special.forEach((_, i) => {
        expect(ulps(Number(y?.[i]), f(Number(x.data[i]))), `${name}(${special[i]}) = ${y?.[i]}`).toBeLessThan(2);
      });
    }
  });

  it("f16 to f32, every pattern", () => {
    const bits = Uint16Array.from({ length: 65_536 }, (_, i) => i);
    const [y] = call(backend, "cast", [{ shape: [65_536], dtype: "f16", data: bits }], [f32(65_536)], { dtype: "f32" });
    bits.forEach((h) => {
      const exponent = (h >> 10) & 31;
      const fraction = (h & 1023) / 1024;
      const magnitude =
        exponent === 31
          ? fraction
            ? Number.NaN
            : Number.POSITIVE_INFINITY
          : exponent === 0
            ? fraction * 2 ** -14
            : (1 + fraction) * 2 ** (exponent - 15);
      const value = h & 0x8000 ? -magnitude : magnitude;
      if (!Object.is(y?.[h], value)) throw new Error(`${h.toString(16)}: ${y?.[h]}, expected ${value}`);
    });
    // And back: every finite pattern survives.
    const finite = bits.filter((h) => ((h >> 10) & 31) !== 31);
    const numbers = floats(
      finite.map((_, i) => i).length ? Float32Array.from(finite, (h) => Number(y?.[h])) : [],
      finite.length,
    );
    const spec: Spec = { shape: [finite.length], dtype: "f16" };
    expect(call(backend, "cast", [numbers], [spec], { dtype: "f16" })[0]).toEqual(finite);
  });

  it("rounds to f16 and bf16 to nearest, ties to even", () => {
    const x = floats(
      [
        1 + 2 ** -11,
        1 + 3 * 2 ** -11,
        65_519,
        65_520,
        2 ** -25,
        3 * 2 ** -26,
        -1e9,
        Number.NaN,
        1 + 2 ** -8,
        1 + 3 * 2 ** -8,
        3.39e38,
        3.4e38,
      ],
      12,
    );
    const [half] = call(backend, "cast", [x], [{ shape: [12], dtype: "f16" }], { dtype: "f16" });
    expect(Array.from(half ?? []).slice(0, 7)).toEqual([0x3c00, 0x3c02, 0x7bff, 0x7c00, 0, 1, 0xfc00]);
    expect(Number(half?.[7]) & 0x7fff).toBeGreaterThan(0x7c00);
    const [brain] = call(backend, "cast", [x], [{ shape: [12], dtype: "bf16" }], { dtype: "bf16" });
    expect(Array.from(brain ?? []).slice(8)).toEqual([0x3f80, 0x3f82, 0x7f7f, 0x7f80]);
    expect(Number(brain?.[7]) & 0x7fff).toBeGreaterThan(0x7f80);
  });

  it("floats to whole numbers saturate, NaN is 0", () => {
    const x = floats([1.9, -1.9, 1e12, -1e12, Number.NaN, 300, -5], 7);
    const [y] = call(backend, "cast", [x], [{ shape: [7], dtype: "i32" }], { dtype: "i32" });
    expect(Array.from(y ?? [])).toEqual([1, -1, 2147483647, -2147483648, 0, 300, -5]);
    const [z] = call(backend, "cast", [x], [{ shape: [7], dtype: "u8" }], { dtype: "u8" });
    expect(Array.from(z ?? [])).toEqual([1, 0, 255, 0, 0, 255, 0]);
  });

  it("broadcasts in five dimensions", () => {
    const shapes = [
      [3, 1, 5, 1, 7],
      [2, 5, 6, 1],
    ] as const;
    const result = [3, 2, 5, 6, 7];
    const at = (x: Host, index: readonly number[]): number => {
      const skip = index.length - x.shape.length;
      return Number(x.data[x.shape.reduce((o, d, i) => o * d + (d === 1 ? 0 : (index[i + skip] ?? 0)), 0)]);
    };
    const each = (f: (index: readonly number[]) => number): Float64Array =>
      Float64Array.from({ length: size(result) }, (_, flat) => {
        let rest = flat;
        const index = [...result].reverse().map((d) => {
          const i = rest % d;
          rest = (rest - i) / d;
          return i;
        });
        return f(index.reverse());
      });
    const [a, b] = [uniform(1, ...shapes[0]), uniform(2, ...shapes[1])];
    const [y] = call(backend, "sub", [a, b], [f32(...result)]);
    expect(
      worst(
        y ?? [],
        each((i) => at(a, i) - at(b, i)),
      ),
    ).toBeLessThan(1e-7);
    const c = integers(3, 0, 1, 6, 7);
    const mask = floats(c.data, 6, 7);
    const [z] = call(backend, "where", [mask, a, b], [f32(...result)]);
    expect(
      worst(
        z ?? [],
        each((i) => (at(mask, i) ? at(a, i) : at(b, i))),
      ),
    ).toBe(0);
  });

  it("takes over storage that was given away", () => {
    const x = uniform(1, 3, 37);
    const handle = backend.upload(x.data, x);
    const row = uniform(2, 37);
    const other = backend.upload(row.data, row);
    const [y] = backend.kernels.add(
      [
        { ...x, handle },
        { ...row, handle: other },
      ],
      [{ ...f32(3, 37), reuse: handle }],
      {},
    );
    expect(y).toBe(handle);
    const data: TypedArray = backend.downloadSync({ ...x, handle });
    expect(
      worst(
        data,
        Float64Array.from(x.data, (v, i) => v + Number(row.data[i % 37])),
      ),
    ).toBeLessThan(1e-7);
    backend.free(handle);
    backend.free(other);
  });
});
