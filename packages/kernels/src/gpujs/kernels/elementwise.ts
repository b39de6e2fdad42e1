// One element at a time: arithmetic with broadcasting, functions of one variable, activations and their gradients.
import type { Kernel } from "@switchyard/core";
import { type Body, type Calls, type GpujsHandle, type Input, lastOf, only, sizeOf } from "../calls.ts";
import { floatsElse, onHost } from "../host.ts";
import { broadcastStrides, logarithm, type Program, positions, simplify, split, walkSizes } from "../program.ts";

// Texts for a variable `v`. None of them overflows on the way to a finite result.
const sigmoid = `
  const t = Math.exp(-Math.abs(v));
  let s = 1 / (1 + t);
  if (v < 0) { s = t / (1 + t); }`;
const tanhOf = (v: string): string => `
  const a = Math.abs(${v});
  const e = Math.exp(-2 * a);
  let y = (1 - e) / (1 + e);
  const a2 = a * a;
  // The quotient loses digits near 0; the series has none to lose.
  if (a < 0.2) { y = a * (1 - a2 * (0.33333333 - a2 * (0.13333333 - a2 * (0.053968254 - a2 * 0.021869488)))); }
  if (${v} < 0) { y = -y; }`;
/** A polynomial near 0, 1 - exp(polynomial) beyond: about 2 ulp. */
const erfOf = (v: string): string => `
  const a = Math.min(Math.abs(${v}), 4);
  const a2 = a * a;
  let p = -0.000596761703;
  p = p * a2 + 0.00499119423;
  p = p * a2 - 0.0267681349;
  p = p * a2 + 0.112819925;
  p = p * a2 - 0.376125336;
  p = p * a2 + 0.128379166;
  let y = p * a + a;
  if (a > 0.927734375) {
    let r = -0.000017285347 * a + 0.000383197126;
    r = r * a2 - 0.00388396438 * a + 0.0242546219;
    r = r * a - 0.106777877;
    r = r * a - 0.634846687;
    r = r * a - 0.128717512;
    y = 1 - Math.exp(r * a - a);
  }
  if (${v} < 0) { y = -y; }`;

const gelu = `const u = v * 0.70710678;${erfOf("u")}`;
const geluTanh = `const u = v * (1 + 0.044715 * v * v) * 0.79788456;${tanhOf("u")}`;

const unary: Readonly<Record<string, string>> = {
  recip: "return 1 / v;",
  exp: "return Math.exp(v);",
  log: `${logarithm("y", "v")}
  return y;`,
  sqrt: "return Math.sqrt(v);",
  floor: "return Math.floor(v);",
  tanh: `${tanhOf("v")}
  return y;`,
  erf: `${erfOf("v")}
  return y;`,
  relu: "return Math.max(v, 0);",
  sigmoid: `${sigmoid}
  return s;`,
  silu: `${sigmoid}
  return v * s;`,
  softplus: "return Math.max(v, 0) + Math.log(1 + Math.exp(-Math.abs(v)));",
};

/** Of the argument and the gradient of the result, `g`. */
const grads: Readonly<Record<string, string>> = {
  reluGrad: `let y = 0;
  if (v > 0) { y = g; }
  return y;`,
  siluGrad: `${sigmoid}
  return g * s * (1 + v * (1 - s));`,
};

type Family =
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
  | "floor";

const binary = {
  add: "return a[at_a] + b[at_b];",
  mul: "return a[at_a] * b[at_b];",
  sub: "return a[at_a] - b[at_b];",
  div: "return a[at_a] / b[at_b];",
  maximum: "return Math.max(a[at_a], b[at_b]);",
  less: "return a[at_a] < b[at_b] ? 1 : 0;",
};
const where = "return a[at_a] != 0 ? b[at_b] : c[at_c];";

const perElement = (name: string, text: string, numbers: readonly string[] = []): Program => ({
  name,
  arrays: ["x"],
  numbers,
  body: `const v = x[i];\n${text}`,
});

/** A body that broadcasts its inputs, which the text calls a, b, c. */
export function broadcasting(name: string, text: string): Body {
  return async (inputs, [y], _, work) => {
    const shape = y?.shape ?? [];
    const operands = ["a", "b", "c"].slice(0, inputs.length);
    const walk = simplify({ dims: shape, strides: inputs.map((x) => broadcastStrides(x.shape, shape)) });
    const { sizes, text: index } = positions(walk.dims.length, operands);
    const program: Program = {
      name: `${name} ${walk.dims.length}`,
      arrays: operands,
      sizes,
      body: `${index}\n  ${text}`,
    };
    const values = inputs.map((x) => x.value);
    return [await work.run(program, sizeOf(shape), values, walkSizes(walk, operands))];
  };
}

/** One program over the whole input. */
const mapping =
  (program: Program): Body =>
  async (inputs, [y], attrs, work) => {
    const params = Object.fromEntries((program.numbers ?? []).map((name) => [name, attrs[name]]));
    const values = inputs.map((x) => x.value);
    return [await work.run(program, sizeOf(y?.shape ?? []), values, params)];
  };

const gating: Program = {
  name: "swiglu",
  arrays: ["x"],
  sizes: ["h"],
  body: `
  ${split("row", "column", "i", "h")}
  const v = x[row * 2 * h + column];
  ${sigmoid}
  return v * s * x[row * 2 * h + h + column];`,
};
const gatingGrad: Program = {
  name: "swigluGrad",
  arrays: ["x", "dy"],
  sizes: ["h"],
  body: `
  ${split("half", "column", "i", "h")}
  ${split("row", "isUp", "half", "2")}
  const v = x[row * 2 * h + column];
  ${sigmoid}
  const g = dy[row * h + column];
  let result = g * v * s;
  if (isUp < 1) { result = g * x[row * 2 * h + h + column] * s * (1 + v * (1 - s)); }
  return result;`,
};
const half = (x: Input): { readonly h: number } => ({ h: lastOf(x) / 2 });

export function elementwiseKernels(
  calls: Calls,
): Readonly<Record<string, Kernel<GpujsHandle>>> & { readonly [P in Family | "cast"]: Kernel<GpujsHandle> } {
  const one = (name: string): Kernel<GpujsHandle> =>
    calls.kernel(name, mapping(perElement(name, unary[name] ?? "")), only("f"));
  const two = (name: keyof typeof binary): Kernel<GpujsHandle> => {
    const floats = broadcasting(name, binary[name]);
    const body = name === "div" || name === "sub" ? floats : floatsElse(name, floats);
    return calls.kernel(name, body, name === "div" || name === "sub" ? only("f") : undefined);
  };
  const grad = (name: string, text: string): Kernel<GpujsHandle> => {
    const program: Program = { name, arrays: ["x", "dy"], body: `const v = x[i];\nconst g = dy[i];\n${text}` };
    return calls.kernel(name, mapping(program), only("ff"));
  };
  const geluBody =
    (exact: Program, approximate: Program): Body =>
    (inputs, results, attrs, work) =>
      mapping(attrs.approximate === "tanh" ? approximate : exact)(inputs, results, attrs, work);
  const geluGrad = (name: string, text: string): Program => ({
    name,
    arrays: ["x", "dy"],
    body: `const v = x[i];\n${text}`,
  });

  return {
    add: two("add"),
    mul: two("mul"),
    maximum: two("maximum"),
    less: two("less"),
    sub: two("sub"),
    div: two("div"),
    where: calls.kernel("where", floatsElse("where", broadcasting("where", where), 1)),

    recip: one("recip"),
    exp: one("exp"),
    log: one("log"),
    sqrt: one("sqrt"),
    tanh: one("tanh"),
    erf: one("erf"),
    floor: one("floor"),
    relu: one("relu"),
    sigmoid: one("sigmoid"),
    silu: one("silu"),
    softplus: one("softplus"),
    ...Object.fromEntries(Object.entries(grads).map(([name, text]) => [name, grad(name, text)])),

    affine: calls.kernel(
      "affine",
      mapping(perElement("affine", "return v * scale + shift;", ["scale", "shift"])),
      only("f"),
    ),
    gelu: calls.kernel(
      "gelu",
      geluBody(
        perElement("gelu", `${gelu}\n  return v * (0.5 + 0.5 * y);`),
        perElement("geluTanh", `${geluTanh}\n  return v * (0.5 + 0.5 * y);`),
      ),
      only("f"),
    ),
    geluGrad: calls.kernel(
      "geluGrad",
      geluBody(
        geluGrad("geluGrad", `${gelu}\n  return dy[i] * (0.5 + 0.5 * y + v * 0.39894228 * Math.exp(-0.5 * v * v));`),
        geluGrad(
          "geluTanhGrad",
          `${geluTanh}
  const inner = (1 + 0.134145 * v * v) * 0.79788456;
  return dy[i] * (0.5 + 0.5 * y + 0.5 * v * (1 - y * y) * inner);`,
        ),
      ),
      only("ff"),
    ),
    swiglu: calls.kernel(
      "swiglu",
      async ([x], [y], _, work) => (x && y ? [await work.run(gating, sizeOf(y.shape), [x.value], half(x))] : []),
      only("f"),
    ),
    swigluGrad: calls.kernel(
      "swigluGrad",
      async ([x, dy], [y], _, work) =>
        x && dy && y ? [await work.run(gatingGrad, sizeOf(y.shape), [x.value, dy.value], half(x))] : [],
      only("ff"),
    ),

    cast: calls.kernel("cast", onHost("cast")),
  };
}
