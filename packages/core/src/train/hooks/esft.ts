// ESFT (2407.01906): fine-tuning of the few experts that a task uses. A statistics pass gives every expert a relevance,
//   gate score g_e = mean over samples of the mean over tokens of the gate of e         eq. 5
//   token ratio r_e = mean over samples of the mean over tokens of 1[gate > 0] / k      eq. 6
// per layer the most relevant experts are taken until their sum reaches p, the crossing one included (eq. 7); everything
// else is frozen. The choice is written as the expert_cfg JSON of the released code.
import type { Engine } from "../../engine.ts";
import { CheckpointError, ShapeError, UnsupportedError } from "../../errors.ts";
import { inside } from "../../moe/parts.ts";
import type { Routed, TrainingHook } from "../../moe/plan.ts";
import { div, less, maximum, mul, where } from "../../ops/elementwise.ts";
import { sum } from "../../ops/reduce.ts";
import { addRows } from "../../ops/rows.ts";
import { concat, full, reshape } from "../../ops/shape.ts";
import { release } from "../../scope.ts";
import { leaves, show, type Tensor, type Tree } from "../../tensor.ts";

// ---------------------------------------------------------------- statistics
export interface EsftStatisticsOptions {
  /** Real experts of a layer. */
  readonly experts: number;
  /** "samples" (the paper): mean over samples of their means. "tokens" (released code): every token weighs alike. */
  readonly mean?: "samples" | "tokens";
  /** k of the token ratio; default: the slots of the plan. */
  readonly k?: number;
}

/** Relevance of every expert, `[layer][expert]`, layers in the order of the MoE layers. */
export interface EsftScores {
  /** Average gate score: what it sums to in a layer depends on the router's weights. */
  readonly gate: readonly (readonly number[])[];
  /** Token selection ratio: sums to 1 in every layer where each token fills k slots. */
  readonly token: readonly (readonly number[])[];
}

export interface EsftStatistics {
  /**
   * Adds one forward pass: what the router of every MoE layer decided (`model.forward(...).routed`), `batch` sequences
   * of equal length, one sample each, `mask` 1 = real token. Gates are the weights of the plan. Call it in the scope
   * of the pass; what it needs is on its way to the host when it returns.
   * @throws UnsupportedError for a plan without gates per token, ShapeError for sizes that do not fit.
   */
  add(layers: readonly Routed[], layout: { readonly batch: number; readonly mask?: Tensor }): void;
  /** Waits for every pass. @throws ShapeError when no sample with a token was added. */
  scores(): Promise<EsftScores>;
}

/**
 * Collects relevance scores over as many passes as wanted (the paper: 131,072 tokens of the task), in evaluation.
 *
 * @example
 * const statistics = esftStatistics({ experts: 64 });
 * for (const ids of batches) engine.scope(() => statistics.add(model.forward(params, ids).routed, { batch: 8 }));
 * const { gate } = await statistics.scores();
 * const config = esftConfig(selectExperts(normaliseScores(gate), 0.1));
 */
export function esftStatistics({ experts, mean = "samples", k }: EsftStatisticsOptions): EsftStatistics {
  if (!Number.isInteger(experts) || experts < 1)
    throw new ShapeError(`esftStatistics: experts = ${experts}; expected a whole number from 1`);
  if (k !== undefined && (!Number.isInteger(k) || k < 1))
    throw new ShapeError(`esftStatistics: k = ${k}; expected a whole number from 1`);
  if (mean !== "samples" && mean !== "tokens")
    throw new ShapeError(`esftStatistics: mean = "${mean}"; expected "samples" or "tokens"`);
  let depth: number | undefined;
  // Per pass: of every layer [2 experts], then the number of samples or tokens.
  const passes: Promise<Float64Array>[] = [];

  return {
    add(layers, { batch, mask }) {
      const [first] = layers;
      if (first === undefined) throw new ShapeError("esftStatistics: a pass without MoE layers");
      if (depth !== undefined && depth !== layers.length)
        throw new ShapeError(`esftStatistics: ${layers.length} MoE layers, the passes before had ${depth}`);
      const { weights } = slotsOf(first);
      const vector = weights.engine.scope(() => {
        const { shares, total } = sharesOf(weights, { batch, mean, ...(mask ? { mask } : {}) });
        const parts = layers.map((layer) => relevance(slotsOf(layer), shares, { experts, ...(k ? { k } : {}) }));
        return concat([...parts, reshape(total, [1])], 0);
      });
      release(vector);
      depth = layers.length;
      const pass = vector
        .data()
        .then((values) => Float64Array.from(values))
        .finally(() => vector.dispose());
      // A failure is told to whoever asks for the scores.
      pass.catch(() => undefined);
      passes.push(pass);
    },
    async scores() {
      const found = await Promise.all(passes);
      const sums = new Float64Array(2 * experts * (depth ?? 0) + 1);
      for (const values of found) for (const [i, value] of values.entries()) sums[i] = (sums[i] ?? 0) + value;
      const divisor = sums.at(-1) ?? 0;
      if (!(divisor > 0)) throw new ShapeError("esftStatistics: no sample with a token was added yet");
      const means = (from: number): number[][] =>
        Array.from({ length: depth ?? 0 }, (_, layer) => {
          const start = layer * 2 * experts + from;
          return Array.from(sums.subarray(start, start + experts), (value) => value / divisor);
        });
      return { gate: means(0), token: means(experts) };
    },
  };
}

/** Ids i32 and gates `[tokens, k]` of a plan; a dense plan has no ids. */
interface Slots {
  readonly experts?: Tensor;
  readonly weights: Tensor;
}

function slotsOf({ plan }: Routed): Slots {
  if (plan.kind === "sparse" || plan.kind === "dense") return plan;
  throw new UnsupportedError(
    `esftStatistics: the plan is of kind "${plan.kind}"; gates per token exist in sparse and dense plans`,
  );
}

/** How much each token counts, `[tokens, 1]`, and what a mean is divided by, []. */
function sharesOf(
  like: Tensor,
  options: { readonly batch: number; readonly mean: string; readonly mask?: Tensor },
): { readonly shares: Tensor; readonly total: Tensor } {
  const { batch, mean, mask } = options;
  const [tokens = 0] = like.shape;
  if (!Number.isInteger(tokens / batch))
    throw new ShapeError(`esftStatistics: ${tokens} tokens do not split into ${batch} samples`);
  if (mask && mask.size !== tokens)
    throw new ShapeError(
      `esftStatistics: the mask is ${show(mask)} for ${tokens} tokens; expected one entry per token`,
    );
  const real = mask ? reshape(mask, [batch, tokens / batch]) : full(like, [batch, tokens / batch], 1);
  if (mean === "tokens") return { shares: reshape(real, [tokens, 1]), total: sum(real) };
  const lengths = reshape(sum(real, [1]), [batch, 1]);
  return { shares: reshape(div(real, maximum(lengths, 1)), [tokens, 1]), total: sum(less(0, lengths)) };
}

/** Shares of the gates, then of the choices over k, summed per expert: `[2 experts]`. */
function relevance(
  { experts: ids, weights }: Slots,
  shares: Tensor,
  { experts, k }: { readonly experts: number; readonly k?: number },
): Tensor {
  const [tokens = 0, slots = 0] = weights.shape;
  if (shares.shape[0] !== tokens)
    throw new ShapeError(`esftStatistics: a layer with ${tokens} tokens beside one with ${shares.shape[0]}`);
  const gates = mul(weights, shares); // [tokens, slots]
  const chosen = mul(mul(less(0, weights), shares), 1 / Math.max(k ?? slots, 1));
  const perExpert = (x: Tensor): Tensor => {
    if (ids === undefined) return reshape(sum(x, [0]), [slots]);
    const kept = reshape(where(inside(ids, experts), ids, -1), [tokens * slots]);
    return reshape(addRows(reshape(x, [tokens * slots, 1]), kept, experts), [experts]);
  };
  if (ids === undefined && slots !== experts)
    throw new ShapeError(`esftStatistics: a dense plan of ${slots} experts, expected ${experts}`);
  return concat([perExpert(gates), perExpert(chosen)], 0);
}

/**
 * Scores divided by their sum over the experts of the layer, as the selection wants gate scores. "layers" divides by
 * the sum over the layers instead: what the released code computes (`sum(axis=0)`), for comparison with its files only.
 * Where the sum is 0 the scores stay 0.
 */
export function normaliseScores(
  scores: readonly (readonly number[])[],
  options: { readonly over?: "experts" | "layers" } = {},
): number[][] {
  const total = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0);
  const { over = "experts" } = options;
  return scores.map((row) =>
    row.map((score, e) => {
      const divisor = over === "experts" ? total(row) : total(scores.map((layer) => layer[e] ?? 0));
      return divisor === 0 ? 0 : score / divisor;
    }),
  );
}

/**
 * Per layer the experts by falling score (ties: lower id) until their sum reaches `p`, the one that crosses it
 * included. The paper: 0.1 for gate scores; the released code: 0.2 for token ratios. p = 0 takes none.
 */
export function selectExperts(scores: readonly (readonly number[])[], p: number): number[][] {
  if (!(p >= 0 && p <= 1)) throw new ShapeError(`selectExperts: p = ${p}; expected a number from 0 to 1`);
  return scores.map((row, layer) => {
    const odd = row.findIndex((score) => !Number.isFinite(score));
    if (odd >= 0)
      throw new ShapeError(
        `selectExperts: the score of expert ${odd} in layer ${layer} is ${row[odd]}; expected numbers`,
      );
    const order = row.map((_, e) => e).sort((a, b) => (row[b] ?? 0) - (row[a] ?? 0) || a - b);
    const taken: number[] = [];
    let reached = 0;
    for (const e of order) {
      if (reached >= p) break;
      taken.push(e);
      reached += row[e] ?? 0;
    }
    return taken;
  });
}

// ---------------------------------------------------------------- the file
/** expert_cfg.json of the released code: what is trained. */
export interface ExpertConfig {
  /** Ids by the number of the block in the model. */
  readonly experts: Readonly<Record<string, readonly number[]>>;
  readonly shared_experts: boolean;
  readonly non_expert_modules: boolean;
}

/** `selected[i]` are the experts of the i-th MoE layer; `blocks[i]` is its block in the model, default i. */
export function esftConfig(
  selected: readonly (readonly number[])[],
  options: {
    readonly blocks?: readonly number[];
    readonly sharedExperts?: boolean;
    readonly nonExpertModules?: boolean;
  } = {},
): ExpertConfig {
  const { blocks = selected.map((_, i) => i), sharedExperts = false, nonExpertModules = false } = options;
  if (blocks.length !== selected.length || !areIds(blocks))
    throw new ShapeError(
      `esftConfig: blocks ${blocks.join(", ")} for ${selected.length} layers; expected one different number each`,
    );
  const odd = selected.findIndex((ids) => !areIds(ids));
  if (odd >= 0)
    throw new ShapeError(
      `esftConfig: layer ${odd} has ${brief(selected[odd])}; expected different whole numbers from 0`,
    );
  return {
    experts: Object.fromEntries(selected.map((ids, i) => [`${blocks[i]}`, [...ids]])),
    shared_experts: sharedExperts,
    non_expert_modules: nonExpertModules,
  };
}

/** Different whole numbers from 0. */
const areIds = (ids: readonly unknown[]): boolean =>
  ids.every((id) => Number.isSafeInteger(id) && (id as number) >= 0) && new Set(ids).size === ids.length;

/** JSON of what was found, cut where it gets long. */
function brief(value: unknown): string {
  const text = `${JSON.stringify(value)}`;
  return text.length > 80 ? `${text.slice(0, 80)}...` : text;
}

/** The file's text, as the released code writes and reads it. */
export const writeExpertConfig = (config: ExpertConfig): string => JSON.stringify(config);

/**
 * Reads the text of an expert_cfg.json; flags that are left out are false, as in the released code.
 * @throws CheckpointError saying what is wrong.
 */
export function readExpertConfig(text: string): ExpertConfig {
  const refuse = (why: string): never => {
    throw new CheckpointError(`expert_cfg: ${why}; expected {"experts":{"1":[0,3]},"shared_experts":false,...}`);
  };
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch (error) {
    return refuse(`no JSON: ${error instanceof Error ? error.message : error}`);
  }
  const record = (value: unknown, what: string): Readonly<Record<string, unknown>> =>
    typeof value === "object" && value !== null && !Array.isArray(value)
      ? (value as Readonly<Record<string, unknown>>)
      : refuse(`${what} is ${brief(value)}, not a record`);
  const file = record(json, "the file");
  const experts = Object.entries(record(file.experts, '"experts"')).map(([block, ids]): [string, number[]] => {
    if (!/^(0|[1-9]\d{0,8})$/.test(block)) refuse(`the layer ${brief(block)} is not a number`);
    if (!Array.isArray(ids) || !areIds(ids)) return refuse(`layer ${block} has ${brief(ids)}, not different ids`);
    return [block, ids];
  });
  const flag = (name: string): boolean => {
    const value = file[name] === undefined ? false : file[name];
    return typeof value === "boolean" ? value : refuse(`"${name}" is ${brief(value)}, not true or false`);
  };
  return {
    experts: Object.fromEntries(experts),
    shared_experts: flag("shared_experts"),
    non_expert_modules: flag("non_expert_modules"),
  };
}

// ---------------------------------------------------------------- the hook
/** What a parameter belongs to. `block` is the number that the config knows the layer by. */
export type EsftPart = { readonly part: "experts"; readonly block: number } | { readonly part: "shared" | "other" };

export interface EsftOptions {
  /** Of the trainer: the masks live on it. */
  readonly engine: Engine;
  readonly config: ExpertConfig;
  /** The task's parameters: their paths and shapes are looked at once, to check the config. */
  readonly params: Tree;
  /** What each parameter is, by its path; default `esftPart`. */
  partOf?(path: string): EsftPart;
}

/**
 * Default reading of a path: "layers.3.moe.experts.down" are routed experts of block 3, "layers.3.moe.shared.0..." and
 * what routed experts share ("layers.3.moe.experts.shared...", in a set of its own "...experts.lora.shared...") are shared ones, everything else (router, attention,
 * embedding) is "other".
 */
export function esftPart(path: string): EsftPart {
  const names = path.split(".");
  const found = names.findIndex((name) => name === "experts" || name === "shared");
  if (found < 0) return { part: "other" };
  if (names.includes("shared", found)) return { part: "shared" };
  const block = names.slice(0, found).findLast((name) => /^\d+$/.test(name));
  return { part: "experts", block: Number(block ?? 0) };
}

/**
 * Trains what the config names and freezes the rest: frozen entries get no gradient, no decay and no moments, whole
 * tensors that are frozen have no optimiser state at all. Use it from the first step of a fine-tuning run.
 *
 * @throws ShapeError when the config names a layer or an expert that does not exist, or leaves a layer out.
 * @example trainer(engine, task, { optimiser: adamw(), hooks: [esft({ engine, config, params: task.params })] })
 */
export function esft({ engine, config, params, partOf = esftPart }: EsftOptions): TrainingHook {
  const trained = new Map<string, boolean | { readonly ids: readonly number[]; readonly shape: readonly number[] }>();
  const blocks = new Set<string>();
  for (const [path, { shape }] of leaves(params)) {
    const found = partOf(path);
    if (found.part !== "experts") {
      trained.set(path, found.part === "shared" ? config.shared_experts : config.non_expert_modules);
      continue;
    }
    const [count = 0, ...rest] = shape;
    const named = config.experts[found.block];
    if (named === undefined)
      throw new ShapeError(
        `esft: the config has no entry for block ${found.block} of "${path}", only for ` +
          `${Object.keys(config.experts).join(", ") || "none"}; [] freezes all its experts`,
      );
    const ids = [...new Set(named)];
    const wrong = ids.find((id) => !Number.isInteger(id) || id < 0 || id >= count);
    if (wrong !== undefined)
      throw new ShapeError(`esft: the config trains expert ${wrong} of block ${found.block}, "${path}" has ${count}`);
    blocks.add(`${found.block}`);
    trained.set(path, ids.length === 0 ? false : ids.length === count || { ids, shape: [count, ...rest.map(() => 1)] });
  }
  const extra = Object.keys(config.experts).filter((block) => !blocks.has(block));
  if (extra.length > 0)
    throw new ShapeError(
      `esft: the config names block ${extra.join(", ")}; the experts are in ${[...blocks].join(", ") || "none"}`,
    );

  return {
    name: "esft",
    updateMask(parameter) {
      const rule = trained.get(parameter);
      if (rule === undefined)
        throw new ShapeError(`esft: parameter "${parameter}" was not among the params that the hook was made with`);
      if (typeof rule === "boolean") return rule ? undefined : false;
      const mask = new Float32Array(rule.shape[0] ?? 0);
      for (const id of rule.ids) mask[id] = 1;
      return engine.tensor(mask, rule.shape); // [experts, 1, ...]
    },
  };
}
