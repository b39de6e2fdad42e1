// Elementwise kernels: broadcasting is turned into a few strides on the host; equal shapes become one long row.
import type { DType, Kernel } from "@switchyard/core";
import { at, bits, type Device, type Input, lastOf, only, type Result, rowsOf, sizeOf } from "../device.ts";
import type { Block } from "../heap.ts";

/** Elements of a unit of work, as in assembly/elementwise.ts. */
const UNIT = 16;
const units = (elements: number): number => Math.ceil(elements / UNIT);
/** Estimated nanoseconds per element: bound by memory; by a polynomial. */
const MOVED = 0.4;
const COMPUTED = 1.5;

export interface Strides {
  /** Length of a row, and the sizes of the dimensions around it. */
  readonly inner: number;
  readonly outer: readonly number[];
  /** For each input, elements from row to row in each outer dimension, and 0 or 1 along the row. */
  readonly inputs: readonly { readonly outer: readonly number[]; readonly step: number }[];
}

/** Broadcast inputs as rows: dimensions of size 1 vanish, neighbours that every input walks alike become one. */
export function collapse(shape: readonly number[], shapes: readonly (readonly number[])[]): Strides {
  const dims: { size: number; strides: number[] }[] = [];
  const sizes = shapes.map(() => 1);
  for (let axis = shape.length - 1; axis >= 0; axis--) {
    const size = at(shape, axis);
    const strides = shapes.map((own, i) => {
      const d = own[axis - shape.length + own.length] ?? 1;
      const stride = d === 1 ? 0 : at(sizes, i);
      sizes[i] = at(sizes, i) * d;
      return stride;
    });
    if (size === 1) continue;
    const inside = dims[0];
    if (inside && strides.every((s, i) => s === at(inside.strides, i) * inside.size)) inside.size *= size;
    else dims.unshift({ size, strides });
  }
  const row = dims.pop() ?? { size: 1, strides: shapes.map(() => 1) };
  return {
    inner: row.size,
    outer: dims.map((d) => d.size),
    inputs: shapes.map((_, i) => ({ outer: dims.map((d) => at(d.strides, i)), step: at(row.strides, i) })),
  };
}

function broadcast(device: Device, kernel: string, inputs: readonly Input[], result: Result): Block {
  const y = device.result(result);
  const total = sizeOf(result.shape);
  if (total === 0) return y;
  const lengths = inputs.map((x) => sizeOf(x.shape));
  if (lengths.every((n) => n === total)) {
    // Nothing is broadcast: one long row.
    const flat = [y.ptr, total, total, 0, inputs.length, 0];
    for (const x of inputs) flat.push(x.handle.ptr, 1);
    device.launch(kernel, flat, units(total), total * MOVED);
    return y;
  }
  const {
    inner,
    outer,
    inputs: strides,
  } = collapse(
    result.shape,
    inputs.map((x) => x.shape),
  );
  const dims = outer.length === 0 ? 0 : device.table([...outer, ...strides.flatMap((s) => s.outer)]);
  const job = [y.ptr, total, inner, outer.length, inputs.length, dims];
  inputs.forEach((x, i) => {
    job.push(x.handle.ptr, at(strides, i).step);
  });
  device.launch(kernel, job, units(total), total * MOVED + (total / inner) * 5 * outer.length);
  return y;
}

function unary(device: Device, kernel: string, x: Input, result: Result, job: readonly number[], cost: number): Block {
  const y = device.result(result);
  const total = sizeOf(result.shape);
  device.launch(kernel, [x.handle.ptr, y.ptr, ...job], units(total), total * cost);
  return y;
}

const castKinds: Readonly<Record<DType, number>> = { f32: 0, bf16: 1, f16: 2, i32: 3, u8: 4 };

/** Converts x to another storage type: floats become whole numbers by dropping the fraction, saturating. */
export function cast(device: Device, x: Input, y: Block, dtype: DType): void {
  const total = sizeOf(x.shape);
  const job = [x.handle.ptr, y.ptr, total, castKinds[x.dtype], castKinds[dtype]];
  const wide = dtype === "f32" && (x.dtype === "bf16" || x.dtype === "f16");
  const kernel = wide ? (x.dtype === "bf16" ? "widenBf16" : "widenF16") : "cast";
  device.launch(kernel, job, units(total), total * (wide ? MOVED : 2));
}

type Primitive =
  | "add"
  | "mul"
  | "maximum"
  | "less"
  | "where"
  | "recip"
  | "exp"
  | "log"
  | "sqrt"
  | "tanh"
  | "erf"
  | "floor"
  | "cast";

export function elementwiseKernels(
  device: Device,
): Readonly<Record<string, Kernel<Block>>> & { readonly [P in Primitive]: Kernel<Block> } {
  const two = (name: string): Kernel<Block> =>
    device.kernel(
      name,
      (inputs, [spec]) =>
        spec ? [broadcast(device, inputs[0]?.dtype === "i32" ? `${name}Int` : name, inputs, spec)] : [],
      only("n"),
    );
  const one = (name: string, cost: number): Kernel<Block> =>
    device.kernel(name, ([x], [spec]) => (x && spec ? [unary(device, name, x, spec, [0, 0, 0], cost)] : []), only("f"));
  const gradient = (name: string, kernelOf: (attrs: { approximate?: string }) => string): Kernel<Block> =>
    device.kernel(
      name,
      ([x, dy], [spec], attrs) =>
        x && dy && spec ? [unary(device, kernelOf(attrs), x, spec, [0, 0, dy.handle.ptr], 2 * COMPUTED)] : [],
      only("f"),
    );
  const geluOf = (suffix: string) => (attrs: { approximate?: string }) =>
    (attrs.approximate === "tanh" ? "geluTanh" : "gelu") + suffix;

  return {
    add: two("add"),
    mul: two("mul"),
    maximum: two("maximum"),
    less: two("less"),
    sub: two("sub"),
    div: device.kernel("div", (inputs, [spec]) => (spec ? [broadcast(device, "div", inputs, spec)] : []), only("f")),
    // The kernel walks a, b and the condition in that order.
    where: device.kernel(
      "where",
      ([c, a, b], [spec]) => (c && a && b && spec ? [broadcast(device, "where", [a, b, c], spec)] : []),
      only("fnn"),
    ),
    recip: one("recip", MOVED),
    exp: one("exp", COMPUTED),
    log: one("log", COMPUTED),
    sqrt: one("sqrt", 1),
    tanh: one("tanh", 2 * COMPUTED),
    erf: one("erf", 2 * COMPUTED),
    floor: one("floor", MOVED),
    relu: one("relu", MOVED),
    sigmoid: one("sigmoid", COMPUTED),
    silu: one("silu", COMPUTED),
    softplus: one("softplus", 2 * COMPUTED),
    gelu: device.kernel(
      "gelu",
      ([x], [spec], attrs) => (x && spec ? [unary(device, geluOf("")(attrs), x, spec, [0, 0, 0], 2 * COMPUTED)] : []),
      only("f"),
    ),
    affine: device.kernel(
      "affine",
      ([x], [spec], { scale, shift }) =>
        x && spec ? [unary(device, "affine", x, spec, [bits(scale), bits(shift), 0], MOVED)] : [],
      only("f"),
    ),
    reluGrad: gradient("reluGrad", () => "reluGrad"),
    siluGrad: gradient("siluGrad", () => "siluGrad"),
    geluGrad: gradient("geluGrad", geluOf("Grad")),

    swiglu: device.kernel(
      "swiglu",
      ([x], [spec]) => {
        if (!x || !spec) return [];
        const y = device.result(spec);
        const n = lastOf(spec);
        device.launch("swiglu", [x.handle.ptr, y.ptr, n, 0], rowsOf(spec), sizeOf(spec.shape) * COMPUTED);
        return [y];
      },
      only("f"),
    ),
    swigluGrad: device.kernel(
      "swigluGrad",
      ([x, dy], [spec]) => {
        if (!x || !dy || !spec) return [];
        const dx = device.result(spec);
        const job = [x.handle.ptr, dx.ptr, lastOf(dy), dy.handle.ptr];
        device.launch("swigluGrad", job, rowsOf(dy), sizeOf(dy.shape) * 2 * COMPUTED);
        return [dx];
      },
      only("f"),
    ),

    cast: device.kernel("cast", ([x], [spec]) => {
      if (!x || !spec) return [];
      const y = device.result(spec);
      cast(device, x, y, spec.dtype);
      return [y];
    }),

    adamw: device.kernel(
      "adamw",
      (inputs, specs, { lr, beta1, beta2, eps, weightDecay, correction1, correction2 }) => {
        const results = specs.map((spec) => device.result(spec));
        const total = sizeOf(at(specs, 0).shape);
        const job = [...inputs.map((x) => x.handle.ptr), ...results.map((y) => y.ptr)];
        const numbers = [
          lr,
          beta1,
          1 - beta1,
          beta2,
          1 - beta2,
          eps,
          1 - lr * weightDecay,
          lr / correction1,
          1 / correction2,
        ];
        job.push(...numbers.map(bits));
        device.launch("adamw", job, units(total), total * 2);
        return results;
      },
      only("f"),
    ),
    sgd: device.kernel(
      "sgd",
      (inputs, specs, { lr, momentum, weightDecay, nesterov }) => {
        const results = specs.map((spec) => device.result(spec));
        const total = sizeOf(at(specs, 0).shape);
        const addresses = [...inputs.map((x) => x.handle.ptr), ...results.map((y) => y.ptr)];
        const job = [...addresses, bits(lr), bits(momentum), bits(weightDecay), nesterov ? 1 : 0];
        device.launch("sgd", job, units(total), total);
        return results;
      },
      only("f"),
    ),
  };
}
