// The tokens of a trace one by one, for looking at them: so many as they are, the others in stretches with the share of each expert.
import type { Tokenizer } from "../tokenizer.ts";
import { distinctExperts, type TraceChunks } from "./analyse.ts";
import type { TraceChunk, TraceChunkLayer, TraceHeader, TraceLayer } from "./format.ts";

export interface TraceTokens {
  /** Tokens that stand here one by one, ordered by sequence and position. */
  readonly count: number;
  readonly sequence: Uint32Array;
  readonly position: Int32Array;
  /** Token ids, -1 = unknown. */
  readonly token: Int32Array;
  /** Experts kept per token and layer. */
  readonly kept: number;
  /** `[count, layers, kept]`: real experts by falling weight, or in the order of the trace without weights; -1 = none. */
  readonly experts: Int32Array;
  /** `[count, layers, kept]`; absent where the trace has none. */
  readonly weights?: Float32Array;
  /** The tokens after those, in the order of the trace. */
  readonly stretches: readonly TraceStretch[];
}

/** Neighbouring tokens of a trace taken together. */
export interface TraceStretch {
  /** Number of its first real token in the trace. */
  readonly first: number;
  readonly tokens: number;
  /** `[layers, kept]`: the experts that most of its tokens saw; -1 = none. */
  readonly experts: Int32Array;
  /** `[layers, kept]`: the share of its tokens that saw them. */
  readonly shares: Float32Array;
}

export interface TraceTokensOptions {
  /** Tokens one by one; default 10,000, fewer where layers times experts would take too much memory. */
  readonly most?: number;
  /** Experts of each token and layer; default 8, or the slots of the trace where those are fewer. */
  readonly kept?: number;
  /** Stretches at most, an even number; default 256. */
  readonly stretches?: number;
}

const mostNumbers = 2 ** 23;

/** Real experts of a token by falling weight, equal ones in the order of the trace, into `into` from `at` on. */
function put(own: TraceChunkLayer, from: number, layer: TraceLayer, { into, weights, at, kept, found }: Places): void {
  const count = distinctExperts(own.experts, from, layer, found);
  const pairs = Array.from({ length: count }, (_, i) => {
    const id = found[i] as number;
    let weight = 0;
    for (let s = from; own.weights && s < from + layer.slots; s++)
      if (own.experts[s] === id) weight += own.weights[s] as number;
    return { id, weight };
  });
  if (own.weights) pairs.sort((a, b) => b.weight - a.weight);
  for (const [i, { id, weight }] of pairs.slice(0, kept).entries()) {
    into[at + i] = id;
    if (weights) weights[at + i] = weight;
  }
}

interface Places {
  readonly into: Int32Array;
  readonly weights: Float32Array | undefined;
  readonly at: number;
  readonly kept: number;
  readonly found: Int32Array;
}

/** Tokens of each expert in stretches of one width; twice as wide whenever there would be too many of them. */
class Stretches {
  readonly #layers: readonly TraceLayer[];
  readonly #offsets: readonly number[];
  readonly #row: number;
  readonly #most: number;
  readonly #counts: Uint32Array;
  #width = 16;
  #tokens = 0;

  constructor(layers: readonly TraceLayer[], most: number) {
    this.#layers = layers;
    let row = 0;
    this.#offsets = layers.map(({ experts }) => {
      row += experts;
      return row - experts;
    });
    this.#row = row;
    this.#most = Math.max(2, 2 * Math.floor(Math.min(most, mostNumbers / row) / 2));
    this.#counts = new Uint32Array(this.#most * row);
  }

  add({ layers }: TraceChunk, token: number, found: Int32Array): void {
    if (this.#tokens === this.#most * this.#width) this.#merge();
    const at = Math.floor(this.#tokens++ / this.#width) * this.#row;
    for (const [i, layer] of this.#layers.entries()) {
      const count = distinctExperts((layers[i] as TraceChunkLayer).experts, token * layer.slots, layer, found);
      for (let j = 0; j < count; j++) {
        const place = at + (this.#offsets[i] as number) + (found[j] as number);
        this.#counts[place] = (this.#counts[place] as number) + 1;
      }
    }
  }

  #merge(): void {
    const [counts, row] = [this.#counts, this.#row];
    for (let s = 0; s < this.#most / 2; s++) {
      for (let i = 0; i < row; i++) {
        counts[s * row + i] = (counts[2 * s * row + i] as number) + (counts[(2 * s + 1) * row + i] as number);
      }
    }
    counts.fill(0, (this.#most / 2) * row);
    this.#width *= 2;
  }

  /** The stretches, the first of which begins at token `from`. */
  list(from: number, kept: number): TraceStretch[] {
    return Array.from({ length: Math.ceil(this.#tokens / this.#width) }, (_, s) => {
      const tokens = Math.min(this.#width, this.#tokens - s * this.#width);
      const experts = new Int32Array(this.#layers.length * kept).fill(-1);
      const shares = new Float32Array(this.#layers.length * kept);
      for (const [l, { experts: wide }] of this.#layers.entries()) {
        const at = s * this.#row + (this.#offsets[l] as number);
        const own = this.#counts.subarray(at, at + wide);
        const ids = [...own.keys()].filter((id) => own[id]);
        ids.sort((a, b) => (own[b] as number) - (own[a] as number) || a - b);
        for (const [i, id] of ids.slice(0, kept).entries()) {
          experts[l * kept + i] = id;
          shares[l * kept + i] = (own[id] as number) / tokens;
        }
      }
      return { first: from + s * this.#width, tokens, experts, shares };
    });
  }
}

/**
 * Collects the first real tokens of a trace with their leading experts, and the others in stretches. Reads the chunks once; memory is
 * bounded by the options, however long the trace.
 */
export async function traceTokens(trace: TraceChunks, options: TraceTokensOptions = {}): Promise<TraceTokens> {
  const { layers, types } = trace.header;
  const slots = layers.reduce((most, layer) => Math.max(most, layer.slots), 1);
  const kept = Math.min(options.kept ?? 8, slots);
  const most = Math.min(options.most ?? 10_000, Math.floor(mostNumbers / (layers.length * kept)));
  const row = layers.length * kept;
  const found = new Int32Array(slots);
  const columns: { sequence: number; position: number; token: number; at: number }[] = [];
  const blocks: { experts: Int32Array; weights: Float32Array | undefined }[] = [];
  let rest: Stretches | undefined;
  for await (const chunk of trace) {
    for (let t = 0; t < chunk.tokens; t++) {
      const position = chunk.position[t] as number;
      if (position < 0) continue;
      if (columns.length >= most) {
        rest ??= new Stretches(layers, options.stretches ?? 256);
        rest.add(chunk, t, found);
        continue;
      }
      const at = columns.length;
      columns.push({ sequence: chunk.sequence[t] as number, position, token: chunk.token[t] as number, at });
      const experts = new Int32Array(row).fill(-1);
      const weights = types.weights ? new Float32Array(row) : undefined;
      for (const [i, layer] of layers.entries()) {
        put(chunk.layers[i] as TraceChunkLayer, t * layer.slots, layer, {
          into: experts,
          weights,
          at: i * kept,
          kept,
          found,
        });
      }
      blocks.push({ experts, weights });
    }
  }
  columns.sort((a, b) => a.sequence - b.sequence || a.position - b.position || a.at - b.at);
  const experts = new Int32Array(columns.length * row);
  const weights = types.weights ? new Float32Array(columns.length * row) : undefined;
  for (const [i, { at }] of columns.entries()) {
    const block = blocks[at];
    if (block) experts.set(block.experts, i * row);
    if (block?.weights) weights?.set(block.weights, i * row);
  }
  return {
    count: columns.length,
    sequence: Uint32Array.from(columns, ({ sequence }) => sequence),
    position: Int32Array.from(columns, ({ position }) => position),
    token: Int32Array.from(columns, ({ token }) => token),
    kept,
    experts,
    ...(weights ? { weights } : {}),
    stretches: rest?.list(columns.length, kept) ?? [],
  };
}

/**
 * The text of each token: from a tokenizer, where a character of several tokens stands at the last of them, else from the header's
 * `extra.tokens` (texts by id, as `switchyard trace` writes them), else the id as "#17".
 */
export function traceTexts(
  { count, sequence, token }: Pick<TraceTokens, "count" | "sequence" | "token">,
  { header, tokenizer }: { readonly header: TraceHeader; readonly tokenizer?: Tokenizer | undefined },
): string[] {
  const known = header.extra?.tokens;
  const listed = typeof known === "object" && known !== null && !Array.isArray(known) ? known : undefined;
  const byId = (id: number): string => {
    const text =
      listed && Object.hasOwn(listed, String(id)) ? (listed as { [id: string]: unknown })[String(id)] : undefined;
    return typeof text === "string" ? text : `#${id}`;
  };
  let stream = tokenizer?.stream();
  return Array.from({ length: count }, (_, i) => {
    const id = token[i] as number;
    if (!tokenizer) return byId(id);
    if (i > 0 && sequence[i] !== sequence[i - 1]) stream = tokenizer.stream();
    return id < 0 || id >= tokenizer.vocabulary ? `#${id}` : (stream?.push(id) ?? "");
  });
}
