// 16-bit conversions, upload, download and free of the reference backend.
import { describe, expect, it } from "vitest";
import { cpu } from "./backend.ts";
import { decode16Bits, encode16 } from "./storage.ts";

describe("16-bit floats", () => {
  // Patterns from the IEEE 754 binary16 tables; bfloat16 is the upper half of the f32 pattern.
  it.each([
    [0, 0x0000],
    [-0, 0x8000],
    [1, 0x3c00],
    [-2, 0xc000],
    [65504, 0x7bff],
    [65519.99, 0x7bff],
    [65520, 0x7c00],
    [1e300, 0x7c00],
    [2 ** -14, 0x0400],
    [2 ** -24, 0x0001],
    [2 ** -25, 0x0000],
    [3 * 2 ** -25, 0x0002],
    [1 + 2 ** -11, 0x3c00],
    [1 + 3 * 2 ** -11, 0x3c02],
    [2 - 2 ** -12, 0x4000],
    [0.1, 0x2e66],
    [Number.NEGATIVE_INFINITY, 0xfc00],
  ])("f16 of %f is %i", (x, bits) => expect(encode16(x, "f16")).toBe(bits));

  it("bf16 equals rounding the f32 pattern by hand, ties to even", () => {
    const f = new Float32Array(1);
    const u = new Uint32Array(f.buffer);
    for (let pattern = 0; pattern < 0x7f800000; pattern += 0x7ffd) {
      for (const low of [0, 0x7fff, 0x8000, 0x8001]) {
        u[0] = (pattern & 0xffff0000) | low;
        const bits = u[0] as number;
        const odd = (bits >>> 16) & 1;
        const expected = (bits + 0x7fff + odd) >>> 16;
        if (encode16(f[0] as number, "bf16") !== expected) throw new Error(`${f[0]} must become ${expected}`);
      }
    }
  });

  it.each(["f16", "bf16"] as const)("every %s pattern survives decoding and encoding", (dtype) => {
    for (let bits = 0; bits < 0x10000; bits++) {
      const x = decode16Bits(bits, dtype);
      if (Number.isNaN(x)) expect(decode16Bits(encode16(x, dtype), dtype)).toBeNaN();
      else if (encode16(x, dtype) !== bits) throw new Error(`${dtype} ${bits} -> ${x} -> ${encode16(x, dtype)}`);
    }
  });
});

describe("upload and download", () => {
  const round = (
    backend: ReturnType<typeof cpu>,
    data: Parameters<typeof backend.upload>[0],
    dtype: "f32" | "f16" | "i32",
  ) => {
    const spec = { shape: [data.length], dtype };
    return backend.downloadSync({ ...spec, handle: backend.upload(data, spec) });
  };

  it("holds f32 in the array its precision asks for", () => {
    expect(round(cpu(), Float64Array.of(0.1), "f32")).toEqual(Float32Array.of(0.1));
    expect(round(cpu({ precision: 64 }), Float64Array.of(0.1), "f32")).toEqual(Float64Array.of(0.1));
  });

  it("converts numbers, and takes 16-bit patterns as they are", () => {
    expect(round(cpu(), Float32Array.of(1, -2), "f16")).toEqual(Uint16Array.of(0x3c00, 0xc000));
    expect(round(cpu(), Uint16Array.of(0x3c00), "f16")).toEqual(Uint16Array.of(0x3c00));
    expect(round(cpu(), Float32Array.of(2.9, -2.9, 1e10, Number.NaN), "i32")).toEqual(
      Int32Array.of(2, -2, 2147483647, 0),
    );
  });

  it("copies in both directions", async () => {
    const backend = cpu();
    const data = Float32Array.of(1, 2);
    const x = { shape: [2], dtype: "f32" as const, handle: backend.upload(data, { shape: [2], dtype: "f32" }) };
    data[0] = 9;
    (await backend.download(x))[1] = 9;
    expect(backend.downloadSync(x)).toEqual(Float32Array.of(1, 2));
  });

  it("refuses data that do not fill the shape, other precisions, double frees and use after free", () => {
    const backend = cpu();
    expect(() => backend.upload(Float32Array.of(1, 2), { shape: [3], dtype: "f32" })).toThrow(
      "2 values do not fill the shape [3]",
    );
    expect(() => cpu({ precision: 16 as 32 })).toThrow("precision must be 32 or 64, found 16");
    const handle = backend.upload(Float32Array.of(1), { shape: [1], dtype: "f32" });
    expect(backend.live()).toBe(1);
    backend.free(handle);
    expect(backend.live()).toBe(0);
    expect(() => backend.free(handle)).toThrow("freed twice");
    expect(() => backend.downloadSync({ shape: [1], dtype: "f32", handle })).toThrow("freed before this use");
  });
});
