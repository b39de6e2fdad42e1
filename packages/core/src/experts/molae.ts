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
import { type HostMatrix, svd } from "../svd.ts";
import { leaves, sizeOf, type Tensor, type Tree } from "../tensor.ts";
import { denseMatrices, type FactorError, type HostStack, relativeError } from "./dense.ts";
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

function checkGroup(what: string, count: number, group: number): void {
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

/** What a factorisation kept of one matrix of the experts; `parts` are groups. */
export interface MoLAEError extends FactorError {
  /** All singular values of each group's stack. */
  readonly singularValues: readonly Float64Array[];
}

/**
 * Params for `molae` from those of trained experts (`glu`, or `ffn` without gate): in each group the up (and the gate) matrices are
 * stacked one below the other, the down matrices side by side, and factored by truncated singular value decompositions, the best there
 * is of that rank (Eckart and Young); both factors get the square roots of the singular values. The report says how much each group
 * lost, by name: "gate", "up", "down". On the host; the new params lie on the engine of the given ones.
 *
 * @throws ShapeError where `group` does not divide the experts, or for a latent beyond the rank that a stack can have.
 * @example const { params, report } = await denseToMoLAE(experts.params, { group: 4, latent: 128 })
 */
export async function denseToMoLAE(
  dense: Tree,
  {
    group,
    latent,
    down = "latent",
  }: { readonly group: number; readonly latent: number; readonly down?: "latent" | "full" },
): Promise<{ readonly params: Tree; readonly report: Readonly<Record<string, MoLAEError>> }> {
  checkSizes("denseToMoLAE", { group, latent });
  const { engine, gated, matrices, biases } = await denseMatrices("denseToMoLAE", dense);
  const stack = (name: string): HostStack => matrices.get(name) ?? { data: new Float64Array(0), shape: [0, 0, 0] };
  const [count = 0, width = 0, hidden = 0] = stack("down").shape;
  checkGroup("denseToMoLAE", count, group);
  const most = Math.min(width, group * hidden);
  if (latent > most) {
    throw new ShapeError(
      `denseToMoLAE: latent ${latent}, but stacks of ${group} experts have rank ${most} at most; choose at most that`,
    );
  }
  // A scope: where a decomposition throws, what was stored before is freed.
  return engine.scope(() => {
    const split: readonly [string, HostStack][] = gated
      ? [
          ["gate", part(stack("gateUp"), 0, hidden)],
          ["up", part(stack("gateUp"), hidden, hidden)],
        ]
      : [["up", stack("up")]];
    const own: Record<string, Tensor> = {};
    const shared: Record<string, Tensor> = {};
    const report: Record<string, MoLAEError> = {};
    const store = (name: string, { a, b, error }: Factored, shapes: readonly [number[], number[]]): void => {
      own[name] = engine.tensor(a, shapes[0]);
      shared[name] = engine.tensor(b, shapes[1]);
      report[name] = error;
    };
    const groups = count / group;
    for (const [name, one] of split) {
      // One below the other: as they lie.
      const parts = groupsOf(one, group, (data) => ({ data, rows: group * hidden, columns: width }));
      store(name, factored(parts, latent, false), [
        [count, hidden, latent],
        [groups, latent, width],
      ]);
    }
    if (down === "latent") {
      const parts = groupsOf(stack("down"), group, (data) => sideBySide(data, group, { rows: width, columns: hidden }));
      const found = factored(parts, latent, true);
      // The experts' parts lie side by side, [groups, latent, group * hidden]: apart, [experts, latent, hidden].
      const apart = new Float64Array(found.a.length);
      for (let i = 0; i < apart.length; i++) {
        const [h, m, e] = [i % hidden, Math.floor(i / hidden) % latent, Math.floor(i / (hidden * latent))];
        const [g, place] = [Math.floor(e / group), e % group];
        apart[i] = found.a[((g * latent + m) * group + place) * hidden + h] as number;
      }
      store("down", { ...found, a: apart }, [
        [count, latent, hidden],
        [groups, width, latent],
      ]);
    } else own.down = engine.tensor(stack("down").data, stack("down").shape);
    for (const [name, bias] of biases) {
      if (name === "gateUpBias") {
        const [gate, up] = [0, hidden].map((from) => part({ ...bias, shape: [...bias.shape, 1] }, from, hidden).data);
        own.gateBias = engine.tensor(gate as Float64Array, [count, hidden]);
        own.upBias = engine.tensor(up as Float64Array, [count, hidden]);
      } else own[name] = engine.tensor(bias.data, bias.shape);
    }
    return { params: { ...own, shared }, report };
  });
}

interface Factored {
  /** The experts' factors, group after group. */
  readonly a: Float64Array;
  /** The shared factors, group after group. */
  readonly b: Float64Array;
  readonly error: MoLAEError;
}

/** matrix = A B of each group, or with `turned` B A; A is what the experts keep. */
function factored(parts: readonly HostMatrix[], latent: number, turned: boolean): Factored {
  const found = parts.map((matrix) => {
    const { rows, columns, data } = matrix;
    const { u, s, v, rank } = svd(matrix);
    const left = new Float64Array(rows * latent);
    const right = new Float64Array(latent * columns);
    for (let q = 0; q < latent; q++) {
      const root = Math.sqrt(s[q] as number);
      for (let i = 0; i < rows; i++) left[i * latent + q] = (u[i * rank + q] as number) * root;
      for (let j = 0; j < columns; j++) right[q * columns + j] = (v[j * rank + q] as number) * root;
    }
    const made = new Float64Array(rows * columns);
    for (let i = 0; i < rows; i++) {
      for (let q = 0; q < latent; q++) {
        const x = left[i * latent + q] as number;
        for (let j = 0; j < columns; j++) {
          made[i * columns + j] = (made[i * columns + j] as number) + x * (right[q * columns + j] as number);
        }
      }
    }
    return { a: turned ? right : left, b: turned ? left : right, s, given: data, made };
  });
  const joined = (lists: readonly Float64Array[]): Float64Array => {
    const all = new Float64Array(lists.reduce((total, { length }) => total + length, 0));
    let at = 0;
    for (const list of lists) {
      all.set(list, at);
      at += list.length;
    }
    return all;
  };
  return {
    a: joined(found.map(({ a }) => a)),
    b: joined(found.map(({ b }) => b)),
    error: {
      ...relativeError(found.map(({ given, made }) => [given, made] as const)),
      singularValues: found.map(({ s }) => s),
    },
  };
}

function groupsOf({ data, shape }: HostStack, group: number, matrix: (data: Float64Array) => HostMatrix): HostMatrix[] {
  const [count = 0, rows = 0, columns = 0] = shape;
  const size = group * rows * columns;
  return Array.from({ length: count / group }, (_, g) => matrix(data.slice(g * size, (g + 1) * size)));
}

/** Matrices one after the other -> next to each other. */
function sideBySide(
  data: Float64Array,
  n: number,
  { rows, columns }: { readonly rows: number; readonly columns: number },
): HostMatrix {
  const wide = new Float64Array(data.length);
  for (let i = 0; i < data.length; i++) {
    const [c, r, e] = [i % columns, Math.floor(i / columns) % rows, Math.floor(i / (columns * rows))];
    wide[(r * n + e) * columns + c] = data[i] as number;
  }
  return { data: wide, rows, columns: n * columns };
}

/** Rows `from` to `from + n` of every matrix of a stack. */
function part({ data, shape }: HostStack, from: number, n: number): HostStack {
  const [count = 0, rows = 0, columns = 0] = shape;
  const taken = new Float64Array(count * n * columns);
  for (let e = 0; e < count; e++) {
    taken.set(data.subarray((e * rows + from) * columns, (e * rows + from + n) * columns), e * n * columns);
  }
  return { data: taken, shape: [count, n, columns] };
}
