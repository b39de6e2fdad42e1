// The measuring around a model that is larger than its memory, with a model that only counts.
import { describe, expect, it } from "vitest";
import { tableText } from "../table.ts";
import {
  measureStreaming,
  type StreamingSubject,
  streamingConfig,
  streamingSizes,
  streamingTable,
} from "./streaming.ts";

function subject(log: string[], fails = false): StreamingSubject & { now(): number } {
  let now = 0;
  let calls = 0;
  return {
    now: () => now,
    async readOnly() {
      log.push("read");
      now += 2;
    },
    async load() {
      log.push("load");
      now += 3;
      return {
        capacity: 5,
        expertBytes: 100,
        async next(ids) {
          log.push(`next ${ids}`);
          if (fails) throw new Error("no");
          now += ids.length;
          return ++calls;
        },
        counts: () => ({ requests: 10 * calls, hits: 4 * calls, bytesRead: 600 * calls }),
        async close() {
          log.push("close");
        },
      };
    },
    peak: () => 1_050_000_000,
  };
}
const options = { name: "lru", bytes: 4e9, memory: 1e9, prompt: [9, 8, 7], tokens: 2 };

describe("streaming", () => {
  it("times loading, the prompt and each token, and counts from the first token on", async () => {
    const log: string[] = [];
    const counting = subject(log);
    const report = await measureStreaming(counting, { ...options, clock: counting });
    expect(log).toEqual(["read", "read", "load", "next 9,8,7", "next 1", "next 2", "close"]);
    expect(report).toEqual({
      name: "lru",
      bytes: 4e9,
      memory: 1e9,
      capacity: 5,
      expertBytes: 100,
      read: 2,
      load: 3,
      prompt: 3,
      tokens: [1, 1],
      requests: 20,
      hits: 8,
      bytesRead: 1200,
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
    expect(text).toMatch(/lru: loading : reading the same bytes.*1\.5/);
    expect(() => streamingTable(streamingSizes.quick, [report, { ...report, ids: [1, 2, 4] }], { threads: 1 })).toThrow(
      RangeError,
    );
    expect(() => streamingTable(streamingSizes.quick, [], { threads: 1 })).toThrow(RangeError);
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
