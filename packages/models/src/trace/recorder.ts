// Recording a routing trace from a model's runs: each pass gets a `RoutingTrace` for `forward` or `step`, reads what the layers
// decided, and hands whole chunks to a writer.
import { ShapeError, type TypedArray, UnsupportedError } from "@switchyard/core";
import type { Plan, Routed } from "@switchyard/core/moe";
import type { RoutingPlace, RoutingTrace } from "../model.ts";
import type { TraceChunk, TraceChunkLayer, TraceHeader, TraceLayer } from "./format.ts";
import { type TraceSink, type TraceWriter, traceWriter } from "./writer.ts";

export interface TraceRecorderOptions {
  readonly model: TraceHeader["model"];
  /** Real experts of every layer; ids from there on are null experts. Default: what `routing` says. */
  readonly experts?: number;
  /** `Model.routing`: which layers the recorded numbers stand for, and how many experts each has. Default: the layers themselves. */
  readonly routing?: readonly RoutingPlace[];
  /** Null experts; default 0. */
  readonly nulls?: number;
  /** Ids per token and layer; default: what the first pass has. Later passes may have fewer. */
  readonly slots?: number;
  /** Bytes of one expert's weights as stored. Routers inside attention get none: their experts stay in memory. */
  readonly expertBytes?: number;
  readonly tokenizer?: string | null;
  readonly labels?: readonly string[];
  readonly sequences?: TraceHeader["sequences"];
  /** Default "f32"; null: not recorded. */
  readonly weights?: TraceHeader["types"]["weights"];
  /** Default null: not recorded. */
  readonly logits?: TraceHeader["types"]["logits"];
  readonly tool?: string;
  readonly extra?: NonNullable<TraceHeader["extra"]>;
  /** Tokens collected before they are written; default 256. */
  readonly chunkTokens?: number;
}

export interface TracePass extends RoutingTrace {
  /** Call it when the model's call has ended: waits for the values. A failed pass that is never closed leaves no mark. */
  done(): Promise<void>;
}

/** What the model was given, on the host. */
export interface TracePassInput {
  /** `[batch][sequence]` */
  readonly ids: readonly ArrayLike<number>[];
  /** Positions that were in the cache; default 0. */
  readonly past?: number;
  /** `[batch][past + sequence]`, 1 = real token; default: all are. Padding is recorded with position -1. */
  readonly mask?: readonly ArrayLike<number>[];
  /** Number of each row's sequence; default: 0, 1, 2, ... */
  readonly sequences?: readonly number[];
}

export interface TraceRecorder {
  /** One forward pass; hand the result to the model as `trace`. One after the other. */
  pass(input: TracePassInput): TracePass;
  /** Writes what was collected. */
  flush(): Promise<void>;
  /** Writes what was collected and closes the sink. */
  close(): Promise<void>;
}

/** One layer of one pass before it is known how wide the trace is. */
interface LayerRecord {
  readonly layer: number;
  readonly plan: "sparse" | "dense";
  readonly slots: number;
  /** `[tokens, slots]` */
  readonly experts: Int32Array;
  readonly weights: Float32Array;
  readonly logits: Float32Array | undefined;
}

/** The ids and weights a plan gives each token. */
async function choices(
  plan: Plan,
  tokens: number,
): Promise<{ slots: number; experts: Int32Array; weights: Float32Array }> {
  switch (plan.kind) {
    case "sparse": {
      const slots = plan.experts.shape[1] ?? 0;
      // Both reads begin now: the tensors may be gone when the first has ended.
      const [experts, weights] = await Promise.all([plan.experts.data(), plan.weights.data()]);
      return { slots, experts: Int32Array.from(experts), weights: Float32Array.from(weights) };
    }
    case "dense": {
      const slots = plan.weights.shape[1] ?? 0;
      const weights = Float32Array.from(await plan.weights.data());
      return { slots, experts: Int32Array.from(weights, (w, i) => (w === 0 ? -1 : i % slots)), weights };
    }
    case "expert-choice": {
      const [slots = 0, capacity = 0] = plan.tokens.shape;
      const [chosen, given] = await Promise.all([plan.tokens.data(), plan.weights.data()]);
      const experts = new Int32Array(tokens * slots).fill(-1);
      const weights = new Float32Array(tokens * slots);
      for (let i = 0; i < chosen.length; i++) {
        const token = chosen[i] as number;
        const expert = Math.floor(i / capacity);
        if (token < 0) continue;
        experts[token * slots + expert] = expert;
        weights[token * slots + expert] = given[i] as number;
      }
      return { slots, experts, weights };
    }
    case "slots":
    case "merge":
      throw new UnsupportedError(
        `a routing trace names experts per token, which a plan of kind "${plan.kind}" does not; use another router`,
      );
    default:
      return plan satisfies never;
  }
}

/** Throws ShapeError where neither `experts` nor `routing` says it. */
function expertsOf({ experts, routing }: TraceRecorderOptions, layer: number): number {
  const found = experts ?? routing?.[layer]?.experts;
  if (found === undefined)
    throw new ShapeError(`routing trace: how many experts has layer ${layer}? Set experts, or routing`);
  return found;
}

async function layerRecord(
  layer: number,
  routed: Routed,
  options: TraceRecorderOptions,
  tokens: number,
): Promise<LayerRecord> {
  const plans = [routed.plan, ...(routed.more ?? []).map(({ plan }) => plan)];
  const wide = expertsOf(options, layer) + (options.nulls ?? 0);
  const wanted = options.logits ?? null;
  if (wanted && !routed.logits)
    throw new UnsupportedError(`layer ${layer}: its router gives no logits; leave them out`);
  const [logits, ...parts] = await Promise.all([
    wanted ? routed.logits?.data() : undefined,
    ...plans.map((plan) => choices(plan, tokens)),
  ] as [Promise<TypedArray> | undefined, ...ReturnType<typeof choices>[]]);
  const slots = parts.reduce((sum, part) => sum + part.slots, 0);
  const experts = new Int32Array(tokens * slots);
  const weights = new Float32Array(tokens * slots);
  let at = 0;
  for (const part of parts) {
    for (let i = 0; i < part.experts.length; i++) {
      const to = Math.floor(i / part.slots) * slots + at + (i % part.slots);
      const id = part.experts[i] as number;
      if (id >= wide) throw new ShapeError(`layer ${layer} chose expert ${id}, but the trace has ${wide}`);
      experts[to] = Math.max(id, -1);
      weights[to] = id < 0 ? 0 : (part.weights[i] as number);
    }
    at += part.slots;
  }
  if (experts.length !== tokens * slots || parts.some((part) => part.experts.length !== tokens * part.slots)) {
    throw new ShapeError(`layer ${layer} routed other tokens than the ${tokens} of the pass`);
  }
  if (logits && logits.length !== tokens * wide) {
    throw new ShapeError(`layer ${layer} has ${logits.length} logits for ${tokens} tokens and ${wide} experts`);
  }
  const plan = plans.every(({ kind }) => kind === "sparse" || kind === "expert-choice") ? "sparse" : "dense";
  return { layer, plan, slots, experts, weights, logits: logits ? Float32Array.from(logits) : undefined };
}

/**
 * Records the passes of a model into a sink, which gets the header with the first chunk. Sparse plans are taken as they are,
 * of dense ones every expert with a weight other than 0; several plans of a layer stand beside each other.
 * `record` throws nothing; `done` throws UnsupportedError for a plan without experts per token or missing logits, ShapeError
 * for a pass that does not fit the earlier ones.
 *
 * @example
 * const recorder = traceRecorder(await traceFile("run.trace"), { model: { name: "whale" }, experts: 8 });
 * const trace = recorder.pass({ ids: [[1, 2, 3]] });
 * (await model.step(ids, { trace })).dispose();
 * await trace.done();
 * await recorder.close();
 */
export function traceRecorder(sink: TraceSink, options: TraceRecorderOptions): TraceRecorder {
  const { chunkTokens = 256 } = options;
  if (!(Number.isSafeInteger(chunkTokens) && chunkTokens > 0)) {
    throw new ShapeError(`traceRecorder: chunkTokens is ${chunkTokens}, expected a whole number from 1`);
  }
  let writer: TraceWriter | undefined;
  let header: TraceHeader | undefined;
  /** The numbers that the layers of the header were recorded with. */
  let recorded: readonly number[] = [];
  let waiting: Omit<TraceChunk, "first">[] = [];
  let passes = 0;

  const makeHeader = (records: readonly LayerRecord[]): TraceHeader => {
    const { routing, nulls, expertBytes, labels = [], sequences = [], tokenizer = null, tool, extra } = options;
    const layers = records.map(
      ({ layer, plan, slots }): TraceLayer => ({
        index: routing?.[layer]?.layer ?? layer,
        ...(routing?.[layer]?.part === "attention" ? { name: "attention" } : {}),
        experts: expertsOf(options, layer),
        ...(nulls === undefined ? {} : { nulls }),
        slots: options.slots ?? slots,
        plan,
        ...(expertBytes === undefined || routing?.[layer]?.part === "attention" ? {} : { expertBytes }),
      }),
    );
    const wide = Math.max(...layers.map(({ experts }) => experts)) + (nulls ?? 0);
    return {
      format: "moe-routing-trace",
      version: 1,
      model: options.model,
      layers,
      tokenizer,
      labels,
      sequences,
      types: {
        experts: wide <= 128 ? "i8" : wide <= 32768 ? "i16" : "i32",
        weights: options.weights === undefined ? "f32" : options.weights,
        logits: options.logits ?? null,
      },
      ...(tool === undefined ? {} : { tool }),
      ...(extra === undefined ? {} : { extra }),
    };
  };

  const fit = (head: TraceHeader, records: readonly LayerRecord[], tokens: number): TraceChunkLayer[] => {
    const found = records.map(({ layer }) => layer).join();
    const wanted = recorded.join();
    if (found !== wanted) throw new ShapeError(`routing trace: layers ${found} were recorded, earlier ${wanted}`);
    return records.map((record, i) => {
      const { slots, plan, index } = head.layers[i] as TraceLayer;
      if (record.slots > slots || record.plan !== plan) {
        throw new ShapeError(
          `routing trace: layer ${index} has a ${record.plan} plan with ${record.slots} experts per token, ` +
            `the trace a ${plan} one with ${slots}; set slots`,
        );
      }
      const experts = new Int32Array(tokens * slots).fill(-1);
      const weights = new Float32Array(tokens * slots);
      for (let j = 0; j < record.experts.length; j++) {
        const to = Math.floor(j / record.slots) * slots + (j % record.slots);
        experts[to] = record.experts[j] as number;
        weights[to] = record.weights[j] as number;
      }
      return {
        experts,
        ...(head.types.weights ? { weights } : {}),
        ...(record.logits ? { logits: record.logits } : {}),
      };
    });
  };

  const flush = async (): Promise<void> => {
    if (!header || waiting.length === 0) return;
    const whole = joinChunks(waiting);
    waiting = [];
    writer ??= await traceWriter(sink, header);
    for (let from = 0; from < whole.tokens; from += chunkTokens) {
      await writer.write(cutChunk(whole, from, Math.min(whole.tokens, from + chunkTokens)));
    }
  };

  return {
    pass(input) {
      const columns = tokenColumns(input);
      const { tokens } = columns;
      const records: Promise<LayerRecord>[] = [];
      return {
        metrics: false,
        record(layer, routed) {
          const reading = layerRecord(layer, routed, options, tokens);
          // Its error is for `done`; until then nobody waits for it.
          reading.catch(() => undefined);
          records.push(reading);
        },
        async done() {
          const layers = await Promise.all(records.splice(0));
          if (layers.length === 0) throw new ShapeError("routing trace: no layer was recorded in this pass");
          if (!header) {
            header = makeHeader(layers);
            recorded = layers.map(({ layer }) => layer);
          }
          const fitted = fit(header, layers, tokens);
          if (tokens === 0) return;
          waiting.push({ ...columns, pass: new Uint32Array(tokens).fill(passes++), layers: fitted });
          if (waiting.reduce((sum, chunk) => sum + chunk.tokens, 0) >= chunkTokens) await flush();
        },
      };
    },
    flush,
    async close() {
      try {
        await flush();
      } finally {
        if (writer) await writer.close();
        else await sink.close?.();
      }
    },
  };
}

/** Sequence, position and id of each token of a pass. */
function tokenColumns({ ids, past = 0, mask, sequences }: TracePassInput) {
  const width = ids[0]?.length ?? 0;
  const tokens = ids.length * width;
  const columns = {
    tokens,
    sequence: new Uint32Array(tokens),
    position: new Int32Array(tokens),
    token: new Int32Array(tokens),
  };
  for (const [row, own] of ids.entries()) {
    const seen = mask?.[row];
    if (own.length !== width || (mask && seen?.length !== past + width)) {
      throw new ShapeError(
        `routing trace: row ${row} has ${own.length} ids and a mask of ${seen?.length ?? "no"} entries, ` +
          `expected ${width} and ${past + width}`,
      );
    }
    let real = 0;
    for (let i = 0; i < past; i++) if (!seen || seen[i]) real++;
    for (let i = 0; i < width; i++) {
      const at = row * width + i;
      columns.sequence[at] = sequences?.[row] ?? row;
      columns.token[at] = own[i] as number;
      columns.position[at] = !seen || seen[past + i] ? real++ : -1;
    }
  }
  return columns;
}

type Content = Omit<TraceChunk, "first">;
type Column = Uint32Array | Int32Array | Float32Array;

function joined<T extends Column>(parts: readonly T[]): T {
  const [one] = parts;
  if (!one) throw new ShapeError("routing trace: nothing to join");
  const make = one.constructor as new (length: number) => T;
  const all = new make(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    all.set(part, at);
    at += part.length;
  }
  return all;
}

/** The same columns, each made from those of several chunks. */
function mapChunk(
  chunks: readonly Content[],
  tokens: number,
  change: <T extends Column>(columns: readonly T[], each: number) => T,
): Content {
  const per = (column: Column): number => column.length / (chunks[0]?.tokens ?? 1);
  const every = <T extends Column>(pick: (chunk: Content) => T | undefined): T | undefined => {
    const columns = chunks.map(pick).filter((column) => column !== undefined);
    const [one] = columns;
    return one && change(columns, per(one));
  };
  const sure = <T extends Column>(pick: (chunk: Content) => T): T =>
    change(chunks.map(pick), per(pick(chunks[0] as Content)));
  return {
    tokens,
    pass: sure((chunk) => chunk.pass),
    sequence: sure((chunk) => chunk.sequence),
    position: sure((chunk) => chunk.position),
    token: sure((chunk) => chunk.token),
    layers: (chunks[0]?.layers ?? []).map((_, i) => {
      const weights = every((chunk) => chunk.layers[i]?.weights);
      const logits = every((chunk) => chunk.layers[i]?.logits);
      return {
        experts: sure((chunk) => (chunk.layers[i] as TraceChunkLayer).experts),
        ...(weights ? { weights } : {}),
        ...(logits ? { logits } : {}),
      };
    }),
  };
}

const joinChunks = (chunks: readonly Content[]): Content =>
  mapChunk(
    chunks,
    chunks.reduce((sum, { tokens }) => sum + tokens, 0),
    (columns) => joined(columns),
  );

const cutChunk = (chunk: Content, from: number, to: number): Content =>
  mapChunk([chunk], to - from, ([column], each) => {
    if (!column) throw new ShapeError("routing trace: nothing to cut");
    return column.slice(from * each, to * each) as typeof column;
  });
