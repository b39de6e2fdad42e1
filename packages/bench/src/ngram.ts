// An order-n byte model with Witten-Bell smoothing: the yardstick a trained model has to beat.
// Witten and Bell, "The zero-frequency problem" (1991), interpolated form; order n predicts a byte from the n bytes before it.

/** Counts of one context length: sorted distinct keys (context * 256 + byte) and the running total of their counts. */
interface Level {
  readonly keys: Float64Array; // [distinct]
  readonly totals: Float64Array; // [distinct + 1]
}

export interface ByteModel {
  readonly order: number;
  readonly levels: readonly Level[]; // levels[n]: contexts of n bytes
}

const maxOrder = 5; // six bytes make 48 bits, the most a double counts exactly in whole bytes

function count(blocks: readonly Uint8Array[], order: number): Level {
  const size = blocks.reduce((sum, block) => sum + Math.max(0, block.length - order), 0);
  const all = new Float64Array(size);
  const span = 256 ** order; // number of contexts
  let at = 0;
  for (const block of blocks) {
    let context = 0;
    for (let i = 0; i < block.length; i++) {
      const byte = block[i] ?? 0;
      if (i >= order) all[at++] = context * 256 + byte;
      context = (context * 256 + byte) % span;
    }
  }
  all.sort();
  let distinct = 0;
  for (let i = 0; i < size; i++) if (i === 0 || all[i] !== all[i - 1]) distinct++;
  const keys = new Float64Array(distinct);
  const totals = new Float64Array(distinct + 1);
  let slot = -1;
  for (let i = 0; i < size; i++) {
    if (i === 0 || all[i] !== all[i - 1]) keys[++slot] = all[i] ?? 0;
    totals[slot + 1] = i + 1;
  }
  return { keys, totals };
}

/** First index whose key is not less than `key`. */
function lowerBound(keys: Float64Array, key: number): number {
  let low = 0;
  let high = keys.length;
  while (low < high) {
    const middle = (low + high) >>> 1;
    if ((keys[middle] ?? 0) < key) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** Counts contexts of 0 to `order` bytes (at most 5) in each block; contexts do not cross from one block to the next. */
export function byteModel(blocks: readonly Uint8Array[], order: number): ByteModel {
  if (!Number.isInteger(order) || order < 0 || order > maxOrder) {
    throw new RangeError(`byteModel: order ${order} is not an integer from 0 to ${maxOrder}`);
  }
  return { order, levels: Array.from({ length: order + 1 }, (_, n) => count(blocks, n)) };
}

/**
 * P(byte | the bytes before it), with contexts of up to `order` bytes:
 * P_n = (count(h, byte) + T(h) P_{n-1}) / (N(h) + T(h)), where h is the last n bytes, N(h) how often it occurred and
 * T(h) how many different bytes followed it; below order 0 stands 1/256, and a context never seen is passed over.
 */
export function byteProbability(model: ByteModel, block: Uint8Array, at: number, order: number = model.order): number {
  const byte = block[at] ?? 0;
  let p = 1 / 256;
  let context = 0;
  let scale = 1;
  for (let n = 0; n <= Math.min(order, model.order, at); n++) {
    if (n > 0) {
      context += (block[at - n] ?? 0) * scale;
      scale *= 256;
    }
    const level = model.levels[n];
    if (level === undefined) break;
    const { keys, totals } = level;
    const from = lowerBound(keys, context * 256);
    const to = lowerBound(keys, context * 256 + 256);
    if (from === to) break; // a longer context that contains an unseen one is unseen too
    const seen = (totals[to] ?? 0) - (totals[from] ?? 0);
    const slot = lowerBound(keys, context * 256 + byte);
    const hits = slot < to && keys[slot] === context * 256 + byte ? (totals[slot + 1] ?? 0) - (totals[slot] ?? 0) : 0;
    p = (hits + (to - from) * p) / (seen + to - from);
  }
  return p;
}

/** Bits per byte of the model over the blocks; 0 for no text. */
export function byteModelBits(model: ByteModel, blocks: readonly Uint8Array[], order: number = model.order): number {
  let bits = 0;
  let bytes = 0;
  for (const block of blocks) {
    for (let i = 0; i < block.length; i++) bits -= Math.log2(byteProbability(model, block, i, order));
    bytes += block.length;
  }
  return bytes === 0 ? 0 : bits / bytes;
}
