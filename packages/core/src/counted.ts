// Counts calls, floating-point operations and bytes per op, as a decorator of `run`. An op without a formula of its own and
// without a kernel is counted as the smaller ops it is made of.
import type { Spec } from "./backend.ts";
import { consume, decorator, type Wrapped } from "./decorator.ts";
import type { Engine } from "./engine.ts";
import { alias } from "./engine.ts";
import { at } from "./op.ts";
import { release, runScope } from "./scope.ts";
import { sizeOf, type Tensor } from "./tensor.ts";

export interface OpCount {
  readonly calls: number;
  readonly flops: number;
  readonly bytes: number;
}

const bytesOf = (x: Spec): number => sizeOf(x.shape) * { f32: 4, i32: 4, f16: 2, bf16: 2, u8: 1 }[x.dtype];
const dim = (x: Spec | undefined, axis: number): number => x?.shape.at(axis) ?? 0;

/** FLOPs where the shapes tell them. Multiply and add count as two. */
const dense: Record<
  string,
  (inputs: readonly Spec[], results: readonly Spec[], attrs: { transposeA?: boolean }) => number
> = {
  matmul: ([a], [y], { transposeA = false }) => 2 * sizeOf(y?.shape ?? []) * dim(a, transposeA ? -2 : -1),
  linear: ([x], [y]) => 2 * sizeOf(y?.shape ?? []) * dim(x, -1),
  quantizedLinear: ([x], [y]) => 2 * sizeOf(y?.shape ?? []) * dim(x, -1),
  // scores and output; a causal mask halves neither here: it is what a dense evaluation costs
  attention: ([q, k, v]) =>
    2 * sizeOf(q?.shape ?? []) * dim(k, 1) + 2 * dim(q, 0) * dim(q, 1) * dim(q, 2) * dim(k, 1) * dim(v, -1),
  attentionGrad: ([q, k]) => 10 * sizeOf(q?.shape ?? []) * dim(k, 1),
};
/** FLOPs per dispatched row: how many rows there are only the device knows. The input that tells is `ends` (or ids). */
const ragged: Record<string, { readonly input: number; perRow(inputs: readonly Spec[]): number }> = {
  groupedMatmul: { input: 2, perRow: ([, w]) => 2 * dim(w, 1) * dim(w, 2) },
  quantizedGroupedMatmul: { input: 3, perRow: ([rows, codes]) => 2 * dim(rows, 1) * dim(codes, 1) },
  groupedOuter: { input: 2, perRow: ([a, b]) => 2 * dim(a, 1) * dim(b, 1) },
  moeExperts: {
    input: 3,
    perRow: ([, gateUp, down]) => 2 * dim(gateUp, 1) * dim(gateUp, 2) + 2 * dim(down, 1) * dim(down, 2),
  },
};

/**
 * An engine that counts what it runs. FLOPs of ops over ragged expert blocks are added by `settle()`, which reads the block sizes:
 * call it after the step.
 */
export function counted(inner: Engine): Engine & {
  readonly counts: ReadonlyMap<string, OpCount>;
  settle(): Promise<void>;
} {
  const counts = new Map<string, OpCount>();
  let pending: { readonly name: string; readonly sizes: Tensor; readonly experts: number; readonly perRow: number }[] =
    [];
  const count = (name: string, calls: number, flops: number, bytes: number): void => {
    const before = counts.get(name) ?? { calls: 0, flops: 0, bytes: 0 };
    counts.set(name, { calls: before.calls + calls, flops: before.flops + flops, bytes: before.bytes + bytes });
  };
  const level = decorator<Wrapped>(
    "counted",
    inner,
    () => self,
    (x) => ({ inner: x }),
  );
  const self: Engine = {
    ...level.members,
    run(op, inputs, attrs) {
      const lowered = inputs.map((x) => level.lower(x, op.name));
      const rows = ragged[op.name];
      const formula = dense[op.name];
      if (!rows && !formula && op.fallback && inner.explain(op, lowered, attrs) !== "kernel") {
        const composite = op.fallback;
        const results = runScope(inner.scopes, () => composite(inputs, attrs));
        consume(inputs.filter((x) => !results.includes(x)));
        return results;
      }
      const results = inner.run(op, lowered, attrs);
      const moved = [...inputs, ...results].reduce((n, x) => n + bytesOf(x), 0);
      count(op.name, 1, formula?.(inputs, results, attrs as object) ?? (rows ? 0 : at(results, 0).size), moved);
      if (rows) {
        const sizes = release(alias(at(lowered, rows.input)));
        pending.push({ name: op.name, sizes, experts: dim(inputs[1], 0), perRow: rows.perRow(inputs) });
      }
      const wrapped = results.map((y) => level.wrap({ inner: lowered.includes(y) ? alias(y) : y }));
      consume(inputs);
      return wrapped;
    },
  };
  return Object.assign(self, {
    counts,
    async settle() {
      const reads = pending;
      pending = [];
      try {
        for (const { name, sizes, experts, perRow } of reads) {
          const values = await sizes.data();
          // ends: the last one is the number of rows; ids: every id of a real expert is a row
          const dispatched =
            name === "moeExperts" ? values.filter((id) => id >= 0 && id < experts).length : (values.at(-1) ?? 0);
          count(name, 0, perRow * dispatched, 0);
        }
      } finally {
        for (const { sizes } of reads) sizes.dispose();
      }
    },
  });
}
