// Every token once: over epochs of training, and over the held-out windows, for sizes that do not divide.
import { describe, expect, test } from "vitest";
import {
  countedBytes,
  countedTokens,
  heldOutWindows,
  inBatches,
  noised,
  spreadOut,
  type TokenBatch,
  tokenStream,
  trainingBatches,
} from "./batches.ts";

const range = (from: number, to: number): Int32Array => Int32Array.from({ length: to - from }, (_, i) => from + i);
const separator = 0;

test("a stream puts the separator before every block", () => {
  expect([...tokenStream([Int32Array.of(5, 6), new Int32Array(0), Int32Array.of(7)], 9)]).toEqual([9, 5, 6, 9, 9, 7]);
});

describe("trainingBatches", () => {
  const streams = [range(0, 1000), range(1000, 1333), range(2000, 2100)];
  const order = { rows: 5, length: 7, seed: 11 };

  test("labels are the next tokens, rows go round the domains", () => {
    const batch = trainingBatches(streams, order);
    for (const index of [0, 1, 2, 40, 3]) {
      const { ids, labels, shape } = batch(index);
      const [rows, length] = shape;
      expect(shape).toEqual([5, 7]);
      for (let row = 0; row < rows; row++) {
        expect(Math.floor((ids[row * length] ?? 0) / 1000)).toBe((index * rows + row) % 3);
        for (let i = row * length; i < (row + 1) * length; i++) {
          expect(labels[i]).toBe((ids[i] ?? 0) + 1);
          if (i > row * length) expect(ids[i]).toBe((ids[i - 1] ?? 0) + 1);
        }
      }
    }
  });

  test("within an epoch no window comes twice, and nearly all of the text is used", () => {
    const batch = trainingBatches([range(0, 1000)], order);
    const windows = Math.floor(999 / 7) - 1;
    const starts = Array.from({ length: Math.ceil(windows / 5) }, (_, i) => {
      const { ids } = batch(i);
      return [0, 1, 2, 3, 4].map((row) => ids[row * 7] ?? -1);
    })
      .flat()
      .slice(0, windows);
    expect(new Set(starts).size).toBe(windows);
    expect(windows * 7).toBeGreaterThan(980);
  });

  test("the same index and seed give the same batch, in any order of asking; another seed another", () => {
    const one = trainingBatches(streams, order);
    const two = trainingBatches(streams, order);
    const late = two(500);
    expect(two(3)).toEqual(one(3));
    expect(one(500)).toEqual(late);
    expect(trainingBatches(streams, { ...order, seed: 12 })(3)).not.toEqual(one(3));
  });

  test("a text shorter than a window leaves the rest uncounted", () => {
    const { ids, labels } = trainingBatches([Int32Array.of(4, 5, 6)], { rows: 2, length: 8, seed: 0 })(0);
    expect([...ids.subarray(0, 3)]).toEqual([4, 5, 0]);
    expect([...labels.subarray(0, 8)]).toEqual([5, 6, -1, -1, -1, -1, -1, -1]);
    expect(() => trainingBatches([Int32Array.of(4)], { rows: 1, length: 8, seed: 0 })).toThrow("two tokens in each");
  });
});

describe.each([1, 2, 3, 7, 16, 100])("held-out windows of %i", (length) => {
  const blocks = [range(1, 60), range(100, 101), new Int32Array(0), range(200, 233)];
  const windows = heldOutWindows(blocks, separator, length);

  test("predict every token of every block once, in order", () => {
    const counted = windows.flatMap(({ labels }) => [...labels].filter((label) => label >= 0));
    expect(counted).toEqual(blocks.flatMap((block) => [...block]));
  });

  test("each token follows the one before it, with a quarter of a window of context where the block has it", () => {
    for (const { ids, labels } of windows) {
      for (let i = 0; i < length; i++) {
        const label = labels[i] ?? -1;
        if (label < 0) continue;
        const first = [1, 100, 200].includes(label);
        expect(ids[i]).toBe(first ? separator : label - 1);
        if (ids[0] !== separator) expect(i).toBeGreaterThanOrEqual(Math.floor(length / 4));
      }
    }
  });

  test("batches hold the same windows", () => {
    const batches = inBatches(windows, 4);
    expect(batches.flatMap(({ ids }) => [...ids])).toEqual(windows.flatMap(({ ids }) => [...ids]));
    expect(batches.reduce((sum, batch) => sum + countedTokens(batch), 0)).toBe(59 + 1 + 33);
    expect(batches.every(({ shape }, i) => shape[0] === 4 || i === batches.length - 1)).toBe(true);
  });
});

test("bytes are those of the counted labels", () => {
  const batch: TokenBatch = { shape: [1, 3], ids: Int32Array.of(0, 1, 2), labels: Int32Array.of(-1, 2, 1) };
  expect(countedBytes(batch, Uint16Array.of(9, 3, 4))).toBe(7);
  expect(countedTokens(batch)).toBe(2);
});

test("spreadOut takes from everywhere", () => {
  expect(spreadOut([...range(0, 10)], 3)).toEqual([1, 5, 8]);
  expect(spreadOut([1, 2], 3)).toEqual([1, 2]);
});

describe("noised", () => {
  const batch: TokenBatch = {
    shape: [2, 10],
    ids: Int32Array.from({ length: 20 }, (_, i) => i + 1),
    labels: Int32Array.from({ length: 20 }, (_, i) => (i % 10 < 8 ? i + 2 : -1)),
  };

  test("replaces the share of the counted tokens by others of them, and keeps the labels", () => {
    const { ids, labels, replaced } = noised(batch, { share: 0.25, seed: 3 });
    expect(labels).toBe(batch.labels);
    expect(replaced.reduce((sum, x) => sum + x, 0)).toBe(4); // of 16
    for (const [i, id] of ids.entries()) {
      expect(id !== batch.ids[i]).toBe(replaced[i] === 1);
      if (replaced[i] === 1) expect([batch.labels[i], batch.labels[id - 1]]).not.toContain(-1);
    }
  });

  test("the same seed replaces the same tokens, another one others", () => {
    expect(noised(batch, { share: 0.25, seed: 3 })).toEqual(noised(batch, { share: 0.25, seed: 3 }));
    expect(noised(batch, { share: 0.25, seed: 4 }).ids).not.toEqual(noised(batch, { share: 0.25, seed: 3 }).ids);
  });

  test("a text of one word stays as it is", () => {
    const same = { ...batch, ids: new Int32Array(20).fill(7) };
    expect(noised(same, { share: 0.5, seed: 1 })).toEqual({ ...same, replaced: new Uint8Array(20) });
  });
});
