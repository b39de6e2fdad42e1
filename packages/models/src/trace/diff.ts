// How far two traces of the same tokens route differently: two models, or two checkpoints of one. The measures are those of core's
// `routingChange`, counted chunk by chunk, whatever the chunks of either file.
import { CheckpointError } from "@switchyard/core";
import { distinctExperts, labelOf, leadingExpert, type TraceChunks } from "./analyse.ts";
import type { TraceChunk, TraceChunkLayer, TraceHeader, TraceLayer } from "./format.ts";

/** Shares from 0 (nothing changed) to 1, over tokens; 0 without tokens. */
export interface RoutingDifference {
  /** Tokens whose set of experts is another one. */
  readonly sets: number;
  /** Mean of 1 - |K ∩ K'| / k, k the larger set: the part of a token's experts that was replaced (2505.10860). */
  readonly overlap: number;
  /** Tokens whose leading expert is another one: that of the greatest weight where both traces have weights, else the first. */
  readonly firsts: number;
}

export interface LayerDifference extends RoutingDifference {
  readonly index: number;
  readonly name?: string;
  /** In the order of `labels`; empty without labels. */
  readonly labels: readonly RoutingDifference[];
}

export interface TraceDifference {
  readonly a: TraceHeader["model"];
  readonly b: TraceHeader["model"];
  /** Real tokens compared. */
  readonly tokens: number;
  /** Mean over the layers. */
  readonly total: RoutingDifference;
  readonly layers: readonly LayerDifference[];
  /** Mean over the layers, of the tokens with each label. */
  readonly labels: readonly (RoutingDifference & { readonly name: string; readonly tokens: number })[];
}

interface Sums {
  sets: number;
  overlap: number;
  firsts: number;
}

const nothing = (): Sums => ({ sets: 0, overlap: 0, firsts: 0 });
const share = ({ sets, overlap, firsts }: Sums, tokens: number): RoutingDifference => {
  const n = Math.max(1, tokens);
  return { sets: sets / n, overlap: overlap / n, firsts: firsts / n };
};
const meanOf = (parts: readonly RoutingDifference[]): RoutingDifference => {
  const sums = nothing();
  for (const part of parts) {
    sums.sets += part.sets;
    sums.overlap += part.overlap;
    sums.firsts += part.firsts;
  }
  return share(sums, parts.length);
};

const shown = ({ index, name, experts }: TraceLayer): string =>
  `layer ${index}${name === undefined ? "" : ` (${name})`} with ${experts} experts`;

function checkHeaders(a: TraceHeader, b: TraceHeader): void {
  const refuse = (what: string): never => {
    throw new CheckpointError(`these traces cannot be compared: ${what}`);
  };
  if (a.tokenizer !== null && b.tokenizer !== null && a.tokenizer !== b.tokenizer) {
    refuse("their tokenizers differ, so the same ids are other text");
  }
  if (a.layers.length !== b.layers.length) {
    refuse(`A has ${a.layers.length} layers that route, B has ${b.layers.length}`);
  }
  for (const [i, one] of a.layers.entries()) {
    const other = b.layers[i] as TraceLayer;
    if (shown(one) !== shown(other))
      refuse(`entry ${i} of their layers is ${shown(one)} in A and ${shown(other)} in B`);
  }
}

/** The real tokens of a trace, one after the other. */
async function* realTokens(chunks: AsyncIterable<TraceChunk>): AsyncGenerator<{ chunk: TraceChunk; at: number }> {
  for await (const chunk of chunks) {
    for (let at = 0; at < chunk.tokens; at++) if ((chunk.position[at] as number) >= 0) yield { chunk, at };
  }
}

type Place = { readonly chunk: TraceChunk; readonly at: number };

/** Throws CheckpointError where two tokens at the same place are not the same. */
function checkToken(number: number, a: Place, b: Place): void {
  const [x, y] = [a, b].map(({ chunk, at }) => ({
    sequence: chunk.sequence[at] as number,
    position: chunk.position[at] as number,
    token: chunk.token[at] as number,
  })) as [Record<"sequence" | "position" | "token", number>, Record<"sequence" | "position" | "token", number>];
  const known = x.token >= 0 && y.token >= 0;
  if (x.sequence === y.sequence && x.position === y.position && (!known || x.token === y.token)) return;
  const words = (one: typeof x): string => `id ${one.token} at position ${one.position} of sequence ${one.sequence}`;
  throw new CheckpointError(
    `these traces do not hold the same tokens: token ${number} is ${words(x)} in A and ${words(y)} in B; ` +
      "record both from the same text with the same options",
  );
}

/**
 * Compares two traces of the same tokens, read side by side. Labels are those of A, or of B where A has none. Tokens may stand in
 * chunks and passes of any size, but in the same order; padding is passed over; unknown ids fit any.
 * Throws CheckpointError where layers, tokenizers or tokens differ, saying where, and what reading throws.
 *
 * @example const { total } = await diffTraces(await readTrace(before), await readTrace(after));
 */
export async function diffTraces(a: TraceChunks, b: TraceChunks): Promise<TraceDifference> {
  checkHeaders(a.header, b.header);
  const labelled = a.header.labels.length > 0 ? a.header : b.header;
  const names = labelled.labels;
  const counts = new Float64Array(names.length);
  const layers = a.header.layers.map((layer, i) => {
    const other = b.header.layers[i] as TraceLayer;
    return {
      layer,
      other,
      all: nothing(),
      labels: names.map(nothing),
      own: new Int32Array(layer.slots),
      theirs: new Int32Array(other.slots),
    };
  });
  const weighted = a.header.types.weights !== null && b.header.types.weights !== null;
  const leads = ({ experts, weights }: TraceChunkLayer, from: number, layer: TraceLayer): number =>
    leadingExpert({ experts, ...(weighted && weights ? { weights } : {}) }, from, layer);
  let tokens = 0;
  const [left, right] = [realTokens(a), realTokens(b)];
  try {
    for (;;) {
      const [x, y] = [await left.next(), await right.next()];
      if (x.done && y.done) break;
      if (x.done || y.done) {
        const [longer, shorter] = x.done ? ["B", "A"] : ["A", "B"];
        throw new CheckpointError(
          `these traces do not hold the same tokens: ${shorter} ends after ${tokens}, ${longer} goes on; ` +
            "record both from the same text with the same options",
        );
      }
      checkToken(tokens, x.value, y.value);
      tokens++;
      const label = labelOf(labelled, x.value.chunk.sequence[x.value.at] as number);
      if (label >= 0) counts[label] = (counts[label] as number) + 1;
      for (const [i, { layer, other, all, labels, own, theirs }] of layers.entries()) {
        const [p, q] = [x.value.chunk.layers[i], y.value.chunk.layers[i]] as [TraceChunkLayer, TraceChunkLayer];
        const [here, there] = [x.value.at * layer.slots, y.value.at * other.slots];
        const n = distinctExperts(p.experts, here, layer, own);
        const m = distinctExperts(q.experts, there, other, theirs);
        let common = 0;
        for (let j = 0; j < n; j++) for (let l = 0; l < m; l++) if (own[j] === theirs[l]) common++;
        const larger = Math.max(n, m);
        const replaced = larger === 0 ? 0 : 1 - common / larger;
        const first = leads(p, here, layer) === leads(q, there, other) ? 0 : 1;
        for (const sums of label >= 0 ? [all, labels[label] as Sums] : [all]) {
          if (common < larger) sums.sets++;
          sums.overlap += replaced;
          sums.firsts += first;
        }
      }
    }
  } finally {
    // Where one was refused in the middle, nothing stays open.
    await Promise.all([left.return(undefined), right.return(undefined)]);
  }
  const found = layers.map(
    ({ layer, all, labels }): LayerDifference => ({
      index: layer.index,
      ...(layer.name === undefined ? {} : { name: layer.name }),
      ...share(all, tokens),
      labels: labels.map((sums, i) => share(sums, counts[i] as number)),
    }),
  );
  return {
    a: a.header.model,
    b: b.header.model,
    tokens,
    total: meanOf(found),
    layers: found,
    labels: names.map((name, i) => ({
      name,
      tokens: counts[i] as number,
      ...meanOf(found.flatMap(({ labels }) => labels[i] ?? [])),
    })),
  };
}
