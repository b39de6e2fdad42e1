// What a router is handed in tests: a context to be made in, and inputs with every lazy extra, drawn from fixed seeds.
import { type Engine, random, type Tensor, type Tree } from "@switchyard/core";
import type { RouterContext, RouterInput } from "@switchyard/core/moe";
import { generator, type HostArray, uniform } from "./arrays.ts";

const vocabulary = 13;
const heads = 2;

/** A context for `plugin.init`: first of two layers, two heads, seed 1, unless told otherwise. */
export function routerContext(
  engine: Engine,
  { seed = 1, ...given }: Partial<RouterContext> & { readonly seed?: number } = {},
): RouterContext {
  const shared = new Map<string, unknown>();
  return {
    engine,
    width: 6,
    experts: 5,
    heads,
    layer: 0,
    layers: 2,
    random: random(engine, seed).at("init"),
    tokenCounts: Float64Array.from({ length: vocabulary }, (_, id) => vocabulary - id),
    shared<T>(key: string, make: () => T): T {
      if (!shared.has(key)) shared.set(key, make());
      return shared.get(key) as T;
    },
    ...given,
  };
}

export interface RouterCall {
  /** [batch * sequence, width] */
  readonly hidden: Tensor | HostArray;
  /** Default 1. */
  readonly batch?: number;
  /** Default: the rows of `hidden`, by batch. */
  readonly sequence?: number;
  /** Tokens in the cache; the token ids go on from there. Default 0. */
  readonly past?: number;
  /** [batch, past + sequence], 1 = real token. */
  readonly mask?: readonly number[];
  /** Experts that `everyExpert()` has outputs of; default 5. */
  readonly experts?: number;
  readonly training?: boolean;
  readonly step?: number;
  readonly seed?: number;
  readonly buffers?: Tree;
  readonly cache?: Tree;
}

/**
 * An input for `router.route`. Token and modality ids, attention (causal, two heads) and the outputs of every
 * expert are made up; they are the same for a token whether it comes alone or in its sequence. Call it inside a
 * scope, which frees its tensors.
 *
 * @example engine.scope(() => router.route(router.params, routerInput(engine, { hidden })))
 */
export function routerInput(engine: Engine, call: RouterCall): RouterInput {
  const { batch = 1, past = 0, experts = 5, training = false, step = 0, seed = 2, buffers = {} } = call;
  const upload = (x: HostArray): Tensor => engine.tensor(x.data, x.shape);
  const hidden = "engine" in call.hidden ? call.hidden : upload(call.hidden);
  const [rows = 0, width = 0] = hidden.shape;
  const sequence = call.sequence ?? (batch === 0 ? 0 : rows / batch);
  const total = past + sequence;
  const ids = (name: string, below: number): Tensor => {
    const data = Int32Array.from({ length: rows }, (_, i) => {
      const [row, position] = [Math.floor(i / Math.max(sequence, 1)), past + (i % Math.max(sequence, 1))];
      return Math.floor(generator(`${name} ${row} ${position}`)() * below);
    });
    return engine.tensor(data, [rows]);
  };
  const mask = call.mask && engine.tensor(Float32Array.from(call.mask), [batch, total]);
  return {
    hidden,
    layout: { batch, sequence, past, ...(mask ? { mask } : {}) },
    training,
    step,
    totalSteps: 10,
    pass: 0,
    layer: 0,
    layers: 2,
    random: random(engine, seed).at("route"),
    buffers,
    tokenIds: ids("token", vocabulary),
    modalityIds: ids("modality", 2),
    attention: () => engine.tensor(attentionRows(batch, sequence, total, call.mask), [batch, heads, sequence, total]),
    everyExpert: () => upload(uniform(generator("every expert"), [rows, experts, width])),
    ...(call.cache === undefined ? {} : { cache: call.cache }),
  };
}

/**
 * Causal attention of two heads with rows of their own, padding left out. An entry depends on nothing but its place,
 * and an earlier one never on a later one.
 */
function attentionRows(batch: number, sequence: number, total: number, mask?: readonly number[]): Float64Array {
  const data = new Float64Array(batch * heads * sequence * total);
  for (let row = 0; row < data.length / Math.max(total, 1); row++) {
    const b = Math.floor(row / (heads * sequence));
    const head = Math.floor(row / sequence) % heads;
    const position = total - sequence + (row % sequence);
    const draw = generator(`attention ${b} ${head} ${position}`);
    // The higher the power, the more a head looks at few tokens.
    const scores = Array.from({ length: position + 1 }, () => draw() ** (1 + 3 * head));
    const seen = scores.map((score, j) => score * (mask?.[b * total + j] ?? 1));
    const sum = seen.reduce((a, x) => a + x, 0);
    for (const [j, score] of seen.entries()) data[row * total + j] = sum === 0 ? 0 : score / sum;
  }
  return data;
}
