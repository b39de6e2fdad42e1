// Sparse upcycling (2212.05055): the experts of an MoE layer made from one dense feed-forward network, whole copies of it or, for
// fine-grained experts, slices of its neurons (2601.15370), with a part of the neurons drawn anew so that the experts part ways.
import { ShapeError } from "../errors.ts";
import { mul, sqrt, square, where } from "../ops/elementwise.ts";
import { mean } from "../ops/reduce.ts";
import { takeRows } from "../ops/rows.ts";
import { broadcastTo, hostConstant, reshape, transpose } from "../ops/shape.ts";
import type { Random } from "../random.ts";
import { leaves, show, type Tensor, type Tree } from "../tensor.ts";

export interface UpcycleOptions {
  /** Experts to make. */
  readonly count: number;
  /** Expert e gets slice e mod `granularity` of that many equal slices of the dense neurons; default 1, whole copies. */
  readonly granularity?: number;
  /** Share of each expert's neurons that is drawn anew, 0 to 1; default 0 (2601.15370 takes 0.3). */
  readonly reinitialise?: number;
  /** Factor of the experts' output; default 1. With k weights that sum to 1 over slices, `granularity` keeps the scale. */
  readonly scale?: number;
  /** Which neurons are drawn anew, and their values. */
  readonly random: Random;
}

/**
 * Params for `glu` or `ffn` with `count` experts of hidden / granularity neurons, from the params of a dense one: what `glu` or `ffn`
 * with `count: 1` holds (`gateUp` or `up`, `down`, and their biases if any). Without `reinitialise`, one expert of every slice at weight
 * 1 (or, without slices, weights that sum to 1) gives the dense network's output. New neurons are normal with the root mean
 * square of the matrix they replace, their biases 0. Run it in a scope. Throws ShapeError when sizes do not fit.
 */
export function upcycle(dense: Tree, options: UpcycleOptions): Tree {
  const { count, granularity = 1, reinitialise = 0, scale = 1, random } = options;
  const given = new Map(leaves(dense));
  const gated = given.has("gateUp");
  const [upName, parts] = gated ? ["gateUp", 2] : ["up", 1];
  const up = matrix(given, upName); // [parts * hidden, width]
  const down = transpose(matrix(given, "down"), [1, 0]); // [hidden, width]
  const [hidden = 0, width = 0] = down.shape;
  if (up.shape[0] !== parts * hidden || up.shape[1] !== width) {
    throw new ShapeError(`upcycle: ${upName} is ${show(up)}, expected [${parts * hidden}, ${width}] beside this down`);
  }
  if (!Number.isInteger(count) || count < 1 || !Number.isInteger(granularity) || granularity < 1) {
    throw new ShapeError(`upcycle: count ${count} and granularity ${granularity}; expected whole numbers from 1`);
  }
  const own = hidden / granularity;
  if (!Number.isInteger(own)) {
    throw new ShapeError(
      `upcycle: ${hidden} neurons do not split into ${granularity} slices; choose a divisor of ${hidden}`,
    );
  }
  if (!(reinitialise >= 0 && reinitialise <= 1)) {
    throw new ShapeError(`upcycle: reinitialise = ${reinitialise}; expected a share from 0 to 1`);
  }

  /** Rows of the dense up (or down) matrix that each expert takes: of each part, its slice. */
  const neurons = (of: number): Tensor =>
    hostConstant(
      up,
      Int32Array.from({ length: count * of * own }, (_, i) => {
        const [e, part, j] = [Math.floor(i / (of * own)), Math.floor(i / own) % of, i % own];
        return part * hidden + (e % granularity) * own + j;
      }),
      [count, of * own],
    );
  const fresh = freshNeurons(random, { count, own, drawn: Math.round(reinitialise * own) });
  const isFresh = (of: number): Tensor =>
    hostConstant(
      up,
      Float32Array.from({ length: count * of * own }, (_, i) => {
        const [e, j] = [Math.floor(i / (of * own)), i % own];
        return fresh[e * own + j] ?? 0;
      }),
      [count, of * own, 1],
    );
  /** `[of * own, width]` of each expert, its fresh neurons replaced. */
  const sliced = (x: Tensor, of: number, name: string): Tensor => {
    const taken = takeRows(x, neurons(of)); // [count, of * own, width]
    if (reinitialise === 0) return taken;
    // Gate and up rows of a glu may differ in scale: one root mean square per part.
    const scales = reshape(sqrt(mean(square(reshape(x, [of, hidden * width])), [1])), [1, of, 1, 1]);
    const drawn = mul(random.at(name).normal([count, of, own, width]), scales);
    return where(isFresh(of), reshape(drawn, taken.shape), taken);
  };
  const bias = given.get(`${upName}Bias`);
  const downBias = given.get("downBias");
  const upper = sliced(up, parts, upName);
  const lower = transpose(sliced(down, 1, "down"), [0, 2, 1]); // [count, width, own]
  const params: Record<string, Tensor> = { [upName]: upper, down: scale === 1 ? lower : mul(lower, scale) };
  if (bias) {
    const taken = takeRows(reshape(bias, [parts * hidden]), neurons(parts)); // [count, parts * own]
    params[`${upName}Bias`] = where(reshape(isFresh(parts), taken.shape), 0, taken);
  }
  if (downBias) {
    params.downBias = mul(broadcastTo(reshape(downBias, [1, width]), [count, width]), scale / granularity);
  }
  return params;
}

/** A dense matrix, [1, rows, columns] -> [rows, columns]. */
function matrix(given: ReadonlyMap<string, Tensor>, name: string): Tensor {
  const x = given.get(name);
  if (x === undefined || x.shape.length !== 3 || x.shape[0] !== 1) {
    throw new ShapeError(
      `upcycle: "${name}" is ${x ? show(x) : `missing among ${[...given.keys()].join(", ")}`}; ` +
        "expected [1, rows, columns], the params of glu or ffn with count 1",
    );
  }
  return reshape(x, x.shape.slice(1));
}

/** 1 for the neurons drawn anew, [count * own]: of each expert those with the smallest of `own` draws. */
function freshNeurons(
  random: Random,
  { count, own, drawn }: { readonly count: number; readonly own: number; readonly drawn: number },
): Float32Array {
  const fresh = new Float32Array(count * own);
  for (let e = 0; e < count; e++) {
    const draws = [...random.at("neurons", e).host("uniform", own).entries()].sort(([, a], [, b]) => a - b);
    for (const [j] of draws.slice(0, drawn)) fresh[e * own + j] = 1;
  }
  return fresh;
}
