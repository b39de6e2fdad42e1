// Forward passes over growing sequences that share a batch and a cache: what strategies are made of. Private.
import { ShapeError, type Tensor, type TypedArray } from "@switchyard/core";
import type { RoutingOverride } from "@switchyard/core/moe";
import { promptChunk } from "../memory.ts";
import type { KvCache, Watch } from "../model.ts";
import type { DecodingModel, DecodingOptions } from "./strategy.ts";

export interface PassesOptions
  extends Pick<DecodingOptions, "prefillChunk" | "cache" | "prefix" | "allowNonCausal" | "signal" | "numbers"> {
  /** Of the strategy, for messages. */
  readonly name: string;
  /** Per row; default: nothing changes. */
  readonly override?: readonly (RoutingOverride | undefined)[];
}

/** The rows of one batch. Prompts of different lengths are padded at the left. Dispose it when done. */
export class Passes {
  readonly #model: DecodingModel;
  readonly #options: PassesOptions;
  #cache: KvCache | undefined;
  /** How traces number the rows: by what each was at the start. */
  #origins: readonly number[];
  #sequences: number[][];
  #override: readonly (RoutingOverride | undefined)[];
  /** Per row, so that all rows end at the same position. */
  #padding: readonly number[];

  constructor(model: DecodingModel, prompts: readonly (readonly number[])[], options: PassesOptions) {
    this.#model = model;
    this.#options = options;
    this.#sequences = prompts.map((prompt) => [...prompt]);
    this.#override = options.override ?? prompts.map(() => undefined);
    this.#padding = padded(this.#sequences);
    const first = options.numbers?.take(prompts.length) ?? 0;
    this.#origins = prompts.map((_, row) => first + row);
  }

  /** Ids so far, prompt included. */
  get sequences(): readonly (readonly number[])[] {
    return this.#sequences;
  }

  /**
   * Appends one id to each row and gives the logits after it, `[vocabulary]` per row; without ids, those after the prompts. `watch` sees
   * all positions that are new, padding included.
   * Throws ShapeError where the context is full, the signal's reason when aborted, an Error for logits that are no numbers.
   */
  async advance(ids?: readonly number[], watch?: Watch): Promise<readonly Float64Array[]> {
    if (!ids && !watch) this.#takePrefix();
    const twins = ids || watch || !this.#options.cache ? undefined : this.#twins();
    if (!twins) return this.#run(ids, watch);
    // The same prompt many times is run once.
    this.keep(twins.first);
    const logits = await this.#run();
    this.keep(twins.of);
    return twins.of.map((row) => logits[row] as Float64Array);
  }

  async #run(ids?: readonly number[], watch?: Watch): Promise<Float64Array[]> {
    for (const [row, id] of (ids ?? []).entries()) this.#sequences[row]?.push(id);
    const total = this.#fit();
    const { prefillChunk = promptChunk, cache, allowNonCausal, signal } = this.#options;
    if (this.#outgrown(total)) this.#forget();
    if (cache) this.#cache ??= this.#model.newCache(this.#sequences.length);
    let at = this.#cache?.length ?? 0;
    for (;;) {
      signal?.throwIfAborted();
      // The first pass reaches into every row, so that none is all padding.
      const size = this.#cache ? Math.max(prefillChunk, Math.max(...this.#padding) + 1 - at) : total;
      const until = Math.min(at + size, total);
      const input = this.#columns(at, until);
      let logits: Tensor;
      try {
        logits = await this.#model.step(input, {
          ...(this.#cache ? { cache: this.#cache } : {}),
          sequences: this.#origins,
          ...(until < total ? { length: total } : {}),
          ...(this.#padding.some((n) => n > 0) ? { padding: this.#padding } : {}),
          ...(this.#override.some((one) => one !== undefined) ? { override: this.#override } : {}),
          ...(allowNonCausal === undefined ? {} : { allowNonCausal }),
          ...(watch ? { watch } : {}),
        });
      } finally {
        input.dispose();
      }
      at = until;
      try {
        if (at === total) return this.#rows(await logits.data());
      } finally {
        logits.dispose();
      }
    }
  }

  /** Row i becomes what row rows[i] was; rows may be left out and repeated. */
  keep(rows: readonly number[]): void {
    const from = <T>(list: readonly T[]): T[] => rows.map((row) => list[row] as T);
    const same = rows.length === this.#sequences.length && rows.every((row, i) => row === i);
    if (!same) this.#cache?.reorder(rows);
    this.#sequences = from(this.#sequences).map((sequence) => [...sequence]);
    this.#override = from(this.#override);
    this.#padding = from(this.#padding);
    this.#origins = from(this.#origins);
  }

  /** Frees the cache, or leaves it to later texts. */
  dispose(): void {
    const { prefix } = this.#options;
    const [sequence = []] = this.#sequences;
    if (prefix && this.#cache && this.#sharesPrefix()) {
      prefix.give(this.#model, sequence.slice(0, this.#cache.length), this.#cache);
      this.#cache = undefined;
    }
    this.#forget();
  }

  #forget(): void {
    this.#cache?.dispose();
    this.#cache = undefined;
  }

  #takePrefix(): void {
    const { prefix } = this.#options;
    const [sequence = []] = this.#sequences;
    if (prefix && !this.#cache && this.#sharesPrefix()) this.#cache = prefix.take(this.#model, sequence);
  }

  /** Whether what the cache holds is what any other text with these tokens would have there. */
  #sharesPrefix(): boolean {
    const { cache, allowNonCausal } = this.#options;
    const { blueprint } = this.#model;
    // Of a router that looks at later tokens, those of this text.
    if (!cache || (allowNonCausal ?? blueprint?.allowNonCausal ?? false)) return false;
    if (this.#sequences.length !== 1 || this.#override[0] !== undefined) return false;
    // Longer texts have other angles, and their first keys may have been turned by either.
    const [sequence = []] = this.#sequences;
    return (blueprint?.layers ?? []).every(
      ({ attention: { rope } }) => sequence.length <= (rope.changesAfter ?? Number.POSITIVE_INFINITY),
    );
  }

  /** The first of each kind of row, and the kind of every row; undefined where all differ. */
  #twins(): { readonly first: number[]; readonly of: number[] } | undefined {
    const first: number[] = [];
    const known = new Map<string, number>();
    const of = this.#sequences.map((sequence, row) => {
      const key = JSON.stringify([sequence, this.#override[row] ?? null]);
      const kind = known.get(key) ?? first.push(row) - 1;
      known.set(key, kind);
      return kind;
    });
    return first.length < of.length ? { first, of } : undefined;
  }

  /** How many positions the batch has. Padding that all rows have goes when it would not fit: the cache is filled anew then. */
  #fit(): number {
    const { context } = this.#model;
    const end = (this.#padding[0] ?? 0) + (this.#sequences[0]?.length ?? 0);
    if (end <= context) return end;
    const longest = Math.max(...this.#sequences.map(({ length }) => length));
    if (longest > context) {
      throw new ShapeError(`${this.#options.name}: ${longest} tokens, but the context of the model is ${context}`);
    }
    this.#forget();
    this.#padding = padded(this.#sequences);
    return longest;
  }

  /** Whether a row passes the length up to which the keys in the cache were turned: longrope turns all of a longer one otherwise. */
  #outgrown(total: number): boolean {
    const past = this.#cache?.length ?? 0;
    if (past === 0) return false;
    return (this.#model.blueprint?.layers ?? []).some(({ attention: { rope } }) => {
      const { type, changesAfter = Number.POSITIVE_INFINITY } = rope;
      const passes = (before: number): boolean => past - before <= changesAfter && total - before > changesAfter;
      return type === "longrope" && this.#padding.some(passes);
    });
  }

  #columns(from: number, to: number): Tensor {
    const ids = this.#sequences.flatMap((sequence, row) => {
      const start = this.#padding[row] ?? 0;
      return Array.from({ length: to - from }, (_, i) => sequence[from + i - start] ?? 0);
    });
    return this.#model.engine.tensor(Int32Array.from(ids), [this.#sequences.length, to - from]);
  }

  #rows(data: TypedArray): Float64Array[] {
    const { name } = this.#options;
    const { vocabulary } = this.#model;
    return this.#sequences.map(({ length }, row) => {
      // Typed arrays copy much faster than a loop does.
      const logits = new Float64Array(data.subarray(row * vocabulary, (row + 1) * vocabulary));
      let top = Number.NEGATIVE_INFINITY;
      let broken = 0;
      for (let i = 0; i < vocabulary; i++) {
        const z = logits[i] as number;
        if (z > top) top = z;
        if (Number.isNaN(z)) broken++;
      }
      if (broken > 0 || !Number.isFinite(top)) {
        const found = broken > 0 ? `${broken} of ${vocabulary} are NaN` : `the largest of ${vocabulary} is ${top}`;
        throw new Error(
          `${name}: the model's logits are not finite: ${found}, in row ${row} after ${length} tokens; look for weights that are not finite or too large for their type`,
        );
      }
      return logits;
    });
  }
}

function padded(sequences: readonly (readonly number[])[]): number[] {
  const longest = Math.max(0, ...sequences.map(({ length }) => length));
  return sequences.map(({ length }) => longest - length);
}
