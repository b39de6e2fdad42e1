// Codes in words: compressed-tensors, GPTQ and AWQ, from vectors, packed and unpacked. Words are compared bit by bit here, since a
// tolerance relative to numbers near 2^31 would let the lowest codes pass.
import { packAwq, unpackAwq } from "../../src/stored/awq.ts";
import { packGptq, unpackGptq, type Words } from "../../src/stored/gptq.ts";
import { packLines, packZeros, unpackLines, unpackZeros } from "../../src/stored/pack.ts";
import type { Family, Found, Values, VectorCase } from "./self-contrast.ts";

const flat = (values: Values): number[] => (typeof values === "number" ? [values] : values.flatMap(flat));
const rows = (values: Values | undefined, name: string): number[][] => {
  if (values === undefined || typeof values === "number") throw new Error(`the case has no lists "${name}"`);
  return values.map(flat);
};
const nested = (data: ArrayLike<number>, columns: number): number[][] =>
  Array.from({ length: columns === 0 ? 0 : data.length / columns }, (_, i) =>
    Array.from({ length: columns }, (_, j) => data[i * columns + j] ?? Number.NaN),
  );
const wordsOf = (values: Values | undefined, name: string): Words => {
  const lists = rows(values, name);
  return { shape: [lists.length, lists[0]?.length ?? 0], data: Int32Array.from(lists.flat()) };
};

/** Throws where two lists of whole numbers are not equal. */
function same(what: string, found: ArrayLike<number>, expected: ArrayLike<number>): void {
  const i = Array.from(expected).findIndex((value, at) => found[at] !== value);
  if (i >= 0 || found.length !== expected.length)
    throw new Error(
      `${what}: entry ${i} of ${found.length} is ${found[i]}, expected ${expected[i]} of ${expected.length}`,
    );
}

/** What was packed, where it is what the case expects to the last bit. */
function exact(found: Found, { expected }: VectorCase): Found {
  for (const [name, values] of Object.entries(expected)) same(name, flat(found[name] ?? []), flat(values));
  return found;
}

function compressedTensors(one: VectorCase): Found {
  const bits = Number(one.config.bits);
  const q = rows(one.inputs.q, "q");
  const zeros = rows(one.inputs.zero_point, "zero_point");
  const [length, groups] = [q[0]?.length ?? 0, zeros[0]?.length ?? 0];
  const packed = packLines(q.flat(), { bits, length });
  const packedZeros = packZeros(zeros.flat(), { bits, groups });
  const signed = (byte: number): number => (byte << 24) >> 24;
  const back = wordsOf(one.expected.weight_packed, "weight_packed");
  const codes = unpackLines(new Uint8Array(back.data.buffer), { bits, length, nibbles: false });
  same("codes unpacked", Array.from(codes, signed), q.flat());
  const backZeros = wordsOf(one.expected.weight_zero_point, "weight_zero_point");
  const how = { bits, groups, nibbles: false, from: 0, count: zeros.length };
  same(
    "zero points unpacked",
    Array.from(unpackZeros(new Uint32Array(backZeros.data.buffer), how), signed),
    zeros.flat(),
  );
  return {
    weight_packed: nested(packed, packed.length / q.length),
    weight_shape: [q.length, length],
    weight_zero_point: nested(packedZeros, groups),
  };
}

function gptq(one: VectorCase): Found {
  const bits = Number(one.config.bits);
  const codes = rows(one.inputs.codes_out_in, "codes_out_in");
  const zeros = rows(one.inputs.zeros_out_group, "zeros_out_group");
  const given = { codes: Uint8Array.from(codes.flat()), zeros: Uint8Array.from(zeros.flat()) };
  const { qweight, qzeros } = packGptq({ bits, shape: [codes.length, codes[0]?.length ?? 0], ...given });
  const back = unpackGptq({
    bits,
    qweight: wordsOf(one.expected.qweight, "qweight"),
    qzeros: wordsOf(one.expected.qzeros, "qzeros"),
  });
  same("codes unpacked", back.codes, given.codes);
  same("zero points unpacked", back.zeros, given.zeros);
  return { qweight: nested(qweight.data, qweight.shape[1]), qzeros: nested(qzeros.data, qzeros.shape[1]) };
}

function awq(one: VectorCase): Found {
  const codes = rows(one.inputs.codes_out_in, "codes_out_in");
  const zeros = rows(one.inputs.zeros_out_group, "zeros_out_group");
  const given = { codes: Uint8Array.from(codes.flat()), zeros: Uint8Array.from(zeros.flat()) };
  const { qweight, qzeros } = packAwq({ shape: [codes.length, codes[0]?.length ?? 0], ...given });
  const back = unpackAwq({
    qweight: wordsOf(one.expected.qweight, "qweight"),
    qzeros: wordsOf(one.expected.qzeros, "qzeros"),
  });
  same("codes unpacked", back.codes, given.codes);
  same("zero points unpacked", back.zeros, given.zeros);
  return { qweight: nested(qweight.data, qweight.shape[1]), qzeros: nested(qzeros.data, qzeros.shape[1]) };
}

export const packFamilies: Readonly<Record<string, Family>> = {
  "prune-pack": async (one) => {
    const found = "q" in one.inputs ? compressedTensors(one) : "bits" in one.config ? gptq(one) : awq(one);
    return exact(found, one);
  },
};
