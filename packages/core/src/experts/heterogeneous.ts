// Different kinds of experts as one set, and one adapter's share of a plan (MoA 2506.05928: one router per block gives a weight to every
// adapter of the block, whatever it is and wherever it sits).
import { ShapeError, UnsupportedError } from "../errors.ts";
import { child, inside } from "../moe/parts.ts";
import type { DensePlan, Experts, Loss, Observe, SparsePlan } from "../moe/plan.ts";
import { add, less, mul, where } from "../ops/elementwise.ts";
import { addRows, takeRows } from "../ops/rows.ts";
import { hostConstant, slice } from "../ops/shape.ts";
import { show, type Tensor } from "../tensor.ts";

/**
 * Sets of different experts behind one: the experts of the first set, then those of the second, and so on; all give rows of
 * one width. Params, losses and observed parameters stand under the names of the sets ("lora.a"). Each set is run on its
 * own blocks only, moved to the front on the device, in as many rows as all of them have. With a set that looks at
 * neighbours (a convolution) the whole does so too. There is no `mixed`: parameters of different kinds cannot be averaged.
 * Throws ShapeError when there is no set or one called "shared" or with a dot, and in `apply` when the widths differ.
 *
 * @example heterogeneous({ lora: lora({ count: 2, width, rank: 8, ...from }), adapter: adapter({ count: 1, width, ...from }) })
 */
export function heterogeneous(sets: Readonly<Record<string, Experts>>): Experts {
  const parts = Object.entries(sets);
  if (parts.length === 0) throw new ShapeError("heterogeneous: there is no set of experts; expected at least one");
  // Paths such as "lora.a" and "lora.shared.a" must stay what they say.
  const odd = parts.find(([name]) => name === "shared" || name === "" || name.includes("."));
  if (odd)
    throw new ShapeError(`heterogeneous: a set is called "${odd[0]}"; expected a name without dots, not "shared"`);
  const starts = parts.map((_, i) => parts.slice(0, i).reduce((total, [, { count }]) => total + count, 0));
  const count = parts.reduce((total, [, one]) => total + one.count, 0);
  const spatial = parts.some(([, one]) => one.spatial ?? false);
  const streamed = parts.find(([, { stream }]) => stream !== undefined);
  if (streamed) {
    throw new UnsupportedError(`heterogeneous: the experts of "${streamed[0]}" are streamed; load them into memory`);
  }

  return {
    count,
    params: Object.fromEntries(parts.map(([name, { params }]) => [name, params])),
    ...(spatial ? { spatial } : {}),
    apply(params, rows, ends, layout, observe) {
      const losses: Record<string, Loss> = {};
      let output: Tensor | undefined;
      for (const [i, [name, experts]] of parts.entries()) {
        const blocks = ownBlocks(rows, ends, { first: starts[i] ?? 0, count: experts.count });
        const own = child(params, name);
        if (own === undefined) throw new ShapeError(`heterogeneous: the parameters lack "${name}"`);
        const tell: Observe | undefined = observe && ((path, x, e) => observe(`${name}.${path}`, x, e));
        const applied = experts.apply(own, takeRows(rows, blocks.ids), blocks.ends, layout, tell);
        for (const [loss, value] of Object.entries(applied.losses ?? {})) losses[`${name}.${loss}`] = value;
        const placed = addRows(applied.output, blocks.ids, rows.shape[0] ?? 0); // [n, out]
        if (output && output.shape[1] !== placed.shape[1]) {
          throw new ShapeError(
            `heterogeneous: "${name}" gives ${show(applied.output)}, the sets before it ${show(output)}; expected one width`,
          );
        }
        output = output ? add(output, placed) : placed;
      }
      if (output === undefined) throw new ShapeError("heterogeneous: there is no set of experts");
      return { output, ...(Object.keys(losses).length > 0 ? { losses } : {}) };
    },
  };
}

interface Range {
  readonly first: number;
  readonly count: number;
}

/** Where the rows of experts first..first + count - 1 stand, -1 beyond them: `ids [n]`; and their ends, counted from the first. */
function ownBlocks(
  rows: Tensor,
  ends: Tensor,
  { first, count }: Range,
): { readonly ids: Tensor; readonly ends: Tensor } {
  const n = rows.shape[0] ?? 0;
  const places = hostConstant(
    rows,
    Int32Array.from({ length: n }, (_, i) => i),
    [n],
  );
  const last = slice(ends, [first + count - 1], [1]);
  const own = slice(ends, [first], [count]);
  if (first === 0) return { ids: where(less(places, last), places, -1), ends: own };
  const start = slice(ends, [first - 1], [1]);
  const moved = add(places, start);
  return { ids: where(less(moved, last), moved, -1), ends: add(own, mul(start, -1)) };
}

/**
 * The plan of the experts first..first + count - 1 alone, numbered from 0: what one adapter needs of the decision of a
 * router for all of them, where each sits at a place of its own. Weights are those of the whole plan.
 */
export function planPart<P extends SparsePlan | DensePlan>(plan: P, range: Range): P;
export function planPart(plan: SparsePlan | DensePlan, { first, count }: Range): SparsePlan | DensePlan {
  if (!Number.isInteger(first) || !Number.isInteger(count) || first < 0 || count < 1)
    throw new ShapeError(`planPart: first ${first}, count ${count}; expected whole numbers from 0 and from 1`);
  if (plan.kind === "dense") {
    const [tokens = 0, experts = 0] = plan.weights.shape;
    if (first + count > experts)
      throw new ShapeError(`planPart: experts ${first}..${first + count - 1} of a plan for ${experts}`);
    return { kind: "dense", weights: slice(plan.weights, [0, first], [tokens, count]) };
  }
  const moved = add(plan.experts, -first);
  const experts = where(inside(moved, count), moved, -1);
  const { bound, ...rest } = plan;
  return { ...rest, ...(bound === undefined ? {} : { bound }), experts };
}
