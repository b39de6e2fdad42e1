// From token streams to batches: training windows in a seeded order, and held-out windows that count every byte once.
import { UnsupportedError } from "@switchyard/core";
import { hostRandom, shuffled } from "./corpus.ts";

/** Host data of one batch, both lists row-major. */
export interface TokenBatch {
  readonly shape: readonly [rows: number, length: number];
  readonly ids: Int32Array;
  /** The next token of each position; -1 is not counted. */
  readonly labels: Int32Array;
}

/** A text in tokens: each block preceded by the separator, so that its first token has something to follow. */
export function tokenStream(blocks: readonly Int32Array[], separator: number): Int32Array {
  const stream = new Int32Array(blocks.reduce((sum, block) => sum + block.length + 1, 0));
  let at = 0;
  for (const block of blocks) {
    stream[at] = separator;
    stream.set(block, at + 1);
    at += block.length + 1;
  }
  return stream;
}

const mixed = (...parts: number[]): number =>
  parts.reduce((hash, part) => Math.imul(hash ^ part, 0x9e3779b1) + 0x7f4a7c15, 17);

export interface TrainingOrder {
  readonly rows: number;
  readonly length: number;
  readonly seed: number;
}

/**
 * Training batches by index. Rows go round the domains, so every domain weighs the same; within a domain every window is used
 * once per epoch, in a new order and with a new offset each time. The same index and seed give the same batch.
 */
export function trainingBatches(streams: readonly Int32Array[], order: TrainingOrder): (index: number) => TokenBatch {
  const { rows, length, seed } = order;
  if (streams.length === 0 || streams.some((stream) => stream.length < 2)) {
    throw new UnsupportedError("training needs at least one domain, and two tokens in each");
  }
  const epochs = new Map<number, { epoch: number; windows: Int32Array; offset: number }>();
  const windowsOf = (domain: number, epoch: number, stream: Int32Array) => {
    const known = epochs.get(domain);
    if (known?.epoch === epoch) return known;
    const random = hostRandom(mixed(seed, domain, epoch));
    const count = Math.max(1, Math.floor((stream.length - 1) / length) - 1); // one window of slack for the offset
    const slack = Math.max(0, stream.length - 1 - count * length);
    const fresh = { epoch, windows: shuffled(count, random), offset: Math.floor(random() * (slack + 1)) };
    epochs.set(domain, fresh);
    return fresh;
  };
  return (index) => {
    const ids = new Int32Array(rows * length);
    const labels = new Int32Array(rows * length).fill(-1);
    for (let row = 0; row < rows; row++) {
      const turn = index * rows + row;
      const domain = turn % streams.length;
      const stream = streams[domain] ?? ids;
      const count = Math.max(1, Math.floor((stream.length - 1) / length) - 1);
      const use = Math.floor(turn / streams.length);
      const { windows, offset } = windowsOf(domain, Math.floor(use / count), stream);
      const from = offset + (windows[use % count] ?? 0) * length;
      const to = Math.min(from + length, stream.length - 1);
      ids.set(stream.subarray(from, to), row * length);
      labels.set(stream.subarray(from + 1, to + 1), row * length);
    }
    return { shape: [rows, length], ids, labels };
  };
}

/**
 * Windows over held-out blocks. The first window of a block counts all its tokens; each further one begins with the last quarter of the
 * window before and counts the rest, so that every token but the separators is predicted once, with context where the block has it.
 */
export function heldOutWindows(
  blocks: readonly Int32Array[],
  separator: number,
  length: number,
): readonly TokenBatch[] {
  const context = Math.floor(length / 4);
  return blocks.flatMap((block) => {
    const stream = tokenStream([block], separator);
    const windows: TokenBatch[] = [];
    let counted = 0; // tokens of the block predicted so far
    while (counted < block.length) {
      const from = Math.max(0, counted - context);
      const to = Math.min(from + length, block.length);
      const ids = new Int32Array(length);
      const labels = new Int32Array(length).fill(-1);
      ids.set(stream.subarray(from, to));
      labels.set(stream.subarray(counted + 1, to + 1), counted - from);
      windows.push({ shape: [1, length], ids, labels });
      counted = to;
    }
    return windows;
  });
}

/** Joins windows of one length into batches of at most `rows` rows. */
export function inBatches(windows: readonly TokenBatch[], rows: number): readonly TokenBatch[] {
  return Array.from({ length: Math.ceil(windows.length / rows) }, (_, i) => {
    const part = windows.slice(i * rows, (i + 1) * rows);
    const length = part[0]?.shape[1] ?? 0;
    const ids = new Int32Array(part.length * length);
    const labels = new Int32Array(part.length * length);
    for (const [row, window] of part.entries()) {
      ids.set(window.ids, row * length);
      labels.set(window.labels, row * length);
    }
    return { shape: [part.length, length], ids, labels };
  });
}

/** `count` windows spread evenly over the list. */
export function spreadOut<T>(items: readonly T[], count: number): readonly T[] {
  if (items.length <= count) return items;
  return Array.from({ length: count }, (_, i) => items[Math.floor(((i + 0.5) * items.length) / count)] as T);
}

/** A batch with some of its counted tokens replaced. */
export interface NoisedBatch extends TokenBatch {
  /** 1 = replaced: [rows, length]. */
  readonly replaced: Uint8Array;
}

/**
 * The batch with a share of its counted tokens replaced by others of its counted tokens, drawn with the seed; the labels stay. At least one
 * is replaced where there are two different ones.
 */
export function noised(
  batch: TokenBatch,
  { share, seed }: { readonly share: number; readonly seed: number },
): NoisedBatch {
  const random = hostRandom(mixed(seed, batch.ids.length));
  const ids = batch.ids.slice();
  const replaced = new Uint8Array(ids.length);
  const counted = Array.from(ids, (_, i) => i).filter((i) => (batch.labels[i] ?? -1) >= 0);
  const order = shuffled(counted.length, random);
  for (const place of order.subarray(0, Math.max(1, Math.round(share * counted.length)))) {
    const at = counted[place] ?? 0;
    const others = counted.filter((i) => batch.ids[i] !== batch.ids[at]);
    const other = others[Math.floor(random() * others.length)];
    if (other === undefined) continue;
    ids[at] = batch.ids[other] ?? 0;
    replaced[at] = 1;
  }
  return { ...batch, ids, replaced };
}

/** Bytes of the text that the counted tokens of a batch stand for. */
export function countedBytes(batch: TokenBatch, tokenBytes: Uint16Array): number {
  return batch.labels.reduce((sum, label) => sum + (label < 0 ? 0 : (tokenBytes[label] ?? 0)), 0);
}

/** Tokens of a batch that are counted. */
export function countedTokens(batch: TokenBatch): number {
  return batch.labels.reduce((sum, label) => sum + (label < 0 ? 0 : 1), 0);
}
