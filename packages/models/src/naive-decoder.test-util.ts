// A decoder in plain float64 loops, written from the formulas: the oracle for options of which no recorded checkpoint shows more than
// one value. It knows the Hub's names and nothing of blueprints, so that it judges architectures as well as the runtime.
import { dispose, engine as makeEngine } from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import { expect } from "vitest";
import type { DescribedArchitecture } from "./architectures/architecture.ts";
import type { Checkpoint } from "./model.ts";

export interface NaiveRope {
  /** Radians per position of each pair of channels (i, i + size / 2). */
  readonly inverse: readonly number[];
  /** Factor of cosine and sine, default 1. */
  readonly scaling?: number;
}

/** Names of an expert's matrices: each by itself, or stacked. */
export type NaiveExperts =
  | { readonly prefix: string; readonly names: readonly [gate: string, up: string, down: string] }
  | { readonly gateUp: string; readonly down: string };

export interface NaiveMoE {
  readonly experts: number;
  readonly hidden: number;
  /** Name of the router's matrix. */
  readonly router: string;
  readonly layout: NaiveExperts;
  /** From a token's logits to [expert, weight] pairs. */
  route(logits: readonly number[]): readonly (readonly [expert: number, weight: number])[];
  readonly shared?: { readonly name: string; readonly hidden: number; readonly gate?: string };
}

export interface NaiveDense {
  readonly hidden: number;
  /** Of the module; its matrices are gate_proj, up_proj, down_proj. */
  readonly name: string;
}

export interface NaiveDecoder {
  readonly vocabulary: number;
  readonly width: number;
  readonly layers: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly headSize: number;
  readonly eps: number;
  /** Default "rms". */
  readonly norm?: "rms" | "layer";
  rope(length: number): NaiveRope;
  /** Factor of the scores, default 1 / sqrt(headSize). */
  readonly scale?: number;
  readonly qkvBias?: boolean;
  readonly outputBias?: boolean;
  readonly qkNorm?: "head" | "projection";
  readonly clip?: number;
  readonly window?: (layer: number) => number | undefined;
  readonly feedForward: (layer: number) => NaiveMoE | NaiveDense;
  readonly activation?: (x: number) => number;
  readonly tied?: boolean;
  readonly headBias?: boolean;
  readonly embedScale?: number;
  readonly residualScale?: number;
  readonly logitScale?: number;
}

/** With tanh, as most libraries compute it. */
export const naiveGelu = (x: number): number =>
  (x / 2) * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3)));

export const naiveSilu = (x: number): number => x / (1 + Math.exp(-x));

/** Every tensor of the checkpoint, by the Hub's name. */
export function naiveShapes(decoder: NaiveDecoder): Map<string, readonly number[]> {
  const { vocabulary, width, layers, heads, kvHeads, headSize, norm, qkvBias, outputBias, qkNorm } = decoder;
  const shapes = new Map<string, readonly number[]>([["model.embed_tokens.weight", [vocabulary, width]]]);
  const addNorm = (name: string): void => {
    shapes.set(`${name}.weight`, [width]);
    if (norm === "layer") shapes.set(`${name}.bias`, [width]);
  };
  const addGated = (name: string, hidden: number): void => {
    for (const one of ["gate_proj", "up_proj"]) shapes.set(`${name}.${one}.weight`, [hidden, width]);
    shapes.set(`${name}.down_proj.weight`, [width, hidden]);
  };
  for (let l = 0; l < layers; l++) {
    const at = `model.layers.${l}`;
    addNorm(`${at}.input_layernorm`);
    addNorm(`${at}.post_attention_layernorm`);
    const rows = { q: heads * headSize, k: kvHeads * headSize, v: kvHeads * headSize };
    for (const [one, count] of Object.entries(rows)) {
      shapes.set(`${at}.self_attn.${one}_proj.weight`, [count, width]);
      if (qkvBias) shapes.set(`${at}.self_attn.${one}_proj.bias`, [count]);
      if (qkNorm && one !== "v") {
        shapes.set(`${at}.self_attn.${one}_norm.weight`, [qkNorm === "head" ? headSize : count]);
      }
    }
    shapes.set(`${at}.self_attn.o_proj.weight`, [width, heads * headSize]);
    if (outputBias) shapes.set(`${at}.self_attn.o_proj.bias`, [width]);
    const part = decoder.feedForward(l);
    if (!("route" in part)) {
      addGated(part.name, part.hidden);
      continue;
    }
    const { experts, hidden, router, layout, shared } = part;
    shapes.set(router, [experts, width]);
    if ("gateUp" in layout) {
      shapes.set(layout.gateUp, [experts, 2 * hidden, width]).set(layout.down, [experts, width, hidden]);
    } else {
      const [gate, up, down] = layout.names;
      for (let e = 0; e < experts; e++) {
        for (const one of [gate, up]) shapes.set(`${layout.prefix}.${e}.${one}.weight`, [hidden, width]);
        shapes.set(`${layout.prefix}.${e}.${down}.weight`, [width, hidden]);
      }
    }
    if (shared) addGated(shared.name, shared.hidden);
    if (shared?.gate) shapes.set(shared.gate, [1, width]);
  }
  addNorm("model.norm");
  if (!decoder.tied) shapes.set("lm_head.weight", [vocabulary, width]);
  if (decoder.headBias) shapes.set("lm_head.bias", [vocabulary]);
  return shapes;
}

/** Normal numbers, rounded to f32, large enough that every part matters in the logits; those of a name depend on the name only. */
function randomNumbers(name: string, shape: readonly number[]): Float32Array {
  let state = 0x9e3779b9;
  for (const c of name) state = Math.imul(state ^ c.charCodeAt(0), 0x01000193);
  const uniform = (): number => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
  const isNorm = /norm(\.weight)$/.test(name);
  return Float32Array.from({ length: shape.reduce((n, d) => n * d, 1) }, () => {
    const normal = Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform());
    return isNorm ? 1 + 0.3 * normal : 0.5 * normal;
  });
}

export interface NaiveCheckpoint extends Checkpoint {
  readonly numbers: ReadonlyMap<string, Float32Array>;
}

/** A checkpoint in memory of random tensors of these shapes, in F32. */
export function randomTensors(
  config: Checkpoint["config"],
  shapes: ReadonlyMap<string, readonly number[]>,
): NaiveCheckpoint {
  const numbers = new Map([...shapes].map(([name, shape]) => [name, randomNumbers(name, shape)]));
  const find = (name: string): Float32Array => {
    const found = numbers.get(name);
    if (!found) throw new Error(`no tensor "${name}"`);
    return found;
  };
  return {
    config,
    names: [...shapes.keys()],
    stored: (name) => ({ shape: shapes.get(name) ?? [], dtype: "F32", bytes: find(name).byteLength }),
    read: async (name, [from, to] = [0, find(name).byteLength]) =>
      new Uint8Array(find(name).buffer.slice(0)).slice(from, to),
    numbers,
  };
}

/** The index of a checkpoint with this config and 500 tensors, of which only the number matters: for what fails before they do. */
export const anyIndex = (config: Checkpoint["config"]): NaiveCheckpoint => ({
  ...randomTensors(config, new Map()),
  names: Array.from({ length: 500 }, (_, i) => `tensor ${i}`),
});

/** Logits `[sequence][vocabulary]`. */
export function naiveLogits(
  decoder: NaiveDecoder,
  { numbers }: Pick<NaiveCheckpoint, "numbers">,
  ids: readonly number[],
): number[][] {
  const { width, heads, kvHeads, headSize: d, eps, clip = Number.POSITIVE_INFINITY } = decoder;
  const { activation = naiveSilu, residualScale = 1, embedScale = 1, logitScale = 1 } = decoder;
  const get = (name: string): Float32Array => {
    const found = numbers.get(name);
    if (!found) throw new Error(`the oracle has no tensor "${name}"`);
    return found;
  };
  /** w x for the rows of w that start at `from`. */
  const times = (w: Float32Array, x: readonly number[], rows: number, from = 0): number[] =>
    Array.from({ length: rows }, (_, r) => {
      let sum = 0;
      for (let c = 0; c < x.length; c++) sum += (x[c] as number) * (w[(from + r) * x.length + c] as number);
      return sum;
    });
  const plus = (x: readonly number[], y: ArrayLike<number>, scale = 1): number[] =>
    x.map((v, i) => v + scale * (y[i] as number));
  const rms = (x: readonly number[], w: Float32Array): number[] => {
    const scale = 1 / Math.sqrt(x.reduce((sum, v) => sum + v * v, 0) / x.length + eps);
    return x.map((v, i) => v * scale * (w[i] as number));
  };
  const normalise = (name: string, x: readonly number[]): number[] => {
    if (decoder.norm !== "layer") return rms(x, get(`${name}.weight`));
    const mean = x.reduce((sum, v) => sum + v, 0) / x.length;
    const variance = x.reduce((sum, v) => sum + (v - mean) ** 2, 0) / x.length;
    const [w, b] = [get(`${name}.weight`), get(`${name}.bias`)];
    return x.map((v, i) => ((v - mean) / Math.sqrt(variance + eps)) * (w[i] as number) + (b[i] as number));
  };
  const { inverse, scaling = 1 } = decoder.rope(ids.length);
  const turn = (x: readonly number[], position: number): number[] =>
    x.map((v, i) => {
      const angle = position * (inverse[i % (d / 2)] as number);
      const other = i < d / 2 ? -(x[i + d / 2] as number) : (x[i - d / 2] as number);
      return scaling * (v * Math.cos(angle) + other * Math.sin(angle));
    });
  const gated = (gate: readonly number[], up: readonly number[]): number[] =>
    gate.map((g, i) => activation(g) * (up[i] as number));
  const runGated = (name: string, x: readonly number[], hidden: number): number[] => {
    const [gate, up] = ["gate_proj", "up_proj"].map((one) => times(get(`${name}.${one}.weight`), x, hidden));
    return times(get(`${name}.down_proj.weight`), gated(gate ?? [], up ?? []), width);
  };
  const runExpert = ({ layout, hidden }: NaiveMoE, e: number, x: readonly number[]): number[] => {
    if ("gateUp" in layout) {
      const both = times(get(layout.gateUp), x, 2 * hidden, e * 2 * hidden);
      return times(get(layout.down), gated(both.slice(0, hidden), both.slice(hidden)), width, e * width);
    }
    const [gate, up, down] = layout.names.map((one) => get(`${layout.prefix}.${e}.${one}.weight`)) as Float32Array[];
    const inner = gated(times(gate as Float32Array, x, hidden), times(up as Float32Array, x, hidden));
    return times(down as Float32Array, inner, width);
  };
  const feedForward = (layer: number, x: readonly number[]): number[] => {
    const part = decoder.feedForward(layer);
    if (!("route" in part)) return runGated(part.name, x, part.hidden);
    let y = x.map(() => 0);
    for (const [e, weight] of part.route(times(get(part.router), x, part.experts))) {
      y = plus(y, runExpert(part, e, x), weight);
    }
    const { shared } = part;
    if (!shared) return y;
    const open = shared.gate ? 1 / (1 + Math.exp(-(times(get(shared.gate), x, 1)[0] as number))) : 1;
    return plus(y, runGated(shared.name, x, shared.hidden), open);
  };

  const embed = get("model.embed_tokens.weight");
  let xs = ids.map((id) => Array.from(embed.slice(id * width, (id + 1) * width), (v) => v * embedScale));
  for (let l = 0; l < decoder.layers; l++) {
    const own = `model.layers.${l}.self_attn`;
    const projected = xs.map((x, position) => {
      const y = normalise(`model.layers.${l}.input_layernorm`, x);
      const make = (one: "q" | "k" | "v", count: number): number[][] => {
        let z = times(get(`${own}.${one}_proj.weight`), y, count * d);
        if (decoder.qkvBias) z = plus(z, get(`${own}.${one}_proj.bias`));
        const normed = decoder.qkNorm && one !== "v" ? get(`${own}.${one}_norm.weight`) : undefined;
        if (normed && decoder.qkNorm === "projection") z = rms(z, normed);
        z = z.map((v) => Math.min(Math.max(v, -clip), clip));
        const list = Array.from({ length: count }, (_, h) => z.slice(h * d, (h + 1) * d));
        const each = normed && decoder.qkNorm === "head" ? list.map((h) => rms(h, normed)) : list;
        return one === "v" ? each : each.map((h) => turn(h, position));
      };
      return { q: make("q", heads), k: make("k", kvHeads), v: make("v", kvHeads) };
    });
    const window = decoder.window?.(l) ?? Number.POSITIVE_INFINITY;
    const scale = decoder.scale ?? 1 / Math.sqrt(d);
    xs = xs.map((x, i) => {
      const seen = projected.slice(Math.max(0, i + 1 - window), i + 1);
      const mixed = (projected[i]?.q ?? []).flatMap((q, h) => {
        const group = Math.floor(h / (heads / kvHeads));
        const scores = seen.map(({ k }) => scale * q.reduce((sum, v, c) => sum + v * (k[group]?.[c] as number), 0));
        const p = softmaxOf(scores);
        return q.map((_, c) => seen.reduce((sum, { v }, j) => sum + (p[j] as number) * (v[group]?.[c] as number), 0));
      });
      let attended = times(get(`${own}.o_proj.weight`), mixed, width);
      if (decoder.outputBias) attended = plus(attended, get(`${own}.o_proj.bias`));
      const residual = plus(x, attended, residualScale);
      const y = feedForward(l, normalise(`model.layers.${l}.post_attention_layernorm`, residual));
      return plus(residual, y, residualScale);
    });
  }
  return xs.map((x) => {
    const last = normalise("model.norm", x);
    const logits = times(decoder.tied ? embed : get("lm_head.weight"), last, decoder.vocabulary);
    return (decoder.headBias ? plus(logits, get("lm_head.bias")) : logits).map((v) => v * logitScale);
  });
}

export function softmaxOf(x: readonly number[]): number[] {
  const top = Math.max(...x);
  const e = x.map((v) => Math.exp(v - top));
  const total = e.reduce((sum, v) => sum + v, 0);
  return e.map((v) => v / total);
}

/** Experts by falling score, ties to the lower one. */
const ranked = (scores: readonly number[]): number[] =>
  [...scores.keys()].sort((a, b) => (scores[b] as number) - (scores[a] as number) || a - b);

/** The k best of a softmax over all; with `renormalise` their weights sum to 1. */
export const naiveTopK =
  (k: number, renormalise: boolean): NaiveMoE["route"] =>
  (logits) => {
    const p = softmaxOf(logits);
    const best = ranked(logits).slice(0, k);
    const total = renormalise ? best.reduce((sum, e) => sum + (p[e] as number), 0) : 1;
    return best.map((e) => [e, (p[e] as number) / total] as const);
  };

/** SparseMixer at inference: the best expert, then the best of the others, each with its share of those within reach of it. */
export const naiveSparseMixer =
  (jitter: number): NaiveMoE["route"] =>
  (logits) => {
    const [first = 0, second = 0] = ranked(logits);
    return [first, second].map((chosen, pick) => {
      const best = logits[chosen] as number;
      const near = logits.map((s, e) => {
        if (pick === 1 && e === first) return Number.NEGATIVE_INFINITY;
        return (best - s) / Math.max(Math.abs(s), best) > 2 * jitter ? Number.NEGATIVE_INFINITY : s;
      });
      return [chosen, softmaxOf(near)[chosen] as number] as const;
    });
  };

const pairs = (size: number, of: (i: number) => number): number[] => Array.from({ length: size / 2 }, (_, i) => of(i));

/** theta^(-2 i / size), and its variants in checkpoints. */
export const naiveRopes = {
  plain:
    (size: number, theta: number): NaiveDecoder["rope"] =>
    () => ({ inverse: pairs(size, (i) => theta ** ((-2 * i) / size)) }),
  linear:
    (size: number, theta: number, factor: number): NaiveDecoder["rope"] =>
    () => ({ inverse: pairs(size, (i) => theta ** ((-2 * i) / size) / factor) }),
  /** The base grows with the length, past the length of training. */
  dynamic:
    (size: number, theta: number, { factor, trained }: { factor: number; trained: number }): NaiveDecoder["rope"] =>
    (length) => {
      const longer = Math.max(length, trained);
      const base = theta * ((factor * longer) / trained - (factor - 1)) ** (size / (size - 2));
      return { inverse: pairs(size, (i) => base ** ((-2 * i) / size)) };
    },
  /** 2309.00071: by the number of turns over the original length, between 32 and 1, with rounded bounds. */
  yarn:
    (size: number, theta: number, { factor, original }: { factor: number; original: number }): NaiveDecoder["rope"] =>
    () => {
      const pairOf = (turns: number): number =>
        (size * Math.log(original / (turns * 2 * Math.PI))) / (2 * Math.log(theta));
      const low = Math.max(Math.floor(pairOf(32)), 0);
      const high = Math.min(Math.ceil(pairOf(1)), size - 1);
      const inverse = pairs(size, (i) => {
        const plain = theta ** ((-2 * i) / size);
        const share = Math.min(Math.max((i - low) / (high - low), 0), 1);
        return share * (plain / factor) + (1 - share) * plain;
      });
      return { inverse, scaling: 0.1 * Math.log(factor) + 1 };
    },
  /** By wavelength: above original / low stretched, below original / high as it is, smooth between. */
  llama3:
    (
      size: number,
      theta: number,
      { factor, original, low, high }: { factor: number; original: number; low: number; high: number },
    ): NaiveDecoder["rope"] =>
    () => ({
      inverse: pairs(size, (i) => {
        const plain = theta ** ((-2 * i) / size);
        const wavelength = (2 * Math.PI) / plain;
        if (wavelength < original / high) return plain;
        if (wavelength > original / low) return plain / factor;
        const smooth = (original / wavelength - low) / (high - low);
        return ((1 - smooth) * plain) / factor + smooth * plain;
      }),
    }),
  longrope:
    (
      size: number,
      theta: number,
      options: {
        original: number;
        short: readonly number[];
        long: readonly number[];
        /** Of cosine and sine, short and long. */
        scalings: readonly [number, number];
      },
    ): NaiveDecoder["rope"] =>
    (length) => {
      const beyond = length > options.original;
      const factors = beyond ? options.long : options.short;
      return {
        inverse: pairs(size, (i) => theta ** ((-2 * i) / size) / (factors[i] as number)),
        scaling: options.scalings[beyond ? 1 : 0],
      };
    },
};

/** What the options named in `change` are in a decoder that has none of them: to see that they matter. */
export const without = (decoder: NaiveDecoder, change: Partial<NaiveDecoder>): Partial<NaiveDecoder> =>
  Object.fromEntries(Object.keys(change).map((key) => [key, decoder[key as keyof NaiveDecoder]]));

/**
 * Makes a random checkpoint of the decoder, reads it with the architecture in float64, and expects the oracle's logits: of a whole pass,
 * and of a run with a cache where `cached` (default true), in pieces of 3 and 1 tokens. Nothing may stay allocated. `unlike`:
 * options of another decoder, from whose logits these must differ, so that the options are seen to matter.
 */
export async function expectNaive(
  architecture: Pick<DescribedArchitecture, "read">,
  config: Checkpoint["config"],
  decoder: NaiveDecoder,
  {
    length = 9,
    cached = true,
    unlike = {},
  }: { readonly length?: number; readonly cached?: boolean; readonly unlike?: Partial<NaiveDecoder> } = {},
): Promise<void> {
  const checkpoint = randomTensors(config, naiveShapes(decoder));
  const ids = Array.from({ length }, (_, i) => (5 * i + 2) % decoder.vocabulary);
  const expected = naiveLogits(decoder, checkpoint, ids);
  if (Object.keys(unlike).length > 0) {
    const plain = { ...decoder, ...unlike };
    const other = naiveLogits(plain, randomTensors(config, naiveShapes(plain)), ids).flat();
    const apart = expected.flat().map((x, i) => Math.abs(x - (other[i] ?? Number.NaN)));
    expect(Math.max(...apart)).toBeGreaterThan(1e-3);
  }
  const on = makeEngine(cpu({ precision: 64 }));
  const model = await architecture.read(checkpoint, on, { weights: "f32" });
  const held = on.live();
  const close = (found: ArrayLike<number>, wanted: readonly number[]): void => {
    expect(found.length).toBe(wanted.length);
    for (const [i, x] of wanted.entries()) expect(Math.abs((found[i] ?? Number.NaN) - x)).toBeLessThan(1e-9);
  };
  const step = async (part: readonly number[], options: Parameters<typeof model.step>[1]): Promise<number[]> => {
    const x = on.tensor(Int32Array.from(part), [1, part.length]);
    const logits = await model.step(x, options);
    const data = Array.from(await logits.data());
    for (const one of [x, logits]) one.dispose();
    return data;
  };
  close(await step(ids, { positions: "all" }), expected.flat());
  if (cached) {
    const cache = model.newCache(1);
    for (let from = 0; from < length; ) {
      const to = from === 0 ? Math.min(3, length) : from + 1;
      close(await step(ids.slice(from, to), { cache }), expected[to - 1] ?? []);
      from = to;
    }
    cache.dispose();
  }
  expect(on.live()).toBe(held);
  dispose([model.params, ...model.buffers]);
  expect(on.live()).toBe(0);
}
