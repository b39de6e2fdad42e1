// Saving a model as a folder and loading it again: the OLMoE layout where the model has that form, our own where it has
// not.
import { CheckpointError, type Engine, type Json, ShapeError } from "@switchyard/core";
import type { RouterPlugin } from "@switchyard/core/moe";
import { olmoe, olmoeRefusal, type SpecialIds, writeOlmoe } from "./architectures/olmoe.ts";
import { switchyard, writeSwitchyard } from "./architectures/switchyard.ts";
import { openCheckpoint } from "./checkpoint.ts";
import { type FileToSave, saveFiles } from "./files.ts";
import { encodeSafetensors } from "./safetensors.ts";
import { tokenizer as makeTokenizer, type Tokenizer } from "./tokenizer.ts";
import type { Transformer } from "./transformer.ts";

export interface SaveOptions {
  /** Saved beside the weights. */
  readonly tokenizer?: Tokenizer;
  /**
   * "olmoe" loads in Hugging Face Transformers, "switchyard" only here; default: olmoe where the model has that form.
   */
  readonly layout?: "olmoe" | "switchyard";
}

const json = (name: string, value: Json): FileToSave => ({
  name,
  content: () => [new TextEncoder().encode(`${JSON.stringify(value, null, 2)}\n`)],
});

/** Files of an earlier save that would not belong to the new weights. */
const ours =
  /^(model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|(tokenizer(_config)?|generation_config)\.json)$/;

/**
 * Saves a model, all or nothing, and says in which layout. Files in the folder that do not belong to a checkpoint stay.
 * Throws CheckpointError where the folder cannot be written or the model does not have the form of the layout asked
 * for.
 *
 * @example await saveModel(model, "runs/first/model", { tokenizer });
 */
export async function saveModel(
  model: Transformer,
  folder: string,
  options: SaveOptions = {},
): Promise<"olmoe" | "switchyard"> {
  const { tokenizer, layout = olmoeRefusal(model) === undefined ? "olmoe" : "switchyard" } = options;
  if (tokenizer && tokenizer.vocabulary > model.vocabulary) {
    throw new ShapeError(
      `saveModel: the tokenizer has ${tokenizer.vocabulary} ids, the model only ${model.vocabulary}; ` +
        "they do not belong together",
    );
  }
  const special = specialIds(tokenizer);
  const { config, tensors } = layout === "olmoe" ? writeOlmoe(model, special) : writeSwitchyard(model);
  const { bos = null, eos = null, pad = null } = special;
  const files: FileToSave[] = [
    { name: "model.safetensors", content: () => encodeSafetensors(tensors) },
    json("generation_config.json", { bos_token_id: bos, eos_token_id: eos, pad_token_id: pad, do_sample: true }),
    json("config.json", config),
  ];
  if (tokenizer) {
    const { files: content } = tokenizer;
    files.push(
      json("tokenizer.json", content.tokenizer),
      json("tokenizer_config.json", { ...content.config, model_max_length: model.config.context }),
    );
  }
  await saveFiles(folder, files, { last: "config.json", isStale: (name) => ours.test(name) });
  return layout;
}

function specialIds(tokenizer: Tokenizer | undefined): SpecialIds {
  if (!tokenizer) return {};
  const find = (role: string): number | undefined => {
    const text = tokenizer.files.config[role];
    return typeof text === "string" ? tokenizer.special.get(text) : undefined;
  };
  const [bos, eos, pad] = [find("bos_token"), find("eos_token"), find("pad_token")];
  return {
    ...(bos === undefined ? {} : { bos }),
    ...(eos === undefined ? {} : { eos }),
    ...(pad === undefined ? {} : { pad }),
  };
}

export interface LoadOptions {
  readonly engine: Engine;
  /** Needed for models saved in our own layout: the routers that may occur, with their options. */
  readonly routers?: readonly RouterPlugin[];
  /** Accepts a router of the same name with other options; default false. */
  readonly otherOptions?: boolean;
  /** Bytes that the parameters may take in f32; default: no limit. */
  readonly memory?: number;
  /** Reads files that are links out of the folder; default false. The cache of the Hugging Face Hub needs no option. */
  readonly followLinks?: boolean;
}

export interface LoadedModel {
  readonly model: Transformer;
  /** Where the folder has a tokenizer.json. */
  readonly tokenizer?: Tokenizer;
}

/**
 * Loads a model (and its tokenizer) from a folder: `model_type` olmoe or switchyard.
 * Throws CheckpointError where the folder holds no such checkpoint, is damaged, or needs a router that was not passed
 * in.
 *
 * @example const { model, tokenizer } = await loadModel("runs/first/model", { engine, routers: [topK({ k: 2 })] });
 */
export async function loadModel(folder: string, options: LoadOptions): Promise<LoadedModel> {
  const { engine, routers = [], otherOptions = false, memory, followLinks = false } = options;
  const checkpoint = await openCheckpoint(folder, { followLinks });
  try {
    const architectures = [olmoe, switchyard({ routers, otherOptions })];
    const type = checkpoint.config.model_type;
    const architecture = architectures.find(({ modelTypes }) => modelTypes.some((known) => known === type));
    if (!architecture) {
      const known = architectures.flatMap(({ modelTypes }) => modelTypes).join(", ");
      throw new CheckpointError(
        `${folder}: model_type is ${JSON.stringify(type ?? null)}; this version loads ${known}`,
      );
    }
    const content = await checkpoint.json("tokenizer.json");
    const config = await checkpoint.json("tokenizer_config.json");
    const tokenizer = content && makeTokenizer({ tokenizer: content, config: config ?? {} });
    const model = await architecture.read(checkpoint, engine, memory === undefined ? {} : { memory });
    return { model, ...(tokenizer ? { tokenizer } : {}) };
  } finally {
    await checkpoint.close();
  }
}
