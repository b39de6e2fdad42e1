// Elements in other places: transpose, slice, concat. Reshape is a view.
import type { Kernel } from "@switchyard/core";
import { at, type Body, type Calls, type GpujsHandle, type Input, sizeOf, type Value, type Work } from "../calls.ts";
import { floatsElse } from "../host.ts";
import { type Program, positions, simplify, split, stridesOf, walkSizes } from "../program.ts";

/** A copy of x in which axis a has dims[a] elements, strides[a] apart, the first one at `from`. */
export function copy(
  work: Work,
  x: Value,
  dims: readonly number[],
  strides: readonly number[],
  from = 0,
): Promise<Value> {
  const walk = simplify({ dims, strides: [strides] });
  const { sizes, text } = positions(walk.dims.length, ["x"]);
  const program: Program = {
    name: `copy ${walk.dims.length}`,
    arrays: ["x"],
    sizes: ["first", ...sizes],
    body: `${text}\n  return x[first + at_x];`,
  };
  return work.run(program, sizeOf(dims), [x], { first: from, ...walkSizes(walk, ["x"]) });
}

const joining: Program = {
  name: "concat",
  arrays: ["a", "b"],
  // Elements of a and of b in each row of the result.
  sizes: ["m", "n"],
  body: `
  const width = m + n;
  ${split("row", "column", "i", "width")}
  let y = 0;
  if (column < m) { y = a[row * m + column]; } else { y = b[row * n + column - m]; }
  return y;`,
};

const transpose: Body = async ([x], [y], { perm }: { perm: readonly number[] }, work) => {
  if (!x || !y) return [];
  const strides = stridesOf(x.shape);
  return [
    await copy(
      work,
      x.value,
      y.shape,
      perm.map((axis) => at(strides, axis)),
    ),
  ];
};

const slice: Body = async ([x], [y], { start }: { start: readonly number[] }, work) => {
  if (!x || !y) return [];
  const strides = stridesOf(x.shape);
  const from = start.reduce((sum, first, axis) => sum + first * at(strides, axis), 0);
  return [await copy(work, x.value, y.shape, strides, from)];
};

const concat: Body = async (inputs, [y], { axis }: { axis: number }, work) => {
  const row = (x: Pick<Input, "shape">): number => sizeOf(x.shape.slice(axis));
  const parts = inputs.filter((x) => sizeOf(x.shape) > 0);
  const [first, ...others] = parts;
  if (!first || !y) return [work.value("f32", new Float32Array(sizeOf(y?.shape ?? [])))];
  if (others.length === 0) return [await copy(work, first.value, [first.value.length], [1])];
  const rows = sizeOf(first.shape.slice(0, axis));
  let joined = first.value;
  let m = row(first);
  for (const x of others) {
    const n = row(x);
    joined = await work.run(joining, rows * (m + n), [joined, x.value], { m, n });
    m += n;
  }
  return [joined];
};

export function shapeKernels(calls: Calls): {
  readonly [P in "reshape" | "transpose" | "slice" | "concat"]: Kernel<GpujsHandle>;
} {
  return {
    reshape: ([x]) => (x ? [x.handle] : []),
    transpose: calls.kernel("transpose", floatsElse("transpose", transpose)),
    slice: calls.kernel("slice", floatsElse("slice", slice)),
    concat: calls.kernel("concat", floatsElse("concat", concat)),
  };
}
