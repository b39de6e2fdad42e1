// MoGE (2504.09265): top-k whose input is kept group-sparse. The routing input z of a token, E numbers, is laid out as
// a map of height x width; neighbours form overlapping groups, and experts that lie together learn to answer together:
//   penalty = mean over tokens of Σ_i sqrt(Σ_j κ_ij z_j² + ε), j in the window of size x size around i, i included
// The released code has a Gaussian κ divided by its sum, takes only windows that lie wholly on the map, and divides the
// sum over i by their number and by size²: { kernel: "gaussian", padding: "valid", normalise: true }; it sums over
// tokens. Top-k, weights and balance loss stay those of top-k routing, and evaluation is unchanged.
import { add, hostConstant, matmul, mul, relu, ShapeError, sqrt, square, sum, type Tensor } from "@switchyard/core";
import { meanOverTokens, type Routed, type RouterInput, type RouterPlugin } from "@switchyard/core/moe";
import { checkK, checkNotNegative, checkWord, maskOf, type RouterCard } from "./parts.ts";
import { type TopKOptions, topK } from "./top-k.ts";

/** How the experts lie on the map, and how its neighbourhoods weigh. */
export interface ExpertMap {
  /** Rows of the map; default 0: the divisor of the number of experts nearest below its root, 2 for 8. */
  readonly height?: number;
  /** Rows and columns of a window, the paper's h; default 3. An even one reaches further up and left. */
  readonly size?: number;
  /** "uniform": κ = 1; "gaussian": κ = exp(-d² / 2σ²) with 1 in the middle. Default "uniform". */
  readonly kernel?: "uniform" | "gaussian";
  /** σ of the Gaussian, in experts; default 1. The released code for language models has 0.2. */
  readonly sigma?: number;
  /**
   * What lies beyond the edge: nothing ("zero"), or the opposite edge ("torus"); "valid": windows that reach beyond
   * it are left out. Default "zero".
   */
  readonly padding?: "zero" | "torus" | "valid";
  /**
   * κ divided by the sum of a whole window, the penalty by the number of windows and by size², as released; default
   * false.
   */
  readonly normalise?: boolean;
}

export interface MoGEOptions extends ExpertMap, TopKOptions {
  /** Weight of the penalty; default 0.001. */
  readonly penalty?: number;
  /** What the penalty sees of the logits: "logits" themselves, or their positive part ("relu"). Default "logits". */
  readonly scores?: "logits" | "relu";
}

/**
 * Top-k routing with the group penalty, and all options of `topK`. Params: `weight [experts, width]`, with `bias`
 * also `bias [experts]`. Throws ShapeError for options out of range; `init` where k or the height does not fit the
 * number of experts.
 *
 * @example moge({ k: 2, penalty: 0.001 })
 */
export function moge(options: MoGEOptions): RouterPlugin {
  const { penalty = 1e-3, scores = "logits", height, size, kernel, sigma, padding, normalise, ...rest } = options;
  const name = "moge";
  checkNotNegative(name, { penalty });
  checkWord(name, "scores", scores, ["logits", "relu"]);
  const map = filledMap(name, { height, size, kernel, sigma, padding, normalise });
  const inner = topK(rest);

  return {
    ...inner,
    name,
    options: { ...inner.options, penalty, scores, ...map },
    init(context) {
      checkK(name, rest.k, context.experts);
      windows(context.experts, map); // throws before training does
      const router = inner.init(context);
      const regular = (routed: Routed, input: RouterInput): Routed => {
        const { logits } = routed;
        if (!input.training || penalty === 0 || !logits) return routed;
        const z = scores === "relu" ? relu(logits) : logits;
        const value = groupPenalty(z, { ...map, ...maskOf(input) });
        return { ...routed, losses: { ...routed.losses, group: { value, weight: penalty } } };
      };
      const { select } = router;
      return {
        ...router,
        route: (params, input) => regular(router.route(params, input), input),
        ...(select ? { select: (logits: Tensor, input: RouterInput) => regular(select(logits, input), input) } : {}),
      };
    },
  };
}

/**
 * The group penalty of `z [tokens, experts]`, []: what `moge` adds, for any other router's logits or scores. `mask
 * [tokens]`: 1 = real token. `epsilon` keeps the root smooth at 0. Throws ShapeError where the map does not hold the
 * experts.
 */
export function groupPenalty(
  z: Tensor,
  options: ExpertMap & { readonly epsilon?: number; readonly mask?: Tensor } = {},
): Tensor {
  const { epsilon = 1e-8, mask, ...given } = options;
  const map = filledMap("groupPenalty", given);
  const experts = z.shape[1] ?? 0;
  const { weights, count } = windows(experts, map);
  const local = matmul(square(z), hostConstant(z, weights, [experts, count])); // [tokens, windows]: Σ_j κ_ij z_j²
  const total = sum(meanOverTokens(sqrt(add(local, epsilon)), mask));
  return map.normalise ? mul(total, 1 / (count * map.size ** 2)) : total;
}

interface MapSize {
  readonly height: number;
  readonly width: number;
}

/** The map that holds that many experts, row after row. Throws ShapeError unless the height divides their number. */
export function mapOf(experts: number, { height = 0 }: Pick<ExpertMap, "height"> = {}): MapSize {
  let rows = height;
  if (rows === 0) for (rows = Math.max(Math.floor(Math.sqrt(experts)), 1); experts % rows !== 0; ) rows--;
  if (experts % rows !== 0) {
    throw new ShapeError(`moge: ${experts} experts do not fill a map of height ${rows}; choose one of its divisors`);
  }
  return { height: rows, width: experts / rows };
}

type Filled = Required<ExpertMap>;

/**
 * κ `[experts, windows]`, row by row: column i holds the weights of window i. On a torus smaller than a window an
 * expert counts once, with its largest weight.
 */
function windows(experts: number, map: Filled): { readonly weights: Float64Array; readonly count: number } {
  const { height, width } = mapOf(experts, map);
  const { size, kernel, sigma, padding, normalise } = map;
  const before = Math.floor(size / 2);
  const offsets = Array.from({ length: size * size }, (_, step) => {
    const [down, right] = [Math.floor(step / size) - before, (step % size) - before];
    return { down, right, own: kernel === "uniform" ? 1 : Math.exp(-(down ** 2 + right ** 2) / (2 * sigma ** 2)) };
  });
  const whole = normalise ? offsets.reduce((total, { own }) => total + own, 0) : 1;
  const inside = (row: number, column: number): boolean => row >= 0 && row < height && column >= 0 && column < width;
  const centres = Array.from({ length: experts }, (_, i) => [Math.floor(i / width), i % width] as const).filter(
    ([row, column]) => padding !== "valid" || offsets.every(({ down, right }) => inside(row + down, column + right)),
  );
  if (centres.length === 0 && experts > 0) {
    throw new ShapeError(
      `moge: no window of ${size} x ${size} fits the map of ${height} x ${width}; take a smaller size, or padding "zero"`,
    );
  }
  const weights = new Float64Array(experts * centres.length);
  for (const [i, [row, column]] of centres.entries())
    for (const { down, right, own } of offsets) {
      let [r, c] = [row + down, column + right];
      if (padding === "torus") [r, c] = [wrapped(r, height), wrapped(c, width)];
      if (!inside(r, c)) continue;
      const at = (r * width + c) * centres.length + i;
      weights[at] = Math.max(weights[at] ?? 0, own / whole);
    }
  return { weights, count: centres.length };
}

const wrapped = (i: number, n: number): number => ((i % n) + n) % n;

type Given = { readonly [K in keyof ExpertMap]?: ExpertMap[K] | undefined };

function filledMap(name: string, given: Given): Filled {
  const { height = 0, size = 3, kernel = "uniform", sigma = 1, padding = "zero", normalise = false } = given;
  checkWord(name, "kernel", kernel, ["uniform", "gaussian"]);
  checkWord(name, "padding", padding, ["zero", "torus", "valid"]);
  if (!Number.isInteger(height) || height < 0) {
    throw new ShapeError(`${name}: height = ${height}; expected a whole number, 0 for the squarest map`);
  }
  if (!Number.isInteger(size) || size < 1)
    throw new ShapeError(`${name}: size = ${size}; expected a whole number from 1`);
  if (!(sigma > 0) || !Number.isFinite(sigma))
    throw new ShapeError(`${name}: sigma = ${sigma}; expected a number above 0`);
  return { height, size, kernel, sigma, padding, normalise };
}

export const card: RouterCard = {
  name: "moge",
  title: "MoGE: top-k with a group-sparse penalty over a map of experts",
  paper: "2504.09265",
  equations: "group-sparse regularisation of the top-k input on a 2-D map",
  needs: [],
  causal: "yes",
  plans: ["sparse"],
  params: "weight [experts, width], bias [experts] on request",
  cost: "one product experts x width; in training experts² more",
  claim: "better image classification and language modelling than plain MoE at little extra memory and compute",
  ourChoices: [
    "a window at every expert and zeros beyond the edges, so that the penalty fits any number of experts; the released code's form is an option",
    "κ is not normalised, σ is 1 and the weight of the penalty 0.001 unless told otherwise",
    "a mean over tokens, where the released code sums",
    "experts lie on the map row after row; on a torus smaller than a window an expert counts once",
  ],
};
