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
import { floatsOf, groupedProduct, product } from "../stored-matrix.ts";
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
    const kvUp = branch(params, "kvUp");
    const linesOf = (from: number, size: number): Tree | undefined => headLines(kvUp, { heads, upSize, from, size });
    const [keyLines, valueLines] = [linesOf(0, nopeSize), linesOf(nopeSize, valueSize)];
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
    const asked = byHead(part(0, nopeSize), nopeSize);
    const form = (queries: Tensor, finish: Form["finish"]): Form => ({
      queries: concat([byToken(queries, rank), part(nopeSize, ropeSize)], -1),
      keys: concat([latent, ropeKey], -1),
      values: latent,
      finish,
    });
    if (keyLines && valueLines) {
      // Codes of the keys are widened for the length of the pass, those of the values inside the product.
      const up = floatsOf(keyLines, "kvUp"); // [heads, nope, rank]
      return form(groupedMatmul(asked, up, ends, { transposed: true }), (output) =>
        byToken(groupedProduct({ kvUp: valueLines }, "kvUp", byHead(output, rank), ends), valueSize),
      );
    }
    const up = reshape(floatsOf(kvUp, "kvUp"), [heads, upSize, rank]);
    // The rows of kvUp that make values meet zeros.
    const rows = pad(asked, [0, 0], [0, valueSize]);
    return form(groupedMatmul(rows, up, ends, { transposed: true }), (output) => {
      const both = groupedMatmul(byHead(output, rank), up, ends); // [heads * n, nope + value]
      return byToken(slice(both, [0, nopeSize], [heads * n, valueSize]), valueSize);
    });
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

/**
 * Lines from .. from + size of every head's [upSize, rank], of a matrix held as codes: a stack of such matrices, [heads, size, rank]. Undefined
 * for other forms, and where blocks that share a scale reach over the cut.
 */
function headLines(
  node: Tree,
  {
    heads,
    upSize,
    from,
    size,
  }: { readonly heads: number; readonly upSize: number; readonly from: number; readonly size: number },
): Tree | undefined {
  if (isTensor(node)) return undefined;
  const [[form = "", content = {}] = []] = Object.entries(node);
  if (form.startsWith("lora/")) return undefined;
  const shared = Number(/^fp8\/(\d+)x/.exec(form)?.[1] ?? 1);
  if ([from, size, upSize].some((lines) => lines % shared !== 0)) return undefined;
  const parts: Record<string, Tensor> = {};
  for (const [name, x] of Object.entries(content)) {
    if (!isTensor(x)) return undefined;
    const [lines = 0, ...rest] = x.shape;
    const each = lines / heads; // upSize, or that by the lines which share a scale
    const [start, count] = [(from * each) / upSize, (size * each) / upSize];
    const zeros = rest.map(() => 0);
    parts[name] = slice(reshape(x, [heads, each, ...rest]), [0, start, ...zeros], [heads, count, ...rest]);
  }
  return { [form]: parts };
}
