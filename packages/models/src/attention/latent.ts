// Multi-head latent attention (2405.04434, section 2.1): keys and values are made from one short vector per position, and that
// vector is what the cache holds, beside one rotary key that all heads share.
//   q = qUp norm(qDown x), or q x; of each head the first nopeSize channels have no position, the rest do      eqs. 37-40
//   c = norm(kvDown x), k = [Uk c; rope(k_r)], v = Uv c with kvUp = [Uk; Uv] head by head                       eqs. 41-45
// Absorbed form: q_nope · Uk c = (Ukᵀ q_nope) · c and Σ p Uv c = Uv Σ p c, so that no position of the cache is expanded.
import {
  attention,
  broadcastTo,
  concat,
  groupedMatmul,
  hostConstant,
  isTensor,
  pad,
  reshape,
  rmsNorm,
  rope,
  ShapeError,
  slice,
  type Tensor,
  type Tree,
  transpose,
} from "@switchyard/core";
import type { LatentAttention } from "../blueprint.ts";
import { lookup, product } from "../stored-matrix.ts";
import { branch, leaf } from "../tree.ts";
import type { Attended, AttentionInput, AttentionModule } from "./kind.ts";

interface Form {
  /** `[batch, sequence, heads, size]`. */
  readonly queries: Tensor;
  /** `[batch, past + sequence, heads or 1, size]`. */
  readonly keys: Tensor;
  /** `[batch, past + sequence, heads or 1, size]`. */
  readonly values: Tensor;
  /** What attention gives, `[batch, sequence, heads, size of values]`, to `[batch, sequence, heads, valueSize]`. */
  finish(output: Tensor): Tensor;
}

/**
 * Remembered are the normalised latent as values, `[batch, positions, 1, rank]`, and the turned rotary key as keys, `[batch,
 * positions, 1, ropeSize]`. New tokens on a cache run in the absorbed form where that takes fewer multiplications.
 */
export function latentAttention(options: LatentAttention, width: number): AttentionModule {
  const { heads, queryRank, rank, nopeSize, ropeSize, valueSize, bias = false, scale, normEps: eps } = options;
  const headSize = nopeSize + ropeSize;
  const upSize = nopeSize + valueSize;
  const turning = options.rope.interleaved ? { interleaved: true } : {};
  if (options.rope.size !== ropeSize) {
    throw new ShapeError(`latent attention: ropeSize is ${ropeSize}, but ${options.rope.size} channels are turned`);
  }

  const expanded = (params: Tree, q: Tensor, latent: Tensor, ropeKey: Tensor): Form => {
    const [batch = 0, total = 0] = latent.shape;
    const up = reshape(product(params, "kvUp", latent), [batch, total, heads, upSize]);
    const part = (from: number, size: number): Tensor => slice(up, [0, 0, 0, from], [batch, total, heads, size]);
    return {
      queries: q,
      keys: concat([part(0, nopeSize), broadcastTo(ropeKey, [batch, total, heads, ropeSize])], -1),
      values: part(nopeSize, valueSize),
      finish: (output) => output,
    };
  };

  const absorbed = (params: Tree, q: Tensor, latent: Tensor, ropeKey: Tensor): Form => {
    const [batch = 0, sequence = 0] = q.shape;
    const n = batch * sequence;
    // The heads are the groups of a grouped product: rows [heads * n, size], kvUp [heads, nope + value, rank].
    const up = reshape(floats(params, "kvUp"), [heads, upSize, rank]);
    const ends = hostConstant(
      q,
      Int32Array.from({ length: heads }, (_, h) => (h + 1) * n),
      [heads],
    );
    const byHead = (x: Tensor, size: number): Tensor =>
      reshape(transpose(reshape(x, [n, heads, size]), [1, 0, 2]), [heads * n, size]);
    const byToken = (rows: Tensor, size: number): Tensor =>
      reshape(transpose(reshape(rows, [heads, n, size]), [1, 0, 2]), [batch, sequence, heads, size]);
    const part = (from: number, size: number): Tensor => slice(q, [0, 0, 0, from], [batch, sequence, heads, size]);
    // The rows of kvUp that make values meet zeros.
    const rows = pad(byHead(part(0, nopeSize), nopeSize), [0, 0], [0, valueSize]);
    return {
      queries: concat(
        [byToken(groupedMatmul(rows, up, ends, { transposed: true }), rank), part(nopeSize, ropeSize)],
        -1,
      ),
      keys: concat([latent, ropeKey], -1),
      values: latent,
      finish(output) {
        const both = groupedMatmul(byHead(output, rank), up, ends); // [heads * n, nope + value]
        return byToken(slice(both, [0, nopeSize], [heads * n, valueSize]), valueSize);
      },
    };
  };

  const run = (params: Tree, { hidden, layout, turns, remember, cached }: AttentionInput): Attended => {
    const { batch, sequence, past, mask } = layout;
    const biasOf = (name: string): Tensor | undefined => (bias ? leaf(params, `${name}Bias`) : undefined);
    const turn = (x: Tensor): Tensor => rope(x, turns.cos, turns.sin, turning);

    const flat =
      queryRank === undefined
        ? product(params, "q", hidden)
        : product(
            params,
            "qUp",
            rmsNorm(product(params, "qDown", hidden, biasOf("qDown")), leaf(params, "qNorm"), { eps }),
          );
    const split = reshape(flat, [batch, sequence, heads, headSize]);
    const plain = slice(split, [0, 0, 0, 0], [batch, sequence, heads, nopeSize]);
    const turned = turn(slice(split, [0, 0, 0, nopeSize], [batch, sequence, heads, ropeSize]));
    const q = concat([plain, turned], -1); // [batch, sequence, heads, headSize]

    const down = product(params, "kvDown", hidden, biasOf("kvDown")); // [batch, sequence, rank + ropeSize]
    const own = rmsNorm(slice(down, [0, 0, 0], [batch, sequence, rank]), leaf(params, "kvNorm"), { eps });
    const ownKey = reshape(slice(down, [0, 0, rank], [batch, sequence, ropeSize]), [batch, sequence, 1, ropeSize]);
    const all = remember(turn(ownKey), reshape(own, [batch, sequence, 1, rank]));
    const total = past + sequence;

    // Multiplications per head: making keys and values of all positions, against turning queries and outputs.
    const costs = {
      expanded: total * rank * upSize + sequence * total * (headSize + valueSize),
      absorbed: sequence * rank * upSize * 2 + sequence * total * (2 * rank + ropeSize),
    };
    const make = cached && past > 0 && costs.absorbed < costs.expanded ? absorbed : expanded;
    const { queries, keys, values, finish } = make(params, q, all.values, all.keys);
    const seen = { causal: true, scale, ...(mask ? { mask } : {}) };
    const { output } = attention(queries, keys, values, seen);
    return {
      output: product(params, "o", reshape(finish(output), [batch, sequence, heads * valueSize]), biasOf("o")),
      probabilities() {
        const { probabilities } = attention(queries, keys, values, { ...seen, probabilities: true });
        if (!probabilities) throw new Error("attention gave no probabilities");
        return probabilities; // [batch, heads, sequence, past + sequence]
      },
    };
  };

  return {
    shapes: {
      ...(queryRank === undefined
        ? { q: [heads * headSize, width] }
        : { qDown: [queryRank, width], qNorm: [queryRank], qUp: [heads * headSize, queryRank] }),
      kvDown: [rank + ropeSize, width],
      kvNorm: [rank],
      kvUp: [heads * upSize, rank],
      o: [width, heads * valueSize],
      ...(bias && queryRank !== undefined ? { qDownBias: [queryRank] } : {}),
      ...(bias ? { kvDownBias: [rank + ropeSize], oBias: [width] } : {}),
    },
    run,
  };
}

/** The matrix [out, in] at params[name] as floats: codes are widened for the length of the pass, and that at every pass. */
function floats(params: Tree, name: string): Tensor {
  const w = branch(params, name);
  if (isTensor(w)) return w;
  const [content = {}] = Object.values(w as { readonly [form: string]: Tree });
  const codes = leaf(content, "codes");
  const rows = codes.shape[0] ?? 0;
  return lookup(
    params,
    name,
    hostConstant(
      codes,
      Int32Array.from({ length: rows }, (_, i) => i),
      [rows],
    ),
  );
}
