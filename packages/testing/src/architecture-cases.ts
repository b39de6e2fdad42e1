// What every family of checkpoints owes to generation and decoding, as data: cases that throw. testArchitecture runs them in vitest. Whether
// the numbers are those of the original is another question, answered by recorded outputs.
import { dispose, type Engine, type Tensor } from "@switchyard/core";

/** The part of a cache that is used. */
export interface ArchitectureCache {
  readonly length: number;
  reorder(rows: readonly number[]): void;
  truncate(length: number): void;
  dispose(): void;
}

/** The part of a `LanguageModel` of @switchyard/models that is used; `Cache` is the model's own kind. */
export interface ArchitectureModel<Cache extends ArchitectureCache> {
  readonly vocabulary: number;
  /** ids [rows, sequence] i32 -> logits [rows, vocabulary] of the last position, or of "all" [rows, sequence, vocabulary]. */
  step(
    ids: Tensor,
    options: {
      readonly cache?: Cache;
      readonly padding?: readonly number[];
      readonly positions?: "last" | "all";
    },
  ): Promise<Tensor>;
  newCache(batch: number): Cache;
}

export interface ArchitectureSuite<Cache extends ArchitectureCache> {
  readonly name: string;
  readonly engine: Engine;
  /** Loads the model on the engine; `close` frees all of it. Called for every case. */
  open(engine: Engine): Promise<{ readonly model: ArchitectureModel<Cache>; close(): Promise<void> }>;
  /** Ten ids or more, and fewer than the context minus 8. */
  readonly prompt: readonly number[];
  /** Largest difference of logits in parts of the largest one; default 1e-5, for float32. */
  readonly tolerance?: number;
}

export interface ArchitectureCase {
  readonly name: string;
  run(): Promise<void>;
}

type Rows = readonly (readonly number[])[];

/** Two ways to the same logits; throws where they differ. */
type Compare = (found: Float64Array | undefined, expected: Float64Array, what: string) => void;

interface Bench<Cache extends ArchitectureCache> {
  readonly model: ArchitectureModel<Cache>;
  readonly prompt: readonly number[];
  /** Logits of each row. */
  step(rows: Rows, options?: Parameters<ArchitectureModel<Cache>["step"]>[1]): Promise<Float64Array[]>;
  /** Logits of the last position of a sequence that is run alone, without a cache. */
  alone(ids: readonly number[]): Promise<Float64Array>;
  readonly same: Compare;
  /** Cases dispose of theirs; what a case that throws leaves is freed too. */
  newCache(batch: number): Cache;
}

/** The largest difference, in parts of the largest number. */
function apart(found: Float64Array, expected: Float64Array): number {
  let most = 0;
  let top = 1;
  for (const [i, x] of expected.entries()) {
    const difference = Math.abs((found[i] ?? Number.NaN) - x);
    most = Math.max(most, difference);
    top = Math.max(top, Math.abs(x));
  }
  return most / top;
}

/** The case of every row by itself after a call for several. */
async function sameAsAlone<Cache extends ArchitectureCache>(
  { same, alone }: Bench<Cache>,
  found: readonly Float64Array[],
  sequences: Rows,
  what: string,
): Promise<void> {
  for (const [i, ids] of sequences.entries()) same(found[i], await alone(ids), `${what}, row ${i}`);
}

async function padded<Cache extends ArchitectureCache>(bench: Bench<Cache>): Promise<void> {
  const { model, prompt } = bench;
  const sequences = [prompt, prompt.slice(0, 1), prompt.slice(2, 9)].map((ids) => [...ids]);
  const padding = sequences.map((ids) => prompt.length - ids.length);
  const cache = bench.newCache(3);
  let rows: number[][] = sequences.map((ids, i) => [
    ...new Array<number>(padding[i] ?? 0).fill(unused(prompt)),
    ...ids,
  ]);
  for (let token = 0; token < 5; token++) {
    await sameAsAlone(bench, await bench.step(rows, { cache, padding }), sequences, `after ${token} tokens`);
    rows = sequences.map((ids, i) => [(7 * token + 3 * i + (ids[0] ?? 0)) % model.vocabulary]);
    for (const [i, ids] of sequences.entries()) ids.push(...(rows[i] ?? []));
  }
}

const chunks =
  (size: number) =>
  async <Cache extends ArchitectureCache>({ prompt, step, newCache, same }: Bench<Cache>): Promise<void> => {
    const [whole = new Float64Array()] = await step([prompt], { positions: "all" });
    const cache = newCache(1);
    const parts: number[] = [];
    for (let at = 0; at < prompt.length; at += size) {
      const [found = []] = await step([prompt.slice(at, at + size)], { cache, positions: "all" });
      parts.push(...Array.from(found));
    }
    if (cache.length !== prompt.length)
      throw new Error(`the cache holds ${cache.length} positions, not ${prompt.length}`);
    same(Float64Array.from(parts), whole, `chunks of ${size}`);
  };

async function cut<Cache extends ArchitectureCache>({
  prompt,
  step,
  alone,
  newCache,
  same,
}: Bench<Cache>): Promise<void> {
  const cache = newCache(1);
  await step([prompt], { cache });
  await step([prompt.slice(3, 6)], { cache });
  for (const length of [prompt.length, 5]) {
    cache.truncate(length);
    if (cache.length !== length) throw new Error(`cut to ${length}, the cache holds ${cache.length} positions`);
    const next = prompt.slice(1, 4);
    const [found] = await step([next], { cache });
    same(found, await alone([...prompt.slice(0, length), ...next]), `cut to ${length}`);
  }
}

async function moved<Cache extends ArchitectureCache>(bench: Bench<Cache>): Promise<void> {
  const { prompt, step, newCache } = bench;
  let sequences: Rows = [prompt.slice(0, 5), prompt.slice(5, 10)];
  const cache = newCache(2);
  await step(sequences, { cache });
  for (const order of [[1, 0], [0, 0, 1], [2]]) {
    cache.reorder(order);
    const next = order.map((_, i) => [prompt[i + 3] ?? 0]);
    const found = await step(next, { cache });
    sequences = order.map((row, i) => [...(sequences[row] ?? []), ...(next[i] ?? [])]);
    await sameAsAlone(bench, found, sequences, `rows ${order}`);
  }
}

async function causal<Cache extends ArchitectureCache>({ model, prompt, step, same }: Bench<Cache>): Promise<void> {
  const earlier = (prompt.length - 1) * model.vocabulary;
  const [first = new Float64Array()] = await step([prompt], { positions: "all" });
  const [second = new Float64Array()] = await step([[...prompt.slice(0, -1), unused(prompt)]], { positions: "all" });
  same(second.slice(0, earlier), first.slice(0, earlier), "the last token was changed");
  if (apart(second.slice(earlier), first.slice(earlier)) < 1e-4) {
    throw new Error("the last token was changed, and the logits at its position stay as they were");
  }
}

async function lastOfAll<Cache extends ArchitectureCache>({ model, prompt, step, same }: Bench<Cache>): Promise<void> {
  const rows = [prompt, [...prompt].reverse()];
  const all = await step(rows, { positions: "all" });
  const last = await step(rows);
  for (const [i, found] of last.entries()) {
    same(found, all[i]?.slice(-model.vocabulary) ?? new Float64Array(), `row ${i}`);
  }
}

/** An id that the prompt lacks. */
const unused = (ids: readonly number[]): number => {
  let id = 0;
  while (ids.includes(id)) id++;
  return id;
};

type Body = <Cache extends ArchitectureCache>(bench: Bench<Cache>) => Promise<void>;
const bodies: readonly (readonly [name: string, body: Body])[] = [
  ["the last position's logits are those of all positions", lastOfAll],
  ["no position looks at later tokens", causal],
  ["a prompt token by token equals the whole", chunks(1)],
  ["a prompt in chunks of 4 equals the whole", chunks(4)],
  ["rows of a padded batch equal each alone, at the prompt and token by token", padded],
  ["a cache that was cut goes on as if the rest had never been", cut],
  ["rows of a cache can be swapped, doubled and dropped", moved],
];

/**
 * The cases for a model. Each loads it, and fails where tensors are left alive after the cache and the model were freed.
 *
 * @example for (const { name, run } of architectureCases(suite)) await run();
 */
export function architectureCases<Cache extends ArchitectureCache>(
  suite: ArchitectureSuite<Cache>,
): ArchitectureCase[] {
  const { engine, prompt, tolerance = 1e-5 } = suite;
  const run = async (body: Body): Promise<void> => {
    if (prompt.length < 10) throw new Error(`the suite needs a prompt of at least 10 ids, found ${prompt.length}`);
    const before = engine.live();
    const { model, close } = await suite.open(engine);
    const caches: Cache[] = [];
    try {
      const step: Bench<Cache>["step"] = async (rows, options = {}) => {
        const ids = engine.tensor(Int32Array.from(rows.flat()), [rows.length, rows[0]?.length ?? 0]);
        try {
          const logits = await model.step(ids, options);
          const data = Float64Array.from(await logits.data());
          dispose(logits);
          const size = data.length / rows.length;
          return rows.map((_, i) => data.slice(i * size, (i + 1) * size));
        } finally {
          dispose(ids);
        }
      };
      await body({
        model,
        prompt,
        step,
        async alone(ids) {
          const [logits = new Float64Array()] = await step([ids]);
          return logits;
        },
        same(found, expected, what) {
          if (found?.length !== expected.length || expected.length === 0) {
            throw new Error(`${what}: ${found?.length ?? 0} logits, expected ${expected.length}`);
          }
          const difference = apart(found, expected);
          if (!(difference <= tolerance)) {
            throw new Error(`${what}: logits differ by ${difference.toExponential(2)}, allowed ${tolerance}`);
          }
        },
        newCache(batch) {
          const cache = model.newCache(batch);
          caches.push(cache);
          return cache;
        },
      });
    } finally {
      for (const cache of caches) cache.dispose();
      await close();
    }
    const left = engine.live() - before;
    if (left !== 0) throw new Error(`${left} tensors were left alive`);
  };
  return bodies.map(([name, body]) => ({ name, run: () => run(body) }));
}
