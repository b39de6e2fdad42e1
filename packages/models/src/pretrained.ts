// Saving a model as a folder and loading it again: the OLMoE layout where the model has that form, our own where it has
// not.
import { dispose, type Engine, type Json, ShapeError } from "@switchyard/core";
import type { RouterPlugin } from "@switchyard/core/moe";
import { findArchitecture } from "./architectures/find.ts";
import { olmoeRefusal, type SpecialIds, writeOlmoe } from "./architectures/olmoe.ts";
import { writeSwitchyard } from "./architectures/switchyard.ts";
import { type ChatTemplate, namedChatTemplates, readChatTemplate } from "./chat-template.ts";
import { type OpenCheckpoint, openCheckpoint } from "./checkpoint.ts";
import { type FileToSave, saveFiles } from "./files.ts";
import type { Architecture, LanguageModel, ReadModelOptions } from "./model.ts";
import { encodeSafetensors } from "./safetensors.ts";
import { isCheckpointFile } from "./save-checkpoint.ts";
import { type FoundTokenizer, readTokenizer, type Tokenizer } from "./tokenizer.ts";
import { asTransformer } from "./transformer.ts";

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

/**
 * Saves a model, all or nothing, and says in which layout. Files in the folder that do not belong to a checkpoint stay.
 * Throws CheckpointError where the folder cannot be written or the model does not have the form of the layout asked
 * for.
 *
 * @example await saveModel(model, "runs/first/model", { tokenizer });
 */
export async function saveModel(
  given: LanguageModel,
  folder: string,
  options: SaveOptions = {},
): Promise<"olmoe" | "switchyard"> {
  const model = asTransformer(given);
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
  await saveFiles(folder, files, { last: "config.json", isStale: isCheckpointFile });
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

export interface LoadOptions extends ReadModelOptions {
  readonly engine: Engine;
  /** Needed for models saved in our own layout: the routers that may occur, with their options. */
  readonly routers?: readonly RouterPlugin[];
  /** Accepts a router of the same name with other options; default false. */
  readonly otherOptions?: boolean;
  /** Architectures beside the built-in ones, asked first. */
  readonly architectures?: readonly Architecture[];
  /** Named chat templates that lie in a folder beside the checkpoint's files; `loadModel` reads them itself. See `namedChatTemplates`. */
  readonly chatTemplates?: Readonly<Record<string, string>>;
}

export interface OpenOptions extends LoadOptions {
  /** Reads files that are links out of the folder; default false. The cache of the Hugging Face Hub needs no option. */
  readonly followLinks?: boolean;
}

export interface LoadedModel extends FoundTokenizer {
  readonly model: LanguageModel;
  /** Says so when it is asked to render and the checkpoint has none. */
  readonly chatTemplate: ChatTemplate;
  /** Frees the parameters and closes the files that streamed experts are read from. The model cannot be used afterwards. */
  close(): Promise<void>;
}

/**
 * Loads a model (and its tokenizer) from a folder in the Hugging Face layout or our own.
 * Throws CheckpointError where the folder holds no such checkpoint, is damaged, asks for what this package cannot run, or needs
 * a router that was not passed in.
 *
 * @example const { model, tokenizer } = await loadModel("OLMoE-1B-7B-0924", { engine, memory: 3e9 });
 */
export async function loadModel(folder: string, options: OpenOptions): Promise<LoadedModel> {
  const { followLinks = false, ...rest } = options;
  const checkpoint = await openCheckpoint(folder, { followLinks });
  try {
    const chatTemplates = rest.chatTemplates ?? (await namedChatTemplates(folder, { followLinks }));
    const loaded = await readModel(checkpoint, { ...rest, chatTemplates }, folder);
    // What is in memory needs its files no longer.
    if (!loaded.model.streamed) await checkpoint.close();
    return loaded;
  } catch (error) {
    await checkpoint.close();
    throw error;
  }
}

/**
 * The same from an open checkpoint, such as `readCheckpoint` makes from downloads or files in a browser. The model takes it over:
 * `close` of what is returned closes it. Where this throws, the checkpoint stays open. `where` names it in errors.
 */
export async function readModel(
  checkpoint: OpenCheckpoint,
  options: LoadOptions,
  where = "the checkpoint",
): Promise<LoadedModel> {
  const { engine, routers = [], otherOptions = false, architectures = [], chatTemplates, ...how } = options;
  const architecture = findArchitecture(checkpoint, { routers, otherOptions, architectures }, where);
  const files = await readTextFiles(checkpoint, chatTemplates);
  const model = await architecture.read(checkpoint, engine, how);
  return {
    model,
    ...files,
    async close() {
      await model.streamed?.close();
      dispose([model.params, ...model.buffers]);
      await checkpoint.close();
    },
  };
}

async function readTextFiles(
  checkpoint: OpenCheckpoint,
  chatTemplates: LoadOptions["chatTemplates"],
): Promise<FoundTokenizer & Pick<LoadedModel, "chatTemplate">> {
  return { ...(await readTokenizer(checkpoint)), chatTemplate: await readChatTemplate(checkpoint, chatTemplates) };
}
