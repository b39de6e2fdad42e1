import { dispose, leaves, random, type Tensor } from "@switchyard/core";
import { convAdapter } from "@switchyard/core/experts";
import { glu, layerInput, layerParams, moe, moeLayer, type RouterInput } from "@switchyard/core/moe";
import { withCapacity } from "@switchyard/core/wrappers";
import { routerContext, routerInput, testExperts, testRouter } from "@switchyard/testing";
import { describe, expect, it } from "vitest";
import { moeFFDFamily } from "../test/families/vision.ts";
import { flat, float64, readVectors, results, sparse, tensor, unmet } from "../test/vectors.ts";
import { type MoEFFDOptions, moeFFD } from "./moe-ffd.ts";
import { noisyTopK } from "./noisy-top-k.ts";

testRouter({ plugin: ({ k = 1 }) => moeFFD({ k, start: "normal" }), weights: "sum to 1" });
testRouter({ plugin: ({ k = 2 }) => moeFFD({ level: "image", k, start: "normal" }), weights: "sum to 1" });
testExperts({
  name: "convAdapter",
  count: 5,
  alike: false,
  unit: 7,
  layout: (rows) => ({ batch: rows / 7, sequence: 7, past: 0 }),
  make: (options) => convAdapter({ ...options, hidden: 2, grid: [2, 3], classToken: true }),
  matrices: ["down", "convolution", "up"],
});

describe("the convolutions of MoE-FFD meet their vectors", () => {
  const { cases, tolerance } = readVectors("moe-ffd");
  it.each(cases.map((one) => [one.id, one] as const))("%s", async (_, one) => {
    expect(await unmet(moeFFDFamily, one, tolerance)).toEqual([]);
  });
});

describe("moeFFD", () => {
  const rows = Array.from({ length: 12 }, (_, i) => [1, Math.sin(i), Math.cos(3 * i), 0.1 * i]);

  /** Choices, weights and losses of three images of four tokens. */
  async function run(
    options: MoEFFDOptions,
    more: { readonly training?: boolean; readonly mask?: readonly number[]; readonly hidden?: number[][] } = {},
  ): Promise<{ ids: number[]; weights: number[]; losses: Record<string, readonly [number, number]> }> {
    const on = float64();
    const { hidden = rows, ...call } = more;
    const router = moeFFD({ start: "normal", ...options }).init(routerContext(on, { experts: 4, width: 4 }));
    const weights: Record<string, number> = {};
    const found = await results(on, (): Record<string, Tensor> => {
      const given = routerInput(on, { hidden: tensor(on, hidden), batch: hidden.length / 4, ...call });
      const routed = router.route(router.params, given);
      for (const [name, one] of Object.entries(routed.losses)) weights[name] = one.weight;
      const values = Object.entries(routed.losses).map(([name, { value }]) => [`loss ${name}`, value]);
      return { ids: sparse(routed).experts, weights: sparse(routed).weights, ...Object.fromEntries(values) };
    });
    dispose(router.params);
    expect(on.live()).toBe(0);
    const losses = Object.fromEntries(
      Object.entries(weights).map(
        ([name, weight]) => [name, [flat(found[`loss ${name}`] ?? [])[0] ?? NaN, weight]] as const,
      ),
    );
    return { ids: flat(found.ids ?? []), weights: flat(found.weights ?? []), losses };
  }

  it("at level image all tokens of an image go where the mean of its tokens goes", async () => {
    const means = [0, 1, 2].map((i) =>
      [0, 1, 2, 3].map((j) => rows.slice(4 * i, 4 * i + 4).reduce((t, row) => t + (row[j] ?? 0) / 4, 0)),
    );
    for (const training of [false, true]) {
      const whole = await run({ level: "image", k: 2 }, { training });
      const alone = await run({ level: "image", k: 2 }, { training, hidden: means.flatMap((m) => [m, m, m, m]) });
      expect(alone.ids).toEqual(whole.ids);
      for (let i = 0; i < 3; i++)
        for (let t = 0; t < 4; t++) {
          const at = (4 * i + t) * 2;
          expect(whole.ids.slice(at, at + 2)).toEqual(whole.ids.slice(8 * i, 8 * i + 2));
          expect(whole.weights.slice(at, at + 2)).toEqual(whole.weights.slice(8 * i, 8 * i + 2));
        }
    }
  });

  it("padding enters no mean, and an image of nothing but padding has no expert and counts for no loss", async () => {
    const mask = [1, 1, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0];
    const padded = await run({ level: "image" }, { training: true, mask });
    const own = [...rows.slice(0, 2), ...rows.slice(0, 2), ...rows.slice(4, 8)]; // the same mean without padding
    const two = await run({ level: "image" }, { training: true, hidden: own });
    expect(padded.ids).toEqual([...two.ids.slice(0, 2), -1, -1, ...two.ids.slice(4), -1, -1, -1, -1]);
    for (const name of ["importance", "load"]) {
      expect(padded.losses[name]?.[0]).toBeCloseTo(two.losses[name]?.[0] ?? NaN, 9);
    }
    const empty = await run({ level: "image" }, { training: true, mask: mask.map(() => 0) });
    expect(empty.ids.every((id) => id === -1)).toBe(true);
  });

  it("the losses weigh 200 for tokens and 1 for images, and are those of noisyTopK with sample variances", async () => {
    const tokens = await run({}, { training: true });
    expect(Object.entries(tokens.losses).map(([name, [, weight]]) => [name, weight])).toEqual([
      ["importance", 200],
      ["load", 200],
    ]);
    const on = float64();
    const router = noisyTopK({ k: 1, start: "normal", sampleVariance: true }).init(
      routerContext(on, { experts: 4, width: 4 }),
    );
    const plain = await results(on, () => {
      const given = routerInput(on, { hidden: tensor(on, rows), batch: 3, training: true });
      const { losses } = router.route(router.params, given);
      return { importance: losses.importance?.value as Tensor, load: losses.load?.value as Tensor };
    });
    dispose(router.params);
    expect(tokens.losses.importance?.[0]).toBeCloseTo(flat(plain.importance)[0] ?? NaN, 12);
    expect(tokens.losses.load?.[0]).toBeCloseTo(flat(plain.load)[0] ?? NaN, 12);
    const images = await run({ level: "image", load: 0 }, { training: true });
    expect(Object.entries(images.losses).map(([name, [, weight]]) => [name, weight])).toEqual([["importance", 1]]);
    // Three images over four experts: at best three loads of 1 and one of 0, whose sample variance is 1/4.
    expect(images.losses.importance?.[0]).toBeGreaterThanOrEqual(0.25 / 0.75 ** 2 - 1e-9);
  });

  it("with one expert per image the weight is 1", async () => {
    expect((await run({ level: "image" })).weights).toEqual(new Array(12).fill(1));
  });

  it("goes with convolution adapters by image only, and an adapter changes the tokens around a changed one", async () => {
    const on = float64();
    const make = () => convAdapter({ width: 4, hidden: 3, grid: [2, 2], engine: on, random: random(on, 3) });
    const torn = make();
    expect(() => moeLayer(moeFFD(), { engine: on, width: 4 }, { experts: torn })).toThrow(
      "router moeFFD: these experts see whole images, and it routes token by token",
    );
    dispose(torn.params);
    const layer = moeLayer(moeFFD({ level: "image", start: "normal" }), { engine: on, width: 4 }, { experts: make() });
    const layout: Partial<RouterInput> = { layout: { batch: 3, sequence: 4, past: 0 } };
    const output = async (hidden: number[][]): Promise<number[]> => {
      const found = await results(on, () => {
        const experts = Object.fromEntries(
          leaves(layer.experts.params).map(([name, x]) => [
            name,
            on.tensor(
              Float64Array.from({ length: x.size }, (_, i) => Math.sin(7 * i + name.length)),
              x.shape,
            ),
          ]),
        );
        return {
          y: moe(layer, { router: layer.router.params, experts }, layerInput(layer, tensor(on, hidden), layout)).output,
        };
      });
      return flat(found.y);
    };
    const before = await output(rows);
    // So little that the choice stays.
    const after = await output(rows.map((row, t) => (t === 5 ? row.map((x) => x + 1e-3) : row)));
    const moved = Array.from({ length: 12 }, (_, t) =>
      before.slice(4 * t, 4 * t + 4).some((x, j) => x !== after[4 * t + j]),
    );
    expect(moved).toEqual([false, false, false, false, true, true, true, true, false, false, false, false]);
    dispose(layerParams(layer));
    expect(on.live()).toBe(0);
  });

  it("goes with experts of single tokens, too", () => {
    const on = float64();
    const experts = glu({ count: 2, width: 4, hidden: 3, engine: on, random: random(on, 3) });
    expect(() => moeLayer(moeFFD({ level: "image" }), { engine: on, width: 4 }, { experts })).not.toThrow();
  });

  it("refuses caches, packed rows and wrong options", () => {
    const on = float64();
    const router = moeFFD({ level: "image" }).init(routerContext(on, { experts: 4, width: 4 }));
    const input = routerInput(on, { hidden: tensor(on, rows), batch: 3 });
    const call = (layout: object) => () =>
      router.route(router.params, { ...input, layout: { ...input.layout, ...layout } });
    expect(call({ past: 3 })).toThrow("3 tokens are in the cache already; give it one whole image per row");
    expect(call({ samples: on.tensor(new Int32Array(12), [12]) })).toThrow("the layout names the sample of each token");
    expect(() => moeFFD({ k: 5 }).init(routerContext(on, { experts: 4 }))).toThrow("moeFFD: k = 5 of 4 experts");
    expect(() => moeFFD({ load: -1 })).toThrow("moeFFD: load = -1");
    expect(() => moeFFD(JSON.parse('{ "level": "patch" }'))).toThrow('level = "patch"; expected "token" or "image"');
  });

  it("declares by level whether it is causal and keeps samples together", () => {
    expect(moeFFD()).toMatchObject({ perSample: false, causal: { training: true, evaluation: true } });
    expect(moeFFD({ level: "image" })).toMatchObject({
      perSample: true,
      causal: { training: false, evaluation: false },
    });
    // A limit of single tokens would tear images apart.
    expect(withCapacity(moeFFD({ level: "image" }), { factor: 1 }).perSample).toBe(false);
    expect(withCapacity(moeFFD({ level: "image" }), { factor: Infinity }).perSample).toBe(true);
    expect(moeFFD({ level: "image" }).options).toMatchObject({ importance: 1, load: 1 });
  });
});
