// Files of a run: written whole or not at all. Runs in Node.
import { randomUUID } from "node:crypto";
import {
  closeSync,
  existsSync,
  fsyncSync,
  mkdirSync,
  openSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  writeSync,
} from "node:fs";
import { basename, dirname, join, resolve } from "node:path";
import { CheckpointError } from "@switchyard/core";

const reasons: ReadonlyMap<string, string> = new Map([
  ["ENOSPC", "the disk is full"],
  ["EDQUOT", "the disk quota is used up"],
  ["EFBIG", "the file would be larger than this disk or user may have"],
  ["EACCES", "permission denied"],
  ["EPERM", "permission denied"],
  ["EROFS", "the file system is read-only"],
  ["ENOTDIR", "a part of the path is a file"],
  ["EEXIST", "a file of that name is in the way"],
  ["ENOENT", "no such file or folder"],
  ["EISDIR", "it is a folder"],
]);

/** What went wrong with a file, in words; errors without a system code are passed on. */
function explained(what: string, error: unknown): unknown {
  const code = error instanceof Error && "code" in error && typeof error.code === "string" ? error.code : undefined;
  if (code === undefined) return error;
  return new CheckpointError(`${what}: ${reasons.get(code) ?? code}`, { cause: error });
}

/** Writes a file beside its place, syncs it and renames it. A failure leaves what was there before and no other file. */
export function writeWhole(path: string, pieces: readonly (string | Uint8Array)[]): void {
  const fresh = join(dirname(path), `.${basename(path)}.${randomUUID().slice(0, 8)}.new`);
  try {
    const file = openSync(fresh, "wx");
    try {
      for (const piece of pieces) {
        const bytes = typeof piece === "string" ? Buffer.from(piece) : piece;
        let done = 0;
        while (done < bytes.length) done += writeSync(file, bytes, done, bytes.length - done);
      }
      fsyncSync(file);
    } finally {
      closeSync(file);
    }
    renameSync(fresh, path);
  } catch (error) {
    rmSync(fresh, { force: true });
    throw explained(`cannot write ${path}`, error);
  }
}

/** One by one: Node's recursive mkdir never ends where a file system that takes no folders says that there is no such one (/proc). */
function makeFolders(path: string): void {
  const above = dirname(path);
  if (existsSync(path) && statSync(path).isDirectory()) return;
  if (!existsSync(above)) makeFolders(above);
  try {
    mkdirSync(path);
  } catch (error) {
    const code = error instanceof Error && "code" in error ? error.code : undefined;
    // Another process was faster.
    if (code === "EEXIST" && statSync(path).isDirectory()) return;
    if (code === "ENOENT") throw new CheckpointError(`${above} takes no new folders; choose another place`);
    throw error;
  }
}

/** Makes a folder, with a trial file, so that a place which cannot be written to is noticed before any work is done. */
export function writableFolder(path: string): void {
  try {
    makeFolders(resolve(path));
  } catch (error) {
    if (CheckpointError.isInstance(error)) {
      throw new CheckpointError(`cannot make the folder ${path}: ${error.message}`, { cause: error });
    }
    throw explained(`cannot make the folder ${path}`, error);
  }
  const trial = join(path, ".trial");
  writeWhole(trial, ["x"]);
  rmSync(trial);
}

/** Text of a file. @throws CheckpointError with the reason. */
export function readText(path: string): string {
  try {
    return readFileSync(path, "utf8");
  } catch (error) {
    throw explained(`cannot read ${path}`, error);
  }
}

/** Removes a file if it is there. */
export function removeFile(path: string): void {
  if (existsSync(path)) rmSync(path);
}
