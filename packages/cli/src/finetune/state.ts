// What an unfinished run leaves in OUT: a folder `.finetune` with its settings and its latest snapshot. OUT is no checkpoint by that: it has no
// config.json, or still that of the checkpoint which is to be replaced.
import { createHash } from "node:crypto";
import { createReadStream, existsSync, readdirSync, realpathSync, rmdirSync, rmSync, statSync } from "node:fs";
import { dirname, join, resolve } from "node:path";
import { parseJson, readText, writableFolder, writeWhole } from "@switchyard/bench";
import { CheckpointError, UnsupportedError } from "@switchyard/core";
import type { ExpertConfig } from "@switchyard/core/train";
import * as v from "valibot";
import { type Settings, settingsSchema } from "./settings.ts";

const name = ".finetune";

/** Of the held-out text. */
export interface Measured {
  /** Nats per token. */
  readonly loss: number;
  readonly perplexity: number;
  /** Where the text is known. */
  readonly bitsPerByte?: number;
  /** Tokens that were foretold. */
  readonly tokens: number;
}

export const measuredSchema: v.GenericSchema<Measured> = v.object({
  loss: v.number(),
  perplexity: v.number(),
  bitsPerByte: v.exactOptional(v.number()),
  tokens: v.number(),
});

/** The file `run.json` of an unfinished run. */
export interface State {
  readonly schema: "switchyard/finetune-state/1";
  /** Of the process that is at work on it, or was the last to be. */
  readonly run: string;
  readonly settings: Settings;
  /** Steps of the run: measured once where a time was given, then fixed. */
  readonly steps: number;
  /** SHA-256 of the text, and of the checkpoint that is tuned. */
  readonly text: string;
  readonly source: string;
  readonly before: Measured;
  /** What --esft chose, or --experts names. */
  readonly experts?: ExpertConfig;
  readonly created: string;
  /** Seconds of work so far. */
  readonly seconds: number;
}

const stateSchema: v.GenericSchema<State> = v.object({
  schema: v.literal("switchyard/finetune-state/1"),
  run: v.string(),
  settings: settingsSchema,
  steps: v.pipe(v.number(), v.integer(), v.minValue(1)),
  text: v.string(),
  source: v.string(),
  before: measuredSchema,
  experts: v.exactOptional(
    v.object({
      experts: v.record(v.string(), v.array(v.number())),
      shared_experts: v.boolean(),
      non_expert_modules: v.boolean(),
    }),
  ),
  created: v.pipe(v.string(), v.isoTimestamp()),
  seconds: v.number(),
});

export const snapshotPath = (out: string): string => join(out, name, "state.snapshot");
const runPath = (out: string): string => join(out, name, "run.json");

/** Of an unfinished run. @throws UnsupportedError where OUT holds none, CheckpointError for a damaged one. */
export function readState(out: string): State {
  const file = runPath(out);
  if (existsSync(file)) return parseJson(stateSchema, readText(file), file);
  const found = existsSync(join(out, "finetune.json"))
    ? `the run in ${out} is finished: finetune.json tells about it`
    : existsSync(out)
      ? `${out} holds no unfinished run`
      : `there is no folder ${out}`;
  throw new UnsupportedError(`--resume: ${found}; start a run with switchyard finetune DIR OUT --text FILE`);
}

/** Makes the folder, so that a place which cannot be written to is noticed before any work is done. */
export const makeState = (out: string): void => writableFolder(join(out, name));

export const writeState = (out: string, state: State): void =>
  writeWhole(runPath(out), [`${JSON.stringify(state, null, 2)}\n`]);

/** The process whose run OUT holds; undefined where it holds none. */
function owner(out: string): string | undefined {
  const file = runPath(out);
  return existsSync(file) ? parseJson(v.object({ run: v.string() }), readText(file), file).run : undefined;
}

/** The run was taken over. */
export class NotOwner extends UnsupportedError {}

/** @throws NotOwner where another process has meanwhile gone on with the run, which would save over what this one saves. */
export function checkOwner(out: string, run: string): void {
  if (owner(out) === run) return;
  throw new NotOwner(
    `the run in ${out} is no longer this one's: another process has gone on with it, or ${join(out, name)} was deleted; this one ends`,
  );
}

/**
 * Removes the unfinished run, and OUT with it where `fresh` says that it was made for the run and nothing else is there; leaves that of
 * another process.
 */
export function removeState(out: string, run: string, fresh: boolean): void {
  if ((owner(out) ?? run) !== run) return;
  rmSync(join(out, name), { recursive: true, force: true });
  if (fresh && existsSync(out) && readdirSync(out).length === 0) rmdirSync(out);
}

/**
 * Refuses a target in the source folder, one that is not empty, and one with an unfinished run.
 * @throws UnsupportedError that says what to do.
 */
export function checkTarget(source: string, out: string, replace: boolean): void {
  const identity = (path: string): string | undefined => {
    if (!existsSync(path)) return undefined;
    const { dev, ino } = statSync(path, { bigint: true });
    return `${dev}:${ino}`;
  };
  const origin = identity(source);
  // By identity, not by name: links and capital letters may hide that it is the same folder.
  for (let at = resolve(out); ; ) {
    if (origin !== undefined && identity(at) === origin) {
      const how = at === resolve(out) ? "is the checkpoint itself" : "lies in the folder of the checkpoint";
      throw new UnsupportedError(`${out} ${how}; choose a folder outside of ${source}`);
    }
    const parent = dirname(existsSync(at) ? realpathSync(at) : at);
    if (parent === at || parent === dirname(parent)) break;
    at = parent;
  }
  if (!existsSync(out)) return;
  if (!statSync(out).isDirectory()) throw new UnsupportedError(`${out} is a file; choose a folder to write to`);
  if (existsSync(runPath(out))) {
    throw new UnsupportedError(
      `${out} holds an unfinished run: go on with switchyard finetune --resume ${out}, or delete ${join(out, name)} to start anew`,
    );
  }
  const [there] = readdirSync(out).filter((one) => one !== name);
  if (there === undefined || replace) return;
  throw new UnsupportedError(
    `${out} is not empty: it holds ${JSON.stringify(there)}. Choose another folder, or replace (--replace) the checkpoint there`,
  );
}

/** Files that decide what a model computes and how text becomes tokens. */
const counted = /\.(safetensors|json|model|jinja|txt)$/;

/** SHA-256 of the files of a checkpoint. */
export async function checksum(
  folder: string,
  { signal, onProgress }: { readonly signal: AbortSignal; onProgress(done: number, total: number): void },
): Promise<string> {
  if (!existsSync(folder)) throw new CheckpointError(`there is no folder ${folder}`);
  const files = readdirSync(folder)
    .filter((file) => counted.test(file) && file !== "finetune.json")
    .map((file) => ({ file, status: statSync(join(folder, file), { throwIfNoEntry: false }) }))
    .flatMap(({ file, status }) => (status?.isFile() ? [{ file, size: status.size }] : []))
    .sort((a, b) => (a.file < b.file ? -1 : 1));
  const total = files.reduce((sum, { size }) => sum + size, 0);
  const hash = createHash("sha256");
  let done = 0;
  for (const { file, size } of files) {
    hash.update(`${file} ${size}\n`);
    for await (const piece of createReadStream(join(folder, file), { highWaterMark: 2 ** 22 })) {
      signal.throwIfAborted();
      hash.update(piece);
      done += piece.length;
      onProgress(done, total);
    }
  }
  return hash.digest("hex");
}
