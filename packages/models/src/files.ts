// Files on disk, Node only: byte-ranged reading and saving a set of files so that a folder never holds half of it.
// Loads in a browser too, where the functions refuse.
import { CheckpointError } from "@switchyard/core";
import { builtIn } from "./built-in.ts";
import type { ByteSource } from "./safetensors.ts";

const codeOf = (error: unknown): string | undefined =>
  error instanceof Error && "code" in error && typeof error.code === "string" ? error.code : undefined;

const reasons: ReadonlyMap<string, string> = new Map([
  ["ENOSPC", "the disk is full"],
  ["EDQUOT", "the disk quota is used up"],
  ["EACCES", "permission denied"],
  ["EPERM", "permission denied"],
  ["EROFS", "the file system is read-only"],
  ["ENOTDIR", "a part of the path is a file"],
  ["EEXIST", "a file of that name is in the way"],
  ["ENOENT", "no such file or folder"],
  ["EISDIR", "it is a folder"],
]);

/** One line a user can act on; the system's own error stays as the cause. */
function explained(what: string, error: unknown, next = ""): CheckpointError {
  if (CheckpointError.isInstance(error)) return error;
  const code = codeOf(error);
  const message = error instanceof Error ? error.message : String(error);
  return new CheckpointError(`${what}: ${(code && reasons.get(code)) ?? message}${next}`, { cause: error });
}

/** Opens a file for byte-ranged reading; undefined where it does not exist. The caller closes it. */
export async function fileSource(path: string): Promise<(ByteSource & { close(): Promise<void> }) | undefined> {
  const { open } = await builtIn("node:fs/promises");
  const handle = await open(path, "r").catch((error: unknown) => {
    if (codeOf(error) === "ENOENT") return undefined;
    throw explained(`cannot read ${path}`, error);
  });
  if (!handle) return undefined;
  const status = await handle.stat();
  if (!status.isFile()) {
    await handle.close();
    throw new CheckpointError(`cannot read ${path}: it is not a file`);
  }
  return {
    name: path,
    size: status.size,
    async read(from, to) {
      const bytes = new Uint8Array(to - from);
      let done = 0;
      while (done < bytes.length) {
        const { bytesRead } = await handle.read(bytes, done, bytes.length - done, from + done);
        if (bytesRead === 0) throw new CheckpointError(`${path} ended at byte ${from + done} while it was being read`);
        done += bytesRead;
      }
      return bytes;
    },
    close: () => handle.close(),
  };
}

/** A file of a set: its name in the folder and its content, in pieces. */
export interface FileToSave {
  readonly name: string;
  content(): Iterable<Uint8Array> | AsyncIterable<Uint8Array>;
}

export interface SaveOptions {
  /** The file that makes the folder valid: taken away first and put in place last. */
  readonly last: string;
  /** Files of an earlier save that must not stay beside the new ones. */
  isStale?(name: string): boolean;
}

async function syncFolder(folder: string): Promise<void> {
  // Windows cannot open a folder; its file system keeps the order of renames by itself.
  if (globalThis.process?.platform === "win32") return;
  const { open } = await builtIn("node:fs/promises");
  const handle = await open(folder, "r");
  try {
    await handle.sync();
  } finally {
    await handle.close();
  }
}

/**
 * Saves a set of files into a folder, all or nothing. Every file is first written beside its place under a temporary
 * name and synced; only when all are complete are they renamed, `last` at the end. A failure at any point removes the
 * temporary files and puts the earlier files back. A process killed between two renames leaves a folder without
 * `last`, which no reader accepts, never a mixture of two saves.
 */
export async function saveFiles(folder: string, files: readonly FileToSave[], options: SaveOptions): Promise<void> {
  const { mkdir, open, readdir, rename, rm, rmdir } = await builtIn("node:fs/promises");
  const { dirname, join, resolve } = await builtIn("node:path");
  const tag = globalThis.crypto.randomUUID().slice(0, 8);
  const fresh = (name: string): string => join(folder, `.${name}.${tag}.new`);
  const aside = (name: string): string => join(folder, `.${name}.${tag}.old`);

  const made = await mkdir(folder, { recursive: true }).catch((error: unknown) => {
    throw explained(`cannot make the folder ${folder}`, error);
  });
  const undo: (() => Promise<void>)[] = [];
  if (made !== undefined) {
    const parents = [resolve(folder)];
    while (parents[0] !== resolve(made)) parents.unshift(dirname(parents[0] as string));
    for (const parent of parents) undo.push(() => rmdir(parent));
  }
  const moved: string[] = [];
  try {
    for (const { name, content } of files) {
      const handle = await open(fresh(name), "wx");
      undo.push(() => rm(fresh(name), { force: true }));
      try {
        for await (const piece of content()) {
          let done = 0;
          while (done < piece.length) done += (await handle.write(piece, done, piece.length - done)).bytesWritten;
        }
        await handle.sync();
      } finally {
        await handle.close();
      }
    }
    const names = new Set(files.map(({ name }) => name));
    const present = new Set(await readdir(folder));
    const stale = [...present].filter((name) => !names.has(name) && options.isStale?.(name));
    // One file takes the place of its predecessor in one rename; only a set needs them out of the way first.
    const leaving =
      files.length === 1 && stale.length === 0 ? [] : [...present].filter((x) => names.has(x)).concat(stale);
    for (const name of leaving.sort((a, b) => Number(b === options.last) - Number(a === options.last))) {
      await rename(join(folder, name), aside(name));
      undo.push(() => rename(aside(name), join(folder, name)));
      moved.push(name);
    }
    for (const name of [...names].sort((a, b) => Number(a === options.last) - Number(b === options.last))) {
      await rename(fresh(name), join(folder, name));
      if (leaving.length > 0 || !present.has(name)) undo.push(() => rename(join(folder, name), fresh(name)));
    }
    await syncFolder(folder);
  } catch (error) {
    const problems: unknown[] = [];
    for (const step of undo.reverse()) await step().catch((problem: unknown) => problems.push(problem));
    const next = problems.length
      ? `; putting the earlier files back failed too (${problems.map(String).join("; ")})`
      : "; nothing was changed";
    throw explained(`cannot save to ${folder}`, error, next);
  }
  for (const name of moved) await rm(aside(name), { recursive: true, force: true });
}
