// Graph of Tokens (2505.00792): similarity-aware and attention-aware routing, and how much routing fluctuates.
import {
  entropyLast,
  hostConstant,
  less,
  linear,
  mean,
  reshape,
  slice,
  softmax,
  type Tensor,
  type Tree,
  where,
} from "@switchyard/core";
import { type Routed, type RouterPlugin, routingChange } from "@switchyard/core/moe";
import { routerContext, routerInput } from "@switchyard/testing";
import { attentionAware, headEntropies, quietestHead } from "../../src/attention-aware.ts";
import { entropyBounds, similarityAware, similarityGraph } from "../../src/similarity-aware.ts";
import { topK } from "../../src/top-k.ts";
import {
  type Family,
  flat,
  given,
  number,
  numberOr,
  only,
  results,
  shapeOf,
  sparse,
  tensor,
  type Values,
  type VectorCase,
  word,
} from "../vectors.ts";

type Found = Readonly<Record<string, Values>>;

/** The router on the tokens U, with the weights of the case; `more` replaces further parameters. */
function routed(plugin: RouterPlugin, one: VectorCase, hidden: Tensor, more: Tree, attention?: Tensor): Routed {
  const on = hidden.engine;
  const [experts = 0, width = 0] = shapeOf(given(one.inputs, "Wrouter"));
  const router = plugin.init(routerContext(on, { experts, width }));
  const { brouter } = one.inputs;
  const params = {
    weight: tensor(on, given(one.inputs, "Wrouter")),
    ...(brouter === undefined ? {} : { bias: tensor(on, brouter) }),
    ...more,
  };
  const input = routerInput(on, { hidden });
  return router.route(params, attention ? { ...input, attention: () => attention } : input);
}

const similarityFamily: Family = async (one, on) => {
  const k = number(one, "k");
  only(one, "mixSpace", ["prob", "logit"]);
  const mixing = word(one, "mixSpace") === "prob" ? "probabilities" : "logits";
  const causal = number(one, "causal") === 1;
  const temperature = number(one, "tau");
  const { Ws } = one.inputs;
  const bias = one.inputs.brouter !== undefined;
  const similarity = Ws === undefined ? "identity" : "learned";
  const found = await results(on, () => {
    const hidden = tensor(on, given(one.inputs, "U"));
    const plugin = similarityAware({ k, mixing, causal, temperature, similarity, bias });
    const own = routed(plugin, one, hidden, Ws === undefined ? {} : { similarity: tensor(on, Ws) });
    const baseline = sparse(routed(topK({ k, bias }), one, hidden, {}));
    const keys = Ws === undefined ? hidden : linear(hidden, tensor(on, Ws));
    const row = (x: Tensor): Tensor => reshape(x, [1, ...x.shape]);
    const S = similarityGraph(row(hidden), row(keys), { causal, temperature }); // [1, N, N]
    const baseProbs = softmax(own.logits as Tensor);
    const mixedProbs = own.probabilities as Tensor;
    return {
      S: reshape(S, S.shape.slice(1)),
      baseProbs,
      mixedProbs,
      topkIdx: sparse(own).experts,
      topkWeight: sparse(own).weights,
      baselineTopkIdx: baseline.experts,
      baselineTopkWeight: baseline.weights,
      entropyBase: entropyLast(baseProbs),
      entropyMixed: entropyLast(mixedProbs),
      entropyUpperBound: reshape(entropyBounds(S, row(baseProbs)).upper, [-1]),
    };
  });
  // The bound is of mixed probabilities; a mixture of logits has none.
  const { entropyUpperBound, ...rest } = found;
  return mixing === "probabilities" ? { ...rest, entropyUpperBound } : rest;
};

const attentionFamily: Family = async (one, on) => {
  const k = number(one, "k");
  only(one, "headAggregation", ["mean", "min-entropy"]);
  const rule = word(one, "headAggregation");
  const causal = numberOr(one, "causal", 1) === 1;
  const bias = one.inputs.brouter !== undefined;
  const options =
    rule === "mean"
      ? ({ headAggregation: "mean" } as const)
      : ({ headAggregation: "min-entropy", entropyOver: "sequence" } as const);
  const logits = given(one.inputs, "attnLogits");
  const [heads = 0, n = 0] = shapeOf(logits);
  const found = await results(on, () => {
    const hidden = tensor(on, given(one.inputs, "U"));
    const seen = hostConstant(
      hidden,
      Float32Array.from({ length: n * n }, (_, i) => Number(!causal || i % n <= Math.floor(i / n))),
      [n, n],
    );
    // What the block supplies: the vector has its scores before the mask.
    const attention = reshape(softmax(where(less(0, seen), tensor(on, logits), -Infinity)), [1, heads, n, n]);
    const own = routed(attentionAware({ k, bias, ...options }), one, hidden, {}, attention);
    const entropies = headEntropies(attention); // [1, n, heads]
    const layout = { batch: 1, sequence: n, past: 0 };
    const { chosen, graph } = quietestHead(attention, entropies, { layout, over: "sequence" });
    const A = rule === "mean" ? mean(attention, [1]) : graph;
    const base = softmax(own.logits as Tensor);
    return {
      headMeanEntropy: reshape(mean(entropies, [1]), [heads]),
      chosenHead: slice(reshape(chosen, [n]), [0], [1]),
      A: reshape(A, [n, n]),
      mixedProbs: own.probabilities as Tensor,
      topkIdx: sparse(own).experts,
      topkWeight: sparse(own).weights,
      entropyMixed: entropyLast(own.probabilities as Tensor),
      entropyUpperBound: reshape(entropyBounds(A, reshape(base, [1, ...base.shape])).upper, [n]),
    };
  });
  const { chosenHead, ...rest } = found;
  return rule === "mean" ? rest : { ...rest, chosenHead: flat(chosenHead)[0] ?? Number.NaN };
};

const fluctuationFamily: Family = async (one, on) => {
  const experts = number(one, "E");
  const sets = given(one.inputs, "checkpoints") as readonly Values[];
  const firsts = given(one.inputs, "top1") as readonly Values[];
  const ids = (values: Values | undefined, columns: number): Tensor => {
    const data = Int32Array.from(flat(values ?? []));
    return on.tensor(data, [data.length / columns, columns]);
  };
  const change = async (list: readonly Values[], i: number, j: number): Promise<Record<string, number>> => {
    const columns = list === firsts ? 1 : number(one, "k");
    const found = await results(on, () => ({
      ...routingChange(ids(list[i], columns), ids(list[j], columns), { experts }),
    }));
    return Object.fromEntries(
      Object.entries<Values>(found).map(([name, value]) => [name, flat(value)[0] ?? Number.NaN]),
    );
  };
  const steps = async (list: readonly Values[], name: string, to: (i: number) => number): Promise<number[]> =>
    Promise.all(list.slice(1).map(async (_, i) => (await change(list, i, to(i)))[name] ?? Number.NaN));
  return {
    setChangeRateConsecutive: await steps(sets, "sets", (i) => i + 1),
    overlapFluctuationConsecutive: await steps(sets, "overlap", (i) => i + 1),
    setChangeRateVsFinal: await steps(sets, "sets", () => sets.length - 1),
    top1ChangeConsecutive: await steps(firsts, "firsts", (i) => i + 1),
  };
};

export const graphFamily: Family = async (one, on): Promise<Found> => {
  const kinds: Readonly<Record<string, Family>> = {
    "similarity-aware": similarityFamily,
    "attention-aware": attentionFamily,
    "routing-fluctuation": fluctuationFamily,
  };
  return given(kinds, word(one, "kind"))(one, on);
};

export const graphFamilies: Readonly<Record<string, Family>> = { "main-graph-of-tokens": graphFamily };
