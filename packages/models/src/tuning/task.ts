// Fine-tuning as a task for core's trainer: some parameters of a loaded model are trained, all others stay what they are.
import {
  alias,
  dispose,
  leaves,
  mapTree,
  ShapeError,
  type Tensor,
  type Tree,
  UnsupportedError,
} from "@switchyard/core";
import type { Router } from "@switchyard/core/moe";
import type { Task } from "@switchyard/core/train";
import type { LanguageModel } from "../model.ts";
import { languageModelTask, type TextBatch } from "../task.ts";
import { mergedLora } from "./lora.ts";
import { matrixPath } from "./parts.ts";

export interface TuningOptions {
  /** Whether the parameter at this path of `model.params` is trained. See `partOf` and `isLora`. */
  trains(path: string): boolean;
  /** Batch `index`, the same for the same index. */
  batch(index: number): TextBatch;
  /**
   * How routers decide while training. "inference" (default): as they will when the model is used, and the loss is the cross entropy
   * alone, as in Hugging Face Transformers without `output_router_logits`. "training": as they did when the model was made: sampling
   * (Phi-3.5-MoE), and balance losses with the weights of config.json. Buffers (DeepSeek-V3's bias) follow the load only
   * where this is "training" and the router's weights are trained.
   */
  readonly routing?: "inference" | "training";
}

/**
 * The task of training a part of `model`: `params` is a flat record from path to tensor, of the trained leaves only, so that gradients,
 * moments and snapshots hold nothing else. The trainer takes these leaves over, and the buffers of routers that change them; all other tensors
 * stay the model's, and are not touched. Afterwards: `tuned(model, trainer.params, trainer.buffers)`.
 *
 * @throws UnsupportedError where nothing is trained, for a trained leaf that is not f32, for one of two paths of a tensor that layers
 * share, and for streamed experts.
 * @example
 * const task = tuningTask(model, { trains: (path) => partOf(path) === "experts", ...randomWindows(ids, { batch: 4, sequence: 128, random }) });
 * const run = trainer(engine, task, { optimiser: adamw({ learningRate: 1e-5 }), clip: 1 });
 */
export function tuningTask(model: LanguageModel, options: TuningOptions): Task<TextBatch> {
  const { trains, routing = "inference" } = options;
  if (model.streamed) {
    throw new UnsupportedError(
      "tuningTask: the experts of this model are streamed, and gradients need all of them in memory; load it without a bound of memory, on " +
        "a backend that holds it",
    );
  }
  const all = leaves(model.params);
  const trained = all.filter(([path]) => trains(path));
  if (trained.length === 0) {
    throw new UnsupportedError(
      "tuningTask: no parameter is trained; `trains` must be true for some path of leaves(model.params)",
    );
  }
  const stored = trained.find(([, { dtype }]) => dtype !== "f32");
  if (stored) {
    const [path, x] = stored;
    throw new UnsupportedError(
      `tuningTask: "${path}" is ${x.dtype} [${x.shape}], and only f32 can be trained; load the model with weights: "f32", or train ` +
        "adapters beside it with withLora",
    );
  }
  // Half of it would move away from the other half, and a file holds it once.
  const frozen = new Map(all.flatMap(([path, x]) => (trains(path) ? [] : [[x, path] as const])));
  const torn = trained.find(([, x]) => frozen.has(x));
  if (torn) {
    const [path, x] = torn;
    throw new UnsupportedError(
      `tuningTask: "${path}" and "${frozen.get(x)}" are one tensor, which layers share; train both or neither`,
    );
  }
  const inner = languageModelTask(model, { batch: options.batch });
  const learns = model.routing.map(({ layer, part }) => {
    const path = `layers.${layer}.${part === "attention" ? "attention" : "moe"}.router.`;
    return routing === "training" && trained.some(([name]) => name.startsWith(path));
  });
  return {
    ...inner,
    params: Object.fromEntries(trained),
    routers: model.routers.map((router, place) => (learns[place] ? router : withoutState(router))),
    forward(params, buffers, batch, info) {
      const training = info.training && routing === "training";
      return inner.forward(placed(model.params, params), allBuffers(model, buffers), batch, { ...info, training });
    },
  };
}

/** The same router without buffers for the trainer: those stay the model's, and stay what they are. */
const withoutState = (router: Router): Router =>
  Object.create(router, {
    buffers: { value: {}, enumerable: true },
    afterStep: { value: undefined, enumerable: true },
  });

/** A trainer's buffers, the model's own where it has none. */
const allBuffers = (model: LanguageModel, buffers: readonly Tree[]): readonly Tree[] =>
  model.buffers.map((own, place) => {
    const given = buffers[place];
    return given === undefined || leaves(given).length === 0 ? own : given;
  });

/** The tree with the leaves of a flat record in their places. */
function placed(tree: Tree, trained: Tree): Tree {
  const found = new Map(leaves(trained));
  return mapTree(tree, (x, path) => found.get(path) ?? x);
}

/**
 * The model with the leaves of a flat record (a trainer's `params`) in their places, and with its buffers. Nothing is copied: it is valid
 * until the trainer's next step.
 * @throws ShapeError for a path that the model does not have, or a leaf of another shape.
 */
export function tuned(model: LanguageModel, params: Tree, buffers: readonly Tree[] = model.buffers): LanguageModel {
  checkPaths(model, params);
  return model.with({ params: placed(model.params, params), buffers: allBuffers(model, buffers) });
}

function checkPaths(model: LanguageModel, params: Tree): void {
  const known = new Set(leaves(model.params).map(([path]) => path));
  const strange = leaves(params).find(([path]) => !known.has(path));
  if (strange) throw new ShapeError(`"${strange[0]}" is no parameter of this model; is it of another model or task?`);
}

/**
 * What training changed, by the path of the parameter, f32: trained leaves, and for every trained adapter the matrix with it added. With
 * `buffers` (a trainer's), also those of routers that are other tensors than the model's, at "layers.0.moe.buffers.bias". The references are
 * the caller's: dispose them; what they show is valid until the trainer's next step.
 * @throws ShapeError for a path that the model does not have.
 */
export function changedParameters(
  model: LanguageModel,
  params: Tree,
  buffers: readonly Tree[] = model.buffers,
): Map<string, Tensor> {
  checkPaths(model, params);
  const trained = leaves(params);
  const adapted = new Set(trained.map(([path]) => matrixPath(path)).filter((path, i) => path !== trained[i]?.[0]));
  const changed = mergedLora(tuned(model, params), (path) => adapted.has(path));
  try {
    // What layers share stays one tensor: a file holds it once.
    const seen = new Map<Tensor, Tensor>();
    for (const [path, x] of trained) {
      if (matrixPath(path) !== path) continue;
      const one = seen.get(x) ?? alias(x);
      seen.set(x, one);
      changed.set(path, one);
    }
    for (const [place, tree] of buffers.entries()) {
      const { layer, part } = model.routing[place] ?? { layer: 0, part: "feedForward" };
      const old = new Map(leaves(model.buffers[place] ?? []));
      for (const [name, x] of leaves(tree)) {
        if (old.get(name) === x) continue;
        changed.set(`layers.${layer}.${part === "attention" ? "attention" : "moe"}.buffers.${name}`, alias(x));
      }
    }
    return changed;
  } catch (error) {
    dispose([...changed.values()]);
    throw error;
  }
}
