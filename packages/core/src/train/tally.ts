// The numbers of a step: small tensors gathered for one transfer, and what they say once it has arrived.
import { lower } from "../autodiff.ts";
import type { TypedArray } from "../backend.ts";
import { ShapeError } from "../errors.ts";
import type { Pass } from "../moe/plan.ts";
import { at } from "../op.ts";
import { cast } from "../ops/elementwise.ts";
import { sum, sumSquares } from "../ops/reduce.ts";
import { concat, constant, reshape } from "../ops/shape.ts";
import { show, type Tensor } from "../tensor.ts";

/** How many tokens a batch has. */
export interface BatchFacts {
  /** 1 = real token. */
  readonly mask?: Tensor;
  /** Real tokens; default: the mask's sum, or the rows of the logits. */
  readonly tokens?: number;
}

/** A step's numbers so far. The methods that take tensors run inside a scope, whose result must hold `parts`. */
export interface Tally {
  readonly result: { loss: number; losses: Record<string, number>; gradientNorm: number; tokens: number };
  readonly parts: readonly Tensor[];
  /** One forward pass that makes up `share` of the step; returns the loads of its layers. */
  pass(out: Pass, share: number): readonly Tensor[];
  tokens(out: Pass, facts: BatchFacts): void;
  loss(name: string, value: Tensor, weight: number): void;
  norm(gradients: readonly Tensor[]): void;
  /** Everything gathered, `[n]`. */
  vector(): Tensor;
  /** The one transfer: adds to `result`, loads and metrics, and frees the vector; then gathering starts anew. */
  read(vector: Tensor): Promise<void>;
  /** Per layer, summed over the passes. */
  loads(): Float64Array[];
  /** Per layer, averaged over the passes. */
  metrics(): Record<string, Float64Array>[];
}

/** An empty tally of a model with `layers` MoE layers. */
export function tallyOf(layers: number): Tally {
  const parts: Tensor[] = [];
  const takers: { readonly size: number; take(values: TypedArray): void }[] = [];
  // Per layer and metric, what each forward pass said.
  const found: Record<string, TypedArray[]>[] = Array.from({ length: layers }, () => ({}));
  const result: Tally["result"] = { loss: 0, losses: {}, gradientNorm: 0, tokens: 0 };

  const collect = (x: Tensor, take: (values: TypedArray) => void): void => {
    parts.push(reshape(cast(lower(x), "f32"), [x.size]));
    takers.push({ size: x.size, take });
  };
  const collectOne = (x: Tensor, take: (value: number) => void): void =>
    collect(x, (values) => take(values[0] as number));
  const summed = (name: string, lists: readonly TypedArray[], weight: number): Float64Array => {
    const total = new Float64Array(lists[0]?.length ?? 0);
    for (const values of lists) {
      if (values.length !== total.length) {
        throw new ShapeError(`metric "${name}" has ${total.length} values in one pass and ${values.length} in another`);
      }
      for (let i = 0; i < total.length; i++) total[i] = (total[i] as number) + (values[i] as number) * weight;
    }
    return total;
  };
  return {
    result,
    parts,
    pass(out, share) {
      if (out.layers.length !== layers) {
        throw new ShapeError(
          `trainer: forward returned ${out.layers.length} MoE layers, the task has ${layers} routers`,
        );
      }
      collectOne(one(out.loss, "the task's loss"), (value) => {
        result.loss += value * share;
      });
      return out.layers.map(({ metrics }, layer) => {
        const load = metrics?.load;
        if (!load) {
          throw new ShapeError(
            `trainer: MoE layer ${layer} has no metrics.load; run it through moe(), or add expertLoad(plan)`,
          );
        }
        const lists = at(found, layer);
        for (const [name, x] of Object.entries(metrics)) {
          collect(x, (values) => {
            lists[name] = [...(lists[name] ?? []), values];
          });
        }
        return load;
      });
    },
    tokens(out, facts) {
      collectOne(tokenCount(out, facts), (value) => {
        result.tokens += value;
      });
    },
    loss(name, value, weight) {
      collectOne(one(value, `loss "${name}"`), (x) => {
        result.losses[name] = (result.losses[name] ?? 0) + x * weight;
      });
    },
    norm(gradients) {
      const squares = gradients.map((gradient) => reshape(sumSquares(gradient), [1]));
      collectOne(sum(concat(squares, 0)), (value) => {
        result.gradientNorm = Math.sqrt(value);
      });
    },
    vector: () => concat(parts, 0),
    async read(vector) {
      try {
        const values = await vector.data();
        let from = 0;
        for (const { size, take } of takers) {
          take(values.slice(from, from + size));
          from += size;
        }
      } finally {
        vector.dispose();
        parts.length = 0;
        takers.length = 0;
      }
    },
    loads: () => found.map(({ load = [] }) => summed("load", load, 1)),
    metrics: () =>
      found.map(({ load: _, ...lists }) =>
        Object.fromEntries(Object.entries(lists).map(([name, all]) => [name, summed(name, all, 1 / all.length)])),
      ),
  };
}

/** Real tokens of a batch, []. */
export const tokenCount = ({ logits }: Pass, { mask, tokens }: BatchFacts): Tensor =>
  tokens === undefined && mask ? sum(mask) : constant(logits, tokens ?? logits.size / (logits.shape.at(-1) || 1));

/** x as [], or an error that says what it should have been. */
export const one = (x: Tensor, what: string): Tensor => {
  if (x.size === 1) return reshape(x, []);
  throw new ShapeError(`trainer: ${what} must be one number, it is ${show(x)}; average or sum it first`);
};
