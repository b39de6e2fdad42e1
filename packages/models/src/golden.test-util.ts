// Comparing a model with recorded outputs of Hugging Face Transformers: a folder with a checkpoint, golden.json (prompts and what
// followed them) and golden.safetensors (the tensors on the way). Runs wherever the package runs; only `openGolden` needs Node.
import type { Engine, Json, Tensor } from "@switchyard/core";
import { architectures } from "./architectures/families.ts";
import { type OpenCheckpoint, readCheckpoint } from "./checkpoint.ts";
import { folderFiles } from "./files.ts";
import type { Checkpoint, LanguageModel, ReadModelOptions } from "./model.ts";
import { bytesSource } from "./safetensors.ts";
import { tensorsIn } from "./tree.ts";
import { readFloats } from "./weights.ts";

/** golden.json, as far as it is used. */
export interface Golden {
  readonly tolerance: {
    readonly logits_max_abs: number;
    readonly hidden_max_abs: number;
    readonly router_logits_max_abs: number;
    readonly topk_weights_max_abs: number;
  };
  readonly moe_layers: readonly number[];
  readonly prompts: readonly {
    readonly input_ids: readonly number[];
    readonly greedy_ids: readonly number[];
    readonly argmax_ids: readonly number[];
  }[];
}

export interface GoldenFolder {
  readonly checkpoint: OpenCheckpoint;
  readonly golden: Golden;
  /** The tensors of golden.safetensors. */
  readonly recorded: Checkpoint;
  close(): Promise<void>;
}

/** Opens any set of files that has the names of such a folder, for example downloads. */
export async function readGolden(
  open: Parameters<typeof readCheckpoint>[0],
  where: string,
  list?: () => Promise<readonly string[]>,
): Promise<GoldenFolder> {
  const checkpoint = await readCheckpoint(open, where, list ? { list } : {});
  let recorded: OpenCheckpoint | undefined;
  let golden: Json;
  try {
    // golden.safetensors is read as a checkpoint of its own, which needs a config.
    recorded = await readCheckpoint(async (name) => {
      if (name === "config.json") return bytesSource(name, new TextEncoder().encode("{}"));
      return name === "model.safetensors" ? open("golden.safetensors") : undefined;
    }, `${where}, recorded`);
    golden = (await checkpoint.json("golden.json")) ?? {};
  } catch (error) {
    await Promise.all([checkpoint.close(), recorded?.close()]);
    throw error;
  }
  return {
    checkpoint,
    golden: golden as typeof golden & Golden,
    recorded,
    async close() {
      await Promise.all([checkpoint.close(), recorded.close()]);
    },
  };
}

/** Opens such a folder (Node). */
export async function openGolden(folder: string): Promise<GoldenFolder> {
  const { open, list } = await folderFiles(folder, {});
  return readGolden(open, folder, list);
}

/** Kinds of tensors that are compared, and by which tolerance. */
const kinds = {
  embed: "hidden_max_abs",
  attention: "hidden_max_abs",
  moeInput: "hidden_max_abs",
  routerLogits: "router_logits_max_abs",
  topkWeights: "topk_weights_max_abs",
  moeOutput: "hidden_max_abs",
  hidden: "hidden_max_abs",
  finalNorm: "hidden_max_abs",
  /** Of `step`, layer by layer. */
  logits: "logits_max_abs",
  /** Of `forward`, the whole pass at once. */
  forwardLogits: "logits_max_abs",
  /** Of the 16 greedy steps, the sequence computed anew for each, and with a cache. */
  greedyLogits: "logits_max_abs",
  cachedLogits: "logits_max_abs",
} as const;
export type GoldenKind = keyof typeof kinds;
const idKinds = ["topkIndices", "argmax", "greedy", "greedyCached"] as const;

export interface GoldenReport {
  /** Largest absolute difference over all prompts, layers and positions; NaN where numbers are not finite. */
  readonly largest: Readonly<Record<GoldenKind, number>>;
  /** How many ids differ. */
  readonly wrongIds: Readonly<Record<(typeof idKinds)[number], number>>;
  /** Numbers compared, so that a comparison of nothing is noticed. */
  readonly compared: Readonly<Record<GoldenKind | (typeof idKinds)[number], number>>;
  /** What is beyond its tolerance; empty: passed. */
  readonly failures: readonly string[];
}

/** Reads the folder's model on an engine. Throws where no architecture has its `model_type`. */
export function readGoldenModel(
  { checkpoint }: GoldenFolder,
  engine: Engine,
  options: ReadModelOptions = {},
): Promise<LanguageModel> {
  const found = architectures.find(({ modelTypes }) => modelTypes.some((one) => one === checkpoint.config.model_type));
  if (!found) throw new Error(`no architecture for ${JSON.stringify(checkpoint.config.model_type)}`);
  return found.read(checkpoint, engine, options);
}

/**
 * Runs every prompt and compares all that was recorded. `forward: false` leaves out the pass that needs all experts in memory,
 * `greedy` all but so many of the greedy tokens.
 */
export async function compareGolden(
  { golden, recorded }: GoldenFolder,
  model: LanguageModel,
  { forward = true, greedy = Number.POSITIVE_INFINITY }: { readonly forward?: boolean; readonly greedy?: number } = {},
): Promise<GoldenReport> {
  const { engine, vocabulary } = model;
  const largest = Object.fromEntries(Object.keys(kinds).map((kind) => [kind, 0])) as Record<GoldenKind, number>;
  const wrongIds = { topkIndices: 0, argmax: 0, greedy: 0, greedyCached: 0 };
  const compared = { ...largest, ...wrongIds };
  const compare = async (kind: GoldenKind, name: string, found: ArrayLike<number>, rows?: number): Promise<void> => {
    const whole = await readFloats(recorded, name, recorded.stored(name).shape);
    const expected = rows === undefined ? whole : whole.subarray(0, rows * vocabulary);
    if (expected.length !== found.length) throw new Error(`${name}: ${found.length} numbers, not ${expected.length}`);
    for (const [i, x] of expected.entries()) {
      const apart = Math.abs(x - (found[i] ?? Number.NaN));
      largest[kind] = Number.isNaN(apart) ? apart : Math.max(largest[kind], apart);
    }
    compared[kind] += expected.length;
  };
  const compareIds = (kind: keyof typeof wrongIds, found: ArrayLike<number>, expected: readonly number[]): void => {
    wrongIds[kind] += expected.filter((id, i) => found[i] !== id).length + Math.abs(found.length - expected.length);
    compared[kind] += expected.length;
  };
  const withIds = async <T>(ids: readonly number[], run: (x: Tensor) => Promise<T>): Promise<T> => {
    const x = engine.tensor(Int32Array.from(ids), [1, ids.length]);
    try {
      return await run(x);
    } finally {
      x.dispose();
    }
  };
  const numbers = async (x: Tensor): Promise<ArrayLike<number>> => {
    const data = await x.data();
    x.dispose();
    return data;
  };

  for (const [i, { input_ids: prompt, greedy_ids, argmax_ids }] of golden.prompts.entries()) {
    const expected = greedy_ids.slice(0, greedy);
    const own = `prompt${i}`;
    const seen: Promise<void>[] = [];
    const see = (kind: GoldenKind, name: string, x: Tensor): void => {
      seen.push(x.data().then((data) => compare(kind, `${own}.${name}`, data)));
    };
    await withIds(prompt, async (ids) => {
      const logits = await model.step(ids, {
        positions: "all",
        watch(what, x, layer) {
          const at = `layers.${layer}`;
          if (what === "embed") see("embed", "embed", x);
          if (what === "attention") see("attention", `${at}.attn_out`, x);
          if (what === "hidden") see("hidden", `${at}.hidden`, x);
          if (what === "finalNorm") see("finalNorm", "final_norm", x);
          if (!golden.moe_layers.includes(layer)) return;
          if (what === "moeInput") see("moeInput", `${at}.moe_in`, x);
          if (what === "moeOutput") see("moeOutput", `${at}.moe_out`, x);
        },
        trace: {
          record(place, { plan, logits: scores }) {
            const where = model.routing[place];
            if (where?.part !== "feedForward") return;
            if (plan.kind !== "sparse" || !scores) throw new Error("expected a sparse plan with logits");
            const at = `layers.${where.layer}`;
            see("routerLogits", `${at}.router_logits`, scores);
            see("topkWeights", `${at}.topk_weights`, plan.weights);
            const name = `${own}.${at}.topk_indices`;
            seen.push(
              plan.experts.data().then(async (found) => {
                const { buffer } = await recorded.read(name);
                compareIds("topkIndices", found, Array.from(new Int32Array(buffer)));
              }),
            );
          },
        },
      });
      await Promise.all(seen);
      const found = await numbers(logits);
      await compare("logits", `${own}.logits`, found);
      compareIds(
        "argmax",
        prompt.map((_, t) => largestOf(found, t * vocabulary, vocabulary)),
        argmax_ids,
      );
      if (forward) {
        const whole = model.forward(model.params, ids);
        await compare("forwardLogits", `${own}.logits`, await numbers(whole.logits));
        for (const x of tensorsIn(whole.routed)) x.dispose();
      }
    });

    for (const [kind, idKind, cached] of [
      ["greedyLogits", "greedy", false],
      ["cachedLogits", "greedyCached", true],
    ] as const) {
      const cache = cached ? model.newCache(1) : undefined;
      const ids: number[] = [];
      const rows: number[] = [];
      try {
        while (ids.length < expected.length) {
          const next = cache && ids.length > 0 ? ids.slice(-1) : [...prompt, ...ids];
          const logits = await withIds(next, async (x) => numbers(await model.step(x, cache ? { cache } : {})));
          rows.push(...Array.from(logits));
          ids.push(largestOf(logits, 0, vocabulary));
        }
      } finally {
        cache?.dispose();
      }
      await compare(kind, `${own}.greedy_logits`, rows, expected.length);
      compareIds(idKind, ids, expected);
    }
  }
  const failures = [
    ...Object.entries(kinds).flatMap(([kind, limit]) => {
      const apart = largest[kind as GoldenKind];
      return apart <= golden.tolerance[limit] ? [] : [`${kind} differ by ${apart}, allowed ${golden.tolerance[limit]}`];
    }),
    ...Object.entries(wrongIds).flatMap(([kind, count]) => (count === 0 ? [] : [`${count} ${kind} differ`])),
    ...Object.entries(compared).flatMap(([kind, count]) =>
      count > 0 || (kind === "forwardLogits" && !forward) ? [] : [`no ${kind} were compared`],
    ),
  ];
  return { largest, wrongIds, compared, failures };
}

/** Index of the first largest number of a row. */
function largestOf(values: ArrayLike<number>, from: number, count: number): number {
  let best = 0;
  for (let j = 1; j < count; j++) {
    if ((values[from + j] ?? Number.NaN) > (values[from + best] ?? Number.NaN)) best = j;
  }
  return best;
}
