// How much memory a model takes and what of it stays: the plan behind `memory: "3GB"`. Only headers are looked at.
import { type Engine, UnsupportedError } from "@switchyard/core";
import type { Blueprint, LayerBlueprint } from "./blueprint.ts";
import type { CheckpointIndex, Description } from "./source.ts";
import { formsOf, planUpload, type StoredForm } from "./stored-matrix.ts";
import { expertsOnTheWay, streamedLayers } from "./streamed-experts.ts";

const units: ReadonlyMap<string, number> = new Map([
  ["", 1],
  ["b", 1],
  ["kb", 1e3],
  ["mb", 1e6],
  ["gb", 1e9],
  ["tb", 1e12],
  ["kib", 2 ** 10],
  ["mib", 2 ** 20],
  ["gib", 2 ** 30],
  ["tib", 2 ** 40],
]);

/**
 * Bytes from "3GB", "1.5 GB", "512MiB" or "4096": units of 1000 (kB, MB, GB, TB) or 1024 (KiB, MiB, GiB, TiB), in any case.
 * Throws UnsupportedError for anything else.
 */
export function parseBytes(text: string): number {
  const [, digits = "", unit = ""] = /^\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*$/i.exec(text) ?? [];
  const factor = units.get(unit.toLowerCase());
  const bytes = Math.floor(Number(digits) * (factor ?? Number.NaN));
  if (digits === "" || factor === undefined || !Number.isSafeInteger(bytes)) {
    throw new UnsupportedError(
      `${JSON.stringify(text)} is no amount of memory; write it like 3GB, 512MiB or 1500000000`,
    );
  }
  return bytes;
}

/** Bytes for people: "1.50 GB". */
export function showBytes(bytes: number): string {
  const [size, unit] = bytes >= 1e9 ? [1e9, "GB"] : bytes >= 1e6 ? [1e6, "MB"] : [1e3, "kB"];
  return `${(bytes / size).toFixed(2)} ${unit}`;
}

/**
 * Whether a parameter takes part in f32 arithmetic: router weights, norms, biases and gates. Matrices of products stay as they
 * are stored.
 */
export const heldInFloat32 = (path: string, shape: readonly number[]): boolean =>
  shape.length < 2 || /\.(router|buffers)\.|Bias$|\.gate$/.test(path);

/** A sequence of this length is planned for, or the model's context where that is shorter. */
const positions = 4096;
/** Tokens of a prompt that go through the model in one pass, unless the caller wants other numbers: activations are planned for these. */
export const promptChunk = 512;
/** A heap of 32 bits holds 4 GB; experts that are streamed are kept outside. */
const wasmHeap = 3.5e9;
const wasmMost = 2 ** 32;

export interface MemoryPlan {
  /** "resident": everything is on the device. "streamed": experts are read when they are needed, and some are kept. */
  readonly kind: "resident" | "streamed";
  /** Bytes that stay: all weights, or all but the streamed experts. */
  readonly resident: number;
  /** Bytes for the cache of keys and values and for what a pass computes: an estimate. */
  readonly working: number;
  /** Bytes that must be allowed for the model to run at all. */
  readonly least: number;
  /** Routed experts that are kept, of how many there are. */
  readonly capacity: number;
  readonly experts: number;
  /** Of one of them, as it is stored. */
  readonly expertBytes: number;
}

export interface MemoryOptions {
  /** Bytes that the model may hold; default: no limit. */
  readonly memory?: number | undefined;
  /** As for loading; default "stored". */
  readonly weights?: "stored" | "f32" | undefined;
}

const sizeOf = (shape: readonly number[]): number => shape.reduce((n, d) => n * d, 1);

/** Numbers that a cache holds for one position of one layer. */
function cached({ attention }: LayerBlueprint): number {
  if (attention.kind === "latent") return attention.rank + attention.ropeSize;
  return 2 * attention.kvHeads * attention.headSize;
}

/** Numbers that a layer computes for one token of a chunk, beside its experts' inner ones, all at the same time. */
function computed({ attention, feedForward }: LayerBlueprint, width: number): number {
  const heads =
    attention.kind === "latent"
      ? attention.heads * (attention.nopeSize + attention.ropeSize + attention.valueSize)
      : attention.kind === "mixture"
        ? (2 * attention.k + 2) * attention.kvHeads * attention.headSize
        : (2 * attention.heads + 2 * attention.kvHeads) * attention.headSize;
  const k = feedForward.kind === "moe" ? (feedForward.router.expertsPerToken ?? feedForward.experts) : 1;
  const shared = feedForward.kind === "moe" ? (feedForward.shared?.hidden ?? 0) : 0;
  const inner = 3 * (feedForward.hidden + shared);
  // Residual, norms and sums; the rows that go to experts, what they give, and that put together.
  return 8 * width + 2 * heads + 4 * k * width + inner;
}

/** Bytes for one sequence: its cache, with room to grow, and a chunk of a prompt. */
export function workingBytes(blueprint: Blueprint): number {
  const { layers, width, vocabulary, context } = blueprint;
  const tokens = Math.min(promptChunk, context);
  const cache = layers.reduce((n, layer) => n + cached(layer), 0) * Math.min(positions, context) * 1.5;
  const pass = layers.reduce((most, layer) => Math.max(most, computed(layer, width)), 0) * tokens;
  return Math.ceil(4 * (cache + pass + 4 * vocabulary));
}

/**
 * What of a model stays in memory, and how many experts are kept where not all can stay. Streamed are routed experts that lie one
 * by one in the checkpoint; attention, norms, routers, embeddings, dense layers and shared experts stay.
 * * Throws UnsupportedError, with the numbers, where less is allowed than what must stay or more must stay than a heap of wasm holds, and
 * CheckpointError as `checkPiece` does.
 */
export function planMemory(
  engine: Engine,
  index: CheckpointIndex,
  description: Description,
  { memory, weights = "stored" }: MemoryOptions = {},
): MemoryPlan {
  if (memory !== undefined && !(memory > 0)) throw new UnsupportedError(`memory is ${memory}, expected bytes above 0`);
  const { blueprint, sources } = description;
  const streamable = new Set<string>();
  const layers = streamedLayers(engine, index, description);
  for (const { layer } of layers)
    for (const name of ["gateUp", "down", "gateUpBias", "downBias"]) {
      streamable.add(`layers.${layer}.moe.experts.${name}`);
    }
  let [all, staying] = [0, 0];
  // Of the largest parameters, which are in memory twice while they are loaded, and of experts one more.
  let [largest, largestStaying] = [0, 0];
  for (const [path, source] of sources) {
    let bytes = 0;
    if (weights === "f32" || heldInFloat32(path, source.shape)) bytes = 4 * sizeOf(source.shape);
    else {
      const stacked = source.kind === "experts" ? [1] : [];
      const bytesOf = (form: StoredForm): number =>
        path === "embed" && form.kind !== "floats"
          ? 4 * sizeOf(form.shape)
          : planUpload(engine, { ...form, shape: [...stacked, ...form.shape] }).bytes;
      let [last, each]: [readonly StoredForm[] | undefined, number] = [undefined, 0];
      // Experts of equal forms share one list of them.
      for (const forms of formsOf(index, source)) {
        if (forms !== last) [last, each] = [forms, forms.reduce((n, form) => n + bytesOf(form), 0)];
        bytes += each;
      }
    }
    // A stack is filled expert by expert.
    const loading = source.kind === "experts" ? bytes + bytes / Math.max(source.shape[0] ?? 1, 1) : bytes;
    all += bytes;
    largest = Math.max(largest, loading);
    if (streamable.has(path)) continue;
    staying += bytes;
    largestStaying = Math.max(largestStaying, loading);
  }
  const working = workingBytes(blueprint);
  const most = engine.root.name === "wasm" ? Math.min(memory ?? Number.POSITIVE_INFINITY, wasmHeap) : memory;
  const expertBytes = layers.reduce((n, { bytes }) => Math.max(n, bytes), 0);
  const onDevice = layers.reduce((n, one) => Math.max(n, weights === "f32" ? one.floats : one.deviceBytes), 0);
  const experts = layers.reduce((n, { count }) => n + count, 0);
  const atWork = expertsOnTheWay * expertBytes + onDevice;
  const resident = all + Math.max(working, largest);
  const streamed = staying + Math.max(working + atWork, largestStaying);
  const least = experts === 0 ? resident : Math.min(resident, streamed);
  const held = experts === 0 ? all : staying;
  if (engine.root.name === "wasm" && held > wasmMost) {
    throw new UnsupportedError(
      `the model needs ${showBytes(held)} on the device${experts === 0 ? "" : " beside its experts"}, and the wasm backend has a heap of ` +
        `${showBytes(wasmMost)}, whatever memory is allowed; use another backend, or a smaller model`,
    );
  }
  const fits = most === undefined || resident <= most;
  if (fits || (experts === 0 && memory === undefined)) {
    return { kind: "resident", resident: all, working, least, capacity: experts, experts, expertBytes };
  }
  const limit = memory ?? Number.POSITIVE_INFINITY;
  if (experts === 0 || streamed > limit) {
    const how =
      experts === 0
        ? "it has no experts that could be read when they are needed"
        : `even with its experts read when they are needed: ${showBytes(staying)} for attention, embeddings and what else every ` +
          `token uses, ${showBytes(working)} for cache and activations, ${showBytes(atWork)} for the experts at work`;
    throw new UnsupportedError(
      `the model needs ${showBytes(least)} of memory, and ${showBytes(limit)} are allowed; ${how}. Raise the limit or take a smaller model`,
    );
  }
  const capacity = Math.min(experts, Math.floor((limit - staying - working - atWork) / Math.max(expertBytes, 1)));
  return { kind: "streamed", resident: staying, working, least, capacity, experts, expertBytes };
}
