// Self-contrast decoding (2405.14507): routing by rank and threshold, one step of contrast, and a small model whose strong and weak pass
// run as two rows of one batch, from vectors through the implementation. Self-contained: other packages' test files are out of reach.
import { add, type Engine, matmul, softmax, type Tensor } from "@switchyard/core";
import {
  glu,
  layerInput,
  layerParams,
  moe,
  moeLayer,
  type Routed,
  type RoutingOverride,
  routeTokens,
} from "@switchyard/core/moe";
import { topK } from "@switchyard/routers/top-k";
import { contrast } from "../../src/decoding/contrast.ts";
import { klDivergence } from "../../src/decoding/kl-divergence.ts";
import { unchosenRatio } from "../../src/decoding/unchosen-ratio.ts";

/** Nested lists of numbers, or one number. */
export type Values = number | readonly Values[];

/** A case of a vector file: words and single numbers, lists, and what is expected, by names with points. */
export interface VectorCase {
  readonly config: Readonly<Record<string, number | string>>;
  readonly inputs: Readonly<Record<string, Values>>;
  readonly expected: Readonly<Record<string, Values>>;
}
export type Found = Readonly<Record<string, Values>>;
/** What the implementation gives under each name of `expected`, computed on an engine. */
export type Family = (one: VectorCase, on: Engine) => Promise<Found>;

const flat = (values: Values): number[] => (typeof values === "number" ? [values] : values.flatMap(flat));
const rowsOf = (values: Values): number[][] => (values as readonly Values[]).map(flat);
const shapeOf = (values: Values): number[] =>
  typeof values === "number" ? [] : [values.length, ...(values[0] === undefined ? [] : shapeOf(values[0]))];

function given<V>(of: Readonly<Record<string, V>>, name: string): V {
  const value = of[name];
  if (value === undefined) throw new Error(`the case has no "${name}"; it has ${Object.keys(of).join(", ")}`);
  return value;
}
const numberOf = (one: VectorCase, name: string): number => Number(given(one.config, name));
const listOf = (one: VectorCase, name: string): number[] => flat(given(one.inputs, name));
const tensor = (on: Engine, values: Values): Tensor => on.tensor(Float64Array.from(flat(values)), shapeOf(values));
const best = (values: ArrayLike<number>): number =>
  Array.from(values).reduce((top, x, i, all) => (x > (all[top] ?? Number.NaN) ? i : top), 0);

/** Runs `f` in a scope, reads the tensors [rows, columns] it returns, and frees them. */
async function matrices<N extends string>(
  on: Engine,
  f: () => Readonly<Record<N, Tensor>>,
): Promise<Record<N, number[][]>> {
  const tensors = on.scope(() => Object.entries<Tensor>(f()));
  const read = tensors.map(async ([name, x]) => {
    const [rows = 0, columns = 0] = x.shape;
    const data = Array.from(await x.data());
    x.dispose();
    return [name, Array.from({ length: rows }, (_, i) => data.slice(i * columns, (i + 1) * columns))] as const;
  });
  return Object.fromEntries(await Promise.all(read)) as Record<N, number[][]>;
}

function sparse({ plan }: Routed): { readonly experts: Tensor; readonly weights: Tensor } {
  if (plan.kind !== "sparse") throw new Error(`a sparse plan was expected, found ${plan.kind}`);
  return plan;
}

/** Filled slots only: `[tokens, slots]` -> lists per token. */
function filled({ experts, weights }: { readonly experts: number[][]; readonly weights: number[][] }) {
  const keep = (of: number[][]): number[][] => of.map((row, t) => row.filter((_, j) => (experts[t]?.[j] ?? -1) >= 0));
  return { experts: keep(experts), weights: keep(weights) };
}

const routing: Family = async (one, on) => {
  const logits = given(one.inputs, "routerLogits");
  const [tokens = 0, experts = 0] = shapeOf(logits);
  const order = numberOf(one, "normTopk") === 1 ? "softmax-topk-renormalise" : "softmax-topk";
  // The hidden states are the logits, and the router's weight is the unit matrix.
  const unit = Array.from({ length: experts }, (_, i) => Array.from({ length: experts }, (_, j) => Number(i === j)));
  const expertParams = {
    gateUp: new Float64Array(experts * 2 * experts),
    down: new Float64Array(experts * experts),
  };
  const route = async (override?: RoutingOverride) =>
    filled(
      await matrices(on, () => {
        const set = glu({
          count: experts,
          width: experts,
          hidden: 1,
          params: {
            gateUp: on.tensor(expertParams.gateUp, [experts, 2, experts]),
            down: on.tensor(expertParams.down, [experts, experts, 1]),
          },
        });
        const layer = moeLayer(
          topK({ k: numberOf(one, "k"), order }),
          { engine: on, width: experts },
          { experts: set },
        );
        const params = { ...layerParams(layer), router: { weight: tensor(on, unit) } };
        const input = layerInput(layer, tensor(on, logits), override ? { override: [override] } : {});
        const { experts: ids, weights } = sparse(routeTokens(layer, params, input));
        return { experts: ids, weights };
      }),
    );
  const { probabilities } = await matrices(on, () => ({ probabilities: softmax(tensor(on, logits)) }));
  const strong = await route();
  const found: Record<string, Values> = {
    softmax: probabilities,
    "strong.experts": strong.experts,
    "strong.weights": strong.weights,
  };
  for (const name of Object.keys(one.expected)) {
    const [, rank] = /^weakRank\.(\d+)\.expert$/.exec(name) ?? [];
    if (rank !== undefined) {
      const weak = await route({ ranks: [Number(rank) - 1] });
      found[name] = weak.experts.flat();
      found[`weakRank.${rank}.weight`] = weak.weights.flat();
      found[`weakRank.${rank}.unchosenRatio`] = unchosenRatio(strong.experts.flat(), weak.experts.flat(), tokens);
    }
    const [, place] = /^(dynamicTopP\.\d+)\.threshold$/.exec(name) ?? [];
    if (place === undefined) continue;
    const threshold = Number(given(one.expected, name));
    const { experts: ids, weights } = await route({ threshold });
    found[name] = threshold;
    for (let t = 0; t < tokens; t++) {
      found[`${place}.tokens.${t}.experts`] = ids[t] ?? [];
      found[`${place}.tokens.${t}.weights`] = weights[t] ?? [];
    }
  }
  return found;
};

const step: Family = async (one) => {
  const [strong, weak] = [listOf(one, "zStrong"), listOf(one, "zWeak")];
  const { logits, cutoff } = contrast(strong, weak, { alpha: numberOf(one, "alpha"), beta: numberOf(one, "beta") });
  const top = Math.max(...logits);
  const raised = Array.from(logits, (z) => Math.exp(z - top));
  const total = raised.reduce((sum, x) => sum + x, 0);
  return {
    cutoff,
    valid: Array.from(logits, (z) => Number(z !== Number.NEGATIVE_INFINITY)),
    zSC: Array.from(logits),
    probSC: raised.map((x) => x / total),
    argmax: best(logits),
    greedyArgmax: best(strong),
    klStrongWeak: klDivergence(strong, weak),
  };
};

const toyModel: Family = async (one, on) => {
  const [width, count, hidden] = [numberOf(one, "D"), numberOf(one, "N"), numberOf(one, "F")];
  const weak: RoutingOverride = { ranks: [numberOf(one, "rankK") - 1] };
  const start = listOf(one, "h0");
  const layers = numberOf(one, "layersCount");
  const outputs = await matrices(on, () => {
    let x = tensor(on, [start, start]); // the strong row, the weak row
    const chosen: Record<string, Tensor> = {};
    for (let i = 0; i < layers; i++) {
      const at = (name: string): Values => given(one.inputs, `layers.${i}.${name}`);
      const up = at("w3") as readonly Values[];
      const gateUp = (at("w1") as readonly Values[]).map((gate, e) => [...rowsOf(gate), ...rowsOf(up[e] ?? [])]);
      const set = glu({
        count,
        width,
        hidden,
        params: { gateUp: tensor(on, gateUp), down: tensor(on, at("w2")) },
      });
      const layer = moeLayer(topK({ k: numberOf(one, "k") }), { engine: on, width }, { experts: set });
      const params = { ...layerParams(layer), router: { weight: tensor(on, at("router")) } };
      const layout = { batch: 2, sequence: 1, past: 0 };
      const done = moe(layer, params, layerInput(layer, x, { layout, override: [undefined, weak] }));
      x = add(x, done.output);
      chosen[`experts ${i}`] = sparse(done.routed).experts;
    }
    return { logits: matmul(x, tensor(on, given(one.inputs, "head")), { transposeB: true }), ...chosen };
  });
  const [zStrong = [], zWeak = []] = outputs.logits;
  const { logits } = contrast(zStrong, zWeak, { alpha: numberOf(one, "alpha"), beta: numberOf(one, "beta") });
  const expertsOf = (row: number): number[][] =>
    Array.from({ length: layers }, (_, i) => {
      const ids = (outputs as Readonly<Record<string, number[][]>>)[`experts ${i}`]?.[row] ?? [];
      return ids.filter((id) => id >= 0);
    });
  return {
    zStrong,
    zWeak,
    strongExperts: expertsOf(0),
    weakExperts: expertsOf(1),
    zSC: Array.from(logits),
    argmax: best(logits),
  };
};

const kinds: Readonly<Record<string, Family>> = { routing, contrast: step, "toy-model": toyModel };

export const selfContrastFamilies: Readonly<Record<string, Family>> = {
  "main-scmoe": (one, on) => {
    const kind = String(given(one.config, "kind"));
    const family = Object.hasOwn(kinds, kind) ? kinds[kind] : undefined;
    if (!family) throw new Error(`no family for "${kind}"; there are ${Object.keys(kinds).join(", ")}`);
    return family(one, on);
  },
};
