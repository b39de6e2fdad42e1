// The experts of muMoE (2402.12550): every layer is one tensor of experts x inputs x outputs, kept in factors, so that thousands of
// experts cost what a dense layer costs. With coefficients a over the experts, x with a 1 appended, and * entry by entry:
//   CP: y = U3 ((U1ᵀ a) * (U2ᵀ x));   TR: y_o = tr(A(a) Z(x) G3[:, o, :]), A(a) = Σ_e a_e A_e, Z(x) = Σ_i x_i Z_i
// Several expert modes multiply: further factors in CP, A(a) A'(a') in TR. The mixed matrix is never built.
import { ShapeError, UnsupportedError } from "../errors.ts";
import type { Activation, Initial } from "../moe/experts.ts";
import { activations, biasRows } from "../moe/parts.ts";
import type { Experts, MergePlan } from "../moe/plan.ts";
import { mul, where } from "../ops/elementwise.ts";
import { linear, matmul } from "../ops/matmul.ts";
import { takeRows } from "../ops/rows.ts";
import { concat, full, hostConstant, reshape, slice } from "../ops/shape.ts";
import { show, sizeOf, type Tensor, type Tree } from "../tensor.ts";
import { checkSizes, type Draw, leafAt, parameters, type Shapes, uniformWithin } from "./parts.ts";

export type MuMoEExpertsOptions = {
  /** Experts in all. */
  readonly count: number;
  /** Width of the tokens. */
  readonly width: number;
  /** Width between the two layers; absent: one layer only, without activation. */
  readonly hidden?: number;
  /** Width of the result; default `width`. */
  readonly output?: number;
  /** Factorisation; default "cp". */
  readonly form?: "cp" | "tr";
  /**
   * CP: the number of terms. TR: the bonds of the ring, one before each expert mode, before the input and before the output, or one number
   * for all.
   */
  readonly rank: number | readonly number[];
  /** Experts of each mode, whose product is `count` (the last mode counts fastest); default one mode. */
  readonly modes?: readonly number[];
  /** Between the layers; default "gelu". */
  readonly activation?: Activation;
  /** Whether a 1 is appended to the inputs of every layer; default true. */
  readonly bias?: boolean;
} & Initial;

export interface MuMoEExperts extends Experts {
  /** Names of the layers in their order: "linear", or "up" and "down". */
  readonly layers: readonly string[];
  mixed(params: Tree, hidden: Tensor, plan: MergePlan): Tensor;
  /**
   * The matrix `[out, in]` of one expert in one layer (default: the first), with its bias `[out]` where there is one: the contraction with
   * one-hot coefficients, for inspection and pruning.
   */
  expertMatrix(params: Tree, expert: number, layer?: string): { readonly matrix: Tensor; readonly bias?: Tensor };
}

/**
 * Experts for the router `muMoE` (its "merge" plan with one `[groups, experts of the mode]` per mode), and for any other one: `apply` is
 * the product with one-hot coefficients. Two layers with the activation between them and the same coefficients, or one linear layer.
 *
 * Params of each layer, R terms or bonds p, q, r, here for "up": `up [experts, R]` (TR `[experts, p, q]`), with several modes
 * `shared.upMode0` and so on instead; `shared.upInput [R, in]` (TR `[q, r, in]`), `shared.upBias [R]` (TR `[q, r]`),
 * `shared.upOutput [out, R]` (TR `[out, p, r]`). New ones: the first expert mode N(1, 1) (TR on the diagonals, else 0),
 * further modes 1, the others uniform within 1/sqrt(inputs) (which inputs is our choice: those of the product with that factor).
 *
 * @example muMoEExperts({ count: 64, width: 256, hidden: 512, rank: 128, engine, random })
 */
export function muMoEExperts(options: MuMoEExpertsOptions): MuMoEExperts {
  const { count, width, hidden, output = width, form = "cp", activation = "gelu", bias = true } = options;
  const { modes = [count] } = options;
  checkSizes("muMoEExperts", { count, width, output, ...(hidden === undefined ? {} : { hidden }) });
  for (const [i, n] of modes.entries()) checkSizes("muMoEExperts", { [`modes[${i}]`]: n });
  if (modes.length === 0 || sizeOf(modes) !== count) {
    throw new ShapeError(
      `muMoEExperts: modes ${modes.join(" x ")} make ${sizeOf(modes)} experts; expected count = ${count}`,
    );
  }
  if (form !== "cp" && form !== "tr") throw new UnsupportedError(`muMoEExperts: form "${form}"; expected "cp" or "tr"`);
  const ranks = ranksOf(form, options.rank, modes.length);
  const layers: readonly Layer[] =
    hidden === undefined
      ? [{ name: "linear", inputs: width, outputs: output }]
      : [
          { name: "up", inputs: width, outputs: hidden },
          { name: "down", inputs: hidden, outputs: output },
        ];
  const algebra = form === "cp" ? cp(ranks) : tr(ranks);
  const factor = ({ name }: Layer, mode: number): string => (modes.length === 1 ? name : `shared.${name}Mode${mode}`);
  const shapes: Shapes = Object.fromEntries(
    layers.flatMap((layer): [string, readonly number[]][] => {
      const { name, inputs, outputs } = layer;
      const own = algebra.shapes(inputs, outputs);
      return [
        ...modes.map((n, mode): [string, number[]] => [factor(layer, mode), [n, ...algebra.slice(mode)]]),
        [`shared.${name}Input`, own.input],
        ...(bias ? [[`shared.${name}Bias`, own.input.slice(0, -1)] as [string, number[]]] : []),
        [`shared.${name}Output`, own.output],
      ];
    }),
  );
  const act = activations[activation];

  /** What the expert modes contribute for each row of coefficients, [groups, ...]. */
  const contracted = (params: Tree, layer: Layer, coefficients: readonly Tensor[]): Tensor =>
    coefficients
      .map((a, mode) => {
        const x = leafAt(params, factor(layer, mode)); // [experts, ...]
        const [experts = 0, ...rest] = x.shape;
        return reshape(matmul(a, reshape(x, [experts, sizeOf(rest)])), [a.shape[0] ?? 0, ...rest]);
      })
      .reduce((left, right) => algebra.join(left, right));
  /** The same for every single expert, [count, ...]. */
  const table = (params: Tree, layer: Layer): Tensor =>
    modes
      .map((_, mode) => leafAt(params, factor(layer, mode)))
      .reduce((left, right) => {
        const [m = 0, ...before] = left.shape;
        const [n = 0, ...after] = right.shape;
        const joined = algebra.join(reshape(left, [m, 1, ...before]), reshape(right, [1, n, ...after]));
        return reshape(joined, [m * n, ...joined.shape.slice(2)]);
      });
  const inputOf = (params: Tree, { name }: Layer): Tensor => leafAt(params, `shared.${name}Input`);
  const outputOf = (params: Tree, { name }: Layer): Tensor => leafAt(params, `shared.${name}Output`);
  const biasOf = (params: Tree, { name }: Layer): Tensor | undefined =>
    bias ? leafAt(params, `shared.${name}Bias`) : undefined;

  const run = (params: Tree, rows: Tensor, parts: (layer: Layer) => Tensor): Tensor => {
    let x = rows;
    layers.forEach((layer, i) => {
      if (i > 0) x = act(x);
      const projected = flatLinear(x, inputOf(params, layer), biasOf(params, layer)); // [n, bonds]
      x = algebra.product(parts(layer), projected, outputOf(params, layer)); // [n, out]
    });
    return x;
  };
  const draw: Draw = (path, shape, random) => {
    const layer = layers.find(({ name }) => path === name || path.startsWith(`shared.${name}`));
    const part = path.slice(`shared.${layer?.name}`.length);
    const mode = part === "" ? 0 : part.startsWith("Mode") ? Number(part.slice("Mode".length)) : undefined;
    if (mode !== undefined) {
      const n = sizeOf(shape);
      const values = mode === 0 ? random.host("normal", n).map((z) => 1 + z) : new Float64Array(n).fill(1);
      return form === "cp" ? values : values.map((x, i) => (onDiagonal(i, shape) ? x : 0));
    }
    const inputs = part === "Output" ? sizeOf(shape.slice(1)) : (layer?.inputs ?? 1) + Number(bias); // the 1 is one more
    return uniformWithin(random, shape, Math.sqrt(1 / inputs));
  };
  const checkExpert = (expert: number): void => {
    if (Number.isInteger(expert) && expert >= 0 && expert < count) return;
    throw new ShapeError(`muMoEExperts: expert ${expert} of ${count}; expected a whole number from 0 to ${count - 1}`);
  };

  return {
    count,
    layers: layers.map(({ name }) => name),
    params: parameters("muMoEExperts", shapes, options, draw),
    apply(params, rows, ends) {
      const n = rows.shape[0] ?? 0;
      // What lies beyond the last block may be anything, NaN included.
      const filled = biasRows(full(rows, [count, 1], 1), ends, n); // [n, 1]
      const parts = (layer: Layer): Tensor => {
        const all = table(params, layer);
        const slices = all.shape.slice(1);
        return reshape(biasRows(reshape(all, [count, sizeOf(slices)]), ends, n), [n, ...slices]);
      };
      return { output: run(params, where(filled, rows, 0), parts) };
    },
    mixed(params, tokens, { groups, coefficients }) {
      checkCoefficients(coefficients, modes);
      if (groups.size !== tokens.shape[0]) {
        throw new ShapeError(
          `muMoEExperts: groups are ${show(groups)} for hidden ${show(tokens)}; expected one per token`,
        );
      }
      return run(params, tokens, (layer) => takeRows(contracted(params, layer, coefficients), groups));
    },
    expertMatrix(params, expert, name = layers[0]?.name) {
      checkExpert(expert);
      const layer = layers.find((one) => one.name === name);
      if (layer === undefined) {
        throw new ShapeError(
          `muMoEExperts: no layer "${name}"; the layers are ${layers.map((one) => one.name).join(", ")}`,
        );
      }
      return outputOf(params, layer).engine.scope(() => {
        const input = inputOf(params, layer); // [bonds..., in]
        const given = biasOf(params, layer);
        const whole = given ? concat([input, reshape(given, [...given.shape, 1])], -1) : input;
        let rest = expert;
        const hot = modes.map((n, mode) => {
          const below = sizeOf(modes.slice(mode + 1));
          const own = Math.floor(rest / below);
          rest -= own * below;
          return hostConstant(
            input,
            Float32Array.from({ length: n }, (_, e) => Number(e === own)),
            [1, n],
          );
        });
        const both = algebra.matrix(contracted(params, layer, hot), whole, outputOf(params, layer)); // [out, in (+ 1)]
        if (!bias) return { matrix: both };
        const { inputs, outputs } = layer;
        return {
          matrix: slice(both, [0, 0], [outputs, inputs]),
          bias: reshape(slice(both, [0, inputs], [outputs, 1]), [outputs]),
        };
      });
    },
  };
}

interface Layer {
  readonly name: string;
  readonly inputs: number;
  readonly outputs: number;
}

/** What tells CP from TR. Bonds stay separate axes in parameters and are flat in products. */
interface Algebra {
  /** Shape of one expert's slice in that mode. */
  slice(mode: number): readonly number[];
  shapes(inputs: number, outputs: number): { readonly input: number[]; readonly output: number[] };
  /** Slices of two neighbouring modes, leading axes broadcast. */
  join(left: Tensor, right: Tensor): Tensor;
  /** slices [n, ...], projected inputs [n, bonds] -> [n, out]. */
  product(slices: Tensor, projected: Tensor, output: Tensor): Tensor;
  /** One slice [1, ...], input [bonds..., in] -> [out, in]. */
  matrix(slice: Tensor, input: Tensor, output: Tensor): Tensor;
}

function cp(ranks: readonly number[]): Algebra {
  const [rank = 1] = ranks;
  return {
    slice: () => [rank],
    shapes: (inputs, outputs) => ({ input: [rank, inputs], output: [outputs, rank] }),
    join: mul,
    product: (slices, projected, output) => linear(mul(slices, projected), output),
    matrix: (slice, input, output) => matmul(mul(output, slice), input),
  };
}

function tr(ranks: readonly number[]): Algebra {
  const modes = ranks.length - 2;
  const bond = (i: number): number => ranks[i] ?? 1;
  const [p, q, r] = [bond(0), bond(modes), bond(modes + 1)];
  return {
    slice: (mode) => [bond(mode), bond(mode + 1)],
    shapes: (inputs, outputs) => ({ input: [q, r, inputs], output: [outputs, p, r] }),
    join: (left, right) => matmul(left, right),
    product(slices, projected, output) {
      const [n = 0] = slices.shape;
      const closed = matmul(slices, reshape(projected, [n, q, r])); // [n, p, r]
      return linear(reshape(closed, [n, p * r]), reshape(output, [output.shape[0] ?? 0, p * r]));
    },
    matrix(slice, input, output) {
      const inputs = input.shape.at(-1) ?? 0;
      const closed = matmul(reshape(slice, [p, q]), reshape(input, [q, r * inputs])); // [p, r * in]
      return matmul(reshape(output, [output.shape[0] ?? 0, p * r]), reshape(closed, [p * r, inputs]));
    },
  };
}

function ranksOf(form: "cp" | "tr", rank: number | readonly number[], modes: number): readonly number[] {
  const wanted = form === "cp" ? 1 : modes + 2;
  const ranks = typeof rank === "number" ? new Array<number>(wanted).fill(rank) : rank;
  if (ranks.length !== wanted || ranks.some((r) => !Number.isInteger(r) || r < 1)) {
    throw new ShapeError(
      `muMoEExperts: rank is [${ranks.join(", ")}]; expected ${wanted === 1 ? "one whole number" : `${wanted} whole numbers`} from 1`,
    );
  }
  return ranks;
}

function checkCoefficients(coefficients: readonly Tensor[], modes: readonly number[]): void {
  if (coefficients.length !== modes.length) {
    throw new UnsupportedError(
      `these experts have ${modes.length} expert modes, the merge plan has ${coefficients.length}; give router and experts the same modes`,
    );
  }
  coefficients.forEach((a, mode) => {
    if (a.shape.length === 2 && a.shape[1] === modes[mode] && a.shape[0] === coefficients[0]?.shape[0]) return;
    throw new ShapeError(
      `merge plan: coefficients of mode ${mode} are ${show(a)}; expected [groups, ${modes[mode]}], as many groups in each mode`,
    );
  });
}

/** x [n, in] times the matrix [bonds..., in], plus a bias [bonds...]: [n, all bonds]. */
function flatLinear(x: Tensor, w: Tensor, bias?: Tensor): Tensor {
  const inputs = w.shape.at(-1) ?? 1;
  const bonds = w.size / inputs;
  return linear(x, reshape(w, [bonds, inputs]), bias && reshape(bias, [bonds]));
}

const onDiagonal = (i: number, shape: readonly number[]): boolean => {
  const [rows = 1, columns = 1] = shape.slice(-2);
  const place = i % (rows * columns);
  return Math.floor(place / columns) === place % columns;
};
