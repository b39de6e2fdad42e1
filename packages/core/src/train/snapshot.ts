// What a training run is saved as: arrays, and JSON that keeps every number of the reports. Reading it back says what
// does not fit.

import type { DType, TypedArray } from "../backend.ts";
import { CheckpointError } from "../errors.ts";
import type { Json } from "../json.ts";
import { isTensor, type Tensor, type Tree } from "../tensor.ts";

/**
 * Everything needed to resume, on the host; writing it to disk is the caller's business. `json` survives
 * JSON.stringify exactly.
 */
export interface TrainerSnapshot {
  /** "params.<path>", "buffers.<layer>.<path>", "optimiser.<slot>.<path>", "hooks.<name>.<path>". */
  readonly arrays: Readonly<Record<string, SnapshotArray>>;
  readonly json: Json;
}

export interface SnapshotArray {
  readonly data: TypedArray;
  readonly shape: readonly number[];
  readonly dtype: DType;
}

/** Changes when older snapshots can no longer be read. */
export const FORMAT: string = "switchyard-trainer-1";

/** The JSON of a snapshot, checked. */
export interface Head {
  readonly optimiser: string;
  readonly seed: number;
  readonly steps: number;
  readonly batches: number;
  readonly totalSteps: number | null;
  readonly updates: Readonly<Record<string, number>>;
  /** Parameters that have optimiser state. */
  readonly slots: readonly string[];
  /** Outlines of the hooks' states, null where a hook has none. */
  readonly hooks: Readonly<Record<string, Json>>;
  /** Step reports. */
  readonly history: readonly unknown[];
}

const isRecord = (x: unknown): x is Readonly<Record<string, unknown>> =>
  typeof x === "object" && x !== null && !Array.isArray(x);

/** Throws CheckpointError for what is not a snapshot, or a damaged one. */
export function readHead(json: Json): Head {
  const head: Readonly<Record<string, unknown>> = isRecord(json) ? json : {};
  if (head.format !== FORMAT) {
    throw new CheckpointError(
      `restore: not a trainer snapshot of this version: format is ${head.format}, expected ${FORMAT}`,
    );
  }
  const kinds: Record<string, (x: unknown) => boolean> = {
    optimiser: (x) => typeof x === "string",
    seed: Number.isFinite,
    steps: Number.isInteger,
    batches: Number.isInteger,
    totalSteps: (x) => x === null || Number.isInteger(x),
    updates: isRecord,
    slots: Array.isArray,
    hooks: isRecord,
    history: Array.isArray,
  };
  for (const [name, fits] of Object.entries(kinds)) {
    if (fits(head[name])) continue;
    throw new CheckpointError(`restore: the snapshot is damaged: "${name}" is ${JSON.stringify(head[name])}`);
  }
  return { ...(head as Readonly<Record<string, unknown>> & Head), history: decode(head.history) as unknown[] };
}

/** JSON has no infinities, no NaN, no -0 and no typed arrays; reports have. */
export function encode(value: unknown): Json {
  if (typeof value === "number") {
    return Number.isFinite(value) && !Object.is(value, -0)
      ? value
      : { $number: Object.is(value, -0) ? "-0" : `${value}` };
  }
  if (value instanceof Float64Array) return { $float64: Array.from(value, encode) };
  if (Array.isArray(value)) return value.map(encode);
  if (isRecord(value)) return mapRecord(value, encode);
  throw new TypeError(`a report holds ${String(value)}, which JSON cannot`);
}

function decode(json: unknown): unknown {
  if (!isRecord(json)) return Array.isArray(json) ? json.map(decode) : json;
  if ("$number" in json) return Number(json.$number);
  if (Array.isArray(json.$float64)) return Float64Array.from(json.$float64, (x) => Number(decode(x)));
  return mapRecord(json, decode);
}

function mapRecord<T, R>(record: Readonly<Record<string, T>>, change: (value: T, key: string) => R): Record<string, R> {
  return Object.fromEntries(Object.entries(record).map(([key, value]) => [key, change(value, key)]));
}

/** The shape of a tree as JSON, with the names of arrays ("hooks.omoe.0") in place of its leaves. */
export function outline(tree: Tree, name: string): Json {
  if (isTensor(tree)) return name;
  if (Array.isArray(tree)) return tree.map((child: Tree, i) => outline(child, `${name}.${i}`));
  return mapRecord<Tree, Json>(tree as Readonly<Record<string, Tree>>, (child, key) =>
    outline(child, `${name}.${key}`),
  );
}

/** The names in an outline. */
export function outlined(json: Json): string[] {
  if (typeof json === "string") return [json];
  return typeof json === "object" && json !== null ? Object.values(json).flatMap(outlined) : [];
}

/** The tree of an outline. */
export function revive(json: Json, make: (name: string) => Tensor): Tree {
  if (typeof json === "string") return make(json);
  if (Array.isArray(json)) return json.map((child: Json) => revive(child, make));
  return mapRecord(json as Readonly<Record<string, Json>>, (child) => revive(child, make));
}
