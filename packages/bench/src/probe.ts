// What a model does on held-out text: bits per byte, and the experts every token went to, read in one go per batch.
import { type Engine, leaves, random, type Tensor, type Tree, takeRows, UnsupportedError } from "@switchyard/core";
import { assignments, coActivation, combinationUsage, type Plan, routingChange } from "@switchyard/core/moe";
import type { Task } from "@switchyard/core/train";
import { countedTokens, type TokenBatch } from "./batches.ts";
import type { LayerDecisions } from "./experiment.ts";
import {
  type Choices,
  chosenProbabilities,
  deadExperts,
  expertLoad,
  expertsByLabel,
  expertsPerToken,
  loadByLabel,
  loadImbalance,
  routingEntropy,
  routingFluctuation,
  specialisation,
} from "./metrics.ts";
import type { FinalLayer, LayerRouting } from "./results.ts";

/** A model as the trainer sees it, with the parameters and buffers of the moment. */
export interface Moment {
  readonly engine: Engine;
  readonly task: Task<TokenBatch>;
  readonly params: Tree;
  readonly buffers: readonly Tree[];
  /** Real experts of every MoE layer. */
  readonly experts: number;
  readonly step: number;
  readonly totalSteps: number;
}

/** One MoE layer's choices for a list of tokens, with each token's distribution over the experts. */
export interface LayerChoices extends Choices {
  readonly probabilities: Float32Array; // [tokens, experts]
}

export interface Watched {
  /** Natural-log loss summed over the counted tokens. */
  readonly nats: number;
  /** All positions of the batch, counted or not. */
  readonly layers: readonly LayerChoices[];
  /** The same with every plan and null expert, as a routing trace keeps it; in words why it cannot. */
  readonly decisions: readonly LayerDecisions[] | string;
}

async function read(x: Tensor): Promise<Float64Array> {
  return Float64Array.from(await x.data());
}

/** One forward pass without gradients. @throws UnsupportedError for a plan that names no experts per token. */
export async function watch(moment: Moment, batch: TokenBatch): Promise<Watched> {
  const { engine, task, params, buffers, experts, step, totalSteps } = moment;
  const kinds: Plan["kind"][][] = [];
  const nulls: number[] = [];
  const kept = engine.scope(() => {
    const pass = task.forward(params, buffers, batch, {
      step,
      totalSteps,
      training: false,
      pass: 0,
      microBatch: 0,
      random: random(engine, 0).at("evaluation"),
      schedule: {},
    });
    return {
      loss: pass.loss,
      layers: pass.layers.map(({ plan, more = [], probabilities, logits }) => {
        const wide = (probabilities ?? logits)?.shape.at(-1) ?? experts;
        kinds.push([plan, ...more.map((path) => path.plan)].map(({ kind }) => kind));
        nulls.push(Math.max(0, wide - experts));
        return {
          ...tokenWeights(plan),
          ...(probabilities === undefined ? {} : { probabilities }),
          more: more.flatMap((path) => (namesExperts(path.plan.kind) ? [tokenWeights(path.plan)] : [])),
        };
      }),
    };
  });
  try {
    const tokens = batch.ids.length;
    const chosen = async ({ ids, weights }: TokenWeights): Promise<Choices> => {
      const values = Float32Array.from(await read(weights));
      return ids === undefined
        ? fromDense(values, experts)
        : fromSparse(Int32Array.from(await read(ids)), values, experts, tokens);
    };
    const layers: LayerChoices[] = [];
    const decisions: LayerDecisions[] = [];
    for (const [layer, { probabilities, more, ...own }] of kept.layers.entries()) {
      const choices = await chosen(own);
      const further: Choices[] = [];
      for (const path of more) further.push(await chosen(path));
      const wide = probabilities === undefined ? undefined : await read(probabilities);
      const distribution = wide === undefined ? chosenProbabilities(choices) : firstColumns(wide, tokens, experts);
      layers.push({ ...choices, probabilities: distribution });
      decisions.push({
        plan: kinds[layer]?.includes("dense") ? "dense" : "sparse",
        experts,
        nulls: nulls[layer] ?? 0,
        ...beside([choices, ...further], tokens),
        ...(wide === undefined ? {} : { probabilities: Float32Array.from(wide) }),
      });
    }
    const [loss = 0] = await read(kept.loss);
    const unheld = kinds.flat().find((kind) => !namesExperts(kind));
    return {
      nats: loss * countedTokens(batch),
      layers,
      decisions: unheld === undefined ? decisions : unnamed(unheld),
    };
  } finally {
    // A router may return one tensor in two places.
    for (const tensor of new Set(leaves(kept).map(([, x]) => x))) tensor.dispose();
  }
}

/** Kinds of plans that name experts for every token, and what these outputs are multiplied by. */
const namesExperts = (kind: Plan["kind"]): boolean => kind === "sparse" || kind === "dense";
const unnamed = (kind: Plan["kind"]): string =>
  `a routing trace names the experts of every token, which a plan of kind "${kind}" does not`;

/** Slots of several plans next to each other, token by token. */
function beside(parts: readonly Choices[], tokens: number): Pick<LayerDecisions, "slots" | "ids" | "weights"> {
  const slots = parts.reduce((sum, { k }) => sum + k, 0);
  const ids = new Int32Array(tokens * slots);
  const weights = new Float32Array(tokens * slots);
  let at = 0;
  for (const part of parts) {
    for (let i = 0; i < part.ids.length; i++) {
      const to = Math.floor(i / part.k) * slots + at + (i % part.k);
      const id = part.ids[i] ?? -1;
      ids[to] = Math.max(-1, id);
      weights[to] = id < 0 ? 0 : (part.weights[i] ?? 0);
    }
    at += part.k;
  }
  return { slots, ids, weights };
}

type TokenWeights = { readonly weights: Tensor; readonly ids?: Tensor };

/** The experts of each token: ids with weights [tokens, k], or weights alone [tokens, experts]. */
function tokenWeights(plan: Plan): TokenWeights {
  if (plan.kind === "sparse") return { weights: plan.weights, ids: plan.experts };
  if (plan.kind === "dense") return { weights: plan.weights };
  // A token's share of its group's mixture; of the first expert mode where there are several.
  const [mixture] = plan.kind === "merge" ? plan.coefficients : [];
  if (plan.kind === "merge" && mixture !== undefined) return { weights: takeRows(mixture, plan.groups) };
  throw new UnsupportedError(`the comparison follows experts per token; a plan of kind "${plan.kind}" names none`);
}

const fromSparse = (ids: Int32Array, weights: Float32Array, experts: number, tokens: number): Choices => ({
  experts,
  k: tokens === 0 ? 0 : ids.length / tokens,
  ids,
  weights,
});

const fromDense = (weights: Float32Array, experts: number): Choices => ({
  experts,
  k: experts,
  ids: Int32Array.from(weights, (weight, i) => (weight === 0 ? -1 : i % experts)),
  weights,
});

/** The columns of the real experts, null ones left out. */
function firstColumns(rows: Float64Array, tokens: number, experts: number): Float32Array {
  const width = tokens === 0 ? experts : rows.length / tokens;
  return Float32Array.from(
    { length: tokens * experts },
    (_, i) => rows[Math.floor(i / experts) * width + (i % experts)] ?? 0,
  );
}

/** Keeps the positions for which `keep` is true. */
export function onlyTokens(choices: LayerChoices, keep: (token: number) => boolean): LayerChoices {
  const { experts, k, ids, weights, probabilities } = choices;
  const rows = (token: number, width: number): readonly [number, number] => [token * width, (token + 1) * width];
  const tokens = Array.from({ length: probabilities.length / Math.max(1, experts) }, (_, token) => token).filter(keep);
  return {
    experts,
    k,
    ids: Int32Array.from(tokens.flatMap((token) => [...ids.subarray(...rows(token, k))])),
    weights: Float32Array.from(tokens.flatMap((token) => [...weights.subarray(...rows(token, k))])),
    probabilities: Float32Array.from(tokens.flatMap((token) => [...probabilities.subarray(...rows(token, experts))])),
  };
}

/** Joins the choices of one layer on several batches; a narrower list of slots is filled up with empty ones. */
export function joined(parts: readonly LayerChoices[]): LayerChoices {
  const experts = parts[0]?.experts ?? 0;
  const k = Math.max(0, ...parts.map((part) => part.k));
  const tokens = parts.map((part) => part.probabilities.length / Math.max(1, experts));
  const total = tokens.reduce((sum, n) => sum + n, 0);
  const ids = new Int32Array(total * k).fill(-1);
  const weights = new Float32Array(total * k);
  const probabilities = new Float32Array(total * experts);
  let at = 0;
  for (const [i, part] of parts.entries()) {
    const count = tokens[i] ?? 0;
    for (let token = 0; token < count; token++) {
      ids.set(part.ids.subarray(token * part.k, (token + 1) * part.k), (at + token) * k);
      weights.set(part.weights.subarray(token * part.k, (token + 1) * part.k), (at + token) * k);
    }
    probabilities.set(part.probabilities, at * experts);
    at += count;
  }
  return { experts, k, ids, weights, probabilities };
}

const rounded = (x: number): number => Number(x.toFixed(5));

/** The record of one layer: tokens labelled by domain, and the same tokens at the checkpoint before. */
export function layerRouting(now: LayerChoices, labels: Uint8Array, domains: number, before?: Choices): LayerRouting {
  const load = loadByLabel(now, labels, domains);
  const all = expertLoad(now);
  return {
    load: Array.from({ length: domains }, (_, d) =>
      [...load.subarray(d * now.experts, (d + 1) * now.experts)].map(rounded),
    ),
    entropy: rounded(routingEntropy(now.probabilities, now.experts)),
    imbalance: rounded(loadImbalance(all)),
    dead: deadExperts(all),
    specialisation: rounded(Math.max(0, specialisation(now, labels, domains))),
    expertsPerToken: rounded(expertsPerToken(now)),
    expertsByDomain: [...expertsByLabel(now, labels, domains)].map(rounded),
    ...(before === undefined ? {} : { fluctuation: rounded(routingFluctuation(before, now)) }),
  };
}

/**
 * The record of one layer at the end of training: who meets whom on the probe, and how many of `clean`'s tokens go elsewhere in `noised`, the
 * same tokens in a noised text.
 */
export async function finalLayer(
  on: Engine,
  { probe, clean, noised }: Readonly<Record<"probe" | "clean" | "noised", LayerChoices>>,
): Promise<FinalLayer> {
  const { experts } = probe;
  const ids = ({ k, ids: flat }: Choices): Tensor => on.tensor(flat, [flat.length / Math.max(1, k), k]);
  const tensors = on.scope(() => {
    const weights = on.tensor(probe.weights, [probe.weights.length / Math.max(1, probe.k), probe.k]);
    const tokens = weights.shape[0] ?? 0;
    const together = coActivation(assignments({ kind: "sparse", experts: ids(probe), weights }, { tokens, experts }));
    return {
      together,
      combinations: combinationUsage(together),
      ...routingChange(ids(clean), ids(noised), { experts }),
    };
  });
  const number = async (x: Tensor): Promise<number> => rounded((await read(x))[0] ?? 0);
  try {
    const counts = await read(tensors.together); // [experts, experts], on the diagonal each expert's load
    const share = (a: number, b: number): number =>
      rounded((counts[a * experts + b] ?? 0) / Math.max(1, counts[a * experts + a] ?? 0));
    return {
      together: Array.from({ length: experts }, (_, a) => Array.from({ length: experts }, (__, b) => share(a, b))),
      combinations: await number(tensors.combinations),
      noised: {
        sets: await number(tensors.sets),
        overlap: await number(tensors.overlap),
        firsts: await number(tensors.firsts),
      },
    };
  } finally {
    for (const [, tensor] of leaves(tensors)) tensor.dispose();
  }
}
