// What routing did, from a trace: load, importance, entropy, who works with whom, and where tokens go from layer to layer. Counted
// chunk by chunk, so a trace of any length takes the memory of its counts. The measures of a step on the device are core's.
import { CheckpointError } from "@switchyard/core";
import type { TraceChunk, TraceChunkLayer, TraceHeader, TraceLayer } from "./format.ts";

/** Experts of one place that routes. Padding counts nowhere; null experts have no load of their own. Plain data. */
export interface LayerAnalysis extends TraceLayer {
  /** Tokens that each expert saw, `[experts]`. */
  readonly load: readonly number[];
  /** Summed weights of each expert, `[experts]` (1701.06538, eq. 6); absent where the trace has no weights. */
  readonly importance?: readonly number[];
  /** Real experts per token, mean. */
  readonly expertsPerToken: number;
  /** Slots that went to null experts. */
  readonly nullLoad: number;
  /** Tokens that no real expert saw. */
  readonly untouched: number;
  /**
   * Entropy of a token's distribution over the experts over ln(experts), mean over the tokens: 0 certain, 1 undecided. Of the softmax of
   * the logits where the trace has them, else of the weights of the chosen; absent with neither, or with one expert.
   */
  readonly entropy?: number;
  /** Entropy of `load` over ln(experts): 1 = all alike, 0 = one has everything; 0 for a single expert. */
  readonly loadEntropy: number;
  /** Load of the busiest expert over the mean: 1 = even; 0 without load. */
  readonly imbalance: number;
  /** Experts that no token chose. */
  readonly dead: readonly number[];
  /** Experts with more than `overload` times the mean load, busiest first. */
  readonly overloaded: readonly number[];
  /** `load` by label, `[labels][experts]`; absent without labels. */
  readonly loadByLabel?: readonly (readonly number[])[];
  /** Tokens that both experts saw, `[experts][experts]`, the diagonal is `load`; absent where `pairs` is false. */
  readonly together?: readonly (readonly number[])[];
  /** Share of the pairs of experts, most frequent first, before 95 % of all meetings are reached (2503.16057). */
  readonly combinations?: number;
}

export interface TransitionAnalysis {
  /** Places in `layers`: `to` is `from + 1`. */
  readonly from: number;
  readonly to: number;
  /** Tokens by their leading expert here and there, `[experts of from][experts of to]`. */
  readonly counts: readonly (readonly number[])[];
  /**
   * How much the expert of `from` tells about the one of `to`: I(from; to) / H(to), 0 nothing, 1 everything. 0 where `to` never varies.
   */
  readonly told: number;
}

export interface TraceAnalysis {
  readonly model: TraceHeader["model"];
  /** Real tokens. */
  readonly tokens: number;
  readonly padding: number;
  readonly passes: number;
  readonly sequences: number;
  /** Tokens of each label; a token of a sequence without one counts in none. */
  readonly labels: readonly { readonly name: string; readonly tokens: number }[];
  readonly overload: number;
  readonly layers: readonly LayerAnalysis[];
  /** Neighbours in `layers`; empty where `pairs` is false. */
  readonly transitions: readonly TransitionAnalysis[];
}

export interface AnalyseOptions {
  /** Times the mean load from which an expert counts as overloaded; default 2. */
  readonly overload?: number;
  /** Counts pairs of experts and transitions; default: where that takes at most 2^25 numbers, as it does for all known models. */
  readonly pairs?: boolean;
}

/** A trace as `readTrace` gives it, or anything of that form. */
export interface TraceChunks extends AsyncIterable<TraceChunk> {
  readonly header: TraceHeader;
}

const mostCounts = 2 ** 24;
const mostPairs = 2 ** 25;

/** Counts of one layer while the chunks go by. */
interface Counts {
  readonly layer: TraceLayer;
  readonly load: Float64Array;
  readonly importance: Float64Array | undefined;
  readonly byLabel: Float64Array | undefined;
  readonly together: Float64Array | undefined;
  readonly towards: Float64Array | undefined;
  slots: number;
  nulls: number;
  untouched: number;
  entropy: number;
}

/** Label of every sequence, -1 where it has none. */
export const labelOf = ({ sequences }: TraceHeader, sequence: number): number => sequences[sequence]?.label ?? -1;

/** The distinct real experts of one token, put into `found`; how many they are. */
export function distinctExperts(ids: Int32Array, from: number, layer: TraceLayer, found: Int32Array): number {
  const { slots, experts } = layer;
  let count = 0;
  for (let i = from; i < from + slots; i++) {
    const id = ids[i] as number;
    if (id < 0 || id >= experts) continue;
    let known = false;
    for (let j = 0; j < count && !known; j++) known = found[j] === id;
    if (!known) found[count++] = id;
  }
  return count;
}

/**
 * The leading expert of a token: the real one with the greatest weight where weights are recorded, else the first one; -1: none.
 * `from` is the token's first slot.
 */
export function leadingExpert({ experts: ids, weights }: TraceChunkLayer, from: number, layer: TraceLayer): number {
  let best = -1;
  let greatest = Number.NEGATIVE_INFINITY;
  for (let i = from; i < from + layer.slots; i++) {
    const id = ids[i] as number;
    if (id < 0 || id >= layer.experts) continue;
    if (!weights) return id;
    const weight = weights[i] as number;
    if (best < 0 || weight > greatest) [best, greatest] = [id, weight];
  }
  return best;
}

/** Σ -p ln p of values that are at least 0 and need not sum to 1; 0 without any. */
function entropyOf(values: ArrayLike<number>, from: number, to: number): number {
  let [total, weighted] = [0, 0];
  for (let i = from; i < to; i++) {
    const x = values[i] as number;
    if (!(x > 0)) continue;
    total += x;
    weighted += x * Math.log(x);
  }
  return total > 0 ? Math.max(0, Math.log(total) - weighted / total) : 0;
}

/** The entropy of the softmax of logits; those that are -Infinity have no share. */
function softmaxEntropy(logits: Float32Array, from: number, to: number): number {
  let top = Number.NEGATIVE_INFINITY;
  for (let i = from; i < to; i++) top = Math.max(top, logits[i] as number);
  if (!Number.isFinite(top)) return 0;
  let [total, weighted] = [0, 0];
  for (let i = from; i < to; i++) {
    const apart = (logits[i] as number) - top;
    const e = Math.exp(apart);
    total += e;
    if (e > 0) weighted += e * apart;
  }
  return Math.log(total) - weighted / total;
}

const rows = (values: Float64Array, width: number): number[][] =>
  Array.from({ length: values.length / Math.max(1, width) }, (_, i) =>
    Array.from(values.subarray(i * width, (i + 1) * width)),
  );

/** As core's `combinationUsage`, of counts on the host. */
function combinationShare(together: Float64Array, experts: number): number | undefined {
  const pairs: number[] = [];
  for (let a = 0; a < experts; a++)
    for (let b = a + 1; b < experts; b++) pairs.push(together[a * experts + b] as number);
  const total = pairs.reduce((sum, n) => sum + n, 0);
  if (total === 0) return undefined;
  const sorted = Float64Array.from(pairs).sort().reverse();
  let [reached, before] = [0, 0];
  for (const n of sorted) {
    reached += n;
    if (reached / total >= 0.95) break;
    before++;
  }
  return before / pairs.length;
}

/** I(row; column) / H(column) of counts. */
function toldBy(counts: Float64Array, width: number): number {
  const columns = new Float64Array(width);
  let [all, withinRows] = [0, 0];
  for (let at = 0; at < counts.length; at += width) {
    let row = 0;
    for (let i = 0; i < width; i++) {
      columns[i] = (columns[i] as number) + (counts[at + i] as number);
      row += counts[at + i] as number;
    }
    all += row;
    withinRows += row * entropyOf(counts, at, at + width);
  }
  const own = entropyOf(columns, 0, width);
  return own > 0 && all > 0 ? Math.min(1, Math.max(0, 1 - withinRows / all / own)) : 0;
}

function layerOf(counts: Counts, tokens: number, labels: number, overload: number): LayerAnalysis {
  const { layer, load, importance, byLabel, together, slots, nulls, untouched, entropy } = counts;
  const { experts } = layer;
  const total = load.reduce((sum, n) => sum + n, 0);
  const mean = total / experts;
  const ids = Array.from({ length: experts }, (_, id) => id);
  const combinations = together ? combinationShare(together, experts) : undefined;
  return {
    ...layer,
    load: Array.from(load),
    ...(importance ? { importance: Array.from(importance) } : {}),
    expertsPerToken: tokens === 0 ? 0 : slots / tokens,
    nullLoad: nulls,
    untouched,
    ...(Number.isNaN(entropy) || tokens === 0 || experts < 2 ? {} : { entropy: entropy / tokens / Math.log(experts) }),
    loadEntropy: experts < 2 ? 0 : entropyOf(load, 0, experts) / Math.log(experts),
    imbalance: total === 0 ? 0 : load.reduce((most, n) => Math.max(most, n), 0) / mean,
    dead: ids.filter((id) => load[id] === 0),
    overloaded: ids
      .filter((id) => total > 0 && (load[id] as number) > overload * mean)
      .sort((a, b) => (load[b] as number) - (load[a] as number) || a - b),
    ...(byLabel && labels > 0 ? { loadByLabel: rows(byLabel, experts) } : {}),
    ...(together ? { together: rows(together, experts) } : {}),
    ...(combinations === undefined ? {} : { combinations }),
  };
}

/**
 * What routing did in a trace: per layer load, importance, entropy, dead and overloaded experts, co-activation, and the transitions
 * between neighbouring layers; by label where the trace has labels. Reads the chunks once. Plain data, ready for JSON.
 * Throws CheckpointError for a trace whose counts would not fit into memory, and what reading the chunks throws.
 *
 * @example const { layers } = await analyseTrace(await readTrace(source)); console.log(layers[0]?.dead);
 */
export async function analyseTrace(trace: TraceChunks, options: AnalyseOptions = {}): Promise<TraceAnalysis> {
  const { header } = trace;
  const { overload = 2 } = options;
  const { layers, labels } = header;
  const sum = (of: (layer: TraceLayer, i: number) => number): number => layers.reduce((n, one, i) => n + of(one, i), 0);
  const numbers = sum(({ experts }) => experts) * (2 + labels.length);
  if (numbers > mostCounts) {
    throw new CheckpointError(
      `the trace has ${layers.length} layers with ${numbers} counts of experts and labels, at most ${mostCounts} fit`,
    );
  }
  const pairNumbers = sum(({ experts }, i) => experts * (experts + (layers[i + 1]?.experts ?? 0)));
  const { pairs = pairNumbers <= mostPairs } = options;
  if (pairs && pairNumbers > mostPairs) {
    throw new CheckpointError(
      `the trace has ${pairNumbers} pairs of experts, at most ${mostPairs} fit; leave pairs out`,
    );
  }
  const all = layers.map((layer, i): Counts => {
    const { experts } = layer;
    const next = layers[i + 1];
    return {
      layer,
      load: new Float64Array(experts),
      importance: header.types.weights ? new Float64Array(experts) : undefined,
      byLabel: labels.length > 0 ? new Float64Array(labels.length * experts) : undefined,
      together: pairs ? new Float64Array(experts * experts) : undefined,
      towards: pairs && next ? new Float64Array(experts * next.experts) : undefined,
      slots: 0,
      nulls: 0,
      untouched: 0,
      entropy: header.types.weights || header.types.logits ? 0 : Number.NaN,
    };
  });
  const labelTokens = new Float64Array(labels.length);
  const sequences = new Set<number>();
  let [tokens, padding, passes, pass] = [0, 0, 0, -1];
  for await (const chunk of trace) {
    const labelsHere = new Int32Array(chunk.tokens).fill(-2); // -2 = padding
    for (let t = 0; t < chunk.tokens; t++) {
      if (chunk.pass[t] !== pass) [pass, passes] = [chunk.pass[t] as number, passes + 1];
      if ((chunk.position[t] as number) < 0) {
        padding++;
        continue;
      }
      tokens++;
      const sequence = chunk.sequence[t] as number;
      sequences.add(sequence);
      const label = labelOf(header, sequence);
      labelsHere[t] = label;
      if (label >= 0) labelTokens[label] = (labelTokens[label] as number) + 1;
    }
    let before: Int32Array | undefined;
    for (const [i, counts] of all.entries()) {
      const leading = new Int32Array(chunk.tokens).fill(-1);
      countLayer(counts, chunk.layers[i] as TraceChunkLayer, labelsHere, leading);
      const { towards } = all[i - 1] ?? {};
      if (towards && before) {
        const width = counts.layer.experts;
        for (let t = 0; t < chunk.tokens; t++) {
          const [a, b] = [before[t] as number, leading[t] as number];
          if (a >= 0 && b >= 0) towards[a * width + b] = (towards[a * width + b] as number) + 1;
        }
      }
      before = leading;
    }
  }
  return {
    model: header.model,
    tokens,
    padding,
    passes,
    sequences: sequences.size,
    labels: labels.map((name, i) => ({ name, tokens: labelTokens[i] as number })),
    overload,
    layers: all.map((counts) => layerOf(counts, tokens, labels.length, overload)),
    transitions: all.flatMap(({ towards }, from) => {
      const width = layers[from + 1]?.experts ?? 0;
      return towards ? [{ from, to: from + 1, counts: rows(towards, width), told: toldBy(towards, width) }] : [];
    }),
  };
}

/** Counts one layer of a chunk; `labels` has -2 for padding, and `leading [tokens]` gets the leading experts. */
function countLayer(counts: Counts, own: TraceChunkLayer, labels: Int32Array, leading: Int32Array): void {
  const { layer, load, importance, byLabel, together } = counts;
  const { slots, experts, nulls = 0 } = layer;
  const found = new Int32Array(slots);
  const weights = new Float64Array(experts);
  for (let t = 0; t < labels.length; t++) {
    const label = labels[t] as number;
    if (label === -2) continue;
    const first = t * slots;
    leading[t] = leadingExpert(own, first, layer);
    const count = distinctExperts(own.experts, first, layer, found);
    counts.slots += count;
    if (count === 0) counts.untouched++;
    for (let i = first; i < first + slots; i++) {
      const id = own.experts[i] as number;
      if (id >= experts) counts.nulls++;
      else if (id >= 0 && importance && own.weights) {
        importance[id] = (importance[id] as number) + (own.weights[i] as number);
        weights[id] = (weights[id] as number) + (own.weights[i] as number);
      }
    }
    for (let a = 0; a < count; a++) {
      const id = found[a] as number;
      load[id] = (load[id] as number) + 1;
      if (byLabel && label >= 0) byLabel[label * experts + id] = (byLabel[label * experts + id] as number) + 1;
      if (!together) continue;
      for (let b = 0; b < count; b++) {
        const at = id * experts + (found[b] as number);
        together[at] = (together[at] as number) + 1;
      }
    }
    if (own.logits) {
      const wide = experts + nulls;
      counts.entropy += softmaxEntropy(own.logits, t * wide, t * wide + experts);
    } else if (own.weights) {
      const chosen = Float64Array.from(found.subarray(0, count), (id) => Math.max(0, weights[id] as number));
      counts.entropy += entropyOf(chosen, 0, count);
    }
    for (let a = 0; a < count; a++) weights[found[a] as number] = 0;
  }
}
