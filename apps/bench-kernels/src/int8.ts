// Numbers in eight bits with a scale for each 32 of a row: the rounding of ggml's q8_0, which compressed-tensors can hold as int8 with
// groups of 32, so that both files of a model hold the same codes.

export const groupSize = 32;

export interface Int8 {
  /** As many as there are numbers. */
  readonly codes: Int8Array<ArrayBuffer>;
  /** One for each group, bits of halves. A number is about its code times this. */
  readonly scales: Uint16Array<ArrayBuffer>;
}

const word = new DataView(new ArrayBuffer(4));

/** Bits of the nearest half, ties to even, of a number from 0 that is not beyond the largest one. */
function half(x: number): number {
  word.setFloat32(0, x);
  // Below 2^-14 halves are multiples of 2^-24; above, of 2^(exponent - 10).
  const exponent = Math.max((word.getUint32(0) >>> 23) - 127, -14);
  const scaled = x / 2 ** (exponent - 10);
  const down = Math.floor(scaled);
  const rest = scaled - down;
  const rounded = rest > 0.5 || (rest === 0.5 && down % 2 === 1) ? down + 1 : down;
  // A carry out of the fraction adds one to the exponent by itself.
  return (exponent + 15) * 1024 + (rounded - 1024);
}

/** Codes round(x / scale), ties away from zero, where the scale is the group's largest magnitude / 127, made a half only afterwards. */
export function quantize(values: Float32Array): Int8 {
  if (values.length % groupSize !== 0)
    throw new Error(`int8: ${values.length} numbers, expected a multiple of ${groupSize}`);
  const codes = new Int8Array(values.length);
  const scales = new Uint16Array(values.length / groupSize);
  for (let group = 0; group < scales.length; group++) {
    const from = group * groupSize;
    let largest = 0;
    for (let i = from; i < from + groupSize; i++) largest = Math.max(largest, Math.abs(values[i] as number));
    const scale = Math.fround(largest / 127);
    const inverse = scale === 0 ? 0 : Math.fround(1 / scale);
    for (let i = from; i < from + groupSize; i++) {
      const x = Math.fround((values[i] as number) * inverse);
      codes[i] = Math.sign(x) * Math.floor(Math.abs(x) + 0.5);
    }
    scales[group] = half(scale);
  }
  return { codes, scales };
}
