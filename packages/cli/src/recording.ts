// Texts through a model with its routing recorded, for `switchyard trace` and `switchyard inspect`: their options, and the recording.
import { createHash } from "node:crypto";
import { existsSync, readFileSync, rmSync } from "node:fs";
import { basename, join } from "node:path";
import { CheckpointError, type Json, ShapeError, UnsupportedError } from "@switchyard/core";
import {
  type CheckpointSummary,
  inspectCheckpoint,
  openCheckpoint,
  type Tokenizer,
  traced,
  traceFile,
  traceRecorder,
} from "@switchyard/models";
import type { ArgsDef } from "citty";
import { type Given, tokenIds } from "./arguments.ts";
import { type ModelArguments, modelName, needTokenizer, type OpenModel, savedRouter } from "./model-arguments.ts";
import type { ProgressBar } from "./progress.ts";
import { routerFrom } from "./routers.ts";
import { readText } from "./text-file.ts";

export const textArgs = {
  text: {
    type: "string",
    description: "A text file in UTF-8; several of them, each with its own --text, are compared by name",
    valueHint: "FILE",
  },
  ids: { type: "string", description: "Token ids instead, separated by commas", valueHint: "1,2,3" },
  tokens: { type: "string", description: "Takes only so many tokens of each text (default: all)", valueHint: "N" },
  context: {
    type: "string",
    description: "Tokens that are seen together; longer texts are cut (default: the model's context, at most 2048)",
    valueHint: "N",
  },
} as const satisfies ArgsDef;

/** What is read, checked before the model is opened. */
export interface TextArguments {
  readonly texts: readonly { readonly name: string; readonly content: string | readonly number[] }[];
  readonly tokens: number | undefined;
  readonly context: number | undefined;
}

/** The texts of --text or --ids; none where neither is given. @throws UnsupportedError, CheckpointError. */
export function textArguments(given: Given): TextArguments {
  const files = given.texts("text");
  const ids = given.text("ids");
  if (files.length > 0 && ids !== undefined) {
    throw new UnsupportedError("--text and --ids exclude each other; leave one of them out");
  }
  const names = files.map((path) => basename(path));
  return {
    texts:
      ids === undefined
        ? files.map((path, i) => ({
            // Two files of one name are told apart by their paths.
            name: names.indexOf(names[i] ?? "") === names.lastIndexOf(names[i] ?? "") ? (names[i] ?? path) : path,
            content: readText(path),
          }))
        : [{ name: "ids", content: tokenIds("--ids", ids) }],
    tokens: given.whole("tokens", { from: 1 }),
    context: given.whole("context", { from: 1 }),
  };
}

/** What a checkpoint is made of; nothing of its weights is read. */
export async function summaryOf({ folder, followLinks, router }: ModelArguments): Promise<CheckpointSummary> {
  const checkpoint = await openCheckpoint(folder, { followLinks });
  try {
    const specification = router ?? savedRouter(checkpoint.config);
    const routers = specification === undefined ? [] : [(await routerFrom(specification)).plugin];
    return inspectCheckpoint(checkpoint, { routers });
  } finally {
    await checkpoint.close();
  }
}

/** The text of a token as it stands inside a text, with the space in front that some tokenizers drop at the beginning. */
function tokenText(tokenizer: Tokenizer, id: number): string {
  try {
    const text = new TextDecoder().decode(tokenizer.bytes([id]));
    return text === "" ? tokenizer.decode([id]) : text;
  } catch (error) {
    // Tokens that are no bytes (WordPiece).
    if (ShapeError.isInstance(error)) return tokenizer.decode([id]);
    throw error;
  }
}

/** Texts of the tokens that occur, by id, for the header of a trace. */
export function tokenTexts(tokenizer: Tokenizer, ids: Iterable<number>): { readonly [id: string]: Json } {
  const texts: { [id: string]: Json } = {};
  for (const id of new Set(ids)) if (id < tokenizer.vocabulary) texts[id] = tokenText(tokenizer, id);
  return texts;
}

interface Window {
  readonly ids: readonly number[];
  readonly label: number;
}

/** The texts cut into windows. */
function windowsOf(open: OpenModel, { texts, tokens, context }: TextArguments): Window[] {
  const { model } = open;
  const length = context ?? Math.min(model.context, 2048);
  if (length > model.context) {
    throw new UnsupportedError(`--context is ${length}, but the model's context is ${model.context}`);
  }
  return texts.flatMap(({ name, content }, label) => {
    const all =
      typeof content === "string"
        ? Array.from(needTokenizer(open, "--text", "Give token ids: --ids 1,2,3").encode(content, { addSpecial: true }))
        : content;
    const ids = all.slice(0, tokens);
    if (ids.length === 0) throw new UnsupportedError(`${name} is empty: there is nothing to route`);
    const wrong = ids.find((id) => id >= model.vocabulary);
    if (wrong !== undefined) {
      throw new UnsupportedError(`${name}: id ${wrong} is not in a vocabulary of ${model.vocabulary}`);
    }
    return Array.from({ length: Math.ceil(ids.length / length) }, (_, i) => ({
      ids: ids.slice(i * length, (i + 1) * length),
      label,
    }));
  });
}

export interface RecordingOptions {
  /** The trace, which must not exist yet. */
  readonly path: string;
  readonly expertBytes?: number | undefined;
  readonly logits?: boolean;
  readonly signal: AbortSignal;
  readonly bar: ProgressBar;
}

const chunk = 128;

/**
 * Runs the texts and writes a trace with them: a label per text where there are several, a sequence per window. Answers how many tokens
 * were recorded; fewer than there are where the signal ended it. Without any, or after an error, no file is left.
 */
export async function recordTexts(
  open: OpenModel,
  texts: TextArguments,
  { path, expertBytes, logits = false, signal, bar }: RecordingOptions,
): Promise<{ readonly tokens: number; readonly total: number }> {
  const windows = windowsOf(open, texts);
  const { model, tokenizer, folder } = open;
  if (existsSync(path)) {
    throw new CheckpointError(`cannot write ${path}: there is such a file already; delete it or name another one`);
  }
  const labels = texts.texts.length > 1 ? texts.texts.map(({ name }) => name) : [];
  const file = join(folder, "tokenizer.json");
  const hash = tokenizer && existsSync(file) ? createHash("sha256").update(readFileSync(file)).digest("hex") : null;
  const type = open.config.model_type;
  const recorder = traceRecorder(await traceFile(path), {
    model: { name: basename(folder), ...(typeof type === "string" ? { type } : {}) },
    routing: model.routing,
    tokenizer: hash,
    labels,
    sequences: windows.map(({ label }) => (labels.length > 0 ? { label } : {})),
    tool: "switchyard",
    ...(expertBytes === undefined ? {} : { expertBytes }),
    ...(logits ? { logits: "f32" } : {}),
    ...(tokenizer
      ? {
          extra: {
            tokens: tokenTexts(
              tokenizer,
              windows.flatMap(({ ids }) => ids),
            ),
          },
        }
      : {}),
  });
  const total = windows.reduce((sum, { ids }) => sum + ids.length, 0);
  let done = 0;
  let kept = false;
  try {
    for (const [sequence, { ids }] of windows.entries()) {
      const recording = traced(model, recorder, { sequences: [sequence] });
      const cache = model.newCache(1);
      try {
        for (let at = 0; at < ids.length && !signal.aborted; at += chunk) {
          const part = Int32Array.from(ids.slice(at, at + chunk));
          const input = model.engine.tensor(part, [1, part.length]);
          try {
            (await recording.step(input, { cache })).dispose();
          } finally {
            input.dispose();
          }
          done += part.length;
          bar.update(`Routing ${modelName(open)}`, done, total);
        }
      } finally {
        cache.dispose();
      }
      if (signal.aborted) break;
    }
    kept = done > 0;
  } finally {
    await recorder.close();
    if (!kept) rmSync(path, { force: true });
    bar.end();
  }
  return { tokens: done, total };
}
