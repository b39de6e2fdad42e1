// Reading and writing safetensors: a round trip of awkward tensors, every refusal by name, and widening of stored
// floats.
import { CheckpointError } from "@switchyard/core";
import { describe, expect, it } from "vitest";
import { bytesSource, encodeSafetensors, readHeader, type TensorSource, toFloat32 } from "./safetensors.ts";

const encode = async (tensors: readonly TensorSource[], metadata?: Record<string, string>): Promise<Uint8Array> => {
  const parts: Uint8Array[] = [];
  for await (const part of encodeSafetensors(tensors, metadata)) parts.push(part);
  return new Uint8Array(Buffer.concat(parts));
};

/** A file with this header, written out as it is, and this many bytes of data. */
const file = (header: string, data = 0, headerLength?: number | bigint): Uint8Array => {
  const text = new TextEncoder().encode(header);
  const bytes = new Uint8Array(8 + text.length + data);
  new DataView(bytes.buffer).setBigUint64(0, BigInt(headerLength ?? text.length), true);
  bytes.set(text, 8);
  return bytes;
};
const read = (bytes: Uint8Array) => readHeader(bytesSource("x.safetensors", bytes));
const tensor = (dtype: string, shape: unknown, from: number, to: number): string =>
  `{"dtype":"${dtype}","shape":${JSON.stringify(shape)},"data_offsets":[${from},${to}]}`;

describe("round trip", () => {
  it("keeps names, shapes and bytes, also of empty tensors and scalars", async () => {
    const numbers = Float32Array.from([1, -2.5, 3e-40, Number.NaN, 5, 6]);
    const bytes = new Uint8Array(numbers.buffer);
    const tensors: TensorSource[] = [
      { name: "matrix", dtype: "F32", shape: [2, 3], bytes: () => bytes },
      { name: "nothing", dtype: "F32", shape: [0, 7], bytes: () => new Uint8Array(0) },
      { name: 'odd "name"\n é', dtype: "U8", shape: [3], bytes: async () => Uint8Array.of(1, 2, 3) },
      { name: "scalar", dtype: "BF16", shape: [], bytes: () => Uint8Array.of(0x80, 0x3f) },
    ];
    const encoded = await encode(tensors, { made: "by hand" });
    const source = bytesSource("x", encoded);
    const { tensors: found, metadata } = await readHeader(source);
    expect([...metadata]).toEqual([
      ["format", "pt"],
      ["made", "by hand"],
    ]);
    expect([...found.keys()]).toEqual(tensors.map(({ name }) => name));
    for (const { name, dtype, shape, bytes } of tensors) {
      const stored = found.get(name);
      expect(stored).toMatchObject({ dtype, shape });
      expect(await source.read(stored?.from ?? 0, stored?.to ?? 0)).toEqual(await bytes());
    }
    expect((found.get("matrix")?.from ?? 1) % 8).toBe(0);
  });

  it("keeps a tensor called like a method and one longer than a write", async () => {
    const large = new Uint8Array((1 << 24) + 5).fill(7);
    const encoded = await encode([{ name: "constructor", dtype: "U8", shape: [large.length], bytes: () => large }]);
    const { tensors } = await read(encoded);
    expect(tensors.get("constructor")?.shape).toEqual([large.length]);
    expect(encoded.at(-1)).toBe(7);
  });

  it("accepts an empty file and a header padded with spaces", async () => {
    expect((await read(file("{}"))).tensors.size).toBe(0);
    expect((await read(file(`{ "a" : ${tensor("F32", [1], 0, 4)} }   `, 4))).tensors.size).toBe(1);
  });
});

describe("writing refuses", () => {
  const one = { dtype: "F32", shape: [1], bytes: () => new Uint8Array(4) };
  it.each([
    [
      "equal names",
      [
        { name: "a", ...one },
        { name: "a", ...one },
      ],
      /named "a".*taken/,
    ],
    ["__proto__", [{ name: "layers.__proto__.x", ...one }], /not allowed/],
    ["an unknown dtype", [{ name: "a", ...one, dtype: "F31" }], /F31 \[1\]/],
    ["a name that it would not read", [{ name: "n".repeat(1025), ...one }], /over 1024 characters/],
    ["more tensors than it would read", new Array<TensorSource>(200_001).fill({ name: "a", ...one }), /200001 tensors/],
    ["bytes that do not fit", [{ name: "a", ...one, shape: [2] }], /needs 8 bytes, got 4/],
  ])("%s", async (_, tensors, message) => {
    await expect(encode(tensors)).rejects.toThrow(message);
    await expect(encode(tensors)).rejects.toSatisfy(CheckpointError.isInstance);
  });
});

describe("reading refuses", () => {
  const a = tensor("F32", [1], 0, 4);
  const cases: [what: string, bytes: Uint8Array, message: RegExp][] = [
    ["a file of 7 bytes", new Uint8Array(7), /7 bytes are too few/],
    ["a header over 100 MB", file("{}", 0, 100_000_001), /100000001 bytes long; at most 100000000/],
    ["a header length beyond 2^53", file("{}", 0, 2n ** 63n), /9223372036854775808 bytes long/],
    ["a header longer than the file", file("{}", 0, 99), /99 bytes long, but the file has 10/],
    ["something else than an object", file("[]"), /does not start with \{/],
    ["broken UTF-8", new Uint8Array([1, 0, 0, 0, 0, 0, 0, 0, 0xff]), /does not start with|UTF-8/],
    ["broken UTF-8 inside", new Uint8Array([2, 0, 0, 0, 0, 0, 0, 0, 0x7b, 0xff]), /UTF-8/],
    ["a header cut short", file('{"a":{"dtype":"F32"'), /expected ,.*found its end/],
    ["a string without an end", file('{"a'), /a string has no end/],
    ["an invalid escape", file('{"\\x":1}'), /invalid string/],
    ["text after the header", file("{} x"), /text after its end/],
    ["a missing key", file('{"a":{"dtype":"F32","shape":[1]}}', 4), /"a" lacks dtype, shape/],
    ["an unknown key", file('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":[1]}}', 4), /unknown key "x"/],
    ["an unknown dtype", file(`{"a":${tensor("F12", [1], 0, 4)}}`, 4), /"a" has the unknown dtype "F12"; known are F4/],
    ["a negative size", file(`{"a":${tensor("F32", [-1], 0, 4)}}`, 4), /whole numbers from 0 up, found "-1"/],
    ["a fractional size", file(`{"a":${tensor("F32", [1.5], 0, 4)}}`, 4), /found "1.5"/],
    ["a size in words", file(`{"a":${tensor("F32", ["1"], 0, 4)}}`, 4), /whole numbers from 0 up/],
    [
      "a size beyond 2^53",
      file('{"a":{"dtype":"F32","shape":[9007199254740993],"data_offsets":[0,4]}}', 4),
      /beyond 2\^53/,
    ],
    [
      "a product beyond 2^53",
      file(`{"a":${tensor("U8", [2 ** 40, 2 ** 40], 0, 4)}}`, 4),
      /no whole number of bytes below/,
    ],
    ["half a byte", file(`{"a":${tensor("F4", [3], 0, 2)}}`, 2), /no whole number of bytes/],
    ["a long shape", file(`{"a":${tensor("U8", new Array(65).fill(1), 0, 1)}}`, 1), /more than 64 entries/],
    ["three offsets", file('{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1,2]}}', 1), /more than 2 entries/],
    ["one offset", file('{"a":{"dtype":"U8","shape":[1],"data_offsets":[0]}}', 1), /lacks dtype/],
    ["an end before the start", file(`{"a":${tensor("F32", [1], 4, 0)}}`, 4), /before its start 4/],
    ["offsets out of the file", file(`{"a":${tensor("F32", [2], 0, 8)}}`, 4), /"a" ends at byte 8.*holds 4.*damaged/],
    ["a size that is not dtype x shape", file(`{"a":${tensor("F32", [2], 0, 4)}}`, 4), /needs 8 bytes.*span 4/],
    ["a huge claim in a small file", file(`{"a":${tensor("F32", [2 ** 40], 0, 2 ** 42)}}`, 4), /holds 4/],
    ["overlaps", file(`{"a":${a},"b":${tensor("F32", [1], 2, 6)}}`, 6), /"a" and "b" overlap/],
    ["two names for one tensor", file(`{"a":${a},"b":${a}}`, 4), /"a" and "b" overlap/],
    ["a hole", file(`{"a":${a},"b":${tensor("F32", [1], 5, 9)}}`, 9), /hole of 1 bytes before tensor "b"/],
    ["bytes at the end", file(`{"a":${a}}`, 5), /1 bytes after its last tensor/],
    ["equal names", file(`{"a":${a},"a":${a}}`, 4), /key "a" twice/],
    ["equal names spelled differently", file(`{"a":${a},"\\u0061":${a}}`, 4), /key "a" twice/],
    ["equal keys", file('{"a":{"dtype":"F32","dtype":"U8","shape":[1],"data_offsets":[0,4]}}', 4), /key "dtype" twice/],
    ["__proto__", file(`{"__proto__":${a}}`, 4), /"__proto__" is not allowed/],
    ["__proto__ in a path", file(`{"x.__proto__.y":${a}}`, 4), /"x.__proto__.y" is not allowed/],
    ["__proto__ in the metadata", file('{"__metadata__":{"__proto__":"x"}}'), /__metadata__ has the key/],
    ["a name of 1025 characters", file(`{"${"n".repeat(1025)}":${a}}`, 4), /1025 characters; at most 1024 .*"nnn/],
    [
      "a long key of the metadata",
      file(`{"__metadata__":{"${"n".repeat(1025)}":"x"}}`),
      /1025 characters; at most 1024/,
    ],
    ["a long dtype", file(`{"a":${tensor("F".repeat(5000), [1], 0, 4)}}`, 4), /unknown dtype "FFF/],
    [
      "10,001 entries of metadata",
      file(`{"__metadata__":{${Array.from({ length: 10_001 }, (_, i) => `"${i}":""`).join()}}}`),
      /__metadata__ lists more than 10000 entries/,
    ],
    ["a list in a shape", file(`{"a":${tensor("F32", [[1]], 0, 4)}}`, 4), /nests deeper than the format allows/],
    ["an object for a dtype", file('{"a":{"dtype":{"x":1}}}'), /nests deeper than the format allows/],
    ["a million levels", file(`{"a":${"[".repeat(1_000_000)}`), /nests deeper than the format allows/],
    ["a list in the metadata", file('{"__metadata__":{"x":[]}}'), /nests deeper than the format allows/],
    [
      "a number of a million digits",
      file(`{"a":{"dtype":"U8","shape":[${"9".repeat(1_000_000)}],"data_offsets":[0,1]}}`, 1),
      /the shape of tensor "a" holds "99999999999999999", which is beyond 2\^53/,
    ],
    ["an archive of PyTorch", new TextEncoder().encode("PK\x03\x04 and more"), /Python pickle.*Convert it/],
    ["a bare pickle", Uint8Array.of(0x80, 2, 0x8a, 10, 0x6c, 0xfc, 0x9c, 0x46), /Python pickle.*Convert it/],
    ["a GGUF file", new TextEncoder().encode("GGUF\x03\0\0\0 and more"), /This is a GGUF file/],
    ["a pointer of Git LFS", new TextEncoder().encode("version https://git-lfs"), /fetch it with git lfs pull/],
    ["metadata that is no text", file('{"__metadata__":{"x":1}}'), /expected "/],
  ];
  it.each(cases)("%s", async (_, bytes, message) => {
    const error: unknown = await read(bytes).catch((thrown: unknown) => thrown);
    expect(CheckpointError.isInstance(error)).toBe(true);
    expect(String(error)).toMatch(message);
    expect(String(error)).toContain("x.safetensors");
  });

  it("before it reads more than the header", async () => {
    let most = 0;
    const bytes = file(`{"a":${tensor("F32", [2 ** 40], 0, 2 ** 42)}}`, 4);
    const inner = bytesSource("x", bytes);
    const watching = {
      ...inner,
      read: (from: number, to: number) => {
        most = Math.max(most, to - from);
        return inner.read(from, to);
      },
    };
    await expect(readHeader(watching)).rejects.toThrow();
    expect(most).toBeLessThan(100);
  });

  it("a source that gives fewer bytes than asked for", async () => {
    const bytes = file("{}");
    for (const cut of [8, 2]) {
      const inner = bytesSource("x", bytes);
      const short = {
        ...inner,
        read: async (from: number, to: number) => (await inner.read(from, to)).subarray(0, -1),
      };
      const good = { ...inner, read: (from: number, to: number) => (to - from === cut ? short : inner).read(from, to) };
      await expect(readHeader(good)).rejects.toThrow(/bytes \d+ to \d+ were asked for, \d came back/);
      await expect(readHeader(good)).rejects.toSatisfy(CheckpointError.isInstance);
    }
  });

  it("a hostile name without printing all of it", async () => {
    const error: unknown = await read(file(`{"${"n".repeat(5000)}":${tensor("X", [1], 0, 4)}}`, 4)).catch(
      (e: unknown) => e,
    );
    expect(String(error).length).toBeLessThan(500);
  });

  it("more than 200,000 tensors", async () => {
    const entry = tensor("U8", [0], 0, 0);
    const header = `{${Array.from({ length: 200_001 }, (_, i) => `"${i}":${entry}`).join(",")}}`;
    await expect(read(file(header))).rejects.toThrow(/more than 200000 tensors/);
  });
});

describe("toFloat32", () => {
  const bytes = (array: ArrayBufferView): Uint8Array =>
    new Uint8Array(array.buffer, array.byteOffset, array.byteLength);
  it("widens every finite half and its specials", () => {
    const halves = Uint16Array.of(
      0x0000,
      0x8000,
      0x3c00,
      0xc000,
      0x0001,
      0x03ff,
      0x0400,
      0x7bff,
      0x7c00,
      0xfc00,
      0x7e00,
    );
    const expected = [0, -0, 1, -2, 2 ** -24, 1023 * 2 ** -24, 2 ** -14, 65504, Infinity, -Infinity, Number.NaN];
    expect([...toFloat32(bytes(halves), "F16", "x")]).toEqual(expected);
  });
  it("widens bf16, f64 and passes f32", () => {
    expect([...toFloat32(bytes(Uint16Array.of(0x3f80, 0xbf00, 0x7f80)), "BF16", "x")]).toEqual([1, -0.5, Infinity]);
    expect([...toFloat32(bytes(Float64Array.of(0.1, -2)), "F64", "x")]).toEqual([Math.fround(0.1), -2]);
    expect([...toFloat32(bytes(Float32Array.of(3)), "F32", "x")]).toEqual([3]);
  });
  it("names the tensor that is no float", () => {
    expect(() => toFloat32(new Uint8Array(4), "I64", "ids")).toThrow(/"ids" is stored as I64/);
  });
});
