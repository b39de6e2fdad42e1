// The measuring around a model that is larger than its memory, with a model that only counts.
import { describe, expect, it } from "vitest";
import type { Clock } from "../harness.ts";
import { tableText } from "../table.ts";
import {
  measureStreaming,
  type StreamingSubject,
  streamingConfig,
  streamingSizes,
  streamingTable,
} from "./streaming.ts";

function subject(log: string[], fails = false): StreamingSubject & Clock {
  let now = 0;
  let calls = 0;
  let loads = 0;
  return {
    now: () => now,
    cpu: () => now / 2,
    loadedBytes: 7e8,
    async readOnly() {
      log.push("read");
      now += 2;
    },
    async load() {
      log.push("load");
      now += loads++ === 0 ? 8 : 3;
      return {
        streamed: {
          capacity: 5,
          expertBytes: 100,
          counts: () => ({ requests: 10 * calls, hits: 4 * calls, bytesRead: 600 * calls }),
        },
        async next(ids) {
          log.push(`next ${ids}`);
          if (fails) throw new Error("no");
          now += ids.length;
          return ++calls;
        },
        async close() {
          log.push("close");
        },
      };
    },
    peak: () => 1_050_000_000,
  };
}
const options = { name: "lru", bytes: 4e9, memory: 1e9, prompt: [9, 8, 7], tokens: 2, loads: 3 };

describe("streaming", () => {
  it("times loading, the prompt and each token, and counts from the first token on", async () => {
    const log: string[] = [];
    const counting = subject(log);
    const report = await measureStreaming(counting, { ...options, clock: counting });
    const pair = ["read", "load"];
    expect(log).toEqual([
      "read",
      ...pair,
      "close",
      ...pair,
      "close",
      ...pair,
      "next 9,8,7",
      "next 1",
      "next 2",
      "close",
    ]);
    expect(report).toEqual({
      name: "lru",
      bytes: 4e9,
      memory: 1e9,
      streamed: { capacity: 5, expertBytes: 100, requests: 20, hits: 8, bytesRead: 1200 },
      loadedBytes: 7e8,
      readings: Array.from({ length: 3 }, () => ({ wall: 2, cpu: 1 })),
      loadings: [8, 3, 3].map((wall) => ({ wall, cpu: wall / 2 })),
      prompt: 3,
      tokens: [1, 1],
      peak: 1_050_000_000,
      ids: [1, 2, 3],
    });
    const table = streamingTable(streamingSizes.quick, [report, { ...report, name: "lfu", peak: 1.4e9 }], {
      threads: 2,
    });
    const text = tableText(table, {});
    expect(text).toContain("4.00 GB of weights in 1.00 GB of memory");
    expect(text).toMatch(/lru: experts that were there.*0\.4/);
    expect(text).toMatch(/lru: MB of peak memory over the bound.*50\.0/);
    expect(text).toMatch(/lfu: MB of peak memory over the bound.*400/);
    expect(text).toMatch(/lru: ms for the first loading.*8,?000/);
    expect(text).toMatch(/lru: loading : reading the same 700 MB = 1\.50? .*goal at most 2: reached/);
    expect(() => streamingTable(streamingSizes.quick, [report, { ...report, ids: [1, 2, 4] }], { threads: 1 })).toThrow(
      RangeError,
    );
    expect(() => streamingTable(streamingSizes.quick, [], { threads: 1 })).toThrow(RangeError);
  });

  it("compares all in memory with what is streamed", async () => {
    const counting = subject([]);
    const { streamed: _, memory: __, ...resident } = await measureStreaming(counting, { ...options, clock: counting });
    const only = { ...resident, name: "all", readings: [{ wall: 1 }], loadings: [{ wall: 2.1 }] };
    const text = tableText(streamingTable(streamingSizes.quick, [only], { threads: 1 }), {});
    expect(text).toContain("4.00 GB of weights: 4 layers");
    expect(text).not.toMatch(/peak|experts that were there|kept/);
    expect(text).toMatch(/all: loading : reading the same 700 MB = 2\.10? .*goal at most 2: missed/);
    const small = { ...only, loadedBytes: 4e6 };
    expect(tableText(streamingTable(streamingSizes.quick, [small], { threads: 1 }), {})).not.toContain("goal");
    expect(() => streamingTable(streamingSizes.quick, [{ ...only, loadings: [] }], { threads: 1 })).toThrow(RangeError);
  });

  it("closes a model that fails", async () => {
    const log: string[] = [];
    await expect(measureStreaming(subject(log, true), options)).rejects.toThrow("no");
    expect(log.at(-1)).toBe("close");
  });

  it("has a model four times its memory in mind", () => {
    for (const sizes of Object.values(streamingSizes)) {
      expect(streamingConfig(sizes)).toMatchObject({ model_type: "olmoe", num_experts: sizes.experts });
    }
  });
});
