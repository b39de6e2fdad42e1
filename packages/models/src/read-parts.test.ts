// Parts of files in few reads: which reads there are, that every byte arrives in its place, and what happens when a read fails.
import { describe, expect, it } from "vitest";
import type { Checkpoint } from "./model.ts";
import { type PlacedPart, readParts, readPlaced } from "./read-parts.ts";
import { type ByteSource, bytesSource } from "./safetensors.ts";

const byteAt = (i: number): number => (i * 31 + (i >>> 8) * 7) & 255;

interface Logged {
  readonly source: ByteSource;
  readonly reads: (readonly [from: number, to: number])[];
  under: number;
  most: number;
}

/** A file of `size` bytes that is read into buffers; `fails` at reads that begin there or later. */
function file(size: number, { fails = Number.POSITIVE_INFINITY, into = true } = {}): Logged {
  const bytes = Uint8Array.from({ length: size }, (_, i) => byteAt(i));
  const logged: Logged = { reads: [], under: 0, most: 0, source: bytesSource("a file", bytes) };
  const during = async <T>(from: number, to: number, body: () => T): Promise<T> => {
    logged.reads.push([from, to]);
    logged.most = Math.max(logged.most, ++logged.under);
    await new Promise((resolve) => setTimeout(resolve, 1));
    logged.under--;
    if (from >= fails) throw new Error("the disk is gone");
    return body();
  };
  const source: ByteSource = {
    name: "a file",
    size,
    read: (from, to) => during(from, to, () => bytes.slice(from, to)),
    ...(into
      ? {
          readInto(target: Uint8Array, from: number) {
            if (this !== source) throw new Error("called without its source");
            return during(from, from + target.length, () => target.set(bytes.subarray(from, from + target.length)));
          },
        }
      : {}),
  };
  return Object.assign(logged, { source });
}

/** A part, and what arrived of it. */
function part(source: ByteSource, from: number, to: number, direct = false): { part: PlacedPart; got: Uint8Array } {
  const got = new Uint8Array(to - from).fill(1);
  const put = (bytes: Uint8Array, at: number): void => got.set(bytes, at);
  return { part: { source, from, to, put, ...(direct ? { into: () => got } : {}) }, got };
}

const expected = (from: number, to: number): Uint8Array =>
  Uint8Array.from({ length: to - from }, (_, i) => byteAt(from + i));

describe("readPlaced", () => {
  for (const [what, options] of [
    ["read into buffers", {}],
    ["read otherwise", { into: false }],
  ] as const) {
    it(`puts every byte in its place, ${what}`, async () => {
      const size = 20_000_003;
      const { source, reads } = file(size, options);
      const other = file(1000, options);
      const ranges: [number, number, boolean?][] = [
        [7, 7],
        [size - 5, size],
        [3, 20],
        [20, 9_000_021],
        // Overlaps and repeats.
        [10, 30],
        [10, 30],
        [9_000_021, 9_000_022],
        [9_500_000, 9_500_100, true],
        [9_600_001, 19_000_000, true],
        [19_000_000, 19_000_017, true],
      ];
      const wanted = ranges.map(([from, to, direct]) => ({ from, to, ...part(source, from, to, direct) }));
      const from = { from: 1, to: 999, ...part(other.source, 1, 999) };
      await readPlaced([...wanted.slice(0, 4), from, ...wanted.slice(4)].map((one) => one.part));
      for (const one of [...wanted, from]) expect(Buffer.compare(one.got, expected(one.from, one.to))).toBe(0);
      for (const [start, end] of reads) expect(end - start).toBeLessThanOrEqual(2 ** 23);
      expect(other.reads).toEqual([[1, 999]]);
    });
  }

  it("reads neighbours together, with the few bytes between them, a few reads at a time", async () => {
    const logged = file(6_000_000);
    const small = Array.from({ length: 50 }, (_, i) => part(logged.source, 100 * i, 100 * i + 90).part);
    await readPlaced(small.toReversed());
    expect(logged.reads).toEqual([[0, 4990]]);
    logged.reads.length = 0;
    // Far away: a read of its own. Nothing to read: none.
    await readPlaced([
      small[0] as PlacedPart,
      part(logged.source, 3_000_000, 3_000_001).part,
      part(logged.source, 9, 9).part,
    ]);
    expect(logged.reads).toEqual([
      [0, 90],
      [3_000_000, 3_000_001],
    ]);
    logged.most = 0;
    await readPlaced([part(logged.source, 0, 6_000_000).part]);
    expect(logged.most).toBe(3);
    await readPlaced([]);
  });

  it("reads long parts straight to where they belong", async () => {
    const logged = file(600_000);
    const got = new Uint8Array(500_000);
    let views = 0;
    const put = (): void => expect.fail("copied");
    const into = (): Uint8Array => {
      views++;
      return got;
    };
    await readPlaced([{ source: logged.source, from: 50_000, to: 550_000, put, into }]);
    expect(views).toBeGreaterThan(0);
    expect(Buffer.compare(got, expected(50_000, 550_000))).toBe(0);
  });

  it("waits for all reads when one fails, and begins no more", async () => {
    const logged = file(20_000_000, { fails: 4_000_000 });
    const one = part(logged.source, 0, 20_000_000);
    await expect(readPlaced([one.part])).rejects.toThrow("the disk is gone");
    expect(logged.under).toBe(0);
    expect(logged.reads.length).toBeLessThan(10);
    await expect(
      readPlaced([{ ...part(file(10).source, 0, 10).part, put: () => expect.fail("no room") }]),
    ).rejects.toThrow("no room");
  });

  it("looks once whether a file was changed, when everything is read", async () => {
    const { source } = file(9_000_000);
    const log: string[] = [];
    const watched: ByteSource = {
      ...source,
      readInto: () => Promise.reject(new Error("looks each time")),
      unwatched: {
        async fill(target, from) {
          log.push("fill");
          target.set(expected(from, from + target.length));
        },
        async unchanged() {
          log.push("look");
          throw new Error("it was changed");
        },
      },
    };
    await expect(readPlaced([part(watched, 0, 9_000_000).part])).rejects.toThrow("it was changed");
    expect(log.indexOf("look")).toBe(log.length - 1);
    expect(log.length).toBeGreaterThan(5);
  });
});

describe("readParts", () => {
  it("reads part by part where the checkpoint cannot do better", async () => {
    const bytes = expected(0, 10_000_000);
    const ranges: (readonly number[])[] = [];
    const checkpoint: Checkpoint = {
      config: {},
      names: ["a"],
      stored: () => ({ shape: [bytes.length], dtype: "U8", bytes: bytes.length }),
      async read(_, [from, to] = [0, bytes.length]) {
        ranges.push([from, to]);
        return bytes.slice(from, to);
      },
    };
    const got = new Uint8Array(9_000_000);
    await readParts(checkpoint, [{ name: "a", from: 5, to: 9_000_005, put: (read, at) => got.set(read, at) }]);
    expect(Buffer.compare(got, bytes.subarray(5, 9_000_005))).toBe(0);
    expect(ranges).toEqual([
      [5, 8_388_613],
      [8_388_613, 9_000_005],
    ]);
  });
});
