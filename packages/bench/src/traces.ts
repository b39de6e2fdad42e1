// The routing traces of a run: where they lie, and the probe's decisions put together for them. Their format comes in as a value.
import { existsSync } from "node:fs";
import { dirname, join } from "node:path";
import type { ComparisonOptions, HeldOut, LayerDecisions, ProbeRouting } from "./experiment.ts";
import { writableFolder } from "./store.ts";

/** The trace of a checkpoint, relative to the comparison's folder, with "/" on every system; names sort by step. */
export function tracePath(model: string, step: number, totalSteps: number): string {
  const digits = Math.max(4, String(totalSteps).length);
  return `traces/${model}/step-${String(step).padStart(digits, "0")}.trace`;
}

type Rows = Float32Array | Int32Array;

/** The rows of some tokens, `width` values each, behind those that stand there. */
function copyRows(to: Rows, at: number, { from, width, wide }: { from: Rows; width: number; wide: number }): void {
  for (let i = 0; i * width < from.length; i++) to.set(from.subarray(i * width, (i + 1) * width), (at + i) * wide);
}

/** One layer's decisions in several batches; narrower lists of slots are filled up with empty ones. */
function joinLayer(parts: readonly LayerDecisions[], tokens: readonly number[]): LayerDecisions {
  const experts = parts[0]?.experts ?? 0;
  const slots = Math.max(1, ...parts.map((part) => part.slots));
  const nulls = Math.max(0, ...parts.map((part) => part.nulls));
  const total = tokens.reduce((sum, n) => sum + n, 0);
  const ids = new Int32Array(total * slots).fill(-1);
  const weights = new Float32Array(total * slots);
  const told = parts.every(({ probabilities }) => probabilities !== undefined);
  const probabilities = new Float32Array(told ? total * (experts + nulls) : 0);
  let at = 0;
  for (const [i, part] of parts.entries()) {
    copyRows(ids, at, { from: part.ids, width: part.slots, wide: slots });
    copyRows(weights, at, { from: part.weights, width: part.slots, wide: slots });
    if (told && part.probabilities !== undefined) {
      copyRows(probabilities, at, { from: part.probabilities, width: experts + part.nulls, wide: experts + nulls });
    }
    at += tokens[i] ?? 0;
  }
  return {
    plan: parts.some(({ plan }) => plan === "dense") ? "dense" : "sparse",
    experts,
    nulls,
    slots,
    ids,
    weights,
    ...(told ? { probabilities } : {}),
  };
}

/** The rows of the tokens for which `keep` is true. */
function someTokens(layer: LayerDecisions, tokens: number, keep: (token: number) => boolean): LayerDecisions {
  const kept = Array.from({ length: tokens }, (_, token) => token).filter(keep);
  const { slots, experts, nulls, ids, weights, probabilities } = layer;
  const pick = <T extends Rows>(from: T, width: number, to: T): T => {
    for (const [i, token] of kept.entries()) to.set(from.subarray(token * width, (token + 1) * width), i * width);
    return to;
  };
  const wide = experts + nulls;
  return {
    ...layer,
    ids: pick(ids, slots, new Int32Array(kept.length * slots)),
    weights: pick(weights, slots, new Float32Array(kept.length * slots)),
    ...(probabilities === undefined
      ? {}
      : { probabilities: pick(probabilities, wide, new Float32Array(kept.length * wide)) }),
  };
}

/** Whether a position's next token is counted: the positions whose routing is followed. */
const isCounted = (labels: Int32Array, token: number): boolean => (labels[token] ?? -1) >= 0;

/**
 * What the layers decided for the counted tokens of all batches, domain by domain, `decisions` in the batches' order. In words why a
 * trace cannot hold it.
 */
export function joinDecisions(
  probe: HeldOut["probe"],
  decisions: readonly (readonly LayerDecisions[] | string)[],
): readonly LayerDecisions[] | string {
  const batches = probe.flat();
  const tokens: number[] = [];
  const layers: LayerDecisions[][] = [];
  for (const [i, batch] of batches.entries()) {
    const own = decisions[i] ?? [];
    if (typeof own === "string") return own;
    tokens.push(batch.labels.reduce((sum, label) => sum + (label < 0 ? 0 : 1), 0));
    for (const [layer, one] of own.entries()) {
      layers[layer] ??= [];
      layers[layer].push(someTokens(one, batch.labels.length, (token) => isCounted(batch.labels, token)));
    }
  }
  return layers.map((parts) => joinLayer(parts, tokens));
}

/** Which text every counted token of the probe stands in, and where. The same at every checkpoint. */
export function tokenPlaces(
  probe: HeldOut["probe"],
): Pick<ProbeRouting, "windows" | "window" | "batch" | "position" | "token"> {
  const windows: number[] = [];
  const places: { window: number; batch: number; position: number; token: number }[] = [];
  let batches = 0;
  for (const [domain, list] of probe.entries()) {
    for (const { shape, ids, labels } of list) {
      const [rows, length] = shape;
      for (let row = 0; row < rows; row++) {
        for (let position = 0; position < length; position++) {
          const at = row * length + position;
          if (isCounted(labels, at)) {
            places.push({ window: windows.length, batch: batches, position, token: ids[at] ?? -1 });
          }
        }
        windows.push(domain);
      }
      batches++;
    }
  }
  return {
    windows,
    window: Uint32Array.from(places, ({ window }) => window),
    batch: Uint32Array.from(places, ({ batch }) => batch),
    position: Int32Array.from(places, ({ position }) => position),
    token: Int32Array.from(places, ({ token }) => token),
  };
}

/** Writes the trace of a checkpoint; a file of an earlier, interrupted attempt is replaced. */
export async function writeTrace(
  { traces, folder }: Pick<ComparisonOptions, "traces" | "folder">,
  path: string,
  routing: ProbeRouting,
): Promise<void> {
  const file = join(folder, path);
  if (!existsSync(dirname(file))) writableFolder(dirname(file));
  await traces?.write(file, routing);
}
