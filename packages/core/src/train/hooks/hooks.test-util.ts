// For tests of hooks: a language model of two MoE layers on made-up text, small enough for the real trainer, and what the
// tests ask of every hook.
import { expect } from "vitest";
import { cpu } from "../../cpu/index.ts";
import { type Engine, engine } from "../../engine.ts";
import { glu } from "../../moe/experts.ts";
import { layerParams, moe } from "../../moe/layer.ts";
import { switchBalance } from "../../moe/losses.ts";
import type { Experts, Pass, Router, TrainingHook } from "../../moe/plan.ts";
import { add } from "../../ops/elementwise.ts";
import { softmaxTopk } from "../../ops/experts.ts";
import { linear } from "../../ops/matmul.ts";
import { crossEntropy } from "../../ops/normalise.ts";
import { mean } from "../../ops/reduce.ts";
import { takeRows } from "../../ops/rows.ts";
import { type Random, random } from "../../random.ts";
import { leaves, type Tensor, type Tree } from "../../tensor.ts";
import { adamw } from "../optim.ts";
import { type Task, type Trainer, type TrainerOptions, trainer } from "../trainer.ts";

export const [vocabulary, width, hidden, count, sequence] = [11, 6, 4, 5, 7] as const;

export interface Text {
  readonly ids: Int32Array;
  readonly labels: Int32Array;
}
/** `sequences` texts from the given index on, one after the other. */
export const text = (index: number, sequences = 1): Text => {
  const rows = Array.from({ length: sequences }, (_, i) =>
    Int32Array.from({ length: sequence + 1 }, (_, j) => ((index + i) * 5 + j * j + j * ((index + i) % 3)) % vocabulary),
  );
  const joined = (from: number): Int32Array =>
    Int32Array.from(rows.flatMap((row) => [...row.slice(from, from + sequence)]));
  return { ids: joined(0), labels: joined(1) };
};

export const leafOf = (tree: Tree, path: string): Tensor => {
  const found = leaves(tree).find(([name]) => name === path)?.[1];
  if (!found) throw new Error(`no "${path}" among ${leaves(tree).map(([name]) => name)}`);
  return found;
};

export interface ModelOptions {
  /** Texts per batch; default 1. */
  readonly sequences?: number;
  /** Weight of the routers' own balance loss; default 0. */
  readonly balance?: number;
  /** false: what the experts see is not passed on to hooks. */
  readonly observed?: boolean;
  /** Default: SwiGLU experts. */
  readonly experts?: (initial: { readonly engine: Engine; readonly random: Random }) => Experts;
}

export function smallTask(
  root: Engine,
  {
    sequences = 1,
    balance = 0,
    observed = true,
    experts = (from) => glu({ count, width, hidden, ...from }),
  }: ModelOptions = {},
): Task<Text> {
  const draws = random(root, 17);
  const router = (layer: number): Router => ({
    params: { weight: draws.at("router", layer).normal([count, width]) },
    buffers: {},
    route(params, input) {
      const logits = linear(input.hidden, leafOf(params, "weight"));
      const { weights, ids, probabilities } = softmaxTopk(logits, { k: 2, order: "softmax-topk" });
      const { globalLoad } = input;
      const value = switchBalance({ probabilities, experts: ids, ...(globalLoad ? { load: globalLoad } : {}) });
      const losses = balance === 0 ? {} : { balance: { value, weight: balance } };
      return { plan: { kind: "sparse", experts: ids, weights }, logits, probabilities, losses };
    },
  });
  const layers = [0, 1].map((layer) => ({
    router: router(layer),
    experts: experts({ engine: root, random: draws.at("experts", layer) }),
  }));
  return {
    params: {
      embedding: draws.at("embedding").normal([vocabulary, width]),
      layers: layers.map((layer) => ({ moe: layerParams(layer) })),
      head: draws.at("head").normal([vocabulary, width]),
    },
    routers: layers.map((layer) => layer.router),
    batch: (index) => text(index * sequences, sequences),
    forward(params, buffers, { ids, labels }, info): Pass {
      let x = takeRows(leafOf(params, "embedding"), root.tensor(ids, [ids.length])); // [tokens, width]
      const routed = layers.map((layer, i) => {
        const { globalLoad: loads, observe, ...rest } = info;
        const globalLoad = loads?.[i];
        const own = (params as { readonly layers: readonly { readonly moe: Tree }[] }).layers[i]?.moe ?? {};
        const result = moe(
          layer,
          own,
          {
            ...rest,
            hidden: x,
            layout: { batch: ids.length / sequence, sequence, past: 0 },
            layer: i,
            layers: layers.length,
            buffers: buffers[i] ?? {},
            ...(globalLoad ? { globalLoad } : {}),
          },
          observe && observed
            ? { observe: (name, rows, ends) => observe(`layers.${i}.moe.experts.${name}`, i, rows, ends) }
            : {},
        );
        x = add(x, result.output);
        return result.routed;
      });
      const logits = linear(x, leafOf(params, "head"));
      return { loss: mean(crossEntropy(logits, root.tensor(labels, [ids.length])).losses), logits, layers: routed };
    },
  };
}

export const train = (
  hooks: readonly TrainingHook[],
  options: Partial<TrainerOptions> = {},
  { root = engine(cpu()), ...model }: ModelOptions & { readonly root?: Engine } = {},
): Trainer<Text> =>
  trainer(root, smallTask(root, model), {
    optimiser: adamw({ learningRate: 0.02, weightDecay: 0.1 }),
    totalSteps: 20,
    seed: 5,
    hooks,
    ...options,
  });

export const numbersOf = async (tree: Tree): Promise<Record<string, number[]>> =>
  Object.fromEntries(
    await Promise.all(
      leaves(tree).map(async ([path, x]): Promise<[string, number[]]> => [path, [...(await x.data())]]),
    ),
  );

/** Everything of a run but the wall time. */
export async function stateOf(one: Trainer<Text>): Promise<unknown> {
  const { arrays } = await one.snapshot();
  return { arrays, history: one.history.map(({ seconds: _, ...report }) => report) };
}

/** Resuming at every step gives, bit for bit, what the whole run gives; the snapshot goes through JSON. */
export async function resumes(
  make: () => TrainingHook,
  options: Partial<TrainerOptions> = {},
  steps = 8,
  root: Engine = engine(cpu()),
): Promise<void> {
  const whole = train([make()], options, { root });
  const snapshots = [];
  for (let step = 0; step < steps; step++) {
    snapshots.push(await whole.snapshot());
    await whole.step();
  }
  const expected = await stateOf(whole);
  for (const { arrays, json } of snapshots) {
    const resumed = train([make()], options, { root });
    resumed.restore({ arrays, json: JSON.parse(JSON.stringify(json)) });
    await resumed.run({ until: steps });
    expect(await stateOf(resumed)).toEqual(expected);
    resumed.dispose();
  }
  whole.dispose();
}
