// A model larger than the memory it may use: how fast it speaks, how often an expert was there, what was read, and how much memory the
// process had at most. Each run has a process of its own, since the peak of a process never falls; this file measures inside one and
// makes a table of several. The model is passed in.
import { type Clock, type Summary, summarise } from "../harness.ts";
import type { Figure, Table } from "../table.ts";

export interface StreamingSizes {
  readonly layers: number;
  readonly width: number;
  readonly heads: number;
  readonly experts: number;
  /** Experts per token. */
  readonly k: number;
  /** Inner width of an expert. */
  readonly hidden: number;
  readonly vocabulary: number;
  readonly context: number;
}

/** About 1.7 GB and 0.2 GB in bf16. */
export const streamingSizes: Readonly<Record<"full" | "quick", StreamingSizes>> = {
  full: { layers: 4, width: 1024, heads: 16, experts: 64, k: 8, hidden: 1024, vocabulary: 8192, context: 1024 },
  quick: { layers: 4, width: 256, heads: 4, experts: 32, k: 4, hidden: 1024, vocabulary: 2048, context: 256 },
};

/** A configuration of these sizes in the Hugging Face layout: OLMoE, whose layers are nothing but attention and routed experts. */
export const streamingConfig = (sizes: StreamingSizes) =>
  ({
    architectures: ["OlmoeForCausalLM"],
    model_type: "olmoe",
    hidden_act: "silu",
    hidden_size: sizes.width,
    intermediate_size: sizes.hidden,
    max_position_embeddings: sizes.context,
    norm_topk_prob: true,
    num_attention_heads: sizes.heads,
    num_experts: sizes.experts,
    num_experts_per_tok: sizes.k,
    num_hidden_layers: sizes.layers,
    num_key_value_heads: sizes.heads,
    tie_word_embeddings: false,
    torch_dtype: "bfloat16",
    vocab_size: sizes.vocabulary,
  }) as const;

/** What is measured, however it is made. */
export interface StreamingSubject {
  /** Reads the bytes that loading reads, and nothing else. */
  readOnly(): Promise<void>;
  load(): Promise<StreamingRun>;
  /** Most bytes that the process has held. */
  peak(): number;
}

export interface StreamingRun {
  /** The next token after these, which follow those of earlier calls. */
  next(ids: readonly number[]): Promise<number>;
  /** Experts that fit; bytes of one. */
  readonly capacity: number;
  readonly expertBytes: number;
  counts(): { readonly requests: number; readonly hits: number; readonly bytesRead: number };
  close(): Promise<void>;
}

export interface StreamingReport {
  /** How it was told to choose the experts to keep. */
  readonly name: string;
  /** Bytes of all weights, and bytes allowed. */
  readonly bytes: number;
  readonly memory: number;
  readonly capacity: number;
  readonly expertBytes: number;
  /** Seconds. */
  readonly read: number;
  readonly load: number;
  /** Seconds for the prompt, and for each token after it. */
  readonly prompt: number;
  readonly tokens: readonly number[];
  /** While tokens were made. */
  readonly requests: number;
  readonly hits: number;
  readonly bytesRead: number;
  /** Bytes. */
  readonly peak: number;
  /** The tokens that were made: the same however the experts are kept. */
  readonly ids: readonly number[];
}

export interface StreamingOptions extends Pick<StreamingReport, "name" | "bytes" | "memory"> {
  readonly prompt: readonly number[];
  /** Tokens to make. */
  readonly tokens: number;
  readonly clock?: Pick<Clock, "now">;
}

/** Loads, runs and closes the model once. The files are read once before anything is timed, so that both readings find them alike. */
export async function measureStreaming(
  subject: StreamingSubject,
  { name, bytes, memory, prompt, tokens, clock = { now: () => performance.now() / 1000 } }: StreamingOptions,
): Promise<StreamingReport> {
  const timed = async <T>(body: () => Promise<T>): Promise<readonly [T, number]> => {
    const start = clock.now();
    const value = await body();
    return [value, clock.now() - start];
  };
  await subject.readOnly();
  const [, read] = await timed(() => subject.readOnly());
  const [run, load] = await timed(() => subject.load());
  try {
    const [first, promptTime] = await timed(() => run.next(prompt));
    const before = run.counts();
    const times: number[] = [];
    const ids = [first];
    while (ids.length <= tokens) {
      const [id, seconds] = await timed(() => run.next(ids.slice(-1)));
      times.push(seconds);
      ids.push(id);
    }
    const { requests, hits, bytesRead } = run.counts();
    return {
      name,
      bytes,
      memory,
      capacity: run.capacity,
      expertBytes: run.expertBytes,
      read,
      load,
      prompt: promptTime,
      tokens: times,
      requests: requests - before.requests,
      hits: hits - before.hits,
      bytesRead: bytesRead - before.bytesRead,
      peak: subject.peak(),
      ids,
    };
  } finally {
    await run.close();
  }
}

const one = (value: number): Summary => summarise([value]);
const gigabytes = (bytes: number): string => `${(bytes / 1e9).toFixed(2)} GB`;

/**
 * Reports of one model as a table: tokens per second, and below it how often experts were there, bytes per token, the peak over the
 * bound (at most 300 MB) and loading against reading.
 * @throws RangeError without reports, or when they did not make the same tokens.
 */
export function streamingTable(
  sizes: StreamingSizes,
  reports: readonly StreamingReport[],
  { threads }: { readonly threads: number },
): Table {
  const [first] = reports;
  if (!first) throw new RangeError("streamingTable: there are no reports");
  for (const { name, ids } of reports) {
    if (ids.join() !== first.ids.join()) {
      throw new RangeError(`streamingTable: ${name} made other tokens than ${first.name}: ${ids} and ${first.ids}`);
    }
  }
  const { layers, experts, k, width, hidden } = sizes;
  const figures = reports.flatMap(({ name, requests, hits, bytesRead, tokens, peak, memory, read, load }): Figure[] => [
    { label: `${name}: experts that were there`, value: one(hits / requests) },
    { label: `${name}: MB read per token`, value: one(bytesRead / tokens.length / 1e6) },
    { label: `${name}: MB of peak memory over the bound`, value: one((peak - memory) / 1e6), goal: { most: 300 } },
    { label: `${name}: loading : reading the same bytes`, value: one(load / read) },
  ]);
  return {
    case: "streaming",
    title:
      `${gigabytes(first.bytes)} of weights in ${gigabytes(first.memory)} of memory: ${layers} layers of ${experts} experts, ` +
      `top-${k}, width ${width}, expert width ${hidden}, bf16; ${first.capacity} experts kept`,
    threads,
    unit: "tokens/s",
    amounts: Object.fromEntries(reports.map(({ name }) => [name, 1])),
    entries: reports.map(({ name, tokens }) => ({
      name,
      timing: { name, samples: tokens, wall: summarise(tokens), runs: 1 },
    })),
    figures,
  };
}
