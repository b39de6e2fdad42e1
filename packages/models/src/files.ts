// Files on disk, Node only: byte-ranged reading, and saving a set of files so that a folder holds the earlier set or the
// new one whenever the process ends (docs/decisions/0008). Loads in a browser too, where the functions refuse.
import { CheckpointError, type Json } from "@switchyard/core";
import { builtIn } from "./built-in.ts";
import { parseUntrusted } from "./json.ts";
import { type ByteSource, quote } from "./safetensors.ts";

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
  ["ELOOP", "a link leads back to itself"],
]);

/** A source that must be closed. */
export type FileSource = ByteSource & { close(): Promise<void> };

/** One line a user can act on; the system's own error stays as the cause. */
function explained(what: string, error: unknown, next = ""): CheckpointError {
  if (CheckpointError.isInstance(error)) return error;
  const code = codeOf(error);
  const message = error instanceof Error ? error.message : String(error);
  return new CheckpointError(`${what}: ${(code && reasons.get(code)) ?? message}${next}`, { cause: error });
}

/** Opens a file for byte-ranged reading; undefined where it does not exist. The caller closes it. */
export const fileSource = (path: string): Promise<FileSource | undefined> => openFile(path, path);

/** `name` is shown in errors. */
async function openFile(path: string, name: string): Promise<FileSource | undefined> {
  const { constants, open } = await builtIn("node:fs/promises");
  // Without O_NONBLOCK (which Windows has not) opening a named pipe would wait for its writer, perhaps for ever.
  const flags = constants.O_RDONLY | (constants.O_NONBLOCK ?? 0);
  const handle = await open(path, flags).catch((error: unknown) => {
    if (codeOf(error) === "ENOENT") return undefined;
    throw explained(`cannot read ${name}`, error);
  });
  if (!handle) return undefined;
  const status = await handle.stat();
  if (!status.isFile()) {
    await handle.close();
    throw new CheckpointError(`cannot read ${name}: it is not a file`);
  }
  const fill = async (target: Uint8Array, from: number): Promise<void> => {
    let done = 0;
    // Memory of wasm that grows meanwhile leaves the array empty: what is missing then must not pass for read.
    const { length } = target;
    while (done < length) {
      const { bytesRead } = await handle.read(target, done, length - done, from + done);
      if (bytesRead === 0) throw new CheckpointError(`${name} ended at byte ${from + done} while it was being read`);
      done += bytesRead;
    }
  };
  const unchanged = async (): Promise<void> => {
    // Streamed experts are read for as long as the model lives: half of another model would be wrong in silence.
    const now = await handle.stat();
    if (now.mtimeMs !== status.mtimeMs || now.size !== status.size) {
      throw new CheckpointError(`${name} was changed after it had been opened; load the checkpoint again`);
    }
  };
  return {
    name,
    size: status.size,
    async read(from, to) {
      const bytes = new Uint8Array(to - from);
      await fill(bytes, from);
      await unchanged();
      return bytes;
    },
    async readInto(target, from) {
      await fill(target, from);
      await unchanged();
    },
    unwatched: { fill, unchanged },
    close: () => handle.close(),
  };
}

const reserved = /^(con|prn|aux|nul|com\d|lpt\d)(\.|$)/i;

/**
 * Whether a name from a stranger names a file in the folder and nothing else, on every system: no separators or drives,
 * no `..`, no control characters, no devices of Windows.
 */
export const isPlainName = (name: string): boolean =>
  name.length > 0 &&
  name.length <= 255 &&
  // biome-ignore lint/suspicious/noControlCharactersInRegex: they are what is looked for
  !/[\u0000-\u001f\u007f/\\:]/.test(name) &&
  name !== "." &&
  name !== ".." &&
  !reserved.test(name);

/** How a folder is read: by names, through the record of an interrupted save where there is one. */
export interface FolderFiles {
  /** Undefined where there is no such file. Throws CheckpointError for a link that leads out of the folder. */
  open(name: string): Promise<FileSource | undefined>;
  /** Names of everything in the folder; none where it does not exist. */
  list(): Promise<readonly string[]>;
  /** Everything in the folder that belongs to its last complete save, or to no save: what it is and by which name. */
  entries(): Promise<readonly FolderEntry[]>;
}

export interface FolderEntry {
  readonly name: string;
  /** "elsewhere": a link that leads out of the folder; "other": a pipe, a device or a name that `open` refuses. */
  readonly kind: "file" | "folder" | "elsewhere" | "other";
}

/**
 * The files of a folder as its last complete save left them. Links that lead out of the folder, or out of the one that it belongs to
 * (`within`), are refused unless `followLinks`; the cache of the Hugging Face Hub, whose snapshots are links into `blobs` beside them,
 * needs no option.
 */
export async function folderFiles(
  folder: string,
  { followLinks = false, within }: { readonly followLinks?: boolean; readonly within?: string } = {},
): Promise<FolderFiles> {
  const { readdir, realpath, stat } = await builtIn("node:fs/promises");
  const { basename, dirname, join, sep } = await builtIn("node:path");
  const real = (path: string): Promise<string | undefined> =>
    realpath(path).catch((error: unknown) => {
      if (codeOf(error) === "ENOENT") return undefined;
      throw explained(`cannot read ${path}`, error);
    });
  const root = await real(folder);
  if (root === undefined) return { open: async () => undefined, list: async () => [], entries: async () => [] };
  const status = await stat(root).catch((error: unknown) => {
    throw explained(`cannot read ${folder}`, error);
  });
  if (!status.isDirectory()) throw new CheckpointError(`cannot read ${folder}: it is a file, not a folder`);
  const top = (within === undefined ? undefined : await real(within)) ?? root;
  const inside = [top + sep];
  const snapshots = dirname(top);
  if (basename(snapshots) === "snapshots") inside.push(join(dirname(snapshots), "blobs") + sep);
  const leadsOut = (target: string): boolean => !followLinks && !inside.some((start) => target.startsWith(start));
  if (leadsOut(root + sep)) {
    throw new CheckpointError(
      `cannot read ${folder}: it is a link that leads out of ${within}, to ${root}. Pass followLinks: true where you made it yourself`,
    );
  }
  const openInside = async (name: string): Promise<FileSource | undefined> => {
    if (!isPlainName(name)) throw new CheckpointError(`cannot read ${quote(name)} in ${folder}: it is no file name`);
    const path = join(folder, name);
    const target = await real(path);
    if (target === undefined) return undefined;
    if (leadsOut(target)) {
      throw new CheckpointError(
        `cannot read ${path}: it is a link that leads out of the folder, to ${target}. Copy the file there, or pass ` +
          "followLinks: true where you made the link yourself",
      );
    }
    return openFile(target, path);
  };
  const record = await readRecord(folder, openInside);
  const list = (): Promise<readonly string[]> =>
    readdir(root).catch((error: unknown) => {
      throw explained(`cannot read the folder ${folder}`, error);
    });
  return {
    async open(name) {
      if (record?.stale.includes(name)) return undefined;
      const fresh = record?.files.includes(name) ? await openInside(freshName(name, record.tag)) : undefined;
      return fresh ?? openInside(name);
    },
    list,
    async entries() {
      const present = (await list()).filter((name) => name !== recordName && !temporary.test(name));
      const names = new Set([...present, ...(record?.files ?? [])]);
      for (const name of record?.stale ?? []) names.delete(name);
      const found: FolderEntry[] = [];
      for (const name of [...names].sort()) {
        const fresh = record?.files.includes(name) ? await real(join(root, freshName(name, record.tag))) : undefined;
        const target = fresh ?? (await real(join(root, name)));
        if (target === undefined || leadsOut(target)) {
          // A link to nothing leads nowhere, which is not in the folder.
          found.push({ name, kind: "elsewhere" });
          continue;
        }
        const status = await stat(target);
        const file = status.isFile() && isPlainName(name);
        found.push({ name, kind: file ? "file" : status.isDirectory() ? "folder" : "other" });
      }
      return found;
    },
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
  /** Looks at the new files when all are written and none counts yet; what it throws undoes the save. */
  verify?(open: (name: string) => Promise<FileSource | undefined>): Promise<void>;
}

/** What a save still has to do. While it stands in the folder, the new files count and the earlier ones do not. */
interface SaveRecord {
  readonly version: 1;
  readonly tag: string;
  readonly last: string;
  readonly files: readonly string[];
  readonly stale: readonly string[];
}

const recordName = ".switchyard-save.json";
const freshName = (name: string, tag: string): string => `.${name}.${tag}.new`;
const asideName = (name: string, tag: string): string => `.${name}.${tag}.old`;
/** Takes such a name apart again. */
const temporary = /^\.(.+)\.[0-9a-f]{8}\.(new|old)$/s;
const maximumRecord = 1_000_000;

async function readRecord(
  folder: string,
  open: (name: string) => Promise<FileSource | undefined>,
): Promise<SaveRecord | undefined> {
  const source = await open(recordName);
  if (!source) return undefined;
  const where = source.name;
  let bytes: Uint8Array;
  try {
    if (source.size > maximumRecord) {
      throw new CheckpointError(`${where} has ${source.size} bytes; at most ${maximumRecord} are allowed`);
    }
    bytes = await source.read(0, source.size);
  } finally {
    await source.close();
  }
  const value = parseUntrusted(new TextDecoder().decode(bytes), where) as { readonly [key: string]: Json } | null;
  const { version, tag, last, files, stale } = value ?? {};
  const names = (list: Json | undefined): list is string[] =>
    Array.isArray(list) && list.every((name) => typeof name === "string" && isPlainName(name));
  const good = version === 1 && typeof tag === "string" && /^[0-9a-f]{8}$/.test(tag) && typeof last === "string";
  if (!good || !names(files) || !names(stale)) {
    throw new CheckpointError(
      `${where} is no record of a save that this version knows; where ${folder} was not saved by Switchyard, delete it`,
    );
  }
  return { version, tag, last, files, stale };
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

/** Writes a file that must not exist yet, and waits until the disk has it. */
async function writeNew(path: string, content: ReturnType<FileToSave["content"]>): Promise<void> {
  const { open } = await builtIn("node:fs/promises");
  const handle = await open(path, "wx");
  try {
    for await (const piece of content) {
      let done = 0;
      while (done < piece.length) done += (await handle.write(piece, done, piece.length - done)).bytesWritten;
    }
    await handle.sync();
  } finally {
    await handle.close();
  }
}

/**
 * Makes a folder and those above it that are missing, one by one: Node's recursive mkdir never ends where a file system that takes no
 * folders says that there is no such one (/proc). Answers the folders made, the outermost first.
 */
async function makeFolders(folder: string): Promise<readonly string[]> {
  const { mkdir, rmdir, stat } = await builtIn("node:fs/promises");
  const { dirname, resolve } = await builtIn("node:path");
  const missing: string[] = [];
  for (let path = resolve(folder); ; path = dirname(path)) {
    const found = await stat(path).catch((error: unknown) => {
      if (codeOf(error) === "ENOENT" && dirname(path) !== path) return undefined;
      throw explained(`cannot make the folder ${folder}`, error);
    });
    if (found === undefined) {
      missing.unshift(path);
      continue;
    }
    if (found.isDirectory()) break;
    throw new CheckpointError(`cannot make the folder ${folder}: a file of that name is in the way`);
  }
  const made: string[] = [];
  for (const path of missing) {
    try {
      await mkdir(path);
      made.push(path);
    } catch (error) {
      // Another process was faster.
      if (codeOf(error) === "EEXIST" && (await stat(path).catch(() => undefined))?.isDirectory()) continue;
      // Empty ones that cannot be removed do no harm.
      for (const one of made.reverse()) await rmdir(one).catch(() => undefined);
      if (codeOf(error) !== "ENOENT") throw explained(`cannot make the folder ${folder}`, error);
      const why = `${dirname(path)} takes no new folders; choose another place`;
      throw new CheckpointError(`cannot make the folder ${folder}: ${why}`, { cause: error });
    }
  }
  return made;
}

type Undo = (() => Promise<void>)[];

/**
 * Does what a record asks for, as far as it is not done yet: the earlier files step aside (`last` first, so that other
 * readers refuse the folder meanwhile), the new ones take their places (`last` last), and the record goes.
 */
async function carryOut(folder: string, record: SaveRecord, undo: Undo): Promise<void> {
  const { readdir, rename, rm } = await builtIn("node:fs/promises");
  const { join } = await builtIn("node:path");
  const { tag, last, files, stale } = record;
  const present = new Set(await readdir(folder));
  const move = async (from: string, to: string): Promise<void> => {
    await rename(join(folder, from), join(folder, to));
    undo.push(() => rename(join(folder, to), join(folder, from)));
  };
  const waiting = files.filter((name) => present.has(freshName(name, tag)));
  const leaving = [...waiting, ...stale].filter((name) => present.has(name));
  for (const name of leaving.sort((a, b) => Number(b === last) - Number(a === last))) {
    await move(name, asideName(name, tag));
  }
  for (const name of waiting.sort((a, b) => Number(a === last) - Number(b === last))) {
    await move(freshName(name, tag), name);
  }
  await syncFolder(folder);
  await rm(join(folder, recordName));
}

/** What killed saves of the same files left lying; without a record it means nothing. */
async function removeLeftovers(folder: string, belongs: (name: string) => boolean): Promise<void> {
  const { readdir, rm } = await builtIn("node:fs/promises");
  const { join } = await builtIn("node:path");
  for (const name of await readdir(folder)) {
    const of = temporary.exec(name)?.[1];
    if (of !== undefined && belongs(of)) await rm(join(folder, name), { recursive: true, force: true });
  }
}

/** Saves to one folder wait for each other: the later one would take the earlier one's files for leftovers. */
const saving = new Map<string, Promise<unknown>>();

/**
 * Saves a set of files into a folder, all or nothing. Every file is first written beside its place under a temporary
 * name and synced; when all are complete, a record of what is left to do is put in place in one rename, and from then on
 * the new set counts: `openCheckpoint` reads through the record. Then the files are renamed, `last` at the end, and the
 * record is removed. A failure at any point removes the temporary files and puts the earlier files back. A process killed
 * at any point leaves the earlier set or the new one; `finishSave`, or the next save, tidies up. A program that does not
 * know the record finds the earlier set, the new one, or a folder without `last`, never a mixture.
 *
 * One process at a time may save to a folder. Throws CheckpointError where it cannot be written.
 */
export async function saveFiles(folder: string, files: readonly FileToSave[], options: SaveOptions): Promise<void> {
  const { resolve } = await builtIn("node:path");
  const key = resolve(folder);
  const before = saving.get(key);
  const turn = before ? before.then(() => save(folder, files, options)) : save(folder, files, options);
  // The next one waits for the end of this one, good or bad; a failure goes to the caller below.
  const end = turn.catch(() => undefined);
  saving.set(key, end);
  try {
    await turn;
  } finally {
    if (saving.get(key) === end) saving.delete(key);
  }
}

/** Undoes a save that failed, latest step first, and says what stands in the folder now. */
async function takeBack(undo: Undo, tidy: Undo): Promise<string> {
  for (const step of undo.reverse()) {
    try {
      await step();
    } catch (problem) {
      // The record may still stand, and all it needs is there. Removing anything more would make a mixture.
      return `; undoing it failed too (${problem}): the earlier files count or the new ones, see finishSave`;
    }
  }
  const problems: unknown[] = [];
  for (const step of tidy.reverse()) await step().catch((problem: unknown) => problems.push(problem));
  if (problems.length === 0) return "; nothing was changed";
  return `; the earlier files are as they were, but temporary ones could not be removed (${problems.join("; ")})`;
}

async function save(folder: string, files: readonly FileToSave[], options: SaveOptions): Promise<void> {
  const { readdir, rename, rm, rmdir } = await builtIn("node:fs/promises");
  const { join } = await builtIn("node:path");
  const { last } = options;
  const tag = globalThis.crypto.randomUUID().slice(0, 8);
  const names = files.map(({ name }) => name);
  const belongs = (name: string): boolean => names.includes(name) || name === recordName || !!options.isStale?.(name);

  const made = await makeFolders(folder);
  /** Removes what was written. */
  const tidy: Undo = [];
  /** From the record on: makes the earlier files count again. Until all of it is done the new ones do. */
  const undo: Undo = [];
  let inPlace = false;
  if (made.length > 0) for (const path of made) tidy.push(() => rmdir(path));
  else await finishSave(folder);
  try {
    await removeLeftovers(folder, belongs);
    for (const { name, content } of files) {
      const path = join(folder, freshName(name, tag));
      // Before it is there: opening it may succeed and report a failure.
      tidy.push(() => rm(path, { force: true }));
      await writeNew(path, content());
    }
    await options.verify?.(async (name) =>
      names.includes(name) ? openFile(join(folder, freshName(name, tag)), join(folder, name)) : undefined,
    );
    const present = await readdir(folder);
    const stale = present.filter((name) => !names.includes(name) && options.isStale?.(name));
    const [only] = names;
    if (only !== undefined && names.length === 1 && stale.length === 0) {
      // One file takes the place of its predecessor in one rename; only a set needs a record.
      await rename(join(folder, freshName(only, tag)), join(folder, only));
      inPlace = true;
      await syncFolder(folder);
    } else {
      const odd = [...names, ...stale].find((name) => !isPlainName(name));
      if (odd !== undefined) throw new CheckpointError(`cannot save to ${folder}: ${quote(odd)} is no file name`);
      const record: SaveRecord = { version: 1, tag, last, files: names, stale };
      const path = join(folder, freshName(recordName, tag));
      tidy.push(() => rm(path, { force: true }));
      await writeNew(path, [new TextEncoder().encode(JSON.stringify(record))]);
      // The disk must know all the names before the record makes them count.
      await syncFolder(folder);
      undo.push(() => rm(join(folder, recordName), { force: true }));
      await rename(path, join(folder, recordName));
      await syncFolder(folder);
      await carryOut(folder, record, undo);
      inPlace = true;
      await syncFolder(folder);
    }
  } catch (error) {
    const next = inPlace
      ? "; the new files are in place, but may be lost if the power fails"
      : await takeBack(undo, tidy);
    throw explained(`cannot save to ${folder}`, error, next);
  }
  await removeLeftovers(folder, belongs).catch((error: unknown) => {
    throw explained(`saved to ${folder}, but files of the earlier save could not be removed`, error);
  });
}

/**
 * Completes a save whose process was killed after all was written, so that programs that do not know our record see the
 * new files; says whether there was anything to do. Not while another process saves there. Throws CheckpointError.
 */
export async function finishSave(folder: string): Promise<boolean> {
  const { join } = await builtIn("node:path");
  const record = await readRecord(folder, (name) => fileSource(join(folder, name)));
  if (!record) return false;
  try {
    await carryOut(folder, record, []);
    await syncFolder(folder);
    await removeLeftovers(folder, (name) => record.files.includes(name) || record.stale.includes(name));
  } catch (error) {
    throw explained(`cannot finish the interrupted save in ${folder}`, error, "; it counts as saved and can be read");
  }
  return true;
}
