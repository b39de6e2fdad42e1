// Attention of DeepSeek, gpt-oss and JetMoE, their experts and a decoder around them in plain float64 loops, written from the formulas of
// the papers and of Hugging Face Transformers: the oracle for one kind of attention, and for whole architectures.
import { dispose } from "@switchyard/core";
import { expect } from "vitest";
import type { DescribedArchitecture } from "./architectures/architecture.ts";
import type { Checkpoint } from "./model.ts";
import { makeEngine } from "./models.test-util.ts";
import { randomTensors, softmaxOf } from "./naive-decoder.test-util.ts";

export type Row = readonly number[];
/** The numbers of a parameter, row-major. */
export type Get = (name: string) => ArrayLike<number>;

/** w x for the `rows` rows of w from `from` on. */
export function times(w: ArrayLike<number>, x: Row, rows: number, from = 0): number[] {
  return Array.from({ length: rows }, (_, r) =>
    x.reduce((sum, v, c) => sum + v * (w[(from + r) * x.length + c] as number), 0),
  );
}
export const plus = (x: Row, y: ArrayLike<number>, scale = 1): number[] =>
  x.map((v, i) => v + scale * (y[i] as number));
export function rms(x: Row, w: ArrayLike<number>, eps: number): number[] {
  const scale = 1 / Math.sqrt(x.reduce((sum, v) => sum + v * v, 0) / x.length + eps);
  return x.map((v, i) => v * scale * (w[i] as number));
}
const dot = (x: Row, y: Row): number => x.reduce((sum, v, i) => sum + v * (y[i] as number), 0);
const parts = (x: Row, size: number): number[][] =>
  Array.from({ length: x.length / size }, (_, h) => x.slice(h * size, (h + 1) * size));
/** Σ p_j values_j. */
const mixed = (p: Row, values: readonly Row[]): number[] =>
  (values[0] ?? []).map((_, c) => values.reduce((sum, v, j) => sum + (p[j] as number) * (v[c] as number), 0));

export interface NaiveTurns {
  /** Radians per position of each pair. */
  readonly inverse: Row;
  readonly scaling?: number;
  /** Pairs (0, 1), (2, 3), ... instead of (i, i + half). */
  readonly interleaved?: boolean;
}
/** x as complex numbers, one for each pair, times e^(i angle). */
export function turned(x: Row, position: number, { inverse, scaling = 1, interleaved = false }: NaiveTurns): number[] {
  const y = [...x];
  const half = inverse.length;
  for (const [i, speed] of inverse.entries()) {
    const [a, b] = interleaved ? [2 * i, 2 * i + 1] : [i, i + half];
    const [cos, sin] = [scaling * Math.cos(position * speed), scaling * Math.sin(position * speed)];
    y[a] = (x[a] as number) * cos - (x[b] as number) * sin;
    y[b] = (x[b] as number) * cos + (x[a] as number) * sin;
  }
  return y;
}

// ---------------------------------------------------------------------------------------------------- latent

export interface NaiveLatent {
  readonly heads: number;
  readonly rank: number;
  readonly nope: number;
  readonly rope: number;
  readonly value: number;
  readonly scale: number;
  readonly turns: NaiveTurns;
}
/** Parameters by what they do; absent ones are not used. */
export interface LatentWeights {
  readonly q?: ArrayLike<number>;
  readonly qDown?: ArrayLike<number>;
  readonly qDownBias?: ArrayLike<number> | undefined;
  readonly qNorm?: ArrayLike<number>;
  readonly qUp?: ArrayLike<number>;
  readonly kvDown: ArrayLike<number>;
  readonly kvDownBias?: ArrayLike<number> | undefined;
  readonly kvNorm: ArrayLike<number>;
  readonly kvUp: ArrayLike<number>;
  readonly o: ArrayLike<number>;
  readonly oBias?: ArrayLike<number> | undefined;
}
/** 2405.04434, eqs. 37 to 47, keys and values of every position made anew. `first`: positions before it are padding. */
export function naiveLatent(w: LatentWeights, o: NaiveLatent, xs: readonly Row[], first = 0): number[][] {
  const { heads, rank, nope, rope, value, scale, turns } = o;
  const width = xs[0]?.length ?? 0;
  const biased = (x: Row, bias: ArrayLike<number> | undefined): number[] => (bias ? plus(x, bias) : [...x]);
  const all = xs.map((x, t) => {
    const position = t - first;
    const queryRank = w.qNorm?.length ?? 0;
    const q = w.q
      ? times(w.q, x, heads * (nope + rope))
      : times(
          w.qUp ?? [],
          rms(biased(times(w.qDown ?? [], x, queryRank), w.qDownBias), w.qNorm ?? [], 1e-6),
          heads * (nope + rope),
        );
    const down = biased(times(w.kvDown, x, rank + rope), w.kvDownBias);
    const up = parts(times(w.kvUp, rms(down.slice(0, rank), w.kvNorm, 1e-6), heads * (nope + value)), nope + value);
    const shared = turned(down.slice(rank), position, turns);
    return {
      q: parts(q, nope + rope).map((h) => [...h.slice(0, nope), ...turned(h.slice(nope), position, turns)]),
      k: up.map((h) => [...h.slice(0, nope), ...shared]),
      v: up.map((h) => h.slice(nope)),
    };
  });
  return all.map(({ q }, t) => {
    const seen = all.slice(Math.min(first, t), t + 1);
    const joined = q.flatMap((query, h) => {
      const p = softmaxOf(seen.map(({ k }) => scale * dot(query, k[h] ?? [])));
      return mixed(
        p,
        seen.map(({ v }) => v[h] ?? []),
      );
    });
    return biased(times(w.o, joined, width), w.oBias);
  });
}

// ---------------------------------------------------------------------------------------------------- sinks

/** Grouped-query attention with a learned score per head that has no value; a query sees `window` positions. */
export function naiveSinks(
  get: (one: string) => ArrayLike<number> | undefined,
  o: {
    readonly heads: number;
    readonly kvHeads: number;
    readonly headSize: number;
    readonly window: number;
    readonly turns: NaiveTurns;
  },
  xs: readonly Row[],
): number[][] {
  const { heads, kvHeads, headSize, window, turns } = o;
  const project = (x: Row, one: string, rows: number): number[] => {
    const y = times(get(`${one}_proj.weight`) ?? [], x, rows);
    const bias = get(`${one}_proj.bias`);
    return bias ? plus(y, bias) : y;
  };
  const all = xs.map((x, t) => ({
    q: parts(project(x, "q", heads * headSize), headSize).map((h) => turned(h, t, turns)),
    k: parts(project(x, "k", kvHeads * headSize), headSize).map((h) => turned(h, t, turns)),
    v: parts(project(x, "v", kvHeads * headSize), headSize),
  }));
  return all.map(({ q }, t) => {
    const seen = all.slice(Math.max(0, t + 1 - window), t + 1);
    const joined = q.flatMap((query, h) => {
      const group = Math.floor((h * kvHeads) / heads);
      const scores = seen.map(({ k }) => dot(query, k[group] ?? []) / Math.sqrt(headSize));
      const p = softmaxOf([...scores, get("sinks")?.[h] as number]); // the last one is the sink's
      return mixed(
        p.slice(0, -1),
        seen.map(({ v }) => v[group] ?? []),
      );
    });
    return project(joined, "o", xs[0]?.length ?? 0);
  });
}

// ---------------------------------------------------------------------------------------------------- mixture

/** The k largest logits, first one first, and their softmax. */
export function naiveChoice(logits: Row, k: number): (readonly [expert: number, weight: number])[] {
  const ids = [...logits.keys()].sort((a, b) => (logits[b] as number) - (logits[a] as number) || a - b).slice(0, k);
  const weights = softmaxOf(ids.map((e) => logits[e] as number));
  return ids.map((e, i) => [e, weights[i] as number] as const);
}

export interface NaiveMixture {
  readonly experts: number;
  readonly k: number;
  readonly kvHeads: number;
  readonly headSize: number;
  readonly turns: NaiveTurns;
}
export interface MixtureWeights {
  readonly router: ArrayLike<number>;
  readonly input: ArrayLike<number>;
  readonly output: ArrayLike<number>;
  readonly kv: ArrayLike<number>;
  readonly bias: ArrayLike<number>;
}
/** 2404.07413, section 2.2: query j of each chosen expert meets key head j. */
export function naiveMixture(w: MixtureWeights, o: NaiveMixture, xs: readonly Row[]): number[][] {
  const { experts, k, kvHeads, headSize, turns } = o;
  const inner = kvHeads * headSize;
  const width = xs[0]?.length ?? 0;
  const all = xs.map((x, t) => {
    const both = parts(times(w.kv, x, 2 * inner), headSize);
    return { k: both.slice(0, kvHeads).map((h) => turned(h, t, turns)), v: both.slice(kvHeads) };
  });
  return xs.map((x, t) => {
    const seen = all.slice(0, t + 1);
    let y = Array.from({ length: width }, (_, i) => w.bias[i] as number);
    for (const [e, weight] of naiveChoice(times(w.router, x, experts), k)) {
      const found = parts(times(w.input, x, inner, e * inner), headSize).flatMap((h, j) => {
        const query = turned(h, t, turns);
        const p = softmaxOf(seen.map((other) => dot(query, other.k[j] ?? []) / Math.sqrt(headSize)));
        return mixed(
          p,
          seen.map(({ v }) => v[j] ?? []),
        );
      });
      y = plus(y, times(w.output, found, width, e * width), weight);
    }
    return y;
  });
}

// ---------------------------------------------------------------------------------------------------- a decoder

export interface NaiveModel {
  readonly vocabulary: number;
  readonly width: number;
  readonly layers: number;
  /** Of the last norm, and of those in layers where they have another. */
  readonly eps: number;
  readonly layerEps?: number;
  readonly tied?: boolean;
  /** Tensors of the layers, by the Hub's name, but their norms. */
  readonly shapes: ReadonlyMap<string, readonly number[]>;
  /** Of a layer: normalised rows to what is added. */
  attention(layer: number, xs: readonly Row[], get: Get): readonly Row[];
  feedForward(layer: number, x: Row, get: Get): Row;
}

/** A random checkpoint of the model, in memory, F32. */
export function naiveCheckpoint(config: Checkpoint["config"], model: NaiveModel): ReturnType<typeof randomTensors> {
  const { vocabulary, width, layers, tied } = model;
  const shapes = new Map<string, readonly number[]>([
    ["model.embed_tokens.weight", [vocabulary, width]],
    ...model.shapes,
  ]);
  for (let l = 0; l < layers; l++) {
    for (const norm of ["input_layernorm", "post_attention_layernorm"]) {
      shapes.set(`model.layers.${l}.${norm}.weight`, [width]);
    }
  }
  shapes.set("model.norm.weight", [width]);
  if (!tied) shapes.set("lm_head.weight", [vocabulary, width]);
  return randomTensors(config, shapes);
}

/** Logits `[sequence][vocabulary]`. */
export function naiveModelLogits(model: NaiveModel, get: Get, ids: readonly number[]): number[][] {
  const { vocabulary, width, layers, eps, layerEps = eps, tied } = model;
  const embed = get("model.embed_tokens.weight");
  let xs = ids.map((id) => Array.from({ length: width }, (_, i) => embed[id * width + i] as number));
  for (let l = 0; l < layers; l++) {
    const norm = (name: string, x: Row): number[] => rms(x, get(`model.layers.${l}.${name}.weight`), layerEps);
    const attended = model.attention(
      l,
      xs.map((x) => norm("input_layernorm", x)),
      get,
    );
    xs = xs.map((x, t) => {
      const residual = plus(x, attended[t] ?? []);
      return plus(residual, model.feedForward(l, norm("post_attention_layernorm", residual), get));
    });
  }
  const head = tied ? embed : get("lm_head.weight");
  return xs.map((x) => times(head, rms(x, get("model.norm.weight"), eps), vocabulary));
}

/** Reads the checkpoint in float64 and expects the oracle's logits, of a whole pass and of a run in pieces with a cache. */
export async function expectModel(
  architecture: Pick<DescribedArchitecture, "read">,
  config: Checkpoint["config"],
  model: NaiveModel,
  {
    length = 9,
    change = (x) => x,
  }: { length?: number; change?: (checkpoint: NaiveCheckpoint) => NaiveCheckpoint } = {},
): Promise<void> {
  const checkpoint = change(naiveCheckpoint(config, model));
  const get: Get = (name) => {
    const found = checkpoint.numbers.get(name);
    if (!found) throw new Error(`the oracle has no tensor "${name}"`);
    return found;
  };
  const ids = Array.from({ length }, (_, i) => (5 * i + 2) % model.vocabulary);
  const expected = naiveModelLogits(model, get, ids).flat();
  expect(expected.every(Number.isFinite)).toBe(true);
  const on = makeEngine(64);
  const read = await architecture.read(checkpoint, on, { weights: "f32" });
  const held = on.live();
  const cache = read.newCache(1);
  const pieces: number[][] = [ids.slice(0, 4), ids.slice(4, 6), ...ids.slice(6).map((id) => [id])];
  const run = async (part: readonly number[], options: Parameters<typeof read.step>[1]): Promise<number[]> => {
    const x = on.tensor(Int32Array.from(part), [1, part.length]);
    const logits = await read.step(x, { ...options, positions: "all" });
    const data = Array.from(await logits.data());
    x.dispose();
    logits.dispose();
    return data;
  };
  const cached: number[] = [];
  const whole = await run(ids, {});
  for (const piece of pieces) cached.push(...(await run(piece, { cache })));
  cache.dispose();
  for (const found of [whole, cached]) {
    expect(found.length).toBe(expected.length);
    for (const [i, x] of expected.entries()) expect(Math.abs((found[i] as number) - x)).toBeLessThan(1e-8);
  }
  expect(on.live()).toBe(held);
  dispose([read.params, ...read.buffers]);
  expect(on.live()).toBe(0);
}
export type NaiveCheckpoint = ReturnType<typeof randomTensors>;
