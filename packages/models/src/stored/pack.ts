// Signed codes of 1 to 8 bits in 32-bit words as the format "pack-quantized" of compressed-tensors has them: code + 2^(bits - 1), as
// many as fit whole into a word, the first in the lowest bits. Codes are packed along a line, zero points along the first axis.

/** What packed codes become: nibbles (code + 8, two to a byte, the first in the low one) or bytes (two's complement). */
export interface PackedForm {
  readonly bits: number;
  readonly nibbles: boolean;
}

const perWord = (bits: number): number => Math.floor(32 / bits);

/** Words [lines, ceil(length / codes per word)] of codes [lines, length]. */
export function packLines(
  codes: ArrayLike<number>,
  { bits, length }: { readonly bits: number; readonly length: number },
): Int32Array {
  const each = perWord(bits);
  const across = Math.ceil(length / each);
  const lines = length === 0 ? 0 : codes.length / length;
  const offset = 2 ** (bits - 1);
  const words = new Int32Array(lines * across);
  for (let i = 0; i < codes.length; i++) {
    const [line, c] = [Math.floor(i / length), i % length];
    const w = line * across + Math.floor(c / each);
    words[w] = (words[w] as number) | (((codes[i] as number) + offset) << (bits * (c % each)));
  }
  return words;
}

/** Words [ceil(lines / codes per word), groups] of zero points [lines, groups]. */
export function packZeros(
  zeros: ArrayLike<number>,
  { bits, groups }: { readonly bits: number; readonly groups: number },
): Int32Array {
  const each = perWord(bits);
  const lines = groups === 0 ? 0 : zeros.length / groups;
  const offset = 2 ** (bits - 1);
  const words = new Int32Array(Math.ceil(lines / each) * groups);
  for (let i = 0; i < zeros.length; i++) {
    const [line, g] = [Math.floor(i / groups), i % groups];
    const w = Math.floor(line / each) * groups + g;
    words[w] = (words[w] as number) | (((zeros[i] as number) + offset) << (bits * (line % each)));
  }
  return words;
}

/**
 * Codes [lines, length] from the bytes of their words, in core's layout: nibbles [lines, length / 2] or bytes [lines, length]. `bytes` start at
 * a multiple of four, and may be what comes back.
 */
export function unpackLines(
  bytes: Uint8Array,
  { bits, nibbles, length }: PackedForm & { readonly length: number },
): Uint8Array {
  const each = perWord(bits);
  const across = Math.ceil(length / each);
  const lines = across === 0 ? 0 : bytes.length / (4 * across);
  const words = new Uint32Array(bytes.buffer, bytes.byteOffset, lines * across);
  // These lie in the words as they are needed, but for the sign and the filling of the last word.
  if (bits === 4 && nibbles) return trimmed(bytes, 4 * across, length / 2);
  if (bits === 8 && !nibbles) {
    const turned = words.map((word) => word ^ 0x80808080);
    return trimmed(new Uint8Array(turned.buffer), 4 * across, length);
  }
  const mask = 2 ** bits - 1;
  const codes = new Uint8Array(lines * (nibbles ? length / 2 : length));
  const shift = (nibbles ? 8 : 0) - 2 ** (bits - 1);
  for (let line = 0; line < lines; line++) {
    for (let c = 0; c < length; c++) {
      const word = words[line * across + Math.floor(c / each)] as number;
      const code = ((word >>> (bits * (c % each))) & mask) + shift;
      const i = line * length + c;
      if (nibbles) codes[i >>> 1] = (codes[i >>> 1] as number) | (code << (4 * (i & 1)));
      else codes[i] = code;
    }
  }
  return codes;
}

/** The first `used` bytes of each line of `stride`. */
function trimmed(bytes: Uint8Array, stride: number, used: number): Uint8Array {
  if (used === stride) return bytes;
  const lines = bytes.length / stride;
  const kept = new Uint8Array(lines * used);
  for (let line = 0; line < lines; line++) kept.set(bytes.subarray(line * stride, line * stride + used), line * used);
  return kept;
}

/** Zero points [count, groups] from words that begin `from` lines before them, in core's layout: code + 8, or two's complement. */
export function unpackZeros(
  words: Uint32Array,
  {
    bits,
    nibbles,
    groups,
    from,
    count,
  }: PackedForm & { readonly groups: number; readonly from: number; readonly count: number },
): Uint8Array {
  const each = perWord(bits);
  const mask = 2 ** bits - 1;
  const shift = (nibbles ? 8 : 0) - 2 ** (bits - 1);
  const zeros = new Uint8Array(count * groups);
  for (let i = 0; i < zeros.length; i++) {
    const line = from + Math.floor(i / groups);
    const word = words[Math.floor(line / each) * groups + (i % groups)] as number;
    zeros[i] = ((word >>> (bits * (line % each))) & mask) + shift;
  }
  return zeros;
}
