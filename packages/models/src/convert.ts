// Rewriting a checkpoint without running it: another float type, other shards, the other layout of experts (Node only). Nothing larger
// than a piece of a tensor is in memory, what needs no change is copied byte for byte, and a certificate that is worked out
// from the written files says where every byte of every tensor went.
import { CheckpointError, type Json, UnsupportedError } from "@switchyard/core";
import { builtIn } from "./built-in.ts";
import { indexName, readCheckpoint } from "./checkpoint.ts";
import { type ConvertCertificate, checkFiles, compareTensors, filesOf } from "./conversion/compare.ts";
import { type Advance, type ConvertOptions, type Origin, pieceSize, readOrigin, stage } from "./conversion/origin.ts";
import { bytesOf, type Draft, keepers, type Plan, planned } from "./conversion/plan.ts";
import { converted } from "./conversion/values.ts";
import { type FileToSave, type FolderFiles, folderFiles, saveFiles } from "./files.ts";
import { setTopLevel } from "./json-edit.ts";
import { encodeSafetensors, quote, readExactly, type TensorSource } from "./safetensors.ts";
import { isCheckpointFile, jsonFile } from "./save-checkpoint.ts";

/** The bytes of a draft, piece by piece. */
async function* draftBytes(
  { dtype, parts }: Draft,
  { checkpoint }: Origin,
  saturate: boolean,
): AsyncGenerator<Uint8Array, void, undefined> {
  for (const { tensor, from, to } of parts) {
    for (let at = from; at < to; at += pieceSize) {
      const bytes = await checkpoint.read(tensor.name, [at, Math.min(to, at + pieceSize)]);
      yield tensor.dtype === dtype ? bytes : converted(bytes, { tensor, to: dtype, saturate });
    }
  }
}

/** A file as it is. */
async function* copied(open: FolderFiles["open"], name: string): AsyncGenerator<Uint8Array, void, undefined> {
  const source = await open(name);
  if (!source) throw new CheckpointError(`${name} was there a moment ago, and is not any more`);
  try {
    for (let at = 0; at < source.size; at += pieceSize) {
      yield await readExactly(source, at, Math.min(source.size, at + pieceSize));
    }
  } finally {
    await source.close();
  }
}

async function* advancing(
  content: AsyncIterable<Uint8Array>,
  advance: Advance,
): AsyncGenerator<Uint8Array, void, undefined> {
  for await (const bytes of content) {
    advance(bytes.length);
    yield bytes;
  }
}

/** Throws UnsupportedError where the result would lie in the source folder, or on something that is there. */
async function checkTarget(source: string, target: string, replace: boolean): Promise<void> {
  const { realpath, stat } = await builtIn("node:fs/promises");
  const { dirname, resolve } = await builtIn("node:path");
  const status = (path: string) =>
    stat(path, { bigint: true }).catch((error: unknown) => {
      if (error instanceof Error && "code" in error && (error.code === "ENOENT" || error.code === "ENOTDIR"))
        return undefined;
      throw error;
    });
  const origin = await status(source);
  let at = resolve(target);
  for (let first = true; ; first = false) {
    const found = await status(at);
    // By identity, not by name: links and capital letters may hide that it is the same folder.
    if (found && found.dev === origin?.dev && found.ino === origin.ino) {
      const how = first ? "is the source folder itself" : "lies in the source folder";
      throw new UnsupportedError(`cannot convert ${source}: ${target} ${how}; choose a folder outside`);
    }
    const real = found ? await realpath(at) : at;
    const parent = dirname(real);
    if (parent === real) break;
    at = parent;
  }
  if (replace) return;
  const [there] = await (await folderFiles(target, { followLinks: true })).entries();
  if (there) {
    throw new UnsupportedError(
      `${target} is not empty: it holds ${quote(there.name)}. Choose another folder, or replace (--replace) the checkpoint there`,
    );
  }
}

const otherWeights =
  /\.(safetensors|bin|pt|pth|ckpt|pickle|pkl|gguf|h5|msgpack|onnx)$|\.(safetensors|bin)\.index\.json$/i;
/** Files that belong to the checkpoint that is replaced. */
const belongs = (name: string): boolean =>
  isCheckpointFile(name) ||
  /^(.+\.safetensors|tokenizer\.model|(vocab|merges|special_tokens_map|added_tokens|chat_template|processor_config|preprocessor_config)\.\w+)$/.test(
    name,
  );

/** What happens to each thing in the source folder that is no file of weights. */
async function otherFiles(
  { files, weights }: Origin,
  { changed, index }: Plan,
): Promise<{ readonly copies: string[]; readonly leftOut: { readonly name: string; readonly reason: string }[] }> {
  const copies: string[] = [];
  const leftOut: { name: string; reason: string }[] = [];
  for (const { name, kind } of await files.entries()) {
    if (kind === "folder") leftOut.push({ name, reason: "a folder" });
    else if (kind === "elsewhere") leftOut.push({ name, reason: "a link that leads out of the folder" });
    else if (kind === "other") leftOut.push({ name, reason: "no file, or a name that is not allowed everywhere" });
    else if (weights.has(name) || name === "config.json") continue;
    else if (name === indexName && index !== undefined) {
      if (index === false) leftOut.push({ name, reason: "there is one file of weights now" });
    } else if (changed && otherWeights.test(name)) {
      leftOut.push({ name, reason: "other weights, which would not be the converted ones" });
    } else copies.push(name);
  }
  return { copies, leftOut };
}

/**
 * Converts a checkpoint folder into another one: float type, size of shards, layout of experts; whatever is not asked to change
 * keeps its bytes, and where nothing changes every file is a copy. Tokenizer and other files come along; folders and links
 * out of the folder do not. Tensors are read and written in pieces of 8 MiB. Before the new files count, every byte of
 * every tensor is compared with the source; the target holds all of the new checkpoint or what it held before, also when
 * the process is killed (see `saveFiles`). Values are rounded to nearest, ties to even.
 *
 * Throws UnsupportedError for a target inside the source or not empty, for a family with one layout of experts, for quantised
 * experts whose layout should change, and for values beyond the float type; CheckpointError for a damaged source, and where
 * files cannot be read or written; the signal's reason when aborted (the target is then as it was).
 *
 * @example
 * const { totals } = await convertCheckpoint("mixtral", "mixtral-bf16", { dtype: "bf16", shardBytes: 2e9 });
 */
export async function convertCheckpoint(
  source: string,
  target: string,
  options: ConvertOptions = {},
): Promise<ConvertCertificate> {
  const { saturate = false, replace = false, followLinks = false, signal } = options;
  signal?.throwIfAborted();
  const files = await folderFiles(source, { followLinks });
  const checkpoint = await readCheckpoint(files.open, source, { list: files.list });
  try {
    await checkTarget(source, target, replace);
    const origin = await readOrigin(source, files, checkpoint);
    const plan = planned(origin, options);
    return await write({ origin, plan, target, saturate }, options);
  } catch (error) {
    // Not wrapped as a failure of the disk.
    signal?.throwIfAborted();
    throw error;
  } finally {
    await checkpoint.close();
  }
}

async function write(
  { origin, plan, target, saturate }: { origin: Origin; plan: Plan; target: string; saturate: boolean },
  options: ConvertOptions,
): Promise<ConvertCertificate> {
  const { files } = origin;
  const { copies, leftOut } = await otherFiles(origin, plan);
  const toSave: FileToSave[] = [];
  const copyNames = new Set([...plan.weights.filter((name) => !plan.written.has(name)), ...copies]);
  const sizes = new Map<string, number>();
  for (const name of [...origin.weights.keys(), ...copies, "config.json"]) {
    const file = await files.open(name);
    sizes.set(name, file?.size ?? 0);
    await file?.close();
  }
  const rewritten = [...plan.written.values()].flatMap(({ drafts }) => drafts);
  const copying = [...copyNames].reduce((sum, name) => sum + (sizes.get(name) ?? 0), 0);
  const advance = stage(
    "writing",
    rewritten.reduce((sum, draft) => sum + bytesOf(draft), copying),
    options,
  );
  for (const name of plan.weights) {
    const fresh = plan.written.get(name);
    if (!fresh) {
      toSave.push({ name, content: () => advancing(copied(files.open, name), advance) });
      continue;
    }
    const tensors = fresh.drafts.map((draft): TensorSource => {
      const { name: tensor, dtype, shape } = draft;
      const bytes = () => advancing(draftBytes(draft, origin, saturate), advance);
      return { name: tensor, dtype, shape, bytes };
    });
    toSave.push({ name, content: () => encodeSafetensors(tensors, fresh.metadata) });
  }
  for (const name of copies) toSave.push({ name, content: () => advancing(copied(files.open, name), advance) });
  if (plan.index !== undefined && plan.index !== false) toSave.push(jsonFile(indexName, plan.index));
  const config = await readText(files, "config.json");
  const edited = plan.configType === undefined ? config : withType(config, plan.configType, origin.checkpoint.config);
  if (edited === config) copyNames.add("config.json");
  const configFile = { name: "config.json", content: () => [new TextEncoder().encode(edited)] };
  toSave.push(
    edited === config ? { name: "config.json", content: () => copied(files.open, "config.json") } : configFile,
  );

  let compared: Pick<ConvertCertificate, "tensors" | "values" | "totals"> | undefined;
  let checked: Omit<ConvertCertificate["files"], "leftOut"> | undefined;
  await saveFiles(target, toSave, {
    last: "config.json",
    isStale: belongs,
    async verify(open) {
      const output = await readCheckpoint(open, target);
      try {
        compared = await compareTensors(origin, output, await filesOf(open, target), options);
      } finally {
        await output.close();
      }
      const read = [...sizes.keys()].filter(
        (name) => copyNames.has(name) || origin.weights.has(name) || name === "config.json",
      );
      checked = await checkFiles({ read, written: toSave.map(({ name }) => name), copyNames, files, open }, options);
    },
  });
  if (!compared || !checked) throw new CheckpointError(`${target} was written, but not compared`);
  const keep = keepers(origin.tensors);
  return {
    schema: "switchyard/convert/1",
    ...{ source: origin.folder, target },
    changed: plan.changed,
    totals: compared.totals,
    values: compared.values,
    tensors: compared.tensors,
    kept:
      options.dtype === undefined
        ? []
        : origin.tensors.flatMap((tensor) => {
            const reason = keep(tensor);
            const { name, dtype } = tensor;
            return reason === undefined ? [] : [{ name, dtype, reason }];
          }),
    dropped: [],
    files: { ...checked, leftOut },
  };
}

async function readText({ open }: FolderFiles, name: string): Promise<string> {
  const file = await open(name);
  if (!file) throw new CheckpointError(`${name} is not there any more`);
  try {
    return new TextDecoder().decode(await readExactly(file, 0, file.size));
  } finally {
    await file.close();
  }
}

/** Names the float type in the keys that are there: `torch_dtype` up to Transformers 4, `dtype` later. */
function withType(text: string, type: string, config: { readonly [key: string]: Json }): string {
  const keys = ["torch_dtype", "dtype"].filter((key) => Object.hasOwn(config, key));
  let result = text;
  for (const key of keys.length > 0 ? keys : ["torch_dtype"]) result = setTopLevel(result, key, type);
  return result;
}
