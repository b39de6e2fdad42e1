// Convolution adapters as experts (MoE-FFD 2404.08452, section 3.3; the adapter is that of Convpass 2207.07039): every expert sees
// whole images, y = up act(conv(act(down x))), where conv is a 3x3 convolution over the grid of patches and, apart from it, over the
// class token as an image of one pixel. Its kind says how the nine weights w become the kernel that is applied:
//   vanilla: w;  central: the centre less the eight others;  angular: w less w turned by one step around the centre;
//   radial: 5x5, w_1..w_8 on the outer ring less the same on the inner one, w_0 at the centre;
//   second-order: 5x5, w_1..w_8 on the outer ring less twice the same on the inner one, the sum of all nine at the centre
// Every kind is linear in w, and a convolution is one gather of neighbours and one grouped product.
import { ShapeError, UnsupportedError } from "../errors.ts";
import type { Initial } from "../moe/experts.ts";
import type { Experts, Layout } from "../moe/plan.ts";
import { affine, cast, floor, less, mul, sigmoid, sub, where } from "../ops/elementwise.ts";
import { linear, matmul } from "../ops/matmul.ts";
import { sum } from "../ops/reduce.ts";
import { takeRows } from "../ops/rows.ts";
import { hostConstant, reshape, transpose } from "../ops/shape.ts";
import { show, sizeOf, type Tensor } from "../tensor.ts";
import { type Draw, groupedLinear, leafAt, parameters } from "./parts.ts";

/** How the nine weights of a 3x3 convolution are used. */
export type ConvolutionKind = "vanilla" | "central" | "angular" | "radial" | "second-order";

/** The five kinds of MoE-FFD, in its order. */
export const convolutionKinds: readonly ConvolutionKind[] = ["vanilla", "central", "angular", "radial", "second-order"];

export type ConvAdapterOptions = {
  /** One expert each; default: the five kinds. */
  readonly kinds?: readonly ConvolutionKind[];
  /** Width of the tokens. */
  readonly width: number;
  /** Channels of the convolution; default 8. */
  readonly hidden?: number;
  /** Patches of an image: [height, width]. */
  readonly grid: readonly [number, number];
  /** Whether each image begins with a class token; default false. */
  readonly classToken?: boolean;
  /** Before and after the convolution: x sigmoid(1.702 x), or nothing; default "quick-gelu". */
  readonly activation?: "quick-gelu" | "none";
} & Initial;

/**
 * Params: `down [experts, hidden, width]`, `convolution [experts, hidden, hidden, 3, 3]`, `up [experts, width, hidden]` and their
 * biases `downBias`, `convolutionBias`, `upBias`. New ones start as nothing: the convolution is the identity, `up` and the biases are
 * zero.
 *
 * An image is `grid[0] * grid[1]` tokens in rows, after its class token if it has one, and is one row of the batch. The router must
 * send all of them to the same experts (`RouterPlugin.perSample`): `moeLayer` refuses others. `apply` throws UnsupportedError for a
 * sequence of another length, a cache, and a mask; experts that got something else than whole images (a layer made by hand) give NaN,
 * which the trainer reports.
 *
 * @example convAdapter({ width: 768, grid: [14, 14], classToken: true, engine, random })
 */
export function convAdapter(options: ConvAdapterOptions): Experts {
  const { kinds = convolutionKinds, width, hidden = 8, grid, classToken = false, activation = "quick-gelu" } = options;
  const count = kinds.length;
  const sizes = [width, hidden, ...grid];
  if (count < 1 || sizes.some((n) => !Number.isInteger(n) || n < 1)) {
    throw new ShapeError(
      `convAdapter: ${count} kinds, width ${width}, hidden ${hidden}, grid ${grid.join(" x ")}; expected whole numbers from 1`,
    );
  }
  for (const kind of kinds) checkKind(kind);
  const shapes = {
    down: [count, hidden, width],
    downBias: [count, hidden],
    convolution: [count, hidden, hidden, 3, 3],
    convolutionBias: [count, hidden],
    up: [count, width, hidden],
    upBias: [count, width],
  };
  const length = grid[0] * grid[1] + (classToken ? 1 : 0);
  const side = kinds.some((kind) => sideOf(kind) === 5) ? 5 : 3;
  const act = (x: Tensor): Tensor => (activation === "none" ? x : mul(x, sigmoid(mul(x, 1.702))));

  return {
    count,
    params: parameters("convAdapter", shapes, options, draw),
    spatial: true,
    apply(params, rows, ends, layout, observe) {
      checkLayout(layout, length, grid, classToken);
      const [n = 0] = rows.shape;
      const product = (name: string, x: Tensor, w = leafAt(params, name)): Tensor => {
        observe?.(name, x, ends);
        return groupedLinear(x, w, ends, leafAt(params, `${name}Bias`));
      };
      const inner = act(product("down", rows)); // [n, hidden]
      const around = reshape(neighbours(inner, { grid, side, classToken }), [n, side * side * hidden]);
      const kernels = columns(stacked(leafAt(params, "convolution"), kinds, side)); // [experts, hidden, side² hidden]
      const output = product("up", act(product("convolution", around, kernels))); // [n, width]
      return { output: where(broken(ends, length), Number.NaN, output) };
    },
  };
}

const draw: Draw = (path, shape, random) => {
  const [, hidden = 1, width = 1] = shape;
  if (path === "down") return random.host("normal", sizeOf(shape)).map((z) => z / Math.sqrt(width));
  if (path !== "convolution") return undefined;
  // The identity: weight 1 at the centre (4 of 9) from every channel to itself.
  const values = new Float64Array(sizeOf(shape));
  for (let i = 4, at = 0; i < values.length; i += 9, at++) {
    values[i] = Number(Math.floor(at / hidden) % hidden === at % hidden);
  }
  return values;
};

/**
 * The kernel that a kind makes of 3x3 weights, `[out, in, 3, 3]` -> `[out, in, side, side]`: side 3, or 5 for radial and
 * second-order differences. `side` 5 puts zeros around the others.
 */
export function effectiveKernel(weight: Tensor, kind: ConvolutionKind, side: 3 | 5 = sideOf(kind)): Tensor {
  const [out = 0, inner = 0, ...taps] = weight.shape;
  if (taps.join() !== "3,3") throw new ShapeError(`effectiveKernel: ${show(weight)}, expected [out, in, 3, 3]`);
  const map = hostConstant(weight, tapMap(kind, side), [side * side, 9]);
  return reshape(linear(reshape(weight, [out * inner, 9]), map), [out, inner, side, side]);
}

/**
 * A convolution over images, same size, zeros around: `x [images, height, width, in]` with `kernel [out, in, side, side]` (side odd)
 * and `bias [out]` -> `[images, height, width, out]`. As in every deep learning library the kernel is not mirrored.
 */
export function convolve(x: Tensor, kernel: Tensor, bias?: Tensor): Tensor {
  const [images = 0, height = 0, width = 0, inner = 0] = x.shape;
  const [out = 0, channels = 0, side = 0, other = 0] = kernel.shape;
  if (x.shape.length !== 4 || kernel.shape.length !== 4 || channels !== inner || side !== other || side % 2 !== 1) {
    throw new ShapeError(
      `convolve: images ${show(x)}, kernel ${show(kernel)}; expected [images, height, width, in] and [out, in, side, side], side odd`,
    );
  }
  const rows = images * height * width;
  const around = neighbours(reshape(x, [rows, inner]), { grid: [height, width], side }); // [rows, side², in]
  const y = linear(
    reshape(around, [rows, side * side * inner]),
    reshape(columns(reshape(kernel, [1, out, inner, side * side])), [out, side * side * inner]),
    bias,
  );
  return reshape(y, [images, height, width, out]);
}

// ---------------------------------------------------------------- kernels
/** Angular: what is taken from weight i is weight turned[i]; the centre is left out. */
const turned = [3, 0, 1, 6, 4, 2, 7, 8, 5];
/** Places of the rings of a 5x5 kernel; weight j + 1 goes to the j-th. */
const outerRing = [0, 2, 4, 10, 14, 20, 22, 24];
const innerRing = [6, 7, 8, 11, 13, 16, 17, 18];

const sideOf = (kind: ConvolutionKind): 3 | 5 => (kind === "radial" || kind === "second-order" ? 5 : 3);

function checkKind(kind: ConvolutionKind): void {
  if (!convolutionKinds.includes(kind)) {
    throw new UnsupportedError(
      `convAdapter: there is no convolution "${kind}"; use one of ${convolutionKinds.join(", ")}`,
    );
  }
}

/** The linear map from the nine weights to the kernel, `[side², 9]`. */
function tapMap(kind: ConvolutionKind, side: 3 | 5): Float32Array {
  checkKind(kind);
  if (side < sideOf(kind))
    throw new ShapeError(`effectiveKernel: "${kind}" needs a kernel of 5 x 5, asked for ${side} x ${side}`);
  const map = new Float32Array(side * side * 9);
  const put = (tap: number, weight: number, value: number): void => {
    map[tap * 9 + weight] = (map[tap * 9 + weight] ?? 0) + value;
  };
  if (sideOf(kind) === 3) {
    for (let i = 0; i < 9; i++) {
      const tap = side === 3 ? i : 6 + 5 * Math.floor(i / 3) + (i % 3);
      put(tap, i, 1);
      if (kind === "central" && i === 4) for (let j = 0; j < 9; j++) if (j !== 4) put(tap, j, -1);
      if (kind === "angular" && i !== 4) put(tap, turned[i] ?? i, -1);
    }
    return map;
  }
  const second = kind === "second-order";
  outerRing.forEach((tap, j) => {
    put(tap, j + 1, 1);
  });
  innerRing.forEach((tap, j) => {
    put(tap, j + 1, second ? -2 : -1);
  });
  for (let j = 0; j < (second ? 9 : 1); j++) put(12, j, 1);
  return map;
}

/** The kernels of all experts: weight `[experts, hidden, hidden, 3, 3]` -> `[experts, hidden, hidden, side²]`. */
function stacked(weight: Tensor, kinds: readonly ConvolutionKind[], side: 3 | 5): Tensor {
  const [, hidden = 0] = weight.shape;
  const maps = Float32Array.from(kinds.flatMap((kind) => [...tapMap(kind, side)]));
  const all = hostConstant(weight, maps, [kinds.length, side * side, 9]);
  const kernels = matmul(reshape(weight, [kinds.length, hidden * hidden, 9]), all, { transposeB: true });
  return reshape(kernels, [kinds.length, hidden, hidden, side * side]);
}

/** [groups, out, in, taps] -> [groups, out, taps * in], as the neighbours lie. */
function columns(kernels: Tensor): Tensor {
  const [groups = 0, out = 0, inner = 0, taps = 0] = kernels.shape;
  return reshape(transpose(kernels, [0, 1, 3, 2]), [groups, out, taps * inner]);
}

// ---------------------------------------------------------------- images
interface Surroundings {
  readonly grid: readonly [number, number];
  readonly side: number;
  readonly classToken?: boolean;
}

/** What lies around every token of its image, zeros beyond the edge: rows `[images * length, c]` -> `[images * length, side², c]`. */
function neighbours(rows: Tensor, { grid, side, classToken = false }: Surroundings): Tensor {
  const [n = 0] = rows.shape;
  const [height, width] = grid;
  const first = classToken ? 1 : 0;
  const length = height * width + first;
  const reach = (side - 1) / 2;
  const ids = new Int32Array(n * side * side).fill(-1);
  for (let row = 0, at = 0; row < n; row++) {
    const place = (row % length) - first;
    const [y, x] = [Math.floor(place / width), place % width];
    for (let dy = -reach; dy <= reach; dy++) {
      for (let dx = -reach; dx <= reach; dx++, at++) {
        // The class token is an image of one pixel.
        const inside =
          place < 0 ? dy === 0 && dx === 0 : y + dy >= 0 && y + dy < height && x + dx >= 0 && x + dx < width;
        if (inside) ids[at] = row + (place < 0 ? 0 : dy * width + dx);
      }
    }
  }
  return takeRows(rows, hostConstant(rows, ids, [n, side * side]));
}

function checkLayout(layout: Layout, length: number, grid: readonly [number, number], classToken: boolean): void {
  const image = `${grid.join(" x ")} patches${classToken ? " and a class token" : ""}`;
  if (layout.sequence !== length || layout.past !== 0) {
    throw new UnsupportedError(
      `convAdapter: the layout has ${layout.sequence} tokens per row${layout.past ? ` after ${layout.past} cached ones` : ""}, ` +
        `these experts see images of ${image}; put one whole image of ${length} tokens into each row`,
    );
  }
  if (layout.mask !== undefined || layout.samples !== undefined) {
    throw new UnsupportedError(
      `convAdapter: the layout has a mask or names samples, but every row must be one whole image of ${image}; leave both out`,
    );
  }
}

/** 1 where some expert did not get whole images, else 0: []. */
function broken(ends: Tensor, length: number): Tensor {
  const rows = cast(ends, "f32");
  // Half a row more, so that rounding cannot take one off.
  const images = floor(affine(rows, { scale: 1 / length, shift: 0.5 / length }));
  return less(0.5, sum(sub(rows, mul(images, length))));
}
