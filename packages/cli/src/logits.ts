// `switchyard logits`: everything a model computes for a prompt, as a file that other programs can compare.
import { basename, dirname } from "node:path";
import { UnsupportedError } from "@switchyard/core";
import { encodeSafetensors, type RecordedTensor, recordedSources, recordLogits, saveFiles } from "@switchyard/models";
import { type ArgsDef, defineCommand } from "citty";
import { count, readArguments, shownBytes, table } from "./arguments.ts";
import {
  modelArgs,
  modelArguments,
  modelName,
  newFile,
  type OpenModel,
  promptArgument,
  promptIds,
  withModel,
} from "./model-arguments.ts";
import type { Streams } from "./terminal.ts";
import { usageText } from "./usage.ts";

const logitsArgs = {
  ids: { type: "string", description: "Token ids of the prompt, separated by commas", valueHint: "1,2,3" },
  prompt: {
    type: "string",
    description: "The prompt as text, where the checkpoint has a tokenizer",
    valueHint: "TEXT",
  },
  out: { type: "string", description: "The file to write, FILE.safetensors", valueHint: "FILE" },
  replace: { type: "boolean", description: "Put it in the place of a file of that name, when it is complete" },
  ...modelArgs,
  json: { type: "boolean", description: "Print the summary as JSON" },
} as const satisfies ArgsDef;

const logitsCommand = defineCommand({
  meta: {
    name: "switchyard logits",
    description: "Write all hidden states, routing decisions and logits of a prompt to a safetensors file",
  },
  args: {
    dir: { type: "positional", description: "A checkpoint in the Hugging Face layout", required: true },
    ...logitsArgs,
  },
});

const example = `
EXAMPLE

  switchyard logits OLMoE-1B-7B --ids 510,5347,273 --out logits.safetensors

The file holds f32 tensors (T tokens, width H, E experts, K chosen, vocabulary V) for every layer l:
  embed [T,H], layers.{l}.attn_out [T,H], layers.{l}.moe_in [T,H], layers.{l}.router_logits [T,E],
  layers.{l}.topk_indices [T,K] (i32), layers.{l}.topk_weights [T,K], layers.{l}.moe_out [T,H], layers.{l}.hidden [T,H],
  final_norm [T,H], logits [T,V]. Its metadata names model, backend and ids.
`;

interface Likely {
  readonly id: number;
  readonly logit: number;
  readonly probability: number;
  readonly text?: string;
}

/** The most likely next tokens. */
function mostLikely(logits: RecordedTensor, { tokenizer, model }: OpenModel, count: number): Likely[] {
  const last = Array.from(logits.data.subarray(logits.data.length - model.vocabulary));
  const top = last.reduce((a, b) => Math.max(a, b), Number.NEGATIVE_INFINITY);
  const sum = last.reduce((total, x) => total + Math.exp(x - top), 0);
  const ids = [...last.keys()].sort((a, b) => (last[b] as number) - (last[a] as number) || a - b);
  return ids.slice(0, count).map((id) => {
    const logit = last[id] as number;
    const text = tokenizer ? { text: tokenizer.decode([id]) } : {};
    return { id, logit, probability: Math.exp(logit - top) / sum, ...text };
  });
}

/** Of every position, the id with the largest logit. */
function largestIds({ data, shape: [tokens = 0, vocabulary = 0] }: RecordedTensor): number[] {
  return Array.from({ length: tokens }, (_, t) => {
    let best = 0;
    for (let i = 1; i < vocabulary; i++) {
      if ((data[t * vocabulary + i] as number) > (data[t * vocabulary + best] as number)) best = i;
    }
    return best;
  });
}

/** Runs the command. Answers the exit code. @throws UnsupportedError, CheckpointError, ShapeError for what a user can mend. */
export async function logits(rest: readonly string[], streams: Streams): Promise<number> {
  if (rest.includes("--help") || rest.includes("-h")) {
    streams.out(`${await usageText(logitsCommand)}\n${example}`);
    return 0;
  }
  const given = readArguments("logits", logitsArgs, rest);
  const args = modelArguments("logits", given);
  const prompt = promptArgument("logits", given);
  const out = given.text("out");
  if (out === undefined || !out.endsWith(".safetensors")) {
    throw new UnsupportedError(
      `logits needs a file to write: --out FILE.safetensors, found ${JSON.stringify(out ?? null)}`,
    );
  }
  if (!given.flag("replace")) newFile("out", given, "--replace puts the new one in its place");
  return withModel(args, async (open) => {
    const ids = promptIds(open, prompt);
    const tensors = await recordLogits(open.model, ids);
    const metadata = { model: modelName(open), backend: open.backend, ids: JSON.stringify(ids) };
    const name = basename(out);
    const content = () => encodeSafetensors(recordedSources(tensors), metadata);
    await saveFiles(dirname(out), [{ name, content }], { last: name });
    const final = tensors.find((one) => one.name === "logits");
    if (!final) throw new Error("the model gave no logits");
    const [next, largest] = [mostLikely(final, open, 5), largestIds(final)];
    const bytes = tensors.reduce((sum, { data }) => sum + data.byteLength, 0);
    if (given.flag("json")) {
      const list = tensors.map(({ name: tensor, shape, data }) => {
        return { name: tensor, shape, dtype: data instanceof Int32Array ? "I32" : "F32" };
      });
      const summary = {
        schema: "switchyard/logits/1",
        file: out,
        ...metadata,
        ids,
        argmax: largest,
        next,
        tensors: list,
      };
      streams.out(`${JSON.stringify(summary)}\n`);
      return 0;
    }
    const rows = next.map(({ id, logit, probability, text }) => [
      `${id}`,
      logit.toFixed(4),
      `${(100 * probability).toFixed(2)} %`,
      ...(text === undefined ? [] : [JSON.stringify(text)]),
    ]);
    const head = ["next id", "logit", "probability", ...(open.tokenizer ? ["text"] : [])];
    streams.out(
      `${modelName(open)}: ${count(ids.length, "token")}, ${count(tensors.length, "tensor")}, ${shownBytes(bytes)} in ${out}\n\n`,
    );
    streams.out(`${table([head, ...rows])}\n`);
    return 0;
  });
}
