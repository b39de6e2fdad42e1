// Low-rank adapters (LoRA, 2106.09685) beside the matrices of a loaded model: y = W x + (alpha / r) B A x, W frozen in whatever type it is
// held, and adding what was learned to W again.
import {
  add,
  affine,
  cast,
  dispose,
  type Engine,
  leaves,
  less,
  matmul,
  mul,
  type Random,
  ShapeError,
  sub,
  type Tensor,
  type Tree,
  UnsupportedError,
  where,
} from "@switchyard/core";
import type { LayerBlueprint } from "../blueprint.ts";
import { blueprintShapes, buildDecoder } from "../build-decoder.ts";
import type { LanguageModel } from "../model.ts";
import { floatsOf, type LowRank, lowRank, lowRankNode } from "../stored-matrix.ts";
import { branch } from "../tree.ts";
import { matrixPath, partOf, type TuningPart, tuningParts } from "./parts.ts";

export interface LoraOptions {
  /** Which matrices get adapters. Biases, sinks and the gate of shared experts get none, and norms have no matrix. */
  readonly parts: readonly TuningPart[];
  /** Default 8. */
  readonly rank?: number;
  /** The low-rank map is multiplied by alpha / rank; default twice the rank. */
  readonly alpha?: number;
  /** Of A. */
  readonly random: Random;
}

/** The path and shape of every matrix of these parts: [out, in], or [experts, out, in] for stacks. */
function matricesOf(model: LanguageModel, parts: readonly TuningPart[]): Map<string, readonly number[]> {
  const all = new Map([...blueprintShapes(model.blueprint)].filter(([path]) => !/(Bias|\.gate|\.sinks)$/.test(path)));
  for (const [path, { shape, dtype }] of leaves(model.params))
    if (dtype === "f32" && partOf(path) === "router") all.set(path, shape);
  return new Map([...all].filter(([path, shape]) => shape.length >= 2 && parts.includes(partOf(path))));
}

/** The names of a path in a tree of parameters. */
const names = (path: string): readonly string[] => path.split(".");

/**
 * The model with low-rank adapters beside the matrices of some of its parts, one for each expert in stacks. A is uniform within
 * 1/sqrt(in), as PEFT draws it, and B zero, so that the model computes what it did. The new model shares every tensor of `model`;
 * A and B, at "layers.0.attention.q.lora/2.a" and `.b` (2: alpha / rank), are its own. Matrices stay in the type in which they are held.
 *
 * @throws UnsupportedError for a model that has adapters, for streamed experts, and for experts whose parameters the router mixes (SMEAR); ShapeError for a rank that is no whole number
 * from 1, and where the parts have no matrix.
 * @example
 * const adapted = withLora(model, { parts: ["experts", "attention"], rank: 8, random: random(engine, 1) });
 * const task = tuningTask(adapted, { trains: isLora, batch });
 */
export function withLora(model: LanguageModel, options: LoraOptions): LanguageModel {
  const { parts, rank = 8, alpha = 2 * rank, random } = options;
  const { engine, blueprint } = model;
  if (!Number.isSafeInteger(rank) || rank < 1)
    throw new ShapeError(`withLora: rank is ${rank}, expected a whole number from 1`);
  if (!(alpha > 0 && alpha < Number.POSITIVE_INFINITY))
    throw new ShapeError(`withLora: alpha is ${alpha}, expected a number above 0`);
  if (model.streamed)
    throw new UnsupportedError(
      "withLora: the experts of this model are streamed, and gradients need all of them in memory; load it without a bound of memory, on a " +
        "backend that holds it",
    );
  if (leaves(model.params).some(([path]) => matrixPath(path) !== path))
    throw new UnsupportedError("withLora: this model has adapters already; give all parts at once");
  const strange = parts.find((part) => !tuningParts.includes(part));
  if (strange !== undefined)
    throw new ShapeError(`withLora: "${strange}" is no part; expected some of ${tuningParts.join(", ")}`);
  const mixing = parts.includes("experts") ? blueprint.layers.map(mixingRouter).find((name) => name) : undefined;
  if (mixing !== undefined)
    throw new UnsupportedError(
      `withLora: the router ${mixing} mixes the parameters of its experts, which takes plain matrices; leave out "experts", or train them whole`,
    );
  const matrices = matricesOf(model, parts);
  const bare = parts.find((part) => ![...matrices.keys()].some((path) => partOf(path) === part));
  if (bare !== undefined || matrices.size === 0)
    throw new ShapeError(
      `withLora: this model has no matrix in ${bare === undefined ? "no parts" : `"${bare}"`}; it has some in ` +
        tuningParts.filter((part) => matricesOf(model, [part]).size > 0).join(", "),
    );

  const at = (path: string): Tree => branch(model.params, ...names(path));
  const made: Tree[] = [];
  // By the matrix: one that layers share has one adapter.
  const nodes = new Map<Tree, Tree>();
  const adapted = (path: string): Tree => {
    const base = at(path);
    const shape = matrices.get(path);
    if (shape === undefined) return base;
    const known = nodes.get(base);
    if (known) return known;
    const { a, b } = freshAdapter(engine, { shape, rank, random: random.at("lora", path) });
    made.push(a, b);
    const node = lowRankNode({ factor: alpha / rank, base, a, b });
    nodes.set(base, node);
    return node;
  };
  try {
    return buildDecoder(engine, blueprint, {
      random,
      parameters: {
        given: adapted,
        routers: model.routers,
        router: (path) => (/\.router\./.test(path) ? adapted(path) : undefined),
      },
    });
  } catch (error) {
    dispose(made);
    throw error;
  }
}

/** The name of the layer's router, where its plans mix experts' parameters (SMEAR). */
function mixingRouter({ feedForward }: LayerBlueprint): string | undefined {
  if (feedForward.kind !== "moe") return undefined;
  const { name, needs, plans } = feedForward.router;
  return needs.includes("mixedExperts") || plans.includes("merge") ? name : undefined;
}

function freshAdapter(
  engine: Engine,
  { shape, rank, random }: { readonly shape: readonly number[]; readonly rank: number; readonly random: Random },
): { readonly a: Tensor; readonly b: Tensor } {
  const [out = 0, inner = 0] = shape.slice(-2);
  const stack = shape.slice(0, -2);
  const bound = 1 / Math.sqrt(inner);
  return engine.scope(() => ({
    a: affine(random.uniform([...stack, rank, inner]), { scale: 2 * bound, shift: -bound }),
    b: engine.tensor(new Float32Array(stack.reduce((n, d) => n * d, out * rank)), [...stack, out, rank]),
  }));
}

/**
 * The sum W + (alpha / rank) B A of every adapted matrix, f32, by the path of the matrix. The tensors are the caller's. `wanted` leaves some
 * out: each takes the memory of its matrix in f32. Over floats, `tuned(model, Object.fromEntries(mergedLora(adapted)))` is the model without adapters.
 */
export function mergedLora(model: LanguageModel, wanted: (path: string) => boolean = () => true): Map<string, Tensor> {
  const paths = new Set(
    leaves(model.params)
      .map(([path]) => path)
      .filter((path) => matrixPath(path) !== path)
      .map(matrixPath),
  );
  return model.engine.scope(() => {
    const merged = new Map<string, Tensor>();
    // Matrices that layers share have one adapter, and one sum.
    const sums = new Map<Tensor, Tensor>();
    for (const path of paths) {
      if (!wanted(path)) continue;
      const low = lowRank(branch(model.params, ...names(path)));
      if (!low) throw new ShapeError(`mergedLora: "${path}" has no adapter`);
      const sum = sums.get(low.a) ?? mergedAt(model, path, low);
      sums.set(low.a, sum);
      merged.set(path, sum);
    }
    return merged;
  });
}

function mergedAt(model: LanguageModel, path: string, low: LowRank): Tensor {
  return model.engine.scope(() => {
    const base = floatsOf(low.base, path);
    const wide = base.dtype === "f32" ? base : cast(base, "f32");
    const more = mul(matmul(low.b, low.a), low.factor);
    // Where 0 is added the bits stay, those of -0 too: experts whose B is zero keep their bytes in a file. What is no number is not 0.
    const zero = mul(sub(1, add(less(more, 0), less(0, more))), less(-1, sub(more, more)));
    return where(zero, wide, add(wide, more));
  });
}
