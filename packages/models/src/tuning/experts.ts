// Which experts a text uses, and training only those (ESFT, 2407.01906): core's statistics and masks on a loaded model.
import { ShapeError, type Tree } from "@switchyard/core";
import type { TrainingHook } from "@switchyard/core/moe";
import {
  type EsftStatistics,
  type ExpertConfig,
  esft,
  esftConfig,
  esftStatistics,
  normaliseScores,
  selectExperts,
} from "@switchyard/core/train";
import type { LanguageModel } from "../model.ts";
import type { TextBatch } from "../task.ts";
import { layerOf, partOf } from "./parts.ts";

export interface ChooseExpertsOptions {
  /** "gate": the average gate score (eq. 5), divided by its sum in the layer. "token": how often it is chosen (eq. 6). Default "gate". */
  readonly by?: "gate" | "token";
  /** Experts are taken until their scores reach this sum, 0 to 1; default 0.1 by gate (the paper), 0.2 by token (the released code). */
  readonly p?: number;
}

/**
 * The experts that matter for some text, layer by layer, as an expert_cfg: one forward pass for every batch, each sequence one sample.
 * Layers are named by their number in the model; routers inside attention are left out. Streamed models are served, too.
 *
 * @throws ShapeError for a model without routed experts, without a batch, or for a `p` out of range; UnsupportedError for routers
 * whose plans have no gates per token.
 * @example const config = await chooseExperts(model, [data.batch(0), data.batch(1)], { by: "token" });
 */
export async function chooseExperts(
  model: LanguageModel,
  batches: Iterable<TextBatch>,
  options: ChooseExpertsOptions = {},
): Promise<ExpertConfig> {
  const { by = "gate", p = by === "gate" ? 0.1 : 0.2 } = options;
  if (by !== "gate" && by !== "token") throw new ShapeError(`chooseExperts: by is "${by}"; expected "gate" or "token"`);
  const { engine } = model;
  const places = new Map<number, { readonly layer: number; readonly statistics: EsftStatistics }>();
  for (const [place, { layer, part, experts }] of model.routing.entries())
    if (part === "feedForward") places.set(place, { layer, statistics: esftStatistics({ experts }) });
  if (places.size === 0) throw new ShapeError("chooseExperts: this model has no routed experts");

  for (const { ids, shape, mask } of batches) {
    const given = engine.scope(() => ({
      ids: engine.tensor(ids, shape),
      ...(mask ? { mask: engine.tensor(mask, shape) } : {}),
    }));
    const about = { batch: shape[0], ...(given.mask ? { mask: given.mask } : {}) };
    try {
      const record = (place: number, routed: Parameters<EsftStatistics["add"]>[0][number]): void =>
        places.get(place)?.statistics.add([routed], about);
      const logits = await model.step(given.ids, {
        ...(given.mask ? { mask: given.mask } : {}),
        trace: { record, metrics: false },
      });
      logits.dispose();
    } finally {
      given.ids.dispose();
      given.mask?.dispose();
    }
  }

  const found = await Promise.all(
    Array.from(places.values(), async ({ layer, statistics }) => ({ layer, scores: await statistics.scores() })),
  );
  const scores = found.flatMap((one) => one.scores[by]);
  const selected = selectExperts(by === "gate" ? normaliseScores(scores) : scores, p);
  return esftConfig(selected, { blocks: found.map(({ layer }) => layer) });
}

/**
 * Whether an expert_cfg trains anything of the parameter at this path: what `tuningTask` takes as `trains`. Which experts of it, is for
 * `onlyExperts` to say. Experts of attention belong to the modules that are not experts.
 */
export function trainsExperts(config: ExpertConfig): (path: string) => boolean {
  return (path) => {
    const part = partOf(path);
    if (part === "experts") return config.experts[layerOf(path) ?? ""] !== undefined;
    return part === "shared" ? config.shared_experts : config.non_expert_modules;
  };
}

/**
 * The hook that trains only the experts of an expert_cfg: core's `esft` with the paths of these models. Rows of other experts, and of their
 * adapters, stay bit for bit. `params` are those of the task.
 *
 * @throws ShapeError where the config names a layer or an expert that `params` do not have, or leaves one out.
 * @example
 * const task = tuningTask(model, { trains: trainsExperts(config), batch });
 * const run = trainer(engine, task, { optimiser: adamw(), hooks: [onlyExperts(model, config, task.params)] });
 */
export function onlyExperts(model: Pick<LanguageModel, "engine">, config: ExpertConfig, params: Tree): TrainingHook {
  return esft({
    engine: model.engine,
    config,
    params,
    partOf(path) {
      const part = partOf(path);
      if (part === "experts") return { part, block: layerOf(path) ?? 0 };
      return { part: part === "shared" ? "shared" : "other" };
    },
  });
}
