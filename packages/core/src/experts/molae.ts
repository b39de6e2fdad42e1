// Latent experts (MoLAE 2503.23100): the matrices of a group of experts factor into one map that the group shares and a small one of
// each expert, W_up,i = A_up,i B_up, W_gate,i = A_gate,i B_gate, W_down,i = B_down A_down,i:
//   y_i = B_down A_down,i (act(A_gate,i B_gate x) * A_up,i B_up x)
// B_gate x and B_up x are computed once per token and group, and B_down once on the sum of the group's experts.
import { ShapeError } from "../errors.ts";
import type { Activation, Initial } from "../moe/experts.ts";
import { activations, biasRows, inside } from "../moe/parts.ts";
import type { Experts, Layout, Observe, SparsePlan } from "../moe/plan.ts";
import { add, cast, less, mul, sub, where } from "../ops/elementwise.ts";
import { combineRows, dispatch, groupedMatmul } from "../ops/experts.ts";
import { matmul } from "../ops/matmul.ts";
import { addRows, takeRows, topkIndices } from "../ops/rows.ts";
import { concat, hostConstant, reshape, slice } from "../ops/shape.ts";
import { leaves, sizeOf, type Tensor, type Tree } from "../tensor.ts";
import { checkSizes, groupedLinear, leafAt, parameters, type Shapes } from "./parts.ts";

export type MoLAEOptions = {
  readonly count: number;
  /** Width of the tokens. */
  readonly width: number;
  /** Width inside each expert. */
  readonly hidden: number;
  /** Width of the latent that a group shares; the paper mostly takes `hidden`. */
  readonly latent: number;
  /** Experts that share a latent map, neighbours by id; it divides `count`. Default: all of them. */
  readonly group?: number;
  /** y = down (act(gate x) * up x) instead of y = down act(up x); default true. */
  readonly gated?: boolean;
  /** Default silu. */
  readonly activation?: Activation;
  /** Whether down is factored too; "full" keeps a whole matrix per expert, since down is less redundant. Default "latent". */
  readonly down?: "latent" | "full";
  /** Default false. */
  readonly bias?: boolean;
} & Initial;

/**
 * Latent experts. Params, groups = count / group: `gate`, `up [experts, hidden, latent]`, `down [experts, latent, hidden]` (full:
 * `[experts, width, hidden]`), `shared.gate`, `shared.up [groups, latent, width]`, `shared.down [groups, width, latent]`; without gate
 * no `gate`, with `bias` also `gateBias`, `upBias`, `downBias [experts, out]`. New ones are normal with variance 1 / inputs.
 * `observe` is told the inputs of the experts' own matrices: latents.
 *
 * @example molae({ count: 64, width: 512, hidden: 256, latent: 256, group: 8, engine, random })
 */
export function molae(options: MoLAEOptions): Experts {
  const { count, width, hidden, latent, group = count, gated = true, activation = "silu", bias = false } = options;
  const { down = "latent" } = options;
  checkSizes("molae", { count, width, hidden, latent, group });
  checkGroup("molae", count, group);
  const groups = count / group;
  const maps = gated ? ["gate", "up"] : ["up"];
  if (down !== "latent" && down !== "full")
    throw new ShapeError(`molae: down = "${down}"; expected "latent" or "full"`);
  const isLatent = down === "latent";
  const shapes: Shapes = Object.fromEntries<readonly number[]>([
    ...maps.flatMap((name): [string, number[]][] => [
      [name, [count, hidden, latent]],
      [`shared.${name}`, [groups, latent, width]],
      ...(bias ? [[`${name}Bias`, [count, hidden]] as [string, number[]]] : []),
    ]),
    ["down", [count, isLatent ? latent : width, hidden]],
    ...(isLatent ? [["shared.down", [groups, width, latent]] as [string, number[]]] : []),
    ...(bias ? [["downBias", [count, width]] as [string, number[]]] : []),
  ]);
  const act = activations[activation];
  const biasOf = (params: Tree, name: string): Tensor | undefined => (bias ? leafAt(params, `${name}Bias`) : undefined);

  /** Latent rows of each map, sorted by expert -> what goes into down, [n, hidden]. */
  const inner = (params: Tree, latents: readonly Tensor[], ends: Tensor, observe?: Observe): Tensor => {
    const [first, second] = maps.map((name, i) => {
      const z = latents[i] as Tensor;
      observe?.(name, z, ends);
      return groupedLinear(z, leafAt(params, name), ends, biasOf(params, name));
    }) as [Tensor, Tensor?];
    const activated = act(first); // the gate, or up where there is none
    return second ? mul(activated, second) : activated;
  };

  const apply = (params: Tree, rows: Tensor, ends: Tensor, _: Layout, observe?: Observe): { output: Tensor } => {
    const groupEnds = reshape(slice(reshape(ends, [groups, group]), [0, group - 1], [groups, 1]), [groups]);
    const latents = maps.map((name) => groupedMatmul(rows, leafAt(params, `shared.${name}`), groupEnds)); // [n, latent]
    const x = inner(params, latents, ends, observe);
    observe?.("down", x, ends);
    const own = groupedMatmul(x, leafAt(params, "down"), ends); // [n, latent or width]
    const y = isLatent ? groupedMatmul(own, leafAt(params, "shared.down"), groupEnds) : own;
    const shift = biasOf(params, "down");
    return { output: shift ? add(y, biasRows(shift, ends, y.shape[0] ?? 0)) : y };
  };

  const fused = (params: Tree, tokens: Tensor, { experts: ids, weights, bound }: SparsePlan): Tensor => {
    const [n = 0, k = 0] = ids.shape;
    if (n * k === 0) return mul(tokens, 0);
    const first = firstOfGroup(ids, { count, group }); // [n, k]: the first slot of the token in the same group
    const slotNumbers = hostConstant(
      ids,
      Int32Array.from({ length: n * k }, (_, i) => i % k),
      [n, k],
    );
    const pairIds = where(less(first, slotNumbers), -1, groupIds(ids, { count, group }));
    // One row per token and group.
    const pairs = dispatch(pairIds, { count: groups, bound: n * Math.min(k, groups) });
    const rows = takeRows(tokens, pairs.rows); // [pairs, width]
    const ofPairs = maps.map((name) => groupedMatmul(rows, leafAt(params, `shared.${name}`), pairs.ends)); // [pairs, latent]
    // One row per token and expert, which finds the row of its pair.
    const all = dispatch(ids, { count, bound: Math.min(bound ?? n * k, n * k) });
    const pair = pairOfRow(pairs.slots, all.slots, first); // i32 [rows]
    const x = inner(
      params,
      ofPairs.map((z) => takeRows(z, pair)),
      all.ends,
    );
    const own = groupedMatmul(x, leafAt(params, "down"), all.ends); // [rows, latent or width]
    if (!isLatent) return combineRows(own, weights, all.slots);
    const weighted = mul(own, takeRows(reshape(weights, [n * k, 1]), all.slots));
    const sums = addRows(weighted, pair, rows.shape[0] ?? 0); // [pairs, latent]
    return addRows(groupedMatmul(sums, leafAt(params, "shared.down"), pairs.ends), pairs.rows, n);
  };

  return {
    count,
    params: parameters("molae", shapes, options, (path, shape, random) =>
      path.endsWith("Bias")
        ? undefined
        : random.host("normal", sizeOf(shape)).map((z) => z / Math.sqrt(shape.at(-1) ?? 1)),
    ),
    apply,
    ...(bias ? {} : { fused }),
  };
}

export function checkDown(what: string, down: string): void {
  if (down !== "latent" && down !== "full")
    throw new ShapeError(`${what}: down = "${down}"; expected "latent" or "full"`);
}

export function checkGroup(what: string, count: number, group: number): void {
  if (count % group !== 0) {
    throw new ShapeError(`${what}: ${count} experts in groups of ${group}; choose a divisor of ${count}`);
  }
}

/** The group of each id, -1 for empty slots and null experts. */
function groupIds(ids: Tensor, { count, group }: { readonly count: number; readonly group: number }): Tensor {
  const table = hostConstant(
    ids,
    Int32Array.from({ length: count }, (_, e) => Math.floor(e / group)),
    [count],
  );
  return where(inside(ids, count), takeRows(table, ids), -1);
}

/** ids `[n, k]` -> the first slot of the same token whose expert is in the same group, i32 `[n, k]`; empty slots find each other. */
function firstOfGroup(ids: Tensor, sizes: { readonly count: number; readonly group: number }): Tensor {
  const [n = 0, k = 0] = ids.shape;
  const own = groupIds(ids, sizes);
  const [a, b] = [reshape(own, [n, k, 1]), reshape(own, [n, 1, k])];
  const same = sub(1, add(less(a, b), less(b, a))); // [n, k, k]
  return reshape(topkIndices(same, 1), [n, k]); // ties go to the lower slot
}

/** For each row of the experts the row of its pair, -1 beyond the last: through the slot that both know. */
function pairOfRow(pairSlots: Tensor, slots: Tensor, first: Tensor): Tensor {
  const [n = 0, k = 0] = first.shape;
  const pairs = pairSlots.size;
  // Row numbers are floats on the way through addRows: exact up to 2^24 rows.
  const numbers = hostConstant(
    slots,
    Float32Array.from({ length: pairs }, (_, i) => i),
    [pairs, 1],
  );
  const rowOfSlot = cast(reshape(addRows(numbers, pairSlots, n * k), [n * k]), "i32");
  const starts = hostConstant(
    slots,
    Int32Array.from({ length: n }, (_, t) => t * k),
    [n, 1],
  );
  const firstSlot = reshape(add(first, starts), [n * k]);
  return where(less(slots, 0), -1, takeRows(rowOfSlot, takeRows(firstSlot, slots)));
}

/**
 * The matrices of experts made by `molae`, as params of `glu` (or, without gate, `ffn`) with the same numbers. Biases and a down that was
 * not factored are the same tensors.
 */
export function molaeToDense(params: Tree): Tree {
  const found = new Map(leaves(params));
  const up = leafAt(params, "up");
  const [count = 0] = up.shape;
  /** A [experts, a, b] and B [groups, c, d] -> [experts, a, d], or B A with `turned`. */
  const product = (name: string, turned: boolean): Tensor => {
    const own = leafAt(params, name);
    const map = found.get(`shared.${name}`);
    if (map === undefined) return own;
    const [, a = 0, b = 0] = own.shape;
    const [groups = 1, c = 0, d = 0] = map.shape;
    const group = count / groups;
    const [left, right] = [reshape(own, [groups, group, a, b]), reshape(map, [groups, 1, c, d])];
    const whole = turned ? matmul(right, left) : matmul(left, right);
    return reshape(whole, [count, ...whole.shape.slice(2)]);
  };
  const gate = found.has("gate") ? product("gate", false) : undefined;
  const upBias = found.get("upBias");
  const gateBias = found.get("gateBias");
  const downBias = found.get("downBias");
  return {
    ...(gate ? { gateUp: concat([gate, product("up", false)], 1) } : { up: product("up", false) }),
    down: product("down", true),
    ...(upBias ? (gateBias ? { gateUpBias: concat([gateBias, upBias], 1) } : { upBias }) : {}),
    ...(downBias ? { downBias } : {}),
  };
}
