// Codes of 2, 3, 4 and 8 bits as GPTQ checkpoints store them (AutoGPTQ, `checkpoint_format` "gptq", where zero points are stored less
// one, and "gptq_v2", where they are not): an unbroken stream of bits along each column, 32 codes to as many words as a code has bits.

/** A matrix of words, row-major. */
export interface Words {
  readonly shape: readonly [rows: number, columns: number];
  readonly data: Int32Array;
}

/** Unsigned codes [out, in] and zero points [out, groups]. */
export interface GptqCodes {
  readonly bits: number;
  readonly shape: readonly [out: number, inner: number];
  readonly codes: Uint8Array;
  readonly zeros: Uint8Array;
}

export interface GptqWords {
  readonly bits: number;
  /** [in bits / 32, out]: the stream goes down. */
  readonly qweight: Words;
  /** [groups, out bits / 32]: the stream goes along. */
  readonly qzeros: Words;
}

export interface GptqOptions {
  /** What zero points are less than what they stand for: 1 in the format "gptq" (default), 0 in "gptq_v2". */
  readonly zeroOffset?: 0 | 1;
}

/** Throws RangeError where codes or zero points do not fill whole words, or bits are not 2, 3, 4 or 8. */
export function packGptq(
  { bits, shape: [out, inner], codes, zeros }: GptqCodes,
  { zeroOffset = 1 }: GptqOptions = {},
): GptqWords {
  const wordsOf = whole(bits);
  const groups = out === 0 ? 0 : zeros.length / out;
  const qweight = new Int32Array(wordsOf(inner) * out);
  for (let line = 0; line < out; line++)
    stream(
      bits,
      inner,
      (i, value) => or(qweight, i * out + line, value),
      (i) => codes[line * inner + i] as number,
    );
  const across = wordsOf(out);
  const qzeros = new Int32Array(groups * across);
  const mask = 2 ** bits - 1;
  for (let g = 0; g < groups; g++)
    stream(
      bits,
      out,
      (i, value) => or(qzeros, g * across + i, value),
      (line) => ((zeros[line * groups + g] as number) - zeroOffset) & mask,
    );
  return {
    bits,
    qweight: { shape: [wordsOf(inner), out], data: qweight },
    qzeros: { shape: [groups, across], data: qzeros },
  };
}

/** The way back. */
export function unpackGptq({ bits, qweight, qzeros }: GptqWords, { zeroOffset = 1 }: GptqOptions = {}): GptqCodes {
  whole(bits);
  const [down, out] = qweight.shape;
  const [groups, across] = qzeros.shape;
  const inner = (down * 32) / bits;
  const codes = new Uint8Array(out * inner);
  for (let line = 0; line < out; line++)
    for (let i = 0; i < inner; i++)
      codes[line * inner + i] = taken(bits, i, (w) => qweight.data[w * out + line] as number);
  const zeros = new Uint8Array(out * groups);
  const mask = 2 ** bits - 1;
  for (let g = 0; g < groups; g++)
    for (let line = 0; line < out; line++)
      zeros[line * groups + g] = (taken(bits, line, (w) => qzeros.data[g * across + w] as number) + zeroOffset) & mask;
  return { bits, shape: [out, inner], codes, zeros };
}

/** Words that so many codes fill. */
const whole =
  (bits: number): ((codes: number) => number) =>
  (codes) => {
    if (![2, 3, 4, 8].includes(bits)) throw new RangeError(`GPTQ has codes of 2, 3, 4 or 8 bits, not ${bits}`);
    if ((codes * bits) % 32 !== 0) throw new RangeError(`${codes} codes of ${bits} bits do not fill words of 32 bits`);
    return (codes * bits) / 32;
  };

const or = (words: Int32Array, i: number, value: number): void => {
  words[i] = (words[i] as number) | value;
};

/** Codes one behind the other; a code of 3 bits may begin in one word and end in the next. */
function stream(
  bits: number,
  count: number,
  put: (word: number, value: number) => void,
  code: (i: number) => number,
): void {
  for (let i = 0; i < count; i++) {
    const [word, shift] = [Math.floor((i * bits) / 32), (i * bits) % 32];
    put(word, code(i) << shift);
    if (shift + bits > 32) put(word + 1, code(i) >>> (32 - shift));
  }
}

function taken(bits: number, i: number, word: (i: number) => number): number {
  const [w, shift] = [Math.floor((i * bits) / 32), (i * bits) % 32];
  const low = word(w) >>> shift;
  const both = shift + bits > 32 ? low | (word(w + 1) << (32 - shift)) : low;
  return both & (2 ** bits - 1);
}
