// What the tests of strategies share: a model whose logits are any function of the sequence, and ways to collect what is generated.
import { type Engine, linear, random, ShapeError, type Tensor } from "@switchyard/core";
import type { RoutingOverride } from "@switchyard/core/moe";
import { type BatchToken, type Ending, type GeneratedToken, type GenerateOptions, generate } from "../generate.ts";
import type { ForwardOptions, KvCache } from "../model.ts";
import type { DecodingModel, DecodingOptions, DecodingRow, DecodingStrategy } from "./strategy.ts";

export interface Script {
  readonly vocabulary?: number;
  readonly context?: number;
  readonly layers?: number;
  /** false: a model without routers. */
  readonly routers?: boolean;
  /** Logits after a sequence, under an override. */
  readonly say: (sequence: readonly number[], override: RoutingOverride | undefined) => readonly number[];
  /** Hidden state of the last token of a sequence, two numbers, after so many layers. */
  readonly hidden?: (sequence: readonly number[], layers: number) => readonly number[];
  /** Called before each pass with the ids of its rows; may throw. */
  readonly onStep?: (rows: readonly (readonly number[])[], options: ForwardOptions) => void;
}

const width = 2;

class ScriptedCache implements KvCache {
  rows: number[][];
  readonly #engine: Engine;
  /** Something to leak. */
  #memory: Tensor[] = [];
  constructor(engine: Engine, batch: number) {
    this.#engine = engine;
    this.rows = Array.from({ length: batch }, () => []);
    this.#remember();
  }
  #remember(): void {
    this.dispose();
    this.#memory = this.rows.map((row) => this.#engine.tensor(Float32Array.of(row.length), [1]));
  }
  get length(): number {
    return this.rows[0]?.length ?? 0;
  }
  set(rows: number[][]): void {
    this.rows = rows;
    this.#remember();
  }
  append(): void {
    throw new Error("a scripted model has no keys");
  }
  reorder(rows: readonly number[]): void {
    this.set(rows.map((row) => [...(this.rows[row] ?? [])]));
  }
  truncate(length: number): void {
    this.set(this.rows.map((row) => row.slice(0, length)));
  }
  dispose(): void {
    for (const x of this.#memory) x.dispose();
    this.#memory = [];
  }
}

/** The head of scripted hidden states: `[vocabulary, 2]`. */
export const scriptedHead = (vocabulary: number): number[][] =>
  Array.from({ length: vocabulary }, (_, i) => [Math.cos(i), Math.sin(2 * i + 1)]);

export function scriptedModel(on: Engine, script: Script): DecodingModel & { dispose(): void } {
  const { vocabulary = 4, context = 32, layers = 2, routers = true, say, hidden, onStep } = script;
  const head = on.tensor(Float64Array.from(scriptedHead(vocabulary).flat()), [vocabulary, width]);
  return {
    engine: on,
    params: { head },
    layers,
    vocabulary,
    width,
    context,
    routing: routers ? [{ layer: 0, part: "feedForward", experts: 4 }] : [],
    forward: () => {
      throw new Error("a scripted model only steps");
    },
    async step(ids, options = {}) {
      const [batch = 0, sequence = 0] = ids.shape;
      const data = Array.from(await ids.data());
      const fresh = Array.from({ length: batch }, (_, i) => data.slice(i * sequence, (i + 1) * sequence));
      onStep?.(fresh, options);
      const { cache, padding = [], override = [], watch } = options;
      if (cache && !(cache instanceof ScriptedCache)) throw new Error("not a scripted cache");
      if (cache && cache.rows.length !== batch) throw new ShapeError("another batch than the cache");
      const all = fresh.map((row, i) => [...(cache?.rows[i] ?? []), ...row]);
      if ((all[0]?.length ?? 0) > context) throw new ShapeError("beyond the context");
      cache?.set(all);
      if (watch && hidden) {
        const show = (after: number): Tensor =>
          on.tensor(
            Float64Array.from(
              all.flatMap((row, i) =>
                Array.from({ length: sequence }, (_, j) => {
                  const end = row.length - sequence + j + 1;
                  return end > (padding[i] ?? 0) ? hidden(row.slice(padding[i] ?? 0, end), after) : [0, 0];
                }).flat(),
              ),
            ),
            [batch, sequence, width],
          );
        on.scope(() => {
          watch("embed", show(0), 0);
          for (let layer = 0; layer < layers; layer++) watch("hidden", show(layer + 1), layer);
          watch("finalNorm", show(layers), 0);
        });
      }
      const logits = all.flatMap((row, i) => say(row.slice(padding[i] ?? 0), override[i]));
      return on.tensor(Float64Array.from(logits), [batch, vocabulary]);
    },
    head: (x) => on.scope(() => linear(x, head)),
    newCache: (batch) => new ScriptedCache(on, batch),
    dispose: () => head.dispose(),
  };
}

/** Numbers in [-3, 3) that follow from the keys and have no other structure. */
export function noise(count: number, ...keys: readonly number[]): number[] {
  let state = 2166136261;
  const mix = (x: number): void => {
    state = Math.imul(state ^ (x + 0x9e3779b9), 16777619) >>> 0;
    state = Math.imul(state ^ (state >>> 15), 0x85ebca6b) >>> 0;
    state = (state ^ (state >>> 13)) >>> 0;
  };
  for (const key of keys) mix(key);
  return Array.from({ length: count }, (_, i) => {
    mix(i);
    return (state / 2 ** 32) * 6 - 3;
  });
}

export interface Collected {
  readonly ids: readonly number[];
  readonly tokens: readonly GeneratedToken[];
  readonly text: string;
  readonly ending: Ending;
}
export async function collect(model: DecodingModel, options: GenerateOptions): Promise<Collected> {
  const running = generate(model, options);
  const tokens: GeneratedToken[] = [];
  for (;;) {
    const { value, done } = await running.next();
    if (!done) tokens.push(value);
    else
      return { ids: tokens.map(({ id }) => id), tokens, text: tokens.map(({ text }) => text).join(""), ending: value };
  }
}

/** Ids per row of a batch, and how each row ended. */
export async function collectRows(running: AsyncGenerator<BatchToken, readonly Ending[], undefined>, rows: number) {
  const tokens: BatchToken[][] = Array.from({ length: rows }, () => []);
  for (;;) {
    const { value, done } = await running.next();
    if (done) return { tokens, ids: tokens.map((row) => row.map(({ id }) => id)), endings: value };
    tokens[value.row]?.push(value);
  }
}

export const idsOf = async (model: DecodingModel, options: GenerateOptions): Promise<readonly number[]> =>
  (await collect(model, options)).ids;

/** A strategy's state on one prompt, without the loop around it. */
export function startAlone(
  strategy: DecodingStrategy,
  model: DecodingModel,
  { prompt, limit = 8, ...options }: Partial<DecodingOptions> & Pick<DecodingRow, "prompt"> & { limit?: number },
) {
  const row = { prompt, random: random(model.engine, 0), limit };
  return strategy.start(model, [row], {
    stopIds: [],
    stopStrings: [],
    topLogProbabilities: 0,
    cache: true,
    ...options,
  });
}

export const softmax = (logits: readonly number[]): number[] => {
  const top = Math.max(...logits);
  const total = logits.reduce((sum, z) => sum + Math.exp(z - top), 0);
  return logits.map((z) => Math.exp(z - top) / total);
};
export const logSoftmax = (logits: readonly number[]): number[] => softmax(logits).map(Math.log);
