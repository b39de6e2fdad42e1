// Convolution adapters against loops, their kernels, and what they refuse.
import { describe, expect, test } from "vitest";
import { gradientError, precise } from "../finite-difference.test-util.ts";
import { layerInput, layerParams, moe, moeLayer } from "../moe/layer.ts";
import {
  close,
  compare,
  fixedRouter,
  float64,
  floats,
  ids,
  noise,
  numbers,
  routerInput,
} from "../moe/moe.test-util.ts";
import type { Experts, RouterPlugin } from "../moe/plan.ts";
import { reshape } from "../ops/shape.ts";
import { random } from "../random.ts";
import { dispose, leaves, mapTree, type Tensor, type Tree } from "../tensor.ts";
import { type ConvolutionKind, convAdapter, convolutionKinds, convolve, effectiveKernel } from "./conv-adapter.ts";

const turned = [3, 0, 1, 6, 4, 2, 7, 8, 5];
const quick = (x: number): number => x / (1 + Math.exp(-1.702 * x));

/** What a kind gives for one channel at (y, x), straight from the differences of pixels that define it. */
function difference(kind: ConvolutionKind, w: readonly number[], pixel: (dy: number, dx: number) => number): number {
  const place = (i: number): [number, number] => [Math.floor(i / 3) - 1, (i % 3) - 1];
  const near = (i: number): number => pixel(...place(i));
  const ring = [0, 1, 2, 3, 5, 6, 7, 8];
  const all = (f: (i: number) => number): number => w.reduce((total, _, i) => total + f(i), 0);
  const at = (i: number): number => w[i] ?? Number.NaN;
  switch (kind) {
    case "vanilla":
      return all((i) => at(i) * near(i));
    case "central":
      return all((i) => at(i) * (i === 4 ? near(4) : near(i) - near(4)));
    case "angular":
      return all((i) => at(i) * near(i)) - ring.reduce((t, i) => t + at(turned[i] ?? 0) * near(i), 0);
    case "radial":
      // Weight 0 is the centre, weights 1 to 8 go around.
      return ring.reduce((t, i, j) => {
        const [dy, dx] = place(i);
        return t + at(j + 1) * (pixel(2 * dy, 2 * dx) - pixel(dy, dx));
      }, at(0) * near(4));
    case "second-order":
      return ring.reduce((t, i, j) => {
        const [dy, dx] = place(i);
        return t + at(j + 1) * (pixel(2 * dy, 2 * dx) - 2 * pixel(dy, dx) + near(4));
      }, at(0) * near(4));
    default:
      return kind satisfies never;
  }
}

/** One image [height * width, channels] through weights [out, in, 9]. */
function naive(
  kind: ConvolutionKind,
  image: readonly (readonly number[])[],
  w: readonly number[],
  [height, width]: readonly [number, number],
  out: number,
): number[][] {
  const channels = image[0]?.length ?? 0;
  return image.map((_, i) => {
    const [y, x] = [Math.floor(i / width), i % width];
    return Array.from({ length: out }, (_, o) =>
      Array.from({ length: channels }, (_, c) => {
        const at = (o * channels + c) * 9;
        return difference(kind, w.slice(at, at + 9), (dy, dx) => {
          const inside = y + dy >= 0 && y + dy < height && x + dx >= 0 && x + dx < width;
          return inside ? (image[(y + dy) * width + x + dx]?.[c] ?? Number.NaN) : 0;
        });
      }).reduce((a, b) => a + b, 0),
    );
  });
}

const chunks = (values: readonly number[], size: number): number[][] =>
  Array.from({ length: values.length / size }, (_, i) => values.slice(i * size, (i + 1) * size));

describe("convolve with the kernels of the five kinds", () => {
  test.each(convolutionKinds)("%s: equals the differences of pixels, with gradients", async (kind) => {
    for (const grid of [
      [3, 4],
      [1, 1],
    ] as const) {
      const pixels = grid[0] * grid[1];
      await compare({
        shapes: { x: [2, ...grid, 2], w: [3, 2, 3, 3] },
        forward: ({ x, w }) => convolve(x, effectiveKernel(w, kind)),
        oracle: ({ x, w }) =>
          chunks(x, pixels * 2).flatMap((image) => naive(kind, chunks(image, 2), w, grid, 3).flat()),
      });
    }
  });

  test("a kernel of 5 x 5 with zeros around is the same convolution, and the bias is added", async () => {
    const error = await gradientError([[1, 3, 3, 1], [2, 1, 3, 3], [2]], (x, w, b) =>
      convolve(x, effectiveKernel(w, "angular", 5), b),
    );
    expect(error).toBeLessThan(1e-8);
    const e = precise();
    const [small, wide] = e.scope(() => {
      const [x, w, b] = [
        floats(e, noise(9), [1, 3, 3, 1]),
        floats(e, noise(18, 2), [2, 1, 3, 3]),
        floats(e, [3, -5], [2]),
      ];
      return [convolve(x, effectiveKernel(w, "central")), convolve(x, effectiveKernel(w, "central", 5), b)];
    });
    const plain = await numbers(small as Tensor);
    close(
      await numbers(wide as Tensor),
      plain.map((y, i) => y + (i % 2 === 0 ? 3 : -5)),
    );
  });

  test("wrong shapes and kinds are refused", () => {
    const e = float64();
    const [x, w] = [floats(e, noise(8), [1, 2, 2, 2]), floats(e, noise(9), [1, 1, 3, 3])];
    expect(() => convolve(x, w)).toThrow("expected [images, height, width, in] and [out, in, side, side], side odd");
    expect(() => effectiveKernel(x, "vanilla")).toThrow("expected [out, in, 3, 3]");
    expect(() => effectiveKernel(w, "radial", 3)).toThrow('"radial" needs a kernel of 5 x 5');
    expect(() => effectiveKernel(w, JSON.parse('"round"'))).toThrow('there is no convolution "round"');
  });
});

describe("convAdapter", () => {
  const [width, hidden] = [3, 2];
  const grid = [2, 3] as const;
  const shapes = (count: number): Record<string, readonly number[]> => ({
    down: [count, hidden, width],
    downBias: [count, hidden],
    convolution: [count, hidden, hidden, 3, 3],
    convolutionBias: [count, hidden],
    up: [count, width, hidden],
    upBias: [count, width],
  });
  /** One image [tokens, width] through expert e. */
  const adapter = (
    p: Readonly<Record<string, readonly number[]>>,
    e: number,
    kind: ConvolutionKind,
    image: readonly (readonly number[])[],
    classToken: boolean,
  ): number[][] => {
    const own = (name: string): readonly number[] => {
      const size = (shapes(1)[name] ?? []).reduce((n, d) => n * d, 1);
      return (p[name] ?? []).slice(e * size, (e + 1) * size);
    };
    const affine = (rows: readonly (readonly number[])[], name: string, inner: number): number[][] =>
      rows.map((row) =>
        own(`${name}Bias`).map((b, o) => row.reduce((t, x, i) => t + x * (own(name)[o * inner + i] ?? 0), b)),
      );
    const down = affine(image, "down", width).map((row) => row.map(quick));
    const patches = classToken ? down.slice(1) : down;
    const convolved = [
      ...(classToken ? naive(kind, down.slice(0, 1), own("convolution"), [1, 1], hidden) : []),
      ...naive(kind, patches, own("convolution"), grid, hidden),
    ].map((row) => row.map((y, o) => quick(y + (own("convolutionBias")[o] ?? 0))));
    return affine(convolved, "up", hidden);
  };

  test.each([
    ["with a class token", true],
    ["without class token", false],
  ])("equals loops, with gradients, %s", async (_, classToken) => {
    const length = classToken ? 7 : 6;
    // Three images to expert 0, none to 1, one to 2; one image's worth of empty rows behind.
    const images = [0, 0, 0, 2];
    const kinds: ConvolutionKind[] = ["angular", "vanilla", "second-order"];
    const layout = { batch: 4, sequence: length, past: 0 };
    await compare({
      shapes: { ...shapes(3), rows: [5 * length, width] },
      forward: ({ rows, ...params }, e) => {
        const made = convAdapter({ kinds, width, hidden, grid, classToken, params });
        return made.apply(params, rows as Tensor, ids(e, [3 * length, 3 * length, 4 * length], [3]), layout).output;
      },
      oracle: ({ rows = [], ...p }) => [
        ...images.flatMap((expert, i) => {
          const image = chunks(rows.slice(i * length * width, (i + 1) * length * width), width);
          return adapter(p, expert, kinds[expert] as ConvolutionKind, image, classToken).flat();
        }),
        ...new Array<number>(length * width).fill(0),
      ],
    });
  });

  const make = (more: object = {}): { e: ReturnType<typeof float64>; experts: Experts } => {
    const e = float64();
    return { e, experts: convAdapter({ width, hidden, grid, engine: e, random: random(e, 1), ...more }) };
  };

  test("starts as nothing: the convolution is the identity, and up is zero", async () => {
    const { e, experts } = make({ activation: "none" });
    const found = new Map(leaves(experts.params));
    expect(experts.count).toBe(5);
    expect([...found.keys()]).toEqual(Object.keys(shapes(5)));
    const identity = await numbers(found.get("convolution") as Tensor);
    expect(chunks(identity, 9).map((taps) => taps[4])).toEqual(Array.from({ length: 5 }, () => [1, 0, 0, 1]).flat());
    expect(identity.filter((x) => x !== 0)).toHaveLength(10);
    const output = e.scope(
      () =>
        experts.apply(experts.params, floats(e, noise(18), [6, 3]), ids(e, [6, 6, 6, 6, 6], [5]), {
          batch: 1,
          sequence: 6,
          past: 0,
        }).output,
    );
    expect(await numbers(output)).toEqual(new Array(18).fill(0));
    dispose([output, experts.params]);
    expect(e.live()).toBe(0);
  });

  /** Sends image i to expert choice[i]; token by token when `choice` has one entry per token. */
  const route = (e: ReturnType<typeof float64>, choice: readonly number[]) =>
    fixedRouter(() => ({
      plan: {
        kind: "sparse",
        experts: ids(e, choice, [choice.length, 1]),
        weights: floats(
          e,
          choice.map(() => 1),
          [choice.length, 1],
        ),
      },
    }));

  test("inside a layer every image comes back in its place", async () => {
    const { e, experts } = make({ kinds: ["radial", "central"] });
    const params = mapTree(experts.params, (x, path) => floats(e, noise(x.size, path.length), x.shape));
    const hidden = floats(e, noise(3 * 6 * 3), [18, 3]);
    const layout = { batch: 3, sequence: 6, past: 0 };
    const run = (choice: readonly number[]): Promise<number[]> => {
      const layer = { router: route(e, choice), experts };
      const output = e.scope(
        () =>
          moe(layer, { router: {}, experts: params }, { ...routerInput(hidden), layout }, { metrics: false }).output,
      );
      return numbers(output);
    };
    const whole = (choice: readonly number[]): number[] => choice.flatMap((c) => new Array<number>(6).fill(c));
    const p = Object.fromEntries(
      await Promise.all(leaves(params).map(async ([name, x]) => [name, await numbers(x)] as const)),
    );
    const values = await numbers(hidden);
    close(
      await run(whole([1, 0, 1])),
      [1, 0, 1].flatMap((c, i) =>
        adapter(p, c, c === 0 ? "radial" : "central", chunks(values.slice(i * 18, (i + 1) * 18), 3), false).flat(),
      ),
    );
    // Five tokens of an image to one expert and the sixth to the other.
    const torn = await run([...whole([1, 0]), 1, 1, 1, 1, 1, 0]);
    expect(torn.every(Number.isNaN)).toBe(true);
  });

  test("a router that tears images apart is refused when the layer is made", () => {
    const { e, experts } = make();
    const plugin: RouterPlugin = {
      name: "single",
      causal: { training: true, evaluation: true },
      needs: [],
      plans: ["sparse"],
      init: () => route(e, [0]),
    };
    expect(() => moeLayer(plugin, { engine: e, width }, { experts })).toThrow(
      "router single: these experts see whole images, and it routes token by token",
    );
    const layer = moeLayer({ ...plugin, perSample: true }, { engine: e, width }, { experts });
    const hidden = floats(e, noise(12), [4, 3]);
    expect(() => e.scope(() => moe(layer, layerParams(layer), layerInput(layer, hidden)).output)).toThrow();
  });

  test("refuses what is no whole image, and wrong sizes", () => {
    const { e, experts } = make({ classToken: true });
    const apply = (layout: object): Tree =>
      experts.apply(experts.params, floats(e, noise(21), [7, 3]), ids(e, [7, 7, 7, 7, 7], [5]), {
        batch: 1,
        sequence: 7,
        past: 0,
        ...layout,
      }).output;
    expect(() => apply({ sequence: 6 })).toThrow(
      "the layout has 6 tokens per row, these experts see images of 2 x 3 patches and a class token",
    );
    expect(() => apply({ past: 2 })).toThrow("after 2 cached ones");
    expect(() => apply({ mask: floats(e, noise(7), [1, 7]) })).toThrow("leave both out");
    expect(() => make({ grid: [0, 3] })).toThrow("expected whole numbers from 1");
    expect(() => make({ kinds: [] })).toThrow("0 kinds");
    expect(() => make({ kinds: ["round"] })).toThrow('there is no convolution "round"');
    expect(() => convAdapter({ width, grid, params: {} })).toThrow('parameter "down" is missing');
  });
  test("no image at all", async () => {
    const { e, experts } = make();
    const layout = { batch: 0, sequence: 6, past: 0 };
    const { output } = experts.apply(
      experts.params,
      reshape(floats(e, [], [0]), [0, 3]),
      ids(e, [0, 0, 0, 0, 0], [5]),
      layout,
    );
    expect(output.shape).toEqual([0, 3]);
  });
});
