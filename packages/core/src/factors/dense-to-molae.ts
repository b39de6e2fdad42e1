// Trained experts to latent ones (MoLAE 2503.23100): truncated singular value decompositions of the stacked matrices of each group.
import { ShapeError } from "../errors.ts";
import { checkDown, checkGroup } from "../experts/molae.ts";
import { checkSizes } from "../experts/parts.ts";
import type { Tensor, Tree } from "../tensor.ts";
import { denseMatrices, type FactorError, type HostStack, relativeError } from "./dense.ts";
import { type HostMatrix, svd } from "./svd.ts";

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
  checkDown("denseToMoLAE", down);
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
