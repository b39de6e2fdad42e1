// Folders of checkpoints that are written anew from others: which targets are allowed, which files come along, and copies.
import { CheckpointError, UnsupportedError } from "@switchyard/core";
import { builtIn } from "../built-in.ts";
import { indexName, readCheckpoint } from "../checkpoint.ts";
import { type FolderFiles, folderFiles } from "../files.ts";
import { quote, readExactly } from "../safetensors.ts";
import { isCheckpointFile } from "../save-checkpoint.ts";
import { type Advance, type Origin, pieceSize, type RewritingOptions, readOrigin } from "./origin.ts";
import type { Plan } from "./plan.ts";

/** A file as it is. */
export async function* copied(open: FolderFiles["open"], name: string): AsyncGenerator<Uint8Array, void, undefined> {
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

/** Counts bytes on their way. */
export async function* advancing(
  content: AsyncIterable<Uint8Array>,
  advance: Advance,
): AsyncGenerator<Uint8Array, void, undefined> {
  for await (const bytes of content) {
    advance(bytes.length);
    yield bytes;
  }
}

/** A checkpoint that is written anew into another folder. */
interface Rewriting {
  readonly source: string;
  readonly target: string;
  /** What is done with the source, for errors. */
  readonly act: string;
}

/**
 * Opens the source, checks the target, and closes the source when the work is done. Throws UnsupportedError for a target inside the
 * source or not empty, and the signal's reason when aborted.
 */
export async function rewriting<R>(
  folders: Rewriting,
  { replace = false, followLinks = false, signal }: RewritingOptions,
  work: (origin: Origin) => Promise<R>,
): Promise<R> {
  const { source } = folders;
  signal?.throwIfAborted();
  const files = await folderFiles(source, { followLinks });
  const checkpoint = await readCheckpoint(files.open, source, { list: files.list });
  try {
    await checkTarget(folders, replace);
    return await work(await readOrigin(source, files, checkpoint));
  } catch (error) {
    // Not wrapped as a failure of the disk.
    signal?.throwIfAborted();
    throw error;
  } finally {
    await checkpoint.close();
  }
}

/** Throws UnsupportedError where the result would lie in the source folder, or on something that is there. */
async function checkTarget({ source, target, act }: Rewriting, replace: boolean): Promise<void> {
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
      throw new UnsupportedError(`cannot ${act} ${source}: ${target} ${how}; choose a folder outside`);
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
export const belongs = (name: string): boolean =>
  isCheckpointFile(name) ||
  /^(.+\.safetensors|tokenizer\.model|(vocab|merges|special_tokens_map|added_tokens|chat_template|processor_config|preprocessor_config)\.\w+)$/.test(
    name,
  );

/** What happens to each thing in the source folder that is no file of weights. */
export async function otherFiles(
  { files, weights }: Pick<Origin, "files" | "weights">,
  { changed, index }: Pick<Plan, "changed" | "index">,
  /** What the new weights are called. */
  done: string,
): Promise<{ readonly copies: string[]; readonly leftOut: { readonly name: string; readonly reason: string }[] }> {
  const copies: string[] = [];
  const leftOut: { name: string; reason: string }[] = [];
  for (const { name, kind } of await files.entries()) {
    if (kind === "folder") leftOut.push({ name, reason: "a folder" });
    else if (kind === "elsewhere") leftOut.push({ name, reason: "a link that leads out of the folder" });
    else if (kind === "other") leftOut.push({ name, reason: "no file, or a name that is not allowed everywhere" });
    else if (weights.has(name) || name === "config.json") continue;
    else if (name === indexName) {
      if (index === undefined) copies.push(name);
      else if (index === false) leftOut.push({ name, reason: "there is one file of weights now" });
    } else if (changed && otherWeights.test(name)) {
      leftOut.push({ name, reason: `other weights, which would not be the ${done} ones` });
    } else copies.push(name);
  }
  return { copies, leftOut };
}
