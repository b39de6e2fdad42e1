// Elementwise kernels, with NumPy broadcasting. Everything is computed in double precision and rounded when it is stored.
import type { Kernel, TypedArray } from "../backend.ts";
import { UnsupportedError } from "../errors.ts";
import { erf } from "./erf.ts";
import { broadcastStrides, positions } from "./index-math.ts";
import { type CpuHandle, type CpuOperand, input, numbers, raw, resultSpec, type Storage } from "./storage.ts";

type Family = "add" | "mul" | "maximum" | "less" | "where" | Unary | "cast";
type Unary = "recip" | "exp" | "log" | "sqrt" | "tanh" | "erf" | "floor";

/** Reads `x` as if it had the shape of the result. */
const reader = (x: CpuOperand, shape: readonly number[]): ((i: number) => number) => {
  const data = raw(x);
  if (x.shape.length === shape.length && x.shape.every((n, axis) => n === shape[axis])) {
    return (i) => data[i] as number;
  }
  const at = positions(shape, broadcastStrides(x.shape, shape));
  return (i) => data[at[i] as number] as number;
};

const refuse16 = (name: string, operands: readonly CpuOperand[]): void => {
  const found = operands.find((x) => x.dtype === "f16" || x.dtype === "bf16");
  if (found !== undefined) {
    throw new UnsupportedError(`${name}: arithmetic is f32, found a ${found.dtype} operand; cast it to f32 first`);
  }
};

export const elementwise = (storage: Storage): { readonly [P in Family]: Kernel<CpuHandle> } => {
  const unary =
    (name: Unary, f: (x: number) => number): Kernel<CpuHandle> =>
    (inputs, results) => {
      refuse16(name, inputs);
      const x = raw(input(inputs, 0));
      const y = storage.zeros(resultSpec(results));
      for (let i = 0; i < y.length; i++) y[i] = f(x[i] as number);
      return [storage.hold(y)];
    };

  const binary =
    (name: string, f: (a: number, b: number) => number, integers = f): Kernel<CpuHandle> =>
    (inputs, results) => {
      refuse16(name, inputs);
      const spec = resultSpec(results);
      const a = reader(input(inputs, 0), spec.shape);
      const b = reader(input(inputs, 1), spec.shape);
      const g = input(inputs, 0).dtype === "i32" ? integers : f;
      const y = storage.zeros(spec);
      for (let i = 0; i < y.length; i++) y[i] = g(a(i), b(i));
      return [storage.hold(y)];
    };

  return {
    add: binary("add", (a, b) => a + b),
    mul: binary("mul", (a, b) => a * b, Math.imul),
    maximum: binary("maximum", Math.max),
    less: binary("less", (a, b) => (a < b ? 1 : 0)),

    where(inputs, results) {
      const spec = resultSpec(results);
      const condition = reader(input(inputs, 0), spec.shape);
      const a = reader(input(inputs, 1), spec.shape);
      const b = reader(input(inputs, 2), spec.shape);
      const y = storage.zeros(spec);
      for (let i = 0; i < y.length; i++) y[i] = condition(i) !== 0 ? a(i) : b(i);
      return [storage.hold(y)];
    },

    recip: unary("recip", (x) => 1 / x),
    exp: unary("exp", Math.exp),
    log: unary("log", Math.log),
    sqrt: unary("sqrt", Math.sqrt),
    tanh: unary("tanh", Math.tanh),
    erf: unary("erf", erf),
    floor: unary("floor", Math.floor),

    cast(inputs, results) {
      const x = input(inputs, 0);
      const { dtype } = resultSpec(results);
      const y: TypedArray = x.dtype === dtype ? raw(x).slice() : storage.encode(numbers(x), dtype);
      return [storage.hold(y)];
    },
  };
};
