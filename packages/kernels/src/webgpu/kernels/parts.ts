// What kernel families share: cached programs, checks of dtypes, broadcasting as a few strides, and ranges of split tensors.
import type { DType, Operand, Spec } from "@switchyard/core";
import type { Gpu, Part, WebgpuHandle } from "../device.ts";
import { bytesPerElement, sizeOf } from "../formats.ts";

export type Input = Operand<WebgpuHandle>;
export type Result = Spec & { readonly reuse?: WebgpuHandle };

type Argument = string | number | boolean;
/**
 * Calls `make` once per combination of arguments: for variants of a program, so that no text is built twice.
 * @example const scaled = memo((dtype: string) => program({ key: `scaled ${dtype}`, ... })); gpu.run(scaled("f32"), ...);
 */
export function memo<A extends readonly Argument[], V>(make: (...args: A) => V): (...args: A) => V {
  const known = new Map<Argument, V>();
  return (...args) => {
    const key = args.length === 1 ? (args[0] as Argument) : args.join();
    let value = known.get(key);
    if (value === undefined) {
      value = make(...args);
      known.set(key, value);
    }
    return value;
  };
}

/** list[i] of a list that is known to be long enough. */
export function at<T>(list: readonly T[], i: number): T {
  const item = list[i];
  if (item === undefined) throw new RangeError(`webgpu: argument ${i} of ${list.length} is missing`);
  return item;
}

export const lastOf = (spec: Spec): number => spec.shape.at(-1) ?? 1;
/** Product of all dimensions but the last. */
export const rowsOf = (spec: Spec): number => sizeOf(spec.shape.slice(0, -1));
export const bytesOf = (spec: Spec): number => sizeOf(spec.shape) * bytesPerElement(spec.dtype);
/** Elements of a storage type in one 32-bit word. */
export const perWord = (dtype: DType): number => 4 / bytesPerElement(dtype);

// biome-ignore lint/suspicious/noExplicitAny: kernel tables hold ops of every attribute type
export type Refusal = (inputs: readonly Spec[], attrs: any) => string | undefined;
/**
 * For `kernel.unsupported`: refuses inputs of another dtype than the letters say, f (f32), i (i32), w (f32, bf16 or f16), n (f32 or
 * i32), ? (any); the last letter holds for all further inputs.
 * @example const kernel: Kernel<WebgpuHandle> = Object.assign(body, { unsupported: only("fi") });
 */
export const only =
  (letters: string): Refusal =>
  (inputs) => {
    for (let i = 0; i < inputs.length; i++) {
      const { dtype, format } = at(inputs, i);
      const letter = letters[Math.min(i, letters.length - 1)];
      const fits =
        letter === "?" ||
        (letter === "f" && dtype === "f32") ||
        (letter === "i" && dtype === "i32") ||
        (letter === "n" && (dtype === "f32" || dtype === "i32")) ||
        (letter === "w" && (dtype === "f32" || dtype === "bf16" || dtype === "f16"));
      if (!fits) return `input ${i} is ${dtype}`;
      if (format !== undefined) return `input ${i} has the format ${format}`;
    }
    return undefined;
  };

/** Invocations of a workgroup that goes over elements one by one. */
export const FLAT_LANES = 64;
/** Steps of one invocation: on a processor starting a workgroup costs as much as a thousand elements, a graphics card wants them all at once. */
export const flatSteps = (gpu: Gpu): number => (gpu.software ? 8 : 1);
/** `main` that runs `body` for every i below p.n, FLAT_LANES neighbours at a time. */
export const flatText = (steps: number, body: string): string =>
  steps === 1
    ? `fn main(group: u32, lane: u32) {
  let i = group * ${FLAT_LANES}u + lane;
  if (i >= p.n) { return; }
  ${body}
}`
    : `fn main(group: u32, lane: u32) {
  for (var step = 0u; step < ${steps}u; step++) {
    let i = (group * ${steps}u + step) * ${FLAT_LANES}u + lane;
    if (i >= p.n) { return; }
    ${body}
  }
}`;
export const flatGroups = (n: number, steps: number): number => Math.ceil(n / (FLAT_LANES * steps));

/** New storage for a result, filled by `body`; freed again if that throws (a tensor in several buffers, say). */
export function produce(gpu: Gpu, result: Spec, body: (y: WebgpuHandle) => void): WebgpuHandle {
  const y = gpu.alloc(result);
  try {
    body(y);
  } catch (error) {
    gpu.free(y);
    throw error;
  }
  return y;
}

/** One dimension of an iteration: its size, and for each operand the elements from one index to the next (0: repeated). */
export interface Dim {
  size: number;
  readonly strides: number[];
}

/** Row-major strides, in elements. */
export function stridesOf(shape: readonly number[]): number[] {
  const strides = new Array<number>(shape.length);
  let step = 1;
  for (let axis = shape.length - 1; axis >= 0; axis--) {
    strides[axis] = step;
    step *= at(shape, axis);
  }
  return strides;
}

/** Fewest dimensions, outermost first: those of size 1 vanish, neighbours that every operand walks alike become one. At least one is left. */
export function mergeDims(dims: readonly Dim[]): Dim[] {
  const merged: Dim[] = [];
  for (const { size, strides } of dims) {
    if (size === 1) continue;
    const outer = merged.at(-1);
    if (outer?.strides.every((s, i) => s === at(strides, i) * size)) {
      outer.size *= size;
      strides.forEach((s, i) => {
        outer.strides[i] = s;
      });
    } else merged.push({ size, strides: [...strides] });
  }
  if (merged.length === 0) merged.push({ size: 1, strides: (dims[0]?.strides ?? []).map(() => 1) });
  return merged;
}

/** NumPy broadcasting of operands of these shapes to `shape`, as few dimensions. */
export function broadcastDims(shape: readonly number[], shapes: readonly (readonly number[])[]): Dim[] {
  const steps = shapes.map(() => 1);
  const dims: Dim[] = [];
  for (let axis = shape.length - 1; axis >= 0; axis--) {
    const strides = shapes.map((own, i) => {
      const d = own[axis - shape.length + own.length] ?? 1;
      const stride = d === 1 ? 0 : at(steps, i);
      steps[i] = at(steps, i) * d;
      return stride;
    });
    dims.unshift({ size: at(shape, axis), strides });
  }
  return mergeDims(dims);
}

/**
 * Visits the ranges of elements in which none of the tensors changes its buffer: one range unless a tensor is split. All have the same
 * number of elements, laid out alike (views may be split at other places). `offsets` are elements into each part, `first` is the
 * range's place in the whole.
 */
export function eachRange(
  handles: readonly WebgpuHandle[],
  dtypes: readonly DType[],
  visit: (parts: readonly Part[], offsets: readonly number[], first: number, count: number) => void,
): void {
  const sizes = dtypes.map(bytesPerElement);
  const total = (handles[0]?.bytes ?? 0) / at(sizes, 0);
  const index = handles.map(() => 0);
  const offsets = handles.map(() => 0);
  for (let first = 0; first < total; ) {
    const parts = handles.map((handle, i) => at(handle.parts, at(index, i)));
    const count = Math.min(...parts.map((part, i) => part.bytes / at(sizes, i) - at(offsets, i)));
    visit(parts, [...offsets], first, count);
    first += count;
    for (let i = 0; i < offsets.length; i++) {
      offsets[i] = at(offsets, i) + count;
      if (at(offsets, i) * at(sizes, i) < at(parts, i).bytes) continue;
      offsets[i] = 0;
      index[i] = at(index, i) + 1;
    }
  }
}
