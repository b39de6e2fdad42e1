// What of a model is trained, from the settings: everything, adapters, or the experts that the text uses.
import { random, ShapeError, UnsupportedError } from "@switchyard/core";
import type { TrainingHook } from "@switchyard/core/moe";
import type { ExpertConfig, Task } from "@switchyard/core/train";
import type { LanguageModel, TextBatch } from "@switchyard/models";
import { chooseExperts, isLora, onlyExperts, trainsExperts, tuningTask, withLora } from "@switchyard/models/tuning";
import type { JobContext } from "./context.ts";
import type { TuningText } from "./data.ts";
import type { Settings } from "./settings.ts";

/** Tokens of which the paper takes its relevance scores. */
const esftTokens = 131_072;

/** A model, the task of training a part of it, and what freezes the rest of that part. */
export interface Plan {
  readonly model: LanguageModel;
  readonly task: Task<TextBatch>;
  readonly hooks: readonly TrainingHook[];
}

/** The model with adapters, or as it is. */
function adapted(model: LanguageModel, { lora, rank, alpha, seed }: Settings): LanguageModel {
  if (!lora) return model;
  try {
    return withLora(model, {
      parts: lora,
      ...(rank === undefined ? {} : { rank }),
      ...(alpha === undefined ? {} : { alpha }),
      random: random(model.engine, seed),
    });
  } catch (cause) {
    // A part of which the model has no matrix, said in the words of the command.
    if (!ShapeError.isInstance(cause)) throw cause;
    throw new UnsupportedError(cause.message.replace(/^withLora:/, "--lora:"), { cause });
  }
}

/** @throws UnsupportedError, ShapeError for parts, layers and experts that the model does not have. */
export function planOf(
  given: LanguageModel,
  settings: Settings,
  { experts, batch }: { readonly experts: ExpertConfig | undefined; readonly batch: (index: number) => TextBatch },
): Plan {
  const lora = settings.lora !== undefined;
  // Adapters lie beside chosen experts alone, but also beside whatever other part is named.
  const config = experts && lora ? { ...experts, shared_experts: true, non_expert_modules: true } : experts;
  const named = config ? trainsExperts(config) : () => true;
  const model = adapted(given, settings);
  const task = tuningTask(model, { trains: (path) => (!lora || isLora(path)) && named(path), batch });
  return { model, task, hooks: config ? [onlyExperts(model, config, task.params)] : [] };
}

/** The experts that --esft finds in the text that is trained on; undefined without it. */
export async function chosenExperts(
  model: LanguageModel,
  settings: Settings,
  { text, batch }: { readonly text: TuningText; readonly batch: (index: number) => TextBatch },
  { bar, signal }: JobContext,
): Promise<ExpertConfig | undefined> {
  if (settings.esft === undefined) return undefined;
  const tokens = Math.min(esftTokens, text.training.length);
  const count = Math.max(1, Math.floor(tokens / (settings.rows * settings.length)));
  function* batches(): Generator<TextBatch> {
    for (let i = 0; i < count; i++) {
      signal.throwIfAborted();
      bar.update("Choosing experts", i, count);
      yield batch(i);
    }
  }
  const { esft: p, esftBy: by = "gate" } = settings;
  const config = await chooseExperts(model, batches(), { p, by });
  bar.update("Choosing experts", count, count);
  bar.end();
  return config;
}
