// What a checkpoint is, from its description and the headers of its files: nothing of the weights is read.
import type { RouterPlugin } from "@switchyard/core/moe";
import type { DescribedArchitecture } from "./architectures/architecture.ts";
import { describeCheckpoint } from "./architectures/find.ts";
import type { Blueprint, LayerBlueprint } from "./blueprint.ts";
import type { Checkpoint } from "./model.ts";
import { piecesOf } from "./source.ts";
import { pieceNames } from "./stored-matrix.ts";

export interface CheckpointPart {
  readonly name:
    | "embedding"
    | "attention"
    | "routers"
    | "experts"
    | "shared experts"
    | "dense"
    | "norms"
    | "head"
    | "unused";
  /** Numbers as they are used, whatever form they are stored in; of "unused" tensors as they are stored. */
  readonly parameters: number;
  /** As stored, scales and the like included. */
  readonly bytes: number;
  /** Types in the files' own names, sorted. */
  readonly types: readonly string[];
}

/** Layers that follow each other and are alike. */
export interface LayerGroup {
  readonly from: number;
  /** The last of them. */
  readonly to: number;
  readonly attention: string;
  readonly feedForward: string;
}

export interface CheckpointSummary {
  readonly modelType: string;
  readonly layers: number;
  readonly width: number;
  readonly vocabulary: number;
  readonly context: number;
  /** `active`: what one token is multiplied with, of routed experts only those it uses. */
  readonly parameters: { readonly total: number; readonly active: number };
  readonly bytes: number;
  /** Those that are there. */
  readonly parts: readonly CheckpointPart[];
  readonly groups: readonly LayerGroup[];
  /** Bytes of one routed expert as stored, where all have one size. */
  readonly expertBytes?: number;
}

type PartName = CheckpointPart["name"];
const order: readonly PartName[] = [
  "embedding",
  "attention",
  "routers",
  "experts",
  "shared experts",
  "dense",
  "norms",
  "head",
  "unused",
];

function partOf(path: string): PartName {
  if (path === "embed") return "embedding";
  if (path === "head" || path === "headBias") return "head";
  if (/norm(Bias)?$/i.test(path) && !/\.attention\./.test(path)) return "norms";
  if (/\.router(\.|$)|\.buffers\./.test(path)) return "routers";
  if (/\.moe\.shared\./.test(path)) return "shared experts";
  if (/\.(moe|attention)\.experts\./.test(path)) return "experts";
  if (/\.attention\./.test(path)) return "attention";
  return /\.moe/.test(path) ? "experts" : "dense";
}

const sizeOf = (shape: readonly number[]): number => shape.reduce((n, d) => n * d, 1);

function attentionText({ attention }: LayerBlueprint): string {
  switch (attention.kind) {
    case "grouped": {
      const window = attention.window === undefined ? "" : `, window of ${attention.window}`;
      return `${attention.heads} heads of ${attention.headSize}, ${attention.kvHeads} of keys and values${window}`;
    }
    case "latent":
      return `latent: ${attention.heads} heads, rank ${attention.rank}`;
    case "mixture":
      return `${attention.k} of ${attention.experts} experts, ${attention.kvHeads} heads of ${attention.headSize}`;
    default:
      return attention satisfies never;
  }
}

function feedForwardText({ feedForward }: LayerBlueprint): string {
  if (feedForward.kind === "dense") return `dense, inner size ${feedForward.hidden}`;
  const { experts, hidden, router, shared } = feedForward;
  const k = router.expertsPerToken === undefined ? "" : `${router.expertsPerToken} of `;
  return `${k}${experts} experts of inner size ${hidden} by ${router.name}${shared ? `, shared ${shared.hidden}` : ""}`;
}

function groupsOf({ layers }: Blueprint): LayerGroup[] {
  const groups: LayerGroup[] = [];
  for (const [i, layer] of layers.entries()) {
    const own = { attention: attentionText(layer), feedForward: feedForwardText(layer) };
    const last = groups.at(-1);
    if (last && last.attention === own.attention && last.feedForward === own.feedForward) {
      groups[groups.length - 1] = { ...last, to: i };
    } else groups.push({ from: i, to: i, ...own });
  }
  return groups;
}

/** The share of a parameter that one token is multiplied with. */
function usedShare(path: string, { layers }: Blueprint): number {
  const [, number, part] = /^layers\.(\d+)\.(moe|attention)\.experts\./.exec(path) ?? [];
  const layer = number === undefined ? undefined : layers[Number(number)];
  if (!layer) return 1;
  const { attention, feedForward } = layer;
  if (part === "attention") return attention.kind === "mixture" ? Math.min(1, attention.k / attention.experts) : 1;
  if (feedForward.kind !== "moe") return 1;
  return Math.min(1, (feedForward.router.expertsPerToken ?? feedForward.experts) / feedForward.experts);
}

export interface InspectOptions {
  /** Families beside the built-in ones, asked first. */
  readonly architectures?: readonly DescribedArchitecture[];
  /** For models saved in our own layout, as for loading: the routers that may occur, with their options. */
  readonly routers?: readonly RouterPlugin[];
}

/**
 * Architecture, parameters and bytes by part from config.json and the headers of a checkpoint's files. Throws CheckpointError
 * for an unknown family, and where config.json and tensors do not fit together.
 *
 * @example const { parameters } = inspectCheckpoint(await openCheckpoint("OLMoE-1B-7B-0924"));
 */
export function inspectCheckpoint(checkpoint: Checkpoint, options: InspectOptions = {}): CheckpointSummary {
  const description = describeCheckpoint(checkpoint, options);
  const { blueprint, sources } = description;
  const parts = new Map(order.map((name) => [name, { parameters: 0, bytes: 0, types: new Set<string>() }]));
  const counted = new Set<string>();
  const add = (part: PartName, names: readonly string[]): void => {
    const sums = parts.get(part);
    for (const name of names) {
      if (counted.has(name) || !sums) continue;
      counted.add(name);
      const { bytes, dtype } = checkpoint.stored(name);
      sums.bytes += bytes;
      sums.types.add(dtype);
    }
  };
  let [total, active] = [0, 0];
  for (const [path, source] of sources) {
    const part = partOf(path);
    const size = sizeOf(source.shape);
    const sums = parts.get(part);
    if (sums) sums.parameters += size;
    // Buffers are no parameters of anything that is multiplied, but they are stored.
    total += size;
    active += size * usedShare(path, blueprint);
    for (const piece of piecesOf(source)) add(part, pieceNames(piece, checkpoint));
  }
  for (const name of checkpoint.names) {
    if (counted.has(name)) continue;
    const sums = parts.get("unused");
    if (sums) sums.parameters += sizeOf(checkpoint.stored(name).shape);
    add("unused", [name]);
  }
  const expertBytes = sizeOfExpert(blueprint, parts.get("experts")?.bytes ?? 0);
  return {
    modelType: String(checkpoint.config.model_type),
    layers: blueprint.layers.length,
    width: blueprint.width,
    vocabulary: blueprint.vocabulary,
    context: blueprint.context,
    parameters: { total, active: Math.round(active) },
    bytes: [...parts.values()].reduce((sum, { bytes }) => sum + bytes, 0),
    parts: order.flatMap((name) => {
      const { parameters = 0, bytes = 0, types = new Set<string>() } = parts.get(name) ?? {};
      return parameters + bytes === 0 ? [] : [{ name, parameters, bytes, types: [...types].sort() }];
    }),
    groups: groupsOf(blueprint),
    ...(expertBytes === undefined ? {} : { expertBytes }),
  };
}

/** Bytes of one expert where all are alike. */
function sizeOfExpert({ layers }: Blueprint, bytes: number): number | undefined {
  const moe = layers.flatMap(({ feedForward }) => (feedForward.kind === "moe" ? [feedForward] : []));
  const alike = new Set(moe.map(({ hidden, bias }) => `${hidden} ${bias}`)).size === 1;
  const mixed = layers.some(({ attention }) => attention.kind === "mixture");
  const each = bytes / moe.reduce((sum, { experts }) => sum + experts, 0);
  return alike && !mixed && Number.isSafeInteger(each) ? each : undefined;
}
