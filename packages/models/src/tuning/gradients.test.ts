// The gradient of the cross entropy by every kind of parameter of every family, against central differences in float64.
import {
  autodiff,
  dispose,
  grad,
  leaves,
  lower,
  mapTree,
  random,
  type Tensor,
  type Tree,
  watch,
} from "@switchyard/core";
import type { Routed } from "@switchyard/core/moe";
import { describe, expect, it } from "vitest";
import type { LanguageModel } from "../model.ts";
import { makeEngine } from "../models.test-util.ts";
import { withLora } from "./lora.ts";
import { isLora, matrixPath, partOf, tuningParts } from "./parts.ts";
import { tuningTask } from "./task.ts";
import { batch, families, familyModel } from "./tuning.test-util.ts";

const on = makeEngine(64);
const info = { step: 0, training: true, pass: 0, microBatch: 0, random: random(on, 1), schedule: {} } as const;

/** The loss for some parameters, and which experts were chosen. */
async function lossOf(model: LanguageModel, params: Readonly<Record<string, Tensor>>) {
  const task = tuningTask(model, { trains: () => true, batch: () => batch });
  const { loss, layers } = on.scope(() => task.forward(params, model.buffers, batch, info));
  const chosen = await choices(layers);
  const [value = Number.NaN] = await loss.data();
  dispose([loss]);
  return { value, chosen };
}

async function choices(layers: readonly Routed[]): Promise<string> {
  const ids = layers.map(async ({ plan }) => (plan.kind === "sparse" ? Array.from(await plan.experts.data()) : []));
  return JSON.stringify(await Promise.all(ids));
}

/** Gradients of the loss by all leaves, and the choices that they hold for. */
async function gradientsOf(model: LanguageModel) {
  const task = tuningTask(model, { trains: () => true, batch: () => batch });
  const recording = autodiff(on);
  const found = on.scope(() => {
    const watched = leaves(task.params).map(([path, x]) => [path, watch(recording, x)] as const);
    const { loss, layers } = task.forward(Object.fromEntries(watched), model.buffers, batch, info);
    const gradients = grad(
      loss,
      watched.map(([, x]) => x),
    );
    const plans = layers.map((layer) => ({
      ...layer,
      plan: layer.plan.kind === "sparse" ? { ...layer.plan, experts: lower(layer.plan.experts) } : layer.plan,
    }));
    return { gradients, plans };
  });
  const chosen = await choices(found.plans);
  const byPath = new Map(
    await Promise.all(
      watchedPaths(task.params).map(async (path, i) => [path, await found.gradients[i]?.data()] as const),
    ),
  );
  dispose([...found.gradients]);
  return { byPath, chosen };
}
const watchedPaths = (params: Tree): string[] => leaves(params).map(([path]) => path);

/** The path without its layer: what differs between layers is their kind. */
const kindOf = (path: string): string => path.replace(/^layers\.\d+\./, "");

/** The entry with the largest gradient, and one further on that has a gradient, too. */
function entriesOf(gradient: ArrayLike<number>): number[] {
  const order = Array.from(gradient, (_, i) => i).sort(
    (a, b) => Math.abs(gradient[b] ?? 0) - Math.abs(gradient[a] ?? 0) || a - b,
  );
  const some = order.filter((i) => gradient[i] !== 0);
  return [...new Set([some[0] ?? order[0] ?? 0, some[Math.floor(some.length / 3)] ?? 0])];
}

/** Compares the last parameter of each kind; returns the kinds. Choices of experts must be the same on both sides of every step. */
async function check(model: LanguageModel, wanted: (path: string) => boolean = () => true): Promise<string[]> {
  const { byPath, chosen } = await gradientsOf(model);
  const params = Object.fromEntries(leaves(model.params));
  const kinds = new Map(
    Object.keys(params)
      .filter(wanted)
      .map((path) => [kindOf(path), path]),
  );
  for (const path of kinds.values()) {
    const gradient = byPath.get(path) ?? [];
    const x = params[path] as Tensor;
    const values = Float64Array.from(await x.data());
    expect(
      Array.from(gradient).some((g) => g !== 0),
      `${path} has a gradient`,
    ).toBe(true);
    for (const entry of entriesOf(gradient)) {
      const step = 1e-6;
      const beside = async (by: number): Promise<number> => {
        const moved = values.slice();
        moved[entry] = (moved[entry] ?? 0) + by;
        const other = on.tensor(moved, x.shape);
        const { value, chosen: now } = await lossOf(model, { ...params, [path]: other });
        other.dispose();
        expect(now, `${path}[${entry}]: the same experts beside it`).toBe(chosen);
        return value;
      };
      const numeric = ((await beside(step)) - (await beside(-step))) / (2 * step);
      const found = gradient[entry] ?? Number.NaN;
      const apart = Math.abs(numeric - found) / Math.max(1e-3, Math.abs(numeric));
      expect(apart, `${path}[${entry}]: ${found}, by differences ${numeric}`).toBeLessThan(1e-5);
    }
  }
  return [...kinds.keys()];
}

describe("gradients of every kind of parameter", () => {
  it.each(families)("%s", async (name) => {
    const model = await familyModel(name, on);
    const kinds = await check(model);
    const ends = model.blueprint.tieEmbeddings ? ["embed"] : ["embed", "head"];
    expect(kinds).toEqual(expect.arrayContaining([...ends, "norm", "attentionNorm", "moe.router.weight"]));
    dispose([model.params, ...model.buffers]);
  });

  // Latent attention with shared experts and dense layers; attention heads of experts and a tied head; biases everywhere; SparseMixer.
  it.each(["deepseek_v3", "jetmoe", "gpt_oss", "phimoe"])("low-rank maps of %s", async (name) => {
    const model = await familyModel(name, on);
    const matrices = leaves(model.params).filter(
      ([path, { shape }]) => shape.length > 1 && !/(Bias|\.gate)$/.test(path),
    );
    const has = new Set(matrices.map(([path]) => partOf(path)));
    const parts = tuningParts.filter((part) => has.has(part));
    const adapted = withLora(model, { parts, rank: 2, alpha: 3, random: random(on, 5) });
    // With a B of zeros A would have no gradient.
    const draw = random(on, 6);
    const params = mapTree(adapted.params, (x, path) =>
      path.endsWith(".b")
        ? on.tensor(
            draw
              .at(path)
              .host("normal", x.size)
              .map((v) => v / 10),
            x.shape,
          )
        : x,
    );
    const moved = adapted.with({ params });
    const kinds = await check(moved, isLora);
    const inLayers = kinds.map((path) => matrixPath(path));
    expect(new Set(inLayers.map((path) => partOf(known(path))))).toEqual(new Set(parts));
    dispose([
      moved.params,
      ...model.buffers,
      ...leaves(adapted.params).flatMap(([p, x]) => (p.endsWith(".b") ? [x] : [])),
    ]);
  });
});

const known = (kind: string): string => (/^(embed|head|norm)/.test(kind) ? kind : `layers.0.${kind}`);
