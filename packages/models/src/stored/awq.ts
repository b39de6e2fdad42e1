// Codes of 4 bits as AWQ checkpoints store them (AutoAWQ, version "gemm"): eight neighbours along `out` in a word, in an order of their own.
import type { Words } from "./gptq.ts";

/** Unsigned codes [out, in] and zero points [out, groups]. */
export interface AwqCodes {
  readonly shape: readonly [out: number, inner: number];
  readonly codes: Uint8Array;
  readonly zeros: Uint8Array;
}

export interface AwqWords {
  /** [in, out / 8]. */
  readonly qweight: Words;
  /** [groups, out / 8]. */
  readonly qzeros: Words;
}

/** Which of eight neighbours has the bits 4 i to 4 i + 3. */
const order = [0, 2, 4, 6, 1, 3, 5, 7] as const;

/** Throws RangeError where `out` is no multiple of eight. */
export function packAwq({ shape: [out, inner], codes, zeros }: AwqCodes): AwqWords {
  if (out % 8 !== 0) throw new RangeError(`${out} lines do not fill words of eight codes`);
  const pack = (values: Uint8Array, length: number): Words => {
    const data = new Int32Array((length * out) / 8);
    for (let i = 0; i < length; i++) {
      for (let w = 0; w < out / 8; w++) {
        let word = 0;
        for (const [place, line] of order.entries())
          word |= (values[(8 * w + line) * length + i] as number) << (4 * place);
        data[(i * out) / 8 + w] = word;
      }
    }
    return { shape: [length, out / 8], data };
  };
  return { qweight: pack(codes, inner), qzeros: pack(zeros, out === 0 ? 0 : zeros.length / out) };
}

/** The way back. */
export function unpackAwq({ qweight, qzeros }: AwqWords): AwqCodes {
  const unpack = ({ shape: [length, across], data }: Words): Uint8Array => {
    const values = new Uint8Array(length * across * 8);
    for (let i = 0; i < length; i++)
      for (let w = 0; w < across; w++)
        for (const [place, line] of order.entries())
          values[(8 * w + line) * length + i] = ((data[i * across + w] as number) >>> (4 * place)) & 15;
    return values;
  };
  const [inner, across] = qweight.shape;
  return { shape: [across * 8, inner], codes: unpack(qweight), zeros: unpack(qzeros) };
}
