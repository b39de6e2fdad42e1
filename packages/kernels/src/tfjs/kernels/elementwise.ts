// Arithmetic, functions of one variable, activations, and conversions between storage types.
import type { Kernel, PrimitiveName, Spec } from "@switchyard/core";
import { type Device, numbers, same, sizeOf } from "../device.ts";
import { formats, type Half } from "../half.ts";
import type { TfTensor } from "../tf.ts";

type Primitives = Extract<
  PrimitiveName,
  "add" | "mul" | "maximum" | "less" | "where" | "recip" | "exp" | "log" | "sqrt" | "tanh" | "erf" | "floor" | "cast"
>;
type Table = { readonly [P in Primitives]: Kernel<TfTensor> } & { readonly [fused: string]: Kernel<TfTensor> };

export function elementwiseKernels(device: Device): Table {
  const { tf, kernel } = device;
  const unary = (f: (x: TfTensor) => TfTensor): Kernel<TfTensor> => kernel(({ x }) => f(x(0)));
  const binary = (f: (a: TfTensor, b: TfTensor) => TfTensor): Kernel<TfTensor> => kernel(({ x }) => f(x(0), x(1)));

  const silu = (x: TfTensor): TfTensor => tf.mul(x, tf.sigmoid(x));
  /** dy times the slope of silu: s (1 + x (1 - s)). */
  const siluGrad = (x: TfTensor, dy: TfTensor): TfTensor => {
    const s = tf.sigmoid(x);
    return tf.mul(dy, tf.mul(s, tf.add(tf.mul(x, tf.sub(1, s)), 1)));
  };
  /** [gate | up] of the last axis. */
  const halves = (x: TfTensor): [gate: TfTensor, up: TfTensor] => {
    const half = (x.shape.at(-1) ?? 0) / 2;
    const begin = x.shape.map(() => 0);
    const size = [...x.shape.slice(0, -1), half];
    return [tf.slice(x, begin, size), tf.slice(x, [...begin.slice(0, -1), half], size)];
  };
  const geluInner = (x: TfTensor): TfTensor =>
    tf.mul(tf.mul(x, tf.add(tf.mul(tf.square(x), 0.044715), 1)), Math.sqrt(2 / Math.PI));
  /** The share of x that passes: Φ(x), or its tanh approximation. */
  const geluShare = (x: TfTensor, approximate: "none" | "tanh"): TfTensor => {
    const t = approximate === "tanh" ? tf.tanh(geluInner(x)) : tf.erf(tf.mul(x, Math.SQRT1_2));
    return tf.add(tf.mul(t, 0.5), 0.5);
  };

  return {
    add: binary(tf.add.bind(tf)),
    mul: binary(tf.mul.bind(tf)),
    maximum: binary(tf.maximum.bind(tf)),
    less: binary((a, b) => numbers(tf, tf.less(a, b))),
    where: kernel(({ x, spec }) => select(device, tf.cast(x(0), "bool"), x(1), x(2), spec().shape)),

    recip: unary(tf.reciprocal.bind(tf)),
    exp: unary(tf.exp.bind(tf)),
    log: unary((x) => log(device, x)),
    sqrt: unary(tf.sqrt.bind(tf)),
    tanh: unary(tf.tanh.bind(tf)),
    erf: unary(tf.erf.bind(tf)),
    floor: unary(tf.floor.bind(tf)),

    cast: (operands, results, attrs) => {
      const from = operands[0]?.dtype ?? "f32";
      return kernel<{ readonly dtype: Spec["dtype"] }>(({ x, attrs: { dtype } }) => convert(device, x(0), from, dtype))(
        operands,
        results,
        attrs,
      );
    },

    sub: binary(tf.sub.bind(tf)),
    div: binary(tf.div.bind(tf)),
    affine: kernel<{ readonly scale: number; readonly shift: number }>(({ x, attrs: { scale, shift } }) => {
      const scaled = scale === 1 ? x(0) : tf.mul(x(0), scale);
      return shift === 0 ? scaled : tf.add(scaled, shift);
    }),
    // tf.relu multiplies by 0 or 1 on WebGL, which makes NaN of -inf.
    relu: unary((x) => tf.maximum(x, 0)),
    reluGrad: binary((x, dy) => tf.mul(dy, numbers(tf, tf.greater(x, 0)))),
    sigmoid: unary(tf.sigmoid.bind(tf)),
    silu: unary(silu),
    siluGrad: binary(siluGrad),
    gelu: kernel<{ readonly approximate?: "none" | "tanh" }>(({ x, attrs: { approximate = "none" } }) =>
      tf.mul(x(0), geluShare(x(0), approximate)),
    ),
    geluGrad: kernel<{ readonly approximate?: "none" | "tanh" }>(({ x, attrs: { approximate = "none" } }) => {
      const share = geluShare(x(0), approximate);
      if (approximate === "none") {
        const density = tf.mul(tf.exp(tf.mul(tf.square(x(0)), -0.5)), 1 / Math.sqrt(2 * Math.PI));
        return tf.mul(x(1), tf.add(share, tf.mul(x(0), density)));
      }
      // share = (1 + t) / 2 with t = tanh(inner): its slope is 2 share (1 - share) inner'.
      const inner = tf.mul(tf.add(tf.mul(tf.square(x(0)), 3 * 0.044715), 1), Math.sqrt(2 / Math.PI));
      const slope = tf.mul(tf.mul(tf.mul(share, 2), tf.sub(1, share)), inner);
      return tf.mul(x(1), tf.add(share, tf.mul(x(0), slope)));
    }),
    swiglu: kernel(({ x }) => {
      const [gate, up] = halves(x(0));
      return tf.mul(silu(gate), up);
    }),
    swigluGrad: kernel(({ x }) => {
      const [gate, up] = halves(x(0));
      const s = tf.sigmoid(gate);
      const passed = tf.mul(gate, s);
      const slope = tf.add(s, tf.mul(passed, tf.sub(1, s)));
      const dy = x(1);
      return tf.concat([tf.mul(tf.mul(dy, up), slope), tf.mul(dy, passed)], dy.shape.length - 1);
    }),
  };
}

/** `a` where the bool mask holds, else `b`, all three broadcast to `shape`; a number is one of the other's dtype. */
export function select(
  device: Device,
  mask: TfTensor,
  a: TfTensor | number,
  b: TfTensor | number,
  shape: readonly number[],
): TfTensor {
  const { tf } = device;
  const size = [sizeOf(shape)];
  const integers = [a, b].some((x) => typeof x !== "number" && x.dtype === "int32");
  // Flat, because TensorFlow.js's Select takes at most four dimensions on its GPU backends.
  const flat = (x: TfTensor | number): TfTensor =>
    typeof x === "number"
      ? tf.fill(size, x, integers ? "int32" : "float32")
      : tf.reshape(spread(device, x, shape), size);
  return tf.reshape(tf.where(flat(mask), flat(a), flat(b)), [...shape]);
}

/**
 * x repeated to a shape that it broadcasts to. Neighbouring axes that are all repeated, or all not, count as one: from five dimensions
 * on TensorFlow.js repeats on the host, which WebGPU cannot read from.
 */
export function spread({ tf }: Device, x: TfTensor, shape: readonly number[]): TfTensor {
  if (same(x.shape, shape)) return x;
  const from: number[] = [];
  const to: number[] = [];
  let repeating: boolean | undefined;
  shape.forEach((d, axis) => {
    const own = x.shape[axis - shape.length + x.shape.length] ?? 1;
    if (d === 1) return;
    const last = to.length - 1;
    if (repeating === (own !== d)) {
      from[last] = (from[last] ?? 1) * own;
      to[last] = (to[last] ?? 1) * d;
    } else {
      from.push(own);
      to.push(d);
    }
    repeating = own !== d;
  });
  return tf.reshape(tf.broadcastTo(tf.reshape(x, from), to), [...shape]);
}

/** The natural logarithm, -inf at 0: GLSL and WGSL leave that to the device, and some give a finite number. */
export function log(device: Device, x: TfTensor): TfTensor {
  const { tf } = device;
  const y = tf.log(x);
  if (!device.compiles) return y;
  return select(device, tf.equal(x, 0), Number.NEGATIVE_INFINITY, y, x.shape);
}

// ---------------------------------------------------------------- conversions
function convert(device: Device, x: TfTensor, from: Spec["dtype"], to: Spec["dtype"]): TfTensor {
  const { tf } = device;
  const float = x.dtype === "float32" ? x : tf.cast(x, "float32");
  switch (to) {
    case "f32":
      return float;
    case "i32":
      return x.dtype === "int32" ? x : tf.cast(x, "int32"); // drops the fraction
    case "u8":
      return from === "u8" ? x : tf.cast(tf.clipByValue(x, 0, 255), "int32");
    case "f16":
    case "bf16":
      return from === to ? x : rounded(device, float, to);
    default:
      return to satisfies never;
  }
}

/** 2^-126 ... 2^127, exact on every device: none computes powers of two exactly. */
const FIRST_POWER = -126;
const powers = Float32Array.from({ length: 254 }, (_, i) => 2 ** (i + FIRST_POWER));

/**
 * x rounded to the nearest number of a 16-bit format, ties to even, without access to bits: the exponent is found by a logarithm and
 * corrected, everything else is products with powers of two, floor and comparisons, which are exact. Numbers that f32 devices flush
 * to zero stay zero.
 */
function rounded(device: Device, x: TfTensor, dtype: Half): TfTensor {
  const { tf } = device;
  const { fraction, bias, most } = formats[dtype];
  const table = tf.tensor(powers, [powers.length], "float32");
  const power = (e: TfTensor): TfTensor => tf.gather(table, tf.cast(tf.sub(e, FIRST_POWER), "int32"));
  const magnitude = tf.abs(x);
  // bf16 reaches as far down as f32 does: tiny numbers are rounded 2^64 times as large.
  const lifted = dtype === "bf16" ? numbers(tf, tf.less(magnitude, 2 ** -60)) : undefined;
  const lift = lifted && tf.add(tf.mul(lifted, 2 ** 64 - 1), 1);
  const a = tf.reshape(lift ? tf.mul(magnitude, lift) : magnitude, [x.size]);

  const lowest = dtype === "bf16" ? -100 : 1 - bias;
  // The smallest positive number stands in for 0, whose logarithm is none.
  const estimate = tf.floor(tf.mul(tf.log(tf.maximum(a, 2 ** -126)), Math.LOG2E));
  const near = tf.clipByValue(estimate, lowest, 126);
  const mantissa = tf.mul(a, power(tf.neg(near))); // in [1, 2) but for the logarithm's error
  const over = numbers(tf, tf.greaterEqual(mantissa, 2));
  const under = numbers(tf, tf.less(mantissa, 1));
  const exponent = tf.maximum(tf.sub(tf.add(near, over), under), lowest);

  const units = tf.mul(a, power(tf.sub(fraction, exponent)));
  const whole = tf.floor(units);
  const rest = tf.sub(units, whole);
  const odd = tf.sub(whole, tf.mul(tf.floor(tf.mul(whole, 0.5)), 2));
  const up = tf.maximum(numbers(tf, tf.greater(rest, 0.5)), tf.mul(numbers(tf, tf.equal(rest, 0.5)), odd));
  // In two steps: the power itself may lie below the smallest normal number.
  const value = tf.mul(tf.add(whole, up), power(tf.sub(exponent, fraction)));

  const flat = tf.reshape(x, [x.size]);
  const bounded = select(device, tf.greater(value, most), Number.POSITIVE_INFINITY, value, [x.size]);
  const lowered = lift ? tf.div(bounded, tf.reshape(lift, [x.size])) : bounded;
  const signed = select(device, tf.less(flat, 0), tf.neg(lowered), lowered, [x.size]);
  // Zeros, which have a sign, infinities and NaN are what they are.
  const changes = tf.logicalAnd(tf.lessEqual(a, 3.4028234663852886e38), tf.greater(a, 0));
  return tf.reshape(select(device, changes, signed, flat, [x.size]), x.shape);
}
