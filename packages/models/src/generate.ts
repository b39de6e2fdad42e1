// Text generation, one token after the other, with a cache. Sampling is done on the host in float64, so that a seed
// gives the same text on every backend whose logits agree.
import { random, ShapeError } from "@switchyard/core";
import type { Tokenizer } from "./tokenizer.ts";
import type { Transformer } from "./transformer.ts";

export interface GenerateOptions {
  /** Ids, or text where a tokenizer is given. At least one token. */
  readonly prompt: ArrayLike<number> | string;
  readonly tokenizer?: Tokenizer;
  /** Tokens to make at most; default: until the context is full. */
  readonly maxNew?: number;
  /** 0 always takes the most likely token; default 1. */
  readonly temperature?: number;
  /** Samples among the k most likely tokens only. */
  readonly topK?: number;
  /** Samples among the most likely tokens whose probabilities reach this sum (1904.09751). */
  readonly topP?: number;
  /** Default 0. */
  readonly seed?: number;
  /** Ids that end the text; they are not yielded. */
  readonly stop?: readonly number[];
  readonly signal?: AbortSignal;
  /** false recomputes the whole sequence for each token; default true. */
  readonly cache?: boolean;
  /**
   * Accepts a router that looks at later tokens: while generating there are none, so it decides otherwise than in the text it was
   * trained on. Default: what the model's config says.
   */
  readonly allowNonCausal?: boolean;
}

export interface GeneratedToken {
  readonly id: number;
  /** Natural logarithm of the probability the model gave this token, before temperature and cuts. */
  readonly logProbability: number;
  /** With a tokenizer: the text that became complete with this token (a character may be split over tokens). */
  readonly text: string;
}

/**
 * Generates tokens until `maxNew`, a stop id, or a full context. Throws ShapeError for an empty or too long prompt or
 * options out of range, UnsupportedError for a router that cannot generate, the signal's reason when aborted.
 *
 * @example for await (const { text } of generate(model, { prompt: "Call me", tokenizer })) process.stdout.write(text);
 */
export async function* generate(
  model: Transformer,
  options: GenerateOptions,
): AsyncGenerator<GeneratedToken, void, undefined> {
  const { tokenizer, seed = 0, stop = [], signal, cache: cached = true, allowNonCausal } = options;
  const { engine, config } = model;
  const ids = promptIds(options, config.vocabulary);
  if (ids.length > config.context) {
    throw new ShapeError(`generate: the prompt has ${ids.length} tokens, but the context is ${config.context}`);
  }
  const pick = sampler(options);
  const { maxNew = config.context } = options;
  const draws = random(engine, seed);
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  const cache = cached ? model.newCache(1) : undefined;
  try {
    let input = ids;
    for (let made = 0; made < maxNew && ids.length <= config.context; made++) {
      signal?.throwIfAborted();
      const tensor = engine.tensor(Int32Array.from(input), [1, input.length]);
      let logits: Float64Array;
      try {
        const y = await model.step(tensor, {
          ...(cache ? { cache } : {}),
          ...(allowNonCausal === undefined ? {} : { allowNonCausal }),
        });
        try {
          logits = Float64Array.from(await y.data());
        } finally {
          y.dispose();
        }
      } finally {
        tensor.dispose();
      }
      const [uniform = 0] = draws.at("generate", made).host("uniform", 1);
      const { id, logProbability } = pick(logits, uniform);
      if (stop.includes(id)) break;
      ids.push(id);
      input = cache ? [id] : ids;
      yield { id, logProbability, text: tokenizer ? decoder.decode(tokenizer.bytes([id]), { stream: true }) : "" };
    }
  } finally {
    cache?.dispose();
  }
}

function promptIds({ prompt, tokenizer }: GenerateOptions, vocabulary: number): number[] {
  if (typeof prompt === "string" && !tokenizer) throw new ShapeError("generate: a text prompt needs a tokenizer");
  const ids = Array.from(
    typeof prompt === "string" && tokenizer ? tokenizer.encode(prompt) : (prompt as ArrayLike<number>),
  );
  if (ids.length === 0) throw new ShapeError("generate: the prompt is empty; begin with at least one token");
  const wrong = ids.find((id) => !Number.isInteger(id) || id < 0 || id >= vocabulary);
  if (wrong !== undefined) throw new ShapeError(`generate: prompt id ${wrong} is not in a vocabulary of ${vocabulary}`);
  return ids;
}

type Pick = (logits: Float64Array, uniform: number) => { readonly id: number; readonly logProbability: number };

/** Chooses by inverting the cumulative distribution over ids sorted by probability (ties: lower id first). */
function sampler({ temperature = 1, topK, topP, maxNew }: GenerateOptions): Pick {
  const refuse = (why: string): never => {
    throw new ShapeError(`generate: ${why}`);
  };
  if (!(temperature >= 0)) refuse(`temperature is ${temperature}, expected 0 or more`);
  if (topK !== undefined && !(Number.isInteger(topK) && topK > 0))
    refuse(`topK is ${topK}, expected a whole number from 1`);
  if (topP !== undefined && !(topP > 0 && topP <= 1)) refuse(`topP is ${topP}, expected a number above 0, up to 1`);
  if (maxNew !== undefined && !(Number.isInteger(maxNew) && maxNew >= 0)) refuse(`maxNew is ${maxNew}`);
  return (logits, uniform) => {
    const top = logits.reduce((a, b) => Math.max(a, b), Number.NEGATIVE_INFINITY);
    if (!Number.isFinite(top) || logits.some(Number.isNaN))
      throw new Error("generate: the model's logits are not finite");
    const logSum = top + Math.log(logits.reduce((sum, x) => sum + Math.exp(x - top), 0));
    const result = (id: number) => ({ id, logProbability: (logits[id] as number) - logSum });
    if (temperature === 0) return result(logits.indexOf(top));
    const order = Array.from(logits.keys()).sort((a, b) => (logits[b] as number) - (logits[a] as number) || a - b);
    const among = order.slice(0, topK ?? order.length);
    const weights = among.map((id) => Math.exp(((logits[id] as number) - top) / temperature));
    let total = weights.reduce((sum, w) => sum + w, 0);
    if (topP !== undefined) {
      let reached = 0;
      const last = weights.findIndex((w) => {
        reached += w;
        return reached >= topP * total;
      });
      if (last >= 0) {
        weights.length = last + 1;
        total = reached;
      }
    }
    let left = uniform * total;
    const chosen = weights.findIndex((w) => {
      left -= w;
      return left < 0;
    });
    return result(among[chosen < 0 ? weights.length - 1 : chosen] as number);
  };
}
