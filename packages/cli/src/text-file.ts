// Text files that commands read.
import { readFileSync } from "node:fs";
import { CheckpointError, UnsupportedError } from "@switchyard/core";

/** By the system's code. */
const reasons: ReadonlyMap<unknown, string> = new Map([
  ["ENOENT", "there is no such file"],
  ["EISDIR", "it is a folder, and a file is needed"],
]);

/** A text in UTF-8. @throws CheckpointError, UnsupportedError that name the file. */
export function readText(path: string): string {
  let bytes: Uint8Array;
  try {
    bytes = readFileSync(path);
  } catch (cause) {
    const code = cause instanceof Error && "code" in cause ? cause.code : undefined;
    const why = reasons.get(code) ?? (cause instanceof Error ? cause.message : String(cause));
    throw new CheckpointError(`cannot read ${path}: ${why}`, { cause });
  }
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch (cause) {
    throw new UnsupportedError(`${path} is no text in UTF-8`, { cause });
  }
}
