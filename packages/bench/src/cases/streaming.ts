// A model larger than the memory it may use: how fast it speaks, how often an expert was there, what was read, and how much memory the
// process had at most; and how loading compares with reading the same bytes. Each run has a process of its own, since the peak of a
// process never falls; this file measures inside one and makes a table of several. The model is passed in.
import { type Clock, hostClock, type Summary, summarise } from "../harness.ts";
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

/** About 1.7 GB and 0.2 GB in bf16. Embeddings are most of what stays in memory, as in small models of the Hub. */
export const streamingSizes: Readonly<Record<"full" | "quick", StreamingSizes>> = {
  full: { layers: 4, width: 1024, heads: 16, experts: 64, k: 6, hidden: 1024, vocabulary: 16_384, context: 1024 },
  quick: { layers: 4, width: 256, heads: 4, experts: 32, k: 4, hidden: 1024, vocabulary: 8192, context: 256 },
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
  /** Bytes that `readOnly` reads. */
  readonly loadedBytes: number;
  /** Reads the bytes that loading reads, as fast as it can be done: large reads into memory that is there already, and nothing else. */
  readOnly(): Promise<void>;
  load(): Promise<StreamingRun>;
  /** Most bytes that the process has held. */
  peak(): number;
}

export interface StreamingRun {
  /** The next token after these, which follow those of earlier calls. */
  next(ids: readonly number[]): Promise<number>;
  /** Experts that fit, and bytes of one; missing where all of the model is in memory. */
  readonly streamed?: {
    readonly capacity: number;
    readonly expertBytes: number;
    counts(): { readonly requests: number; readonly hits: number; readonly bytesRead: number };
  };
  close(): Promise<void>;
}

/** In seconds. */
export interface Spent {
  readonly wall: number;
  /** Missing where the host cannot tell. */
  readonly cpu?: number;
}

export interface StreamingReport {
  /** How it was told to choose the experts to keep. */
  readonly name: string;
  /** Bytes of all weights, and bytes allowed: missing where there is no limit. */
  readonly bytes: number;
  readonly memory?: number;
  /** Of experts that are streamed. */
  readonly streamed?: StreamedReport;
  /** Bytes that loading must read. */
  readonly loadedBytes: number;
  /** In turn: a reading of the same bytes, then a loading, as often as asked. The first loading of a process compiles all code. */
  readonly readings: readonly Spent[];
  readonly loadings: readonly Spent[];
  /** Seconds for the prompt, and for each token after it. */
  readonly prompt: number;
  readonly tokens: readonly number[];
  /** Bytes. */
  readonly peak: number;
  /** The tokens that were made: the same however the experts are kept. */
  readonly ids: readonly number[];
}

export interface StreamedReport {
  readonly capacity: number;
  readonly expertBytes: number;
  /** While tokens were made. */
  readonly requests: number;
  readonly hits: number;
  readonly bytesRead: number;
}

export interface StreamingOptions extends Pick<StreamingReport, "name" | "bytes" | "memory"> {
  readonly prompt: readonly number[];
  /** Tokens to make. */
  readonly tokens: number;
  /** Pairs of a reading and a loading; default 1. */
  readonly loads?: number;
  readonly clock?: Clock;
}

/**
 * Loads and closes the model a few times, each time after reading the same bytes; runs the last one. The files are read once before
 * anything is timed, so that all find them alike.
 */
export async function measureStreaming(
  subject: StreamingSubject,
  { name, bytes, memory, prompt, tokens, loads = 1, clock = hostClock }: StreamingOptions,
): Promise<StreamingReport> {
  const timed = async <T>(body: () => Promise<T>): Promise<readonly [T, number]> => {
    const start = clock.now();
    const value = await body();
    return [value, clock.now() - start];
  };
  const spent = async <T>(body: () => Promise<T>, spending: Spent[]): Promise<T> => {
    const before = clock.cpu();
    const [value, wall] = await timed(body);
    const after = clock.cpu();
    spending.push({ wall, ...(before === undefined || after === undefined ? {} : { cpu: after - before }) });
    return value;
  };
  const [readings, loadings]: [Spent[], Spent[]] = [[], []];
  const load = async (): Promise<StreamingRun> => {
    await spent(() => subject.readOnly(), readings);
    return spent(() => subject.load(), loadings);
  };
  await subject.readOnly();
  for (let i = 1; i < loads; i++) await (await load()).close();
  const run = await load();
  try {
    const [first, promptTime] = await timed(() => run.next(prompt));
    const before = run.streamed?.counts();
    const times: number[] = [];
    const ids = [first];
    while (ids.length <= tokens) {
      const [id, seconds] = await timed(() => run.next(ids.slice(-1)));
      times.push(seconds);
      ids.push(id);
    }
    return {
      name,
      bytes,
      ...(memory === undefined ? {} : { memory }),
      ...(run.streamed && before ? { streamed: streamedReport(run.streamed, before) } : {}),
      loadedBytes: subject.loadedBytes,
      readings,
      loadings,
      prompt: promptTime,
      tokens: times,
      peak: subject.peak(),
      ids,
    };
  } finally {
    await run.close();
  }
}

function streamedReport(
  { capacity, expertBytes, counts }: NonNullable<StreamingRun["streamed"]>,
  before: { readonly requests: number; readonly hits: number; readonly bytesRead: number },
): StreamedReport {
  const { requests, hits, bytesRead } = counts();
  return {
    capacity,
    expertBytes,
    requests: requests - before.requests,
    hits: hits - before.hits,
    bytesRead: bytesRead - before.bytesRead,
  };
}

const one = (value: number): Summary => summarise([value]);
const gigabytes = (bytes: number): string => `${(bytes / 1e9).toFixed(2)} GB`;

/** What loading took for each second of reading, pair by pair, but for the first where there are more: that one compiles. */
function ratios({ readings, loadings }: StreamingReport, of: keyof Spent): Summary | undefined {
  const all = loadings.map((spent, i) => (spent[of] ?? Number.NaN) / (readings[i]?.[of] ?? Number.NaN));
  if (all.some(Number.isNaN)) return undefined;
  return summarise(all.length > 1 ? all.slice(1) : all);
}

/** Loading is called dominated by reading where it takes at most so many times as long: reading is then more than half of it. */
const mostOfReading = 2;
/** From so many bytes on: a model of a few megabytes is read in less time than it takes to look at its headers. */
const worthReading = 5e7;

/**
 * Reports of one model as a table: tokens per second, and below it how often experts were there, bytes per token, the peak over the
 * bound (at most 300 MB) and loading against reading (at most twice, where 50 MB or more are read).
 * @throws RangeError without reports or loadings, or when they did not make the same tokens.
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
  const figures = reports.flatMap((report): Figure[] => {
    const { name, streamed, tokens, peak, memory, loadings, loadedBytes } = report;
    const kept: Figure[] = streamed
      ? [
          { label: `${name}: experts that were there`, value: one(streamed.hits / streamed.requests) },
          { label: `${name}: MB read per token`, value: one(streamed.bytesRead / tokens.length / 1e6) },
        ]
      : [];
    const over: Figure[] =
      memory === undefined
        ? []
        : [
            {
              label: `${name}: MB of peak memory over the bound`,
              value: one((peak - memory) / 1e6),
              goal: { most: 300 },
            },
          ];
    const [first] = loadings;
    const value = ratios(report, "wall");
    if (!first || !value) throw new RangeError(`streamingTable: ${name} was not loaded as often as it was read`);
    const cpu = ratios(report, "cpu");
    const label = `${name}: loading : reading the same ${Math.round(loadedBytes / 1e6)} MB`;
    const goal = loadedBytes < worthReading ? {} : { goal: { most: mostOfReading } };
    return [
      ...kept,
      ...over,
      { label: `${name}: ms for the first loading`, value: one(first.wall * 1e3) },
      { label, value, ...(cpu ? { cpu } : {}), ...goal },
    ];
  });
  const bound = reports.find(({ memory }) => memory !== undefined)?.memory;
  const capacity = reports.find(({ streamed }) => streamed)?.streamed?.capacity;
  const within = bound === undefined ? "" : ` in ${gigabytes(bound)} of memory`;
  const keeps = capacity === undefined ? "" : `; ${capacity} experts kept`;
  return {
    case: "streaming",
    title:
      `${gigabytes(first.bytes)} of weights${within}: ${layers} layers of ${experts} experts, ` +
      `top-${k}, width ${width}, expert width ${hidden}, bf16${keeps}`,
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
