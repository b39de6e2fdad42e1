// Writing a checkpoint as a folder in the Hugging Face layout: config.json beside one file of weights, or beside shards and
// their index. One tensor is in memory at a time.
import { CheckpointError, type Json } from "@switchyard/core";
import { type FileToSave, saveFiles } from "./files.ts";
import { encodeSafetensors, maximumTensors, quote, storedBytes, type TensorSource } from "./safetensors.ts";
import type { CheckpointContent } from "./weights.ts";

export interface SaveCheckpointOptions {
  /** Most bytes of tensors in one file, unless a single tensor has more; default 5 GB. */
  readonly shardBytes?: number;
  /** Written into every file of weights; `format: "pt"` is always there. */
  readonly metadata?: Readonly<Record<string, string>>;
  /** Further files of the folder, such as tokenizer.json. */
  readonly files?: readonly FileToSave[];
}

export interface SavedCheckpoint {
  readonly tensors: number;
  /** Of all tensors, without headers. */
  readonly bytes: number;
  /** Names of the files with weights. */
  readonly files: readonly string[];
}

const names =
  /^(model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|(tokenizer(_config)?|generation_config)\.json)$/;

/** Whether a file belongs to a checkpoint, so that one of an earlier save must not stay beside the new weights. */
export const isCheckpointFile = (name: string): boolean => names.test(name);

/** A JSON file of a checkpoint, as Transformers writes it. */
export const jsonFile = (name: string, value: Json): FileToSave => ({
  name,
  content: () => [new TextEncoder().encode(`${JSON.stringify(value, null, 2)}\n`)],
});

/**
 * Saves a checkpoint, all or nothing (see `saveFiles`). Tensors are written in the order given and asked for their bytes one
 * by one; where they are more than `shardBytes` together, they are spread over files named and indexed as on the Hub.
 * Throws CheckpointError where the folder cannot be written, or a name, a dtype or a size is not allowed.
 */
export async function saveCheckpoint(
  folder: string,
  { config, tensors }: CheckpointContent,
  { shardBytes = 5e9, metadata = {}, files = [] }: SaveCheckpointOptions = {},
): Promise<SavedCheckpoint> {
  if (!(shardBytes >= 1)) throw new CheckpointError(`shardBytes is ${shardBytes}, expected at least 1`);
  const shards: TensorSource[][] = [[]];
  let bytes = 0;
  let filled = 0;
  for (const tensor of tensors) {
    const size = storedBytes(tensor);
    if (size === undefined) {
      throw new CheckpointError(`cannot write tensor ${quote(tensor.name)}: ${tensor.dtype} [${tensor.shape}]`);
    }
    if (filled > 0 && (filled + size > shardBytes || (shards.at(-1)?.length ?? 0) === maximumTensors)) {
      shards.push([]);
      filled = 0;
    }
    shards.at(-1)?.push(tensor);
    filled += size;
    bytes += size;
  }
  const number = (i: number): string => `${i}`.padStart(5, "0");
  const weights = shards.map((content, i) => ({
    name: shards.length === 1 ? "model.safetensors" : `model-${number(i + 1)}-of-${number(shards.length)}.safetensors`,
    tensors: content,
  }));
  const toSave: FileToSave[] = weights.map(({ name, tensors: content }) => ({
    name,
    content: () => encodeSafetensors(content, metadata),
  }));
  if (weights.length > 1) {
    // From entries: a tensor named __proto__ is refused by the encoder, not lost in an assignment.
    const places = weights.flatMap(({ name, tensors: content }) => content.map((one) => [one.name, name] as const));
    const index = { metadata: { total_size: bytes }, weight_map: Object.fromEntries(places) };
    if (new Set(places.map(([name]) => name)).size < places.length) {
      throw new CheckpointError(`cannot save to ${folder}: two tensors have one name`);
    }
    toSave.push(jsonFile("model.safetensors.index.json", index));
  }
  toSave.push(...files, jsonFile("config.json", config));
  await saveFiles(folder, toSave, { last: "config.json", isStale: isCheckpointFile });
  return { tensors: tensors.length, bytes, files: weights.map(({ name }) => name) };
}
