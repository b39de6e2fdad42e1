// What texts leave behind for later ones that begin alike: a conversation that goes on runs its new tokens only.
import { ShapeError } from "@switchyard/core";
import type { KvCache, Model } from "../model.ts";
import type { DecodingModel } from "./strategy.ts";

export interface PrefixCacheOptions {
  /** Texts that are kept, of which those unused for longest go first; default 1, for one conversation. */
  readonly texts?: number;
  /** Bytes that they may have together; default: no limit. wasm sets up to half more aside, so that texts can grow in place. */
  readonly bytes?: number;
}

/** What one text holds at the end, and the ids that it stands for. */
interface Kept {
  readonly ids: readonly number[];
  readonly cache: KvCache;
}

/** Caches of texts that have ended, for `generate`; one for each model. Made by `prefixCache`. */
export interface PrefixCache {
  /** Texts kept now. */
  readonly texts: number;
  /** Bytes of their keys, values and what routers keep. */
  readonly bytes: number;
  /** Tokens of prompts that need not be run again, so far. */
  readonly reused: number;
  /** How many of the first tokens of a prompt it would spare now. */
  covers(prompt: ArrayLike<number>): number;
  /** For strategies: a cache that holds the first tokens of `prompt`, at least one less than all; it is the caller's. */
  take(model: DecodingModel, prompt: readonly number[]): KvCache | undefined;
  /** For strategies: takes over a cache of one row that holds `ids`. Frees it where there is no room. */
  give(model: DecodingModel, ids: readonly number[], cache: KvCache): void;
  /** Frees everything; texts that end later leave nothing behind. */
  dispose(): void;
}

/**
 * Keeps the keys and values of texts that have ended: hand the same one to every `generate` of a conversation, and only what is new of
 * each prompt is run. Logits are those of a run from the start up to rounding, as backends add in another order when fewer rows run
 * together. Used by strategies of one row and the trained routing (greedy, sample); the others run the whole prompt. So do models whose
 * routers look at later tokens, and texts longer than rotary positions of type dynamic or longrope keep their angles. A trace has no
 * routing of what is not run.
 * Throws ShapeError for options out of range.
 *
 * @example
 * const prefix = prefixCache();
 * for await (const { text } of generate(model, { prompt, tokenizer, prefix })) process.stdout.write(text);
 * prefix.dispose();
 */
export function prefixCache(options: PrefixCacheOptions = {}): PrefixCache {
  const { texts: most = 1, bytes: room = Number.POSITIVE_INFINITY } = options;
  if (!(Number.isSafeInteger(most) && most >= 0)) {
    throw new ShapeError(`prefixCache: texts is ${most}, expected a whole number from 0`);
  }
  if (!(room >= 0)) throw new ShapeError(`prefixCache: bytes is ${room}, expected a number from 0`);
  /** The latest used last. */
  let kept: Kept[] = [];
  let of: Model["params"] | undefined;
  let reused = 0;
  let disposed = false;

  const held = (): number => kept.reduce((sum, { cache }) => sum + (cache.bytes ?? 0), 0);
  const checkModel = ({ params }: DecodingModel): void => {
    of ??= params;
    if (of !== params) throw new ShapeError("generate: this prefix cache is another model's; make one for each model");
  };
  const best = (prompt: ArrayLike<number>): { readonly one: Kept; readonly length: number } | undefined => {
    let found: { readonly one: Kept; readonly length: number } | undefined;
    for (const one of kept) {
      // The last token is run in any case: what follows comes from its logits.
      const length = Math.min(common(one.ids, prompt), prompt.length - 1);
      if (length > (found?.length ?? 0)) found = { one, length };
    }
    return found;
  };
  return {
    get texts() {
      return kept.length;
    },
    get bytes() {
      return held();
    },
    get reused() {
      return reused;
    },
    covers: (prompt) => best(prompt)?.length ?? 0,
    take(model, prompt) {
      checkModel(model);
      const found = best(prompt);
      if (!found) return undefined;
      const { one, length } = found;
      // Where it would be the only text, or all of it goes on, nothing is left that another could use.
      const moves = most === 1 || length === one.ids.length || !one.cache.copy;
      kept = kept.filter((other) => other !== one);
      if (!moves) kept.push(one);
      const cache = !moves && one.cache.copy ? one.cache.copy(length) : one.cache;
      try {
        if (cache.length > length) cache.truncate(length);
      } catch (error) {
        cache.dispose();
        throw error;
      }
      reused += length;
      return cache;
    },
    give(model, ids, cache) {
      checkModel(model);
      // Without a size there is no saying whether it fits.
      const fits = Number.isFinite(room) ? cache.bytes !== undefined && cache.bytes <= room : true;
      if (disposed || most === 0 || ids.length === 0 || !fits) return cache.dispose();
      if (kept.some((one) => one.ids.length >= ids.length && common(one.ids, ids) === ids.length)) {
        return cache.dispose();
      }
      const gone = kept.filter((one) => common(one.ids, ids) === one.ids.length);
      kept = [...kept.filter((one) => !gone.includes(one)), { ids: [...ids], cache }];
      while (kept.length > most || held() > room) gone.push(...kept.splice(0, 1));
      for (const one of gone) one.cache.dispose();
    },
    dispose() {
      disposed = true;
      for (const { cache } of kept) cache.dispose();
      kept = [];
    },
  };
}

/** How many of the first ids are the same. */
function common(a: ArrayLike<number>, b: ArrayLike<number>): number {
  const most = Math.min(a.length, b.length);
  for (let i = 0; i < most; i++) if (a[i] !== b[i]) return i;
  return most;
}
