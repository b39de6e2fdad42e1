// Products beyond the small sizes of the shared suite: panels, edge tiles, blocks of k, tasks, dots, storage types. Oracle: loops in float64.
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { type WasmBackend, wasm } from "../backend.ts";
import { call, converted, f32, type Host, ints, uniform, worst } from "../call.test-util.ts";

const number = (x: Host, i: number): number => Number(x.data[i]);

/** c[i, j] = sum of a(i, l) b(l, j) */
function product(
  m: number,
  n: number,
  k: number,
  a: (i: number, l: number) => number,
  b: (l: number, j: number) => number,
): Float64Array {
  const c = new Float64Array(m * n);
  for (let i = 0; i < m; i++) {
    for (let j = 0; j < n; j++) {
      let sum = 0;
      for (let l = 0; l < k; l++) sum += a(i, l) * b(l, j);
      c[i * n + j] = sum;
    }
  }
  return c;
}

/** bf16 and f16 bits as numbers. */
function decode(x: Host): Host {
  if (x.dtype !== "bf16" && x.dtype !== "f16") return x;
  const [mantissa, bias] = x.dtype === "bf16" ? [7, 127] : [10, 15];
  const data = Float64Array.from(x.data, (bits) => {
    const exponent = (bits & 0x7fff) >> mantissa;
    const fraction = (bits & ((1 << mantissa) - 1)) / 2 ** mantissa;
    const value = exponent === 0 ? fraction * 2 ** (1 - bias) : (1 + fraction) * 2 ** (exponent - bias);
    return bits & 0x8000 ? -value : value;
  });
  return { ...x, data };
}

describe.each(["relaxed", "plain"] as const)("matmul, %s", (variant) => {
  let backend: WasmBackend;
  beforeAll(async () => {
    backend = await wasm({ threads: 1, variant });
  });
  afterAll(() => backend.dispose());

  // Rows below, at and above the change from dots to panels; columns and k around the tile, the panel, the task and the block of k.
  const sizes = [
    [1, 9, 2050],
    [1, 77, 2052],
    [1, 8, 4],
    [2, 33, 513],
    [3, 8, 4],
    [19, 130, 7],
    [20, 31, 515],
    [21, 129, 257],
    [24, 128, 256],
    [47, 7, 519],
    [65, 257, 3],
    [245, 17, 31],
    [30, 5, 0],
  ] as const;
  for (const [m, n, k] of sizes) {
    for (const transposeA of [false, true]) {
      for (const transposeB of [false, true]) {
        it(`${m} x ${n} x ${k}${transposeA ? ", A transposed" : ""}${transposeB ? ", B transposed" : ""}`, () => {
          const a = transposeA ? uniform(1, k, m) : uniform(1, m, k);
          const b = transposeB ? uniform(2, n, k) : uniform(2, k, n);
          const expected = product(
            m,
            n,
            k,
            (i, l) => number(a, transposeA ? l * m + i : i * k + l),
            (l, j) => number(b, transposeB ? j * k + l : l * n + j),
          );
          const [c] = call(backend, "matmul", [a, b], [f32(m, n)], { transposeA, transposeB });
          expect(worst(c ?? [], expected)).toBeLessThan(2e-6);
        });
      }
    }
  }

  it.each([
    [3, 70, 33],
    [25, 70, 300],
  ])("broadcasts batches of %i x %i x %i", (m, n, k) => {
    const [a, b] = [uniform(1, 2, 1, m, k), uniform(2, 3, k, n)];
    const [c] = call(backend, "matmul", [a, b], [f32(2, 3, m, n)], {});
    for (let i = 0; i < 6; i++) {
      const [p, q] = [Math.floor(i / 3), i % 3];
      const expected = product(
        m,
        n,
        k,
        (r, l) => number(a, (p * m + r) * k + l),
        (l, j) => number(b, (q * k + l) * n + j),
      );
      expect(worst(c?.subarray(i * m * n, (i + 1) * m * n) ?? [], expected)).toBeLessThan(2e-6);
    }
  });

  it.each([
    ["bf16", 2],
    ["bf16", 50],
    ["f16", 2],
    ["f16", 50],
  ] as const)("linear with weights in %s, %i rows, with a bias", (dtype, m) => {
    const [n, k] = [131, 269];
    const x = uniform(1, m, k);
    const w = converted(backend, uniform(2, n, k), dtype);
    const exact = decode(w);
    const bias = uniform(3, n);
    const expected = product(
      m,
      n,
      k,
      (i, l) => number(x, i * k + l),
      (l, j) => number(exact, j * k + l),
    ).map((sum, i) => sum + number(bias, i % n));
    const [y] = call(backend, "linear", [x, w, bias], [f32(m, n)]);
    expect(worst(y ?? [], expected)).toBeLessThan(2e-6);
    if (m > 2) {
      // The same weights stored [k, n], as the gradient of the rows would read them.
      const rows = uniform(1, m, n);
      const [z] = call(backend, "matmul", [rows, w], [f32(m, k)], {});
      const back = product(
        m,
        k,
        n,
        (i, l) => number(rows, i * n + l),
        (l, j) => number(exact, l * k + j),
      );
      expect(worst(z ?? [], back)).toBeLessThan(2e-6);
    }
  });

  it.each(["f32", "bf16", "f16"] as const)(
    "one row: a column has the same bits alone and among others, %s",
    (dtype) => {
      // Eight columns at a time, then four; two blocks of k.
      const [n, k] = [45, 2056];
      const [x, bias] = [uniform(1, 1, k), uniform(3, n)];
      const w = converted(backend, uniform(2, n, k), dtype);
      const [y] = call(backend, "linear", [x, w, bias], [f32(1, n)]);
      const alone = Array.from({ length: n }, (_, j) => {
        const line = { ...w, shape: [1, k], data: w.data.slice(j * k, (j + 1) * k) };
        const own = { ...bias, shape: [1], data: bias.data.slice(j, j + 1) };
        return call(backend, "linear", [x, line, own], [f32(1, 1)])[0]?.[0];
      });
      expect([...(y ?? [])]).toEqual(alone);
    },
  );

  it("loses little precision in long sums", () => {
    const k = 8192;
    const [a, b] = [uniform(1, 24, k), uniform(2, 8, k)];
    const positive = { ...a, data: Float32Array.from(a.data, (x) => Math.abs(x)) };
    const other = { ...b, data: Float32Array.from(b.data, (x) => Math.abs(x)) };
    const expected = product(
      24,
      8,
      k,
      (i, l) => number(positive, i * k + l),
      (l, j) => number(other, j * k + l),
    );
    const [c] = call(backend, "matmul", [positive, other], [f32(24, 8)], { transposeB: true });
    expect(worst(c ?? [], expected)).toBeLessThan(1e-6);
  });

  describe("grouped", () => {
    // No rows, few, many, none again, and rows behind the last block that hold NaN.
    const ends = ints([0, 5, 5, 67, 68], 5);
    const [rows, k, n] = [71, 37, 141];
    const block = (i: number): number => ends.data.findIndex((end) => i < end);
    const x = uniform(1, rows, k);
    x.data.fill(Number.NaN, 68 * k);

    it("products", () => {
      const w = uniform(2, 5, n, k);
      const [y] = call(backend, "groupedMatmul", [x, w, ends], [f32(rows, n)]);
      const expected = product(
        rows,
        n,
        k,
        (i, l) => (i < 68 ? number(x, i * k + l) : 0),
        (l, j) => l * n + j,
      ).map((_, at) => {
        const [i, j] = [Math.floor(at / n), at % n];
        if (i >= 68) return 0;
        let sum = 0;
        for (let l = 0; l < k; l++) sum += number(x, i * k + l) * number(w, (block(i) * n + j) * k + l);
        return sum;
      });
      expect(worst(y ?? [], expected)).toBeLessThan(2e-6);
    });
    it("transposed products", () => {
      const w = uniform(2, 5, k, n);
      const [y] = call(backend, "groupedMatmul", [x, w, ends], [f32(rows, n)], { transposed: true });
      const expected = Float64Array.from({ length: rows * n }, (_, at) => {
        const [i, j] = [Math.floor(at / n), at % n];
        let sum = 0;
        for (let l = 0; i < 68 && l < k; l++) sum += number(x, i * k + l) * number(w, (block(i) * k + l) * n + j);
        return sum;
      });
      expect(worst(y ?? [], expected)).toBeLessThan(2e-6);
    });
    it("outer products", () => {
      const b = uniform(3, rows, n);
      b.data.fill(Number.NaN, 68 * n);
      const [c] = call(backend, "groupedOuter", [x, b, ends], [f32(5, k, n)]);
      const expected = new Float64Array(5 * k * n);
      for (let i = 0; i < 68; i++) {
        for (let p = 0; p < k; p++) {
          for (let q = 0; q < n; q++) {
            const at = (block(i) * k + p) * n + q;
            expected[at] = (expected[at] ?? 0) + number(x, i * k + p) * number(b, i * n + q);
          }
        }
      }
      expect(worst(c ?? [], expected)).toBeLessThan(2e-6);
    });
  });

  it("refuses a storage type it cannot read, with the reason", () => {
    const kernel = backend.kernels.matmul;
    const reason = kernel.unsupported?.(
      [
        { shape: [2, 2], dtype: "bf16" },
        { shape: [2, 2], dtype: "f32" },
      ],
      {},
    );
    expect(reason).toBe("input 0 is bf16");
    expect(() =>
      call(backend, "matmul", [converted(backend, uniform(1, 2, 2), "bf16"), uniform(1, 2, 2)], [f32(2, 2)]),
    ).toThrow("wasm: matmul: input 0 is bf16; cast() it first");
  });
});
