// The suite of checkpoint families on a model that only sums up its ids, and on such models with one thing wrong each.
import { type Engine, engine, type Tensor } from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import { describe, expect, it } from "vitest";
import { type ArchitectureCache, type ArchitectureModel, architectureCases } from "./architecture-cases.ts";
import { testArchitecture } from "./test-architecture.ts";

const vocabulary = 16;
const prompt = [5, 3, 8, 1, 9, 2, 7, 4, 6, 0, 11, 3];

interface Sums extends ArchitectureCache {
  /** Ids of each row, padding included. */
  rows: number[][];
}

/** What is wrong with a model. */
interface Fault {
  readonly looksAhead?: boolean;
  readonly seesPadding?: boolean;
  readonly forgetsPast?: boolean;
  readonly ignoresCut?: boolean;
  readonly ignoresOrder?: boolean;
  readonly wrongLast?: boolean;
  readonly deaf?: boolean;
  readonly leaks?: boolean;
}

/** Logits follow a sum of all ids so far, in which older ones weigh less. */
function sums(on: Engine, fault: Fault): ArchitectureModel<Sums> {
  const logits = (ids: readonly number[]): number[] => {
    const sum = fault.deaf ? 1 : ids.reduce((s, id) => 0.7 * s + (id + 1) / 8, 0);
    return Array.from({ length: vocabulary }, (_, v) => sum * ((v % 3) - 1) + Math.cos(v));
  };
  return {
    vocabulary,
    newCache(batch) {
      const cache: Sums = {
        rows: Array.from({ length: batch }, () => []),
        get length() {
          return cache.rows[0]?.length ?? 0;
        },
        reorder(rows) {
          const from = fault.ignoresOrder ? rows.map((_, i) => Math.min(i, cache.rows.length - 1)) : rows;
          cache.rows = from.map((row) => [...(cache.rows[row] ?? [])]);
        },
        truncate(length) {
          if (fault.ignoresCut) Object.defineProperty(cache, "length", { value: length, configurable: true });
          else cache.rows = cache.rows.map((ids) => ids.slice(0, length));
        },
        dispose: () => undefined,
      };
      return cache;
    },
    async step(ids, { cache, padding = [], positions = "last" }) {
      const [batch = 0, sequence = 0] = ids.shape;
      const data = Array.from(await ids.data());
      const all = Array.from({ length: batch }, (_, row) => {
        const past = fault.forgetsPast ? [] : (cache?.rows[row] ?? []);
        const whole = [...(cache?.rows[row] ?? []), ...data.slice(row * sequence, (row + 1) * sequence)];
        const begin = whole.length - sequence;
        if (cache) cache.rows[row] = whole;
        const skipped = fault.seesPadding ? 0 : (padding[row] ?? 0);
        const seen = [...past, ...whole.slice(begin)];
        return Array.from({ length: sequence }, (_, t) =>
          logits(seen.slice(skipped, fault.looksAhead ? seen.length : past.length + t + 1)),
        );
      });
      if (fault.leaks) on.tensor(Float32Array.of(1), [1]);
      const last = all.map((rows) => rows.at(fault.wrongLast ? 0 : -1) ?? []);
      const made: Tensor =
        positions === "all"
          ? on.tensor(Float64Array.from(all.flat(2)), [batch, sequence, vocabulary])
          : on.tensor(Float64Array.from(last.flat()), [batch, vocabulary]);
      return made;
    },
  };
}

const suite = (fault: Fault, on = engine(cpu())) => ({
  name: "sums",
  engine: on,
  open: async (given: Engine) => ({ model: sums(given, fault), close: async () => undefined }),
  prompt,
});

testArchitecture(suite({}));
testArchitecture({ ...suite({}, engine(cpu({ precision: 64 }))), name: "sums in float64", tolerance: 1e-13 });

describe("the suite of architectures can fail", () => {
  const failures = async (fault: Fault): Promise<string[]> => {
    const failed: string[] = [];
    for (const { name, run } of architectureCases(suite(fault))) {
      await run().catch((error: Error) => failed.push(`${name}: ${error.message}`));
    }
    return failed;
  };

  it.each<[string, Fault, RegExp]>([
    [
      "looks ahead",
      { looksAhead: true },
      /^no position looks at later tokens: the last token was changed: logits differ by/,
    ],
    ["sees padding", { seesPadding: true }, /^rows of a padded batch .*: after 0 tokens, row 1: logits differ by/],
    [
      "forgets the past",
      { forgetsPast: true },
      /^a prompt token by token equals the whole: chunks of 1: logits differ by/,
    ],
    ["ignores a cut", { ignoresCut: true }, /^a cache that was cut .*: cut to 12: logits differ by/],
    ["ignores an order", { ignoresOrder: true }, /^rows of a cache .*: rows 1,0, row 0: logits differ by/],
    ["answers for the first position", { wrongLast: true }, /^the last position's logits .*: row 0: logits differ by/],
    [
      "hears nothing",
      { deaf: true },
      /^no position .*: the last token was changed, and the logits .* stay as they were/,
    ],
    ["leaks", { leaks: true }, /^a prompt in chunks of 4 equals the whole: \d tensors were left alive/],
  ])("where a model %s", async (_, fault, message) => {
    expect(await failures({})).toEqual([]);
    const failed = await failures(fault);
    expect(
      failed.find((line) => message.test(line)),
      failed.join("\n"),
    ).toBeDefined();
  });

  it("for numbers that are none, for too few of them, and for a prompt that is too short", async () => {
    const on = engine(cpu());
    const broken = (change: (x: number[]) => number[]) => ({
      ...suite({}, on),
      open: async (given: Engine) => {
        const model = sums(given, {});
        const step: typeof model.step = async (ids, options) => {
          const logits = await model.step(ids, options);
          const data = change(Array.from(await logits.data()));
          logits.dispose();
          return given.tensor(Float64Array.from(data), [data.length]);
        };
        return { model: { ...model, step }, close: async () => undefined };
      },
    });
    const [first] = architectureCases(broken((x) => x.map(() => Number.NaN)));
    await expect(first?.run()).rejects.toThrow("row 0: logits differ by NaN");
    const [second] = architectureCases(broken(() => []));
    await expect(second?.run()).rejects.toThrow("row 0: 0 logits, expected 0");
    const [third] = architectureCases({ ...suite({}, on), prompt: [1, 2, 3] });
    await expect(third?.run()).rejects.toThrow("at least 10 ids, found 3");
    expect(on.live()).toBe(0);
  });
});
