// Kernels as text: one output element per thread, flat arrays in and out, gathers only. Every array is one-dimensional,
// so that a reshaped tensor is the same device array.

/**
 * A kernel of this adapter. The name is its key in the cache, so two programs may not share one.
 * In the body `i` is the index of the output element; sizes and numbers go by their names.
 */
export interface Program {
  readonly name: string;
  readonly arrays: readonly string[];
  /** Whole numbers: constants of the kernel in some modes, arguments in others. */
  readonly sizes?: readonly string[];
  /** Arguments in every mode: they change from call to call. */
  readonly numbers?: readonly string[];
  /** Statements of gpu.js's JavaScript that return the value of element i. */
  readonly body: string;
}

/** Index arithmetic of gpu.js is f32: whole numbers are exact up to here, and no array may be longer. */
export const MOST_ELEMENTS = 2 ** 24;

/** The function that gpu.js compiles; `constant` sizes are read from the kernel's constants. */
export function sourceOf({ arrays, sizes = [], numbers = [], body }: Program, constant: boolean): string {
  const parameters = [...arrays, ...(constant ? [] : sizes), ...numbers];
  const constants = constant ? sizes.map((name) => `  const ${name} = this.constants.${name};`) : [];
  return [
    `function(${parameters.join(", ")}) {`,
    ...constants,
    "  const i = this.thread.x;",
    ...body.trim().split("\n"),
    "}",
  ].join("\n");
}

/**
 * Statements that define `q`, the whole quotient of two whole numbers. Division on a GPU is not exact: floor() may land
 * one beside the quotient, and the two comparisons put that right.
 */
export const divide = (q: string, x: string, by: string): string => `
  let ${q} = Math.floor(${x} / ${by});
  if (${q} * ${by} > ${x}) { ${q} -= 1; }
  if (${q} * ${by} + ${by} <= ${x}) { ${q} += 1; }`;

/** Statements that split an index: `row` and `column` of rows with `width` elements. */
export const split = (row: string, column: string, x: string, width: string): string => `${divide(row, x, width)}
  const ${column} = ${x} - ${row} * ${width};`;

/** Statements that define `y`, the logarithm of `x`. Some drivers answer log(0) with a finite number. */
export const logarithm = (y: string, x: string): string => `
  let ${y} = Math.log(${x});
  if (${x} == 0) { ${y} = -1 / Math.abs(${x}); }`;

/** How the elements of a result of shape `dims` are found in each operand. */
export interface Walk {
  readonly dims: readonly number[];
  /** Per operand, a stride for each axis. */
  readonly strides: readonly (readonly number[])[];
}

/** The same walk with as few axes as possible: those of size 1 go, neighbours in one line merge. */
export function simplify({ dims, strides }: Walk): Walk {
  const merged: { size: number; strides: number[] }[] = [];
  dims.forEach((size, axis) => {
    if (size === 1) return;
    const own = strides.map((operand) => operand[axis] ?? 0);
    const outer = merged.at(-1);
    if (outer?.strides.every((stride, operand) => stride === (own[operand] ?? 0) * size)) {
      outer.size *= size;
      outer.strides = own;
    } else {
      merged.push({ size, strides: own });
    }
  });
  if (merged.length === 0) merged.push({ size: 1, strides: strides.map(() => 0) });
  return {
    dims: merged.map(({ size }) => size),
    strides: strides.map((_, operand) => merged.map((axis) => axis.strides[operand] ?? 0)),
  };
}

/** Statements that define the position `at_x` of element i in each operand x, for walks of a given rank. */
export function positions(
  rank: number,
  operands: readonly string[],
): { readonly sizes: string[]; readonly text: string } {
  const lines: string[] = [];
  let rest = "i";
  for (let axis = rank - 1; axis > 0; axis--) {
    lines.push(split(`rest${axis}`, `axis${axis}`, rest, `d${axis}`));
    rest = `rest${axis}`;
  }
  for (const x of operands) {
    const terms = Array.from({ length: rank }, (_, axis) => `${axis === 0 ? rest : `axis${axis}`} * ${x}${axis}`);
    lines.push(`  const at_${x} = ${terms.join(" + ")};`);
  }
  const outer = Array.from({ length: rank - 1 }, (_, axis) => `d${axis + 1}`);
  const strides = operands.flatMap((x) => Array.from({ length: rank }, (_, axis) => `${x}${axis}`));
  return { sizes: [...outer, ...strides], text: lines.join("\n") };
}

/** The sizes of `positions` for a simplified walk. */
export function walkSizes({ dims, strides }: Walk, operands: readonly string[]): Record<string, number> {
  const sizes: Record<string, number> = {};
  dims.forEach((size, axis) => {
    if (axis > 0) sizes[`d${axis}`] = size;
    operands.forEach((x, operand) => {
      sizes[`${x}${axis}`] = strides[operand]?.[axis] ?? 0;
    });
  });
  return sizes;
}

/** Row-major strides. */
export function stridesOf(shape: readonly number[]): number[] {
  const strides = new Array<number>(shape.length).fill(1);
  for (let axis = shape.length - 2; axis >= 0; axis--)
    strides[axis] = (strides[axis + 1] ?? 1) * (shape[axis + 1] ?? 1);
  return strides;
}

/** Strides that read an array of shape `from` as if it had the larger shape `to`. */
export function broadcastStrides(from: readonly number[], to: readonly number[]): number[] {
  const own = stridesOf(from);
  const missing = to.length - from.length;
  return to.map((_, axis) => (axis < missing || from[axis - missing] === 1 ? 0 : (own[axis - missing] ?? 0)));
}
