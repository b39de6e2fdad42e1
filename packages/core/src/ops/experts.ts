// The ops of a Mixture-of-Experts layer: selection, dispatch, grouped products over ragged expert blocks, combination.
import { at, type Op, run, run1 } from "../op.ts";
import type { Tensor } from "../tensor.ts";
import { add, cast, div, less, mul, sub, swiglu, where } from "./elementwise.ts";
import { count, dtypes, fail, last, rank, same, spec } from "./infer.ts";
import { matmul } from "./matmul.ts";
import { softmax, softmaxGradOp } from "./normalise.ts";
import { sumLast } from "./reduce.ts";
import { addRows, argsort, blockEnds, gatherLast, scatterLast, takeRows, topkIndices } from "./rows.ts";
import { concat, hostConstant, reshape, slice } from "./shape.ts";

// ---------------------------------------------------------------- selection
export interface SoftmaxTopk {
  readonly k: number;
  /** softmax-topk-renormalise: Mixtral. softmax-topk: OLMoE, DeepSeek-V2. topk-softmax: gpt-oss. */
  readonly order: "softmax-topk-renormalise" | "softmax-topk" | "topk-softmax";
}
export const softmaxTopkOp: Op<SoftmaxTopk> = {
  name: "softmaxTopk",
  shapes(inputs, { k }) {
    dtypes("softmaxTopk", inputs, "f");
    rank("softmaxTopk", inputs, [2]);
    const logits = at(inputs, 0);
    if (!Number.isInteger(k) || k < 1 || k > last(logits)) fail("softmaxTopk", `k = ${k}`, inputs);
    const chosen = [at(logits.shape, 0), k];
    return [spec(chosen), spec(chosen, "i32"), spec(logits.shape)];
  },
  fallback([logits], { k, order }) {
    if (!logits) return [];
    const probabilities = softmax(logits);
    const ids = topkIndices(logits, k);
    if (order === "topk-softmax") return [softmax(gatherLast(logits, ids)), ids, probabilities];
    const chosen = gatherLast(probabilities, ids);
    return [order === "softmax-topk" ? chosen : div(chosen, sumLast(chosen)), ids, probabilities];
  },
  vjp([dw, , dp], [logits], [weights, ids, probabilities], { order }) {
    if (!logits || !weights || !ids || !probabilities) return [];
    const experts = last(logits);
    let dProbabilities = dp;
    let dLogits: Tensor | undefined;
    if (dw && order === "topk-softmax") {
      dLogits = scatterLast(run1(softmaxGradOp, [weights, dw], {}), ids, experts);
    } else if (dw) {
      // weights = chosen / total: d chosen = (dw - sum(dw weights)) / total
      const dChosen =
        order === "softmax-topk"
          ? dw
          : div(sub(dw, sumLast(mul(dw, weights))), sumLast(gatherLast(probabilities, ids)));
      const scattered = scatterLast(dChosen, ids, experts);
      dProbabilities = dp ? add(dp, scattered) : scattered;
    }
    const throughSoftmax = dProbabilities && run1(softmaxGradOp, [probabilities, dProbabilities], {});
    return [dLogits && throughSoftmax ? add(dLogits, throughSoftmax) : (dLogits ?? throughSoftmax)];
  },
};
/** Weights [n, k], expert ids [n, k] and the full softmax [n, experts] of logits [n, experts]. Ties: lower id first. */
export const softmaxTopk = (
  logits: Tensor,
  attrs: SoftmaxTopk,
): { readonly weights: Tensor; readonly ids: Tensor; readonly probabilities: Tensor } => {
  const ys = run(softmaxTopkOp, [logits], attrs);
  return { weights: at(ys, 0), ids: at(ys, 1), probabilities: at(ys, 2) };
};

// ---------------------------------------------------------------- dispatch and combine
export interface DispatchAttrs {
  /** Number of experts. */
  readonly count: number;
  /** Static limit on the filled slots: the length of the results. */
  readonly bound: number;
}
const line = (like: Tensor, n: number, value: (i: number) => number): Tensor =>
  hostConstant(
    like,
    Int32Array.from({ length: n }, (_, i) => value(i)),
    [n],
  );

export const dispatchOp: Op<DispatchAttrs> = {
  name: "dispatch",
  shapes(inputs, { count, bound }) {
    dtypes("dispatch", inputs, "i");
    rank("dispatch", inputs, [2]);
    const ids = at(inputs, 0);
    const slots = at(ids.shape, 0) * at(ids.shape, 1);
    if (bound < 0 || bound > slots || count < 1)
      fail("dispatch", `count ${count}, bound ${bound} of ${slots} slots`, inputs);
    return [spec([bound], "i32"), spec([bound], "i32"), spec([count], "i32")];
  },
  fallback([ids], { count, bound }) {
    if (!ids) return [];
    const k = last(ids);
    const flat = reshape(ids, [-1]);
    const key = where(mul(less(-1, flat), less(flat, count)), flat, count);
    const order = slice(argsort(key, { bound: count + 1 }), [0], [bound]);
    const closed = blockEnds(key, count);
    const ends = where(less(bound, closed), bound, closed);
    const filled = less(
      line(ids, bound, (i) => i),
      slice(ends, [count - 1], [1]),
    );
    const tokens = takeRows(
      line(ids, flat.size, (slot) => Math.floor(slot / k)),
      order,
    );
    return [where(filled, tokens, -1), where(filled, order, -1), ends];
  },
};
/**
 * Counting sort of the slots of ids [tokens, k] by expert (stable): token of each sorted slot, flat slot id, and where each expert's
 * block ends. Slots whose id is outside 0..count-1 are left out; positions behind the last block hold -1.
 */
export const dispatch = (
  ids: Tensor,
  attrs: DispatchAttrs,
): { readonly rows: Tensor; readonly slots: Tensor; readonly ends: Tensor } => {
  const ys = run(dispatchOp, [ids], attrs);
  return { rows: at(ys, 0), slots: at(ys, 1), ends: at(ys, 2) };
};

const tokenOfSlot = (slots: Tensor, weights: Tensor): Tensor => {
  const k = last(weights);
  const tokens = takeRows(
    line(slots, weights.size, (slot) => Math.floor(slot / k)),
    slots,
  );
  return where(less(slots, 0), -1, tokens);
};
export const combineRowsGradOp: Op = {
  name: "combineRowsGrad",
  shapes: ([out, weights]) => (out && weights ? [spec(out.shape), spec(weights.shape)] : []),
  fallback([out, weights, slots, dy]) {
    if (!out || !weights || !slots || !dy) return [];
    const g = takeRows(dy, tokenOfSlot(slots, weights)); // [bound, width]
    const w = takeRows(reshape(weights, [-1, 1]), slots); // [bound, 1]
    return [mul(g, w), reshape(addRows(sumLast(mul(out, g)), slots, weights.size), weights.shape)];
  },
};
export const combineRowsOp: Op = {
  name: "combineRows",
  shapes(inputs) {
    count("combineRows", inputs, 3);
    dtypes("combineRows", inputs, "ffi");
    const [out, weights, slots] = [at(inputs, 0), at(inputs, 1), at(inputs, 2)];
    rank("combineRows", inputs, [2, 2, 1]);
    if (out.shape[0] !== slots.shape[0]) fail("combineRows", "one slot per row", inputs);
    return [spec([at(weights.shape, 0), last(out)])];
  },
  fallback: ([out, weights, slots]) =>
    out && weights && slots
      ? [
          addRows(
            mul(out, takeRows(reshape(weights, [-1, 1]), slots)),
            tokenOfSlot(slots, weights),
            at(weights.shape, 0),
          ),
        ]
      : [],
  vjp: ([dy], [out, weights, slots]) =>
    dy && out && weights && slots ? run(combineRowsGradOp, [out, weights, slots, dy], {}) : [],
};
/** y[slot / k] += weights[slot] * out[i] for slot = slots[i]: out [bound, width], weights [tokens, k] -> [tokens, width]. */
export const combineRows = (out: Tensor, weights: Tensor, slots: Tensor): Tensor =>
  run1(combineRowsOp, [out, weights, slots], {});

// ---------------------------------------------------------------- grouped products
/** Expert of each of n rows: ends[e-1] <= row < ends[e]; `count` behind the last block. */
const expertMask = (like: Tensor, n: number, ends: Tensor, e: number): Tensor => {
  const rows = line(like, n, (i) => i);
  const inside = less(rows, slice(ends, [e], [1]));
  const before = e === 0 ? undefined : less(rows, slice(ends, [e - 1], [1]));
  return reshape(before ? sub(inside, before) : inside, [n, 1]);
};

export interface GroupedMatmul {
  /** The weights are [experts, in, out]: the gradient of the rows. */
  readonly transposed?: boolean;
}
export const groupedMatmulOp: Op<GroupedMatmul> = {
  name: "groupedMatmul",
  shapes(inputs, { transposed = false }) {
    count("groupedMatmul", inputs, 3);
    dtypes("groupedMatmul", inputs, "fwi");
    rank("groupedMatmul", inputs, [2, 3, 1]);
    const [rows, w, ends] = [at(inputs, 0), at(inputs, 1), at(inputs, 2)];
    const [experts, out, inner] = w.shape as readonly [number, number, number];
    if (experts !== ends.shape[0]) fail("groupedMatmul", "one end per expert", inputs);
    if (last(rows) !== (transposed ? out : inner)) fail("groupedMatmul", "inner sizes differ", inputs);
    return [spec([at(rows.shape, 0), transposed ? inner : out])];
  },
  fallback([rows, w, ends], { transposed = false }) {
    if (!rows || !w || !ends) return [];
    const [experts, out, inner] = w.shape as readonly [number, number, number];
    const n = at(rows.shape, 0);
    let y: Tensor | undefined;
    for (let e = 0; e < experts; e++) {
      const expert = cast(reshape(slice(w, [e, 0, 0], [1, out, inner]), [out, inner]), "f32");
      // where, not mul: rows of other blocks, and behind the last, may hold NaN.
      const part = matmul(where(expertMask(ends, n, ends, e), rows, 0), expert, { transposeB: !transposed });
      y = y ? add(y, part) : part;
    }
    return y ? [y] : [];
  },
  vjp([dy], [rows, w, ends], _, { transposed = false }, [wantRows, wantW]) {
    if (!dy || !rows || !w || !ends) return [];
    return [
      wantRows ? groupedMatmul(dy, w, ends, { transposed: !transposed }) : undefined,
      wantW ? (transposed ? groupedOuter(rows, dy, ends) : groupedOuter(dy, rows, ends)) : undefined,
    ];
  },
};
/**
 * Row i of expert e's block (ends[e-1] <= i < ends[e]) times that expert's weights: rows [n, in], w [experts, out, in], ends [experts]
 * -> [n, out]. Rows behind the last block give zeros.
 */
export const groupedMatmul = (rows: Tensor, w: Tensor, ends: Tensor, attrs: GroupedMatmul = {}): Tensor =>
  run1(groupedMatmulOp, [rows, w, ends], attrs);

export const groupedOuterOp: Op = {
  name: "groupedOuter",
  shapes(inputs) {
    count("groupedOuter", inputs, 3);
    dtypes("groupedOuter", inputs, "ffi");
    rank("groupedOuter", inputs, [2, 2, 1]);
    const [a, b, ends] = [at(inputs, 0), at(inputs, 1), at(inputs, 2)];
    if (a.shape[0] !== b.shape[0]) fail("groupedOuter", "numbers of rows differ", inputs);
    return [spec([at(ends.shape, 0), last(a), last(b)])];
  },
  fallback([a, b, ends]) {
    if (!a || !b || !ends) return [];
    const n = at(a.shape, 0);
    const blocks = Array.from({ length: at(ends.shape, 0) }, (_, e) => {
      const own = expertMask(ends, n, ends, e);
      return reshape(matmul(where(own, a, 0), where(own, b, 0), { transposeA: true }), [1, last(a), last(b)]);
    });
    return [concat(blocks, 0)];
  },
  vjp: ([dy], [a, b, ends]) =>
    dy && a && b && ends ? [groupedMatmul(b, dy, ends), groupedMatmul(a, dy, ends, { transposed: true })] : [],
};
/** Sum over each expert's rows of aᵀ b: a [n, p], b [n, q], ends [experts] -> [experts, p, q]: the gradient of the weights. */
export const groupedOuter = (a: Tensor, b: Tensor, ends: Tensor): Tensor => run1(groupedOuterOp, [a, b, ends], {});

// ---------------------------------------------------------------- the whole layer
export interface MoeExperts {
  /** Static limit on the filled slots; tokens * k by default. */
  readonly bound?: number;
}
export const moeExpertsOp: Op<MoeExperts> = {
  name: "moeExperts",
  shapes(inputs) {
    count("moeExperts", inputs, 5);
    dtypes("moeExperts", inputs, "fwwif");
    rank("moeExperts", inputs, [2, 3, 3, 2, 2]);
    const [hidden, gateUp, down, ids, weights] = inputs.map((x) => x.shape);
    const [tokens, width] = hidden as readonly [number, number];
    const [experts, out, inner] = gateUp as readonly [number, number, number];
    if (inner !== width || !same(down ?? [], [experts, width, out / 2])) {
      fail("moeExperts", "hidden [t, w], gateUp [experts, 2 h, w], down [experts, w, h]", inputs);
    }
    if (!same(ids ?? [], weights ?? []) || ids?.[0] !== tokens) fail("moeExperts", "ids and weights [t, k]", inputs);
    return [spec([tokens, width])];
  },
  fallback([hidden, gateUp, down, ids, weights], { bound }) {
    if (!hidden || !gateUp || !down || !ids || !weights) return [];
    const { rows, slots, ends } = dispatch(ids, { count: at(gateUp.shape, 0), bound: bound ?? ids.size });
    const inner = swiglu(groupedMatmul(takeRows(hidden, rows), gateUp, ends)); // [bound, h]
    return [combineRows(groupedMatmul(inner, down, ends), weights, slots)];
  },
};
/** SwiGLU experts on routed tokens, dispatch to combination: hidden [t, w], gateUp [experts, 2 h, w], down [experts, w, h], ids and weights [t, k] -> [t, w]. */
export const moeExperts = (
  hidden: Tensor,
  params: { readonly gateUp: Tensor; readonly down: Tensor },
  routing: { readonly ids: Tensor; readonly weights: Tensor },
  attrs: MoeExperts = {},
): Tensor => run1(moeExpertsOp, [hidden, params.gateUp, params.down, routing.ids, routing.weights], attrs);

/** How many rows each expert has, f32 [experts], from the block ends. */
export const blockSizes = (ends: Tensor): Tensor => {
  const n = at(ends.shape, 0);
  const starts = n > 1 ? concat([hostConstant(ends, Int32Array.of(0), [1]), slice(ends, [0], [n - 1])], 0) : undefined;
  return cast(starts ? add(ends, mul(starts, -1)) : ends, "f32");
};
