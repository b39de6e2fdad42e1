// What commands that run a checkpoint share: their options, and opening the model on a backend.
import { existsSync, rmSync, statSync } from "node:fs";
import { basename } from "node:path";
import { CheckpointError, type Json, UnsupportedError } from "@switchyard/core";
import type { RouterPlugin } from "@switchyard/core/moe";
import {
  inspectCheckpoint,
  type LoadedModel,
  namedChatTemplates,
  openCheckpoint,
  type ReadModelOptions,
  readModel,
  traced,
  traceFile,
  traceRecorder,
} from "@switchyard/models";
import type { ArgsDef } from "citty";
import { count, exactly, type Given, shownBytes } from "./arguments.ts";
import { type BackendName, backendNames, openBackend } from "./backends.ts";
import { routerFrom, routerNames } from "./routers.ts";

const policies = ["lru", "lfu", "prefetch"] as const;

export const modelArgs = {
  backend: {
    type: "string",
    description: `${backendNames.join(", ")} (default wasm; cpu is the slow reference; the others need their package)`,
    valueHint: "NAME",
  },
  threads: {
    type: "string",
    description: "Threads of the wasm backend (default: what the machine has)",
    valueHint: "N",
  },
  memory: {
    type: "string",
    description: "Memory that the model may hold, such as 3GB: experts beyond it are read from the files when needed",
    valueHint: "SIZE",
  },
  policy: {
    type: "string",
    description: `With --memory, which experts are kept: ${policies.join(", ")} (default lru; prefetch also loads ahead)`,
    valueHint: "NAME",
  },
  router: {
    type: "string",
    description: "Router of a model in our own layout, as in switchyard train (default: what its config.json says)",
    valueHint: "NAME",
  },
  "follow-links": { type: "boolean", description: "Read files that are links out of DIR" },
} as const satisfies ArgsDef;

export interface OpenModel extends LoadedModel {
  readonly folder: string;
  readonly config: { readonly [key: string]: Json };
  /** Of generation_config.json or config.json: ids that end a text. */
  readonly endIds: readonly number[];
  /** What one takes as stored: a trace of a model in memory foretells with it what streaming would read. */
  readonly expertBytes: number | undefined;
  readonly backend: BackendName;
  /** What a model in our own layout was read with. */
  readonly plugins: readonly RouterPlugin[];
}

/** The options, checked before anything is opened. */
export interface ModelArguments {
  readonly folder: string;
  readonly backend: BackendName;
  readonly threads: number | undefined;
  readonly memory: number | undefined;
  readonly policy: (typeof policies)[number] | undefined;
  readonly router: string | undefined;
  readonly followLinks: boolean;
}

/** @throws UnsupportedError for what a user can mend. */
export function modelArguments(command: string, given: Given): ModelArguments {
  const [folder = ""] = exactly(
    1,
    given,
    `${command} takes one checkpoint folder`,
    `switchyard ${command} DIR; see switchyard ${command} --help`,
  );
  const [memory, policy] = [given.bytes("memory"), given.choice("policy", policies)];
  if (policy !== undefined && memory === undefined) {
    throw new UnsupportedError("--policy says which experts are kept in --memory; give that too");
  }
  return {
    folder,
    backend: given.choice("backend", backendNames) ?? "wasm",
    threads: given.whole("threads", { from: 1, to: 256 }),
    memory,
    policy,
    router: given.text("router"),
    followLinks: given.flag("follow-links"),
  };
}

/** The router that a checkpoint in our own layout was saved with, as `routerFrom` reads it. */
export function savedRouter(config: OpenModel["config"]): string | undefined {
  const { router } = config;
  if (config.model_type !== "switchyard" || typeof router !== "object" || router === null || Array.isArray(router)) {
    return undefined;
  }
  const { name, options } = router as { readonly [key: string]: Json };
  if (typeof name !== "string" || !routerNames.includes(name)) return undefined;
  const given = Object.entries(typeof options === "object" && options !== null ? options : {});
  return [
    name,
    ...given.flatMap(([key, value]) => (typeof value === "object" ? [] : [`${key}=${String(value)}`])),
  ].join(":");
}

const idsOf = (value: Json | undefined): number[] =>
  (Array.isArray(value) ? value : [value]).filter((id): id is number => typeof id === "number");

/**
 * Opens a model, hands it to `act` and closes it.
 * @throws CheckpointError for a folder without a model that can be run, and what the backend throws.
 */
export async function withModel<T>(
  args: ModelArguments,
  act: (open: OpenModel) => Promise<T>,
  options: Pick<ReadModelOptions, "weights"> = {},
): Promise<T> {
  const { folder, backend, threads, memory, policy, followLinks } = args;
  const checkpoint = await openCheckpoint(folder, { followLinks });
  let ours = true;
  try {
    const { config } = checkpoint;
    if (args.router !== undefined && config.model_type !== "switchyard") {
      const found = `model_type ${JSON.stringify(config.model_type ?? null)}, which says itself how it routes`;
      throw new UnsupportedError(`--router is for models in our own layout; ${folder} has ${found}: leave it out`);
    }
    const specification = args.router ?? savedRouter(config);
    const routers = specification === undefined ? [] : [(await routerFrom(specification)).plugin];
    const generation = (await checkpoint.json("generation_config.json")) ?? {};
    const engine = await openBackend(backend, threads);
    try {
      const how = {
        engine,
        routers,
        chatTemplates: await namedChatTemplates(folder, { followLinks }),
        ...options,
        ...(memory === undefined ? {} : { memory }),
        ...(policy ? { streaming: policy } : {}),
      };
      const loaded = await readModel(checkpoint, how, folder);
      ours = false;
      try {
        // Some checkpoints name ids that their vocabulary does not reach: those never come.
        const endIds = idsOf(generation.eos_token_id ?? config.eos_token_id).filter(
          (id) => Number.isInteger(id) && id >= 0 && id < loaded.model.vocabulary,
        );
        const { expertBytes } = inspectCheckpoint(checkpoint, { routers });
        return await act({ ...loaded, folder, config, endIds, expertBytes, backend, plugins: routers });
      } finally {
        await loaded.close();
      }
    } finally {
      engine.close();
    }
  } finally {
    if (ours) await checkpoint.close();
  }
}

/** The tokenizer. @throws CheckpointError that says what to use instead. */
export function needTokenizer({ tokenizer, withoutTokenizer, folder }: OpenModel, option: string, instead: string) {
  if (tokenizer) return tokenizer;
  throw new CheckpointError(
    `${option} needs a tokenizer: ${withoutTokenizer ?? `${folder} has no tokenizer.json`}. ${instead}`,
  );
}

/** What the prompt is, by --prompt or --ids. @throws UnsupportedError unless there is exactly one of them. */
export function promptArgument(
  command: string,
  given: Given,
): { readonly text: string } | { readonly ids: readonly number[] } {
  const [text, ids] = [given.text("prompt"), given.ids("ids")];
  if (text !== undefined && ids !== undefined) {
    throw new UnsupportedError("--prompt and --ids exclude each other; leave one of them out");
  }
  if (text !== undefined) return { text };
  if (ids !== undefined) return { ids };
  throw new UnsupportedError(`${command} needs a prompt: --prompt TEXT, or --ids 1,2,3`);
}

/** Ids of a prompt, with the special tokens that the checkpoint wants around a text. */
export function promptIds(
  open: OpenModel,
  prompt: { readonly text: string } | { readonly ids: readonly number[] },
): number[] {
  if ("ids" in prompt) return [...prompt.ids];
  const words = needTokenizer(open, "--prompt", "Give token ids: --ids 1,2,3");
  return Array.from(words.encode(prompt.text, { addSpecial: true }));
}

export const modelName = ({ folder, config }: OpenModel): string =>
  `${basename(folder)} (${typeof config.model_type === "string" ? config.model_type : "unknown"})`;

/** What streaming experts from the files has cost; empty where all are in memory. */
export function streamingText({ model: { streamed } }: OpenModel): string {
  if (!streamed) return "";
  const { requests, hits, bytesRead } = streamed.counts();
  const rate = requests === 0 ? "" : ` ${((100 * hits) / requests).toFixed(1)} % of experts were there,`;
  return `${count(streamed.capacity, "expert")} kept in memory:${rate} ${shownBytes(bytesRead)} read\n`;
}

/**
 * The file that an option names, before anything is loaded for it.
 * @throws CheckpointError where there is such a file: nothing that stands there is written over unasked.
 */
export function newFile(option: string, given: Given, instead?: string): string | undefined {
  const path = given.text(option);
  if (path === undefined || !existsSync(path)) return path;
  const next = ["delete it", "name another one", ...(instead === undefined ? [] : [instead])].join(", or ");
  throw new CheckpointError(`cannot write ${path} (--${option}): there is such a file already; ${next}`);
}

export const traceArg = {
  trace: {
    type: "string",
    description: "Records which experts every token chose, for switchyard cache-sim",
    valueHint: "FILE",
  },
} as const satisfies ArgsDef;

/** Hands `act` the model, which records its passes where --trace names a file. */
export async function recording<T>(
  open: OpenModel,
  file: string | undefined,
  act: (model: OpenModel["model"]) => Promise<T>,
): Promise<T> {
  const { model } = open;
  if (file === undefined) return act(model);
  const expertBytes = model.streamed?.expertBytes ?? open.expertBytes;
  const recorder = traceRecorder(await traceFile(file), {
    model: { name: modelName(open) },
    routing: model.routing,
    ...(expertBytes === undefined ? {} : { expertBytes }),
    tool: "switchyard",
  });
  try {
    return await act(traced(model, recorder));
  } finally {
    await recorder.close();
    // Nothing was recorded: no trace, and in the way of the next try.
    if (statSync(file).size === 0) rmSync(file);
  }
}
