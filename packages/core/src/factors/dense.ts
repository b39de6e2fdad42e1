// What the conversions of trained experts share: reading the matrices of glu() or ffn() params to the host, and the report of what
// a factorisation lost. Private but for the report's type.
import type { Engine } from "../engine.ts";
import { ShapeError } from "../errors.ts";
import { cast } from "../ops/elementwise.ts";
import { leaves, show, type Tree } from "../tensor.ts";

/** How far matrices made from factors are from those that were given, in Frobenius norms relative to the latter; 0 within 1e-13. */
export interface FactorError {
  /** Of all matrices together. */
  readonly relative: number;
  /** Of each part: of each group of experts, or of each given expert. */
  readonly parts: readonly number[];
}

/** A stack of matrices on the host, row-major. */
export interface HostStack {
  readonly data: Float64Array;
  readonly shape: readonly number[];
}

/** Params of `glu` or `ffn` on the host: matrices `[experts, out, in]`, biases `[experts, out]`. */
export async function denseMatrices(
  what: string,
  dense: Tree,
): Promise<{
  readonly engine: Engine;
  readonly gated: boolean;
  readonly matrices: ReadonlyMap<string, HostStack>;
  readonly biases: ReadonlyMap<string, HostStack>;
}> {
  const found = leaves(dense);
  const names = found.map(([name]) => name);
  const gated = names.includes("gateUp");
  const wanted = [gated ? "gateUp" : "up", "down"];
  const [, first] = found.find(([name]) => name === wanted[0]) ?? [];
  const [, second] = found.find(([name]) => name === "down") ?? [];
  if (first === undefined || second === undefined || first.shape.length !== 3 || second.shape.length !== 3) {
    throw new ShapeError(
      `${what}: found ${found.map(([name, x]) => `${name} ${show(x)}`).join(", ") || "no parameters"}; expected those of ` +
        "glu or ffn: gateUp or up [experts, hidden, width], and down [experts, width, hidden]",
    );
  }
  const [experts, rows = 0, width] = first.shape;
  const [same, out, hidden = 0] = second.shape;
  if (experts !== same || width !== out || rows !== (gated ? 2 : 1) * hidden) {
    throw new ShapeError(
      `${what}: ${wanted[0]} is ${show(first)}, down is ${show(second)}; they do not belong together`,
    );
  }
  const stacks = await Promise.all(
    found.map(async ([name, x]): Promise<[string, HostStack]> => {
      const widened = cast(x, "f32");
      try {
        return [name, { data: Float64Array.from(await widened.data()), shape: x.shape }];
      } finally {
        if (widened !== x) widened.dispose();
      }
    }),
  );
  return {
    engine: first.engine,
    gated,
    matrices: new Map(stacks.filter(([name]) => wanted.includes(name))),
    biases: new Map(stacks.filter(([name]) => wanted.some((matrix) => name === `${matrix}Bias`))),
  };
}

/** The report of parts, each given and made. A matrix of zeros that stayed zero has the error 0. */
export function relativeError(
  parts: readonly (readonly [given: ArrayLike<number>, made: ArrayLike<number>])[],
): FactorError {
  const norms = parts.map(([given, made]) => {
    let [lost, all] = [0, 0];
    for (let i = 0; i < given.length; i++) {
      lost += ((given[i] as number) - (made[i] as number)) ** 2;
      all += (given[i] as number) ** 2;
    }
    return [lost, all] as const;
  });
  // What is within the rounding of float64 is nothing.
  const ratio = (lost: number, all: number): number => (lost <= 1e-26 * all ? 0 : Math.sqrt(lost / all));
  const total = norms.reduce(([a, b], [lost, all]) => [a + lost, b + all] as const, [0, 0] as const);
  return { relative: ratio(...total), parts: norms.map(([lost, all]) => ratio(lost, all)) };
}
