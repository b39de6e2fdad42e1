import { dispose, random, type Tensor } from "@switchyard/core";
import { glu, layerInput, layerParams, moe, moeLayer, type RouterInput } from "@switchyard/core/moe";
import { routerContext, routerInput, testRouter } from "@switchyard/testing";
import { describe, expect, it } from "vitest";
import { fuseMoEFamily } from "../test/families/vision.ts";
import { flat, float64, readVectors, results, sparse, tensor, unmet } from "../test/vectors.ts";
import { entropyRegulariser, type FuseMoEOptions, fuseMoE, modalityMeans } from "./fuse-moe.ts";

/** Some of it missing, by row and position: the same for a token whether it comes alone or in its sequence. */
const some = ({ hidden, layout: { sequence, past } }: RouterInput, each: number): Tensor => {
  const tokens = hidden.shape[0] ?? 0;
  const data = Float64Array.from({ length: tokens * each }, (_, i) => {
    const [token, part] = [Math.floor(i / each), i % each];
    return Number((3 * Math.floor(token / sequence) + past + (token % sequence) + part) % 4 === 2);
  });
  return hidden.engine.root.tensor(data, each === 1 ? [tokens] : [tokens, each]);
};
testRouter({
  plugin: ({ k = 2 }) => fuseMoE({ k }),
  weights: "sum to 1",
  input: (base) => ({ missing: some(base, 1) }),
});
testRouter({
  plugin: ({ k = 3 }) => fuseMoE({ k, gate: "gaussian", sampleVariance: true, noise: false }),
  weights: "sum to 1",
});
testRouter({
  plugin: ({ k = 2 }) => fuseMoE({ k, design: "joint", gate: "softmax", modalities: 3 }),
  weights: "sum to 1",
  input: (base) => ({ missing: some(base, 3) }),
});
testRouter({
  plugin: ({ experts, k = 2 }) => {
    const modalities = experts === 6 ? 2 : 1;
    return fuseMoE({ k, design: "disjoint", modalities });
  },
  weights: "sum to 1",
  sizes: { experts: 6, width: 7 },
  input: (base) => ({ missing: some(base, 1) }),
  skip: [
    {
      reason: "experts of different pools cannot change places",
      tests: ["permuting the experts permutes the answer"],
    },
  ],
});

describe("fuseMoE meets its vectors", () => {
  const { cases, tolerance } = readVectors("fusemoe");
  it.each(cases.map((one) => [one.id, one] as const))("%s", async (_, one) => {
    expect(await unmet(fuseMoEFamily, one, tolerance)).toEqual([]);
  });
});

describe("fuseMoE", () => {
  const rows = [
    [0.5, 1, 0],
    [2, -1, 1],
    [-1, 0, 3],
    [1, 1, 1],
  ];

  /** Four tokens, modalities 0 1 0 1, six experts. */
  async function run(
    options: Partial<FuseMoEOptions>,
    more: {
      readonly hidden?: number[][];
      readonly missing?: readonly number[];
      readonly ids?: readonly number[];
      readonly training?: boolean;
      readonly mask?: readonly number[];
    } = {},
  ): Promise<{ ids: number[]; weights: number[]; rows?: number[]; logits: number[]; losses: Record<string, number> }> {
    const on = float64();
    const { hidden = rows, missing, ids = [0, 1, 0, 1], ...call } = more;
    const router = fuseMoE({ k: 1, ...options }).init(routerContext(on, { experts: 6, width: hidden[0]?.length ?? 0 }));
    const found = await results(on, (): Record<string, Tensor> => {
      const routed = router.route(router.params, {
        ...routerInput(on, { hidden: tensor(on, hidden), ...call }),
        modalityIds: on.tensor(Int32Array.from(ids), [ids.length]),
        ...(missing ? { missing: on.tensor(Float64Array.from(missing), [missing.length]) } : {}),
      });
      const losses = Object.entries(routed.losses).map(([name, { value }]) => [`loss ${name}`, value]);
      return {
        ids: sparse(routed).experts,
        weights: sparse(routed).weights,
        logits: routed.logits as Tensor,
        ...(routed.rows ? { rows: routed.rows } : {}),
        ...Object.fromEntries(losses),
      };
    });
    dispose(router.params);
    expect(on.live()).toBe(0);
    const losses = Object.entries(found).flatMap(([name, value]) =>
      name.startsWith("loss ") ? [[name.slice(5), flat(value)[0] ?? Number.NaN] as const] : [],
    );
    return {
      ids: flat(found.ids ?? []),
      weights: flat(found.weights ?? []),
      logits: flat(found.logits ?? []),
      ...(found.rows ? { rows: flat(found.rows) } : {}),
      losses: Object.fromEntries(losses),
    };
  }

  it("what stands in the place of a missing modality changes nothing, and all of one modality get the same vector", async () => {
    const missing = [0, 1, 1, 1];
    const one = await run({}, { missing, training: true });
    const other = await run({}, { missing, training: true, hidden: [rows[0] ?? [], [9, 9, 9], [-9, 9, 9], [0, 0, 0]] });
    expect(other).toEqual(one);
    const filled = [0, 1, 2, 3].map((t) => one.rows?.slice(3 * t, 3 * t + 3));
    expect(filled[0]).toEqual(rows[0]);
    expect(filled[1]).toEqual(filled[3]);
    expect(filled[1]).not.toEqual(filled[2]);
    expect((await run({})).rows).toBeUndefined();
  });

  it("each modality has centres of its own, the nearest wins, and the quirk turns that around", async () => {
    const same = [rows[0] ?? [], rows[0] ?? []];
    const apart = await run({}, { hidden: same, ids: [0, 1] });
    expect(apart.logits.slice(0, 6)).not.toEqual(apart.logits.slice(6));
    const nearest = await run({ k: 6 }, { hidden: same, ids: [0, 0] });
    const farthest = await run({ k: 6, farthest: true }, { hidden: same, ids: [0, 0] });
    expect(farthest.ids.slice(0, 6)).toEqual(nearest.ids.slice(0, 6).reverse());
    expect(nearest.logits.every((h) => h < 0)).toBe(true);
    const squared = await run({ gate: "gaussian" }, { hidden: same, ids: [0, 0] });
    squared.logits.forEach((h, i) => {
      expect(h).toBeCloseTo(-((nearest.logits[i] ?? NaN) ** 2), 9);
    });
  });

  it("disjoint pools: tokens of modality m go to the experts of its pool alone, by the same numbers", async () => {
    const disjoint = await run({ design: "disjoint", k: 2 });
    const pools = [0, 1, 2, 3].map((t) => disjoint.ids.slice(2 * t, 2 * t + 2).map((e) => Math.floor(e / 3)));
    expect(pools).toEqual([
      [0, 0],
      [1, 1],
      [0, 0],
      [1, 1],
    ]);
    const finite = disjoint.logits.map(
      (h, i) => Number.isFinite(h) === (Math.floor((i % 6) / 3) === Math.floor(i / 6) % 2),
    );
    expect(finite.every(Boolean)).toBe(true);
    expect(await run({ design: "disjoint", k: 3 }, { missing: [0, 0, 0, 0] })).toMatchObject({
      ids: expect.arrayContaining([0, 1, 2, 3, 4, 5]),
    });
  });

  it("a token of no known modality has no expert and counts for no loss", async () => {
    const strange = await run({}, { ids: [0, 7, 0, -1], training: true });
    expect(strange.ids.map((id) => id >= 0)).toEqual([true, false, true, false]);
    const masked = await run({}, { ids: [0, 1, 0, 1], training: true, mask: [1, 0, 1, 0] });
    expect(strange.losses).toEqual(masked.losses);
    const pools = await run({ design: "disjoint" }, { ids: [0, 7, 0, -1] });
    expect(pools.ids.map((id) => id >= 0)).toEqual([true, false, true, false]);
  });

  it("the joint design takes the modalities side by side", async () => {
    const wide = [
      [1, 2, 3, 4],
      [5, 6, 7, 8],
    ];
    const found = await run({ design: "joint", modalities: 2 }, { hidden: wide, ids: [], missing: [0, 0, 1, 0] });
    expect(found.rows?.slice(0, 4)).toEqual([1, 2, 3, 4]);
    expect(found.rows?.slice(4, 6)).not.toEqual([5, 6]);
    expect(found.rows?.slice(6)).toEqual([7, 8]);
  });

  it("has losses in training only, none whose weight is 0, and no load without noise", async () => {
    const names = async (options: Partial<FuseMoEOptions>, training = true): Promise<string[]> =>
      Object.keys((await run(options, { training })).losses);
    expect(await names({})).toEqual(["importance", "load", "entropy"]);
    expect(await names({ design: "disjoint" })).toEqual(["importance", "load"]);
    expect(await names({ noise: false })).toEqual(["importance", "entropy"]);
    expect(await names({ importance: 0, load: 0, entropy: 0 })).toEqual([]);
    expect(await names({}, false)).toEqual([]);
  });

  it("disjoint pools: the importance loss is the mean of both pools' own", async () => {
    // Two tokens of each modality, each alone with its expert or not: CV² of (2, 0, 0) is 2, of (1, 1, 0) 1/2.
    const cost = async (hidden: number[][]): Promise<number> => {
      const { ids, losses } = await run({ design: "disjoint", noise: false }, { hidden, training: true });
      const loads = [0, 1].map((m) => [0, 1, 2].map((e) => ids.filter((id) => id === 3 * m + e).length));
      const cv = loads.map((load) => {
        const mean = load.reduce((a, b) => a + b, 0) / 3;
        return load.reduce((t, x) => t + (x - mean) ** 2, 0) / 3 / mean ** 2;
      });
      const expected = ((cv[0] ?? NaN) + (cv[1] ?? NaN)) / 2;
      expect(losses.importance).toBeCloseTo(expected, 8);
      return expected;
    };
    expect(
      await cost([
        [1, 1, 1],
        [1, 1, 1],
        [1, 1, 1],
        [1, 1, 1],
      ]),
    ).toBeCloseTo(2, 8);
    const spread = await Promise.all(
      [3, 6, 9].map((x) =>
        cost([
          [x, 0, 0],
          [x, 0, 0],
          [-x, x, 0],
          [0, -x, x],
        ]),
      ),
    );
    expect(Math.min(...spread)).toBeLessThan(2);
  });

  it("the entropy regulariser is -ln 2 where each of two modalities keeps to its own expert, 0 where they agree", async () => {
    const on = float64();
    const regulariser = async (probabilities: number[][], present: number[][]): Promise<number> => {
      const found = await results(on, () => ({
        value: entropyRegulariser(
          modalityMeans(
            tensor(on, probabilities),
            present.map((mask) => on.tensor(Float64Array.from(mask), [mask.length])),
          ),
        ),
      }));
      return flat(found.value)[0] ?? Number.NaN;
    };
    const own = [
      [1, 0, 0],
      [0, 1, 0],
    ];
    expect(
      await regulariser(own, [
        [1, 0],
        [0, 1],
      ]),
    ).toBeCloseTo(-Math.LN2, 12);
    expect(
      await regulariser(own, [
        [1, 0],
        [1, 0],
      ]),
    ).toBeCloseTo(0, 12);
    // A modality without tokens is not averaged in.
    expect(
      await regulariser(own, [
        [1, 0],
        [0, 1],
        [0, 0],
      ]),
    ).toBeCloseTo(-Math.LN2, 12);
    expect(
      await regulariser(own, [
        [0, 0],
        [0, 0],
      ]),
    ).toBeCloseTo(0, 12);
    expect(on.live()).toBe(0);
  });

  it("inside a layer the experts see the indicator instead of what is missing", async () => {
    const on = float64();
    const experts = glu({ count: 4, width: 3, hidden: 2, engine: on, random: random(on, 5) });
    const layer = moeLayer(fuseMoE({ k: 2 }), { engine: on, width: 3 }, { experts });
    const output = async (hidden: number[][], missing: number[]): Promise<number[]> => {
      const found = await results(on, () => ({
        y: moe(
          layer,
          layerParams(layer),
          layerInput(layer, tensor(on, hidden), {
            modalityIds: on.tensor(Int32Array.of(0, 1, 0, 1), [4]),
            missing: on.tensor(Float64Array.from(missing), [4]),
          }),
        ).output,
      }));
      return flat(found.y);
    };
    const changed = rows.map((row, t) => (t === 1 ? [7, 7, 7] : row));
    expect(await output(changed, [0, 1, 0, 0])).toEqual(await output(rows, [0, 1, 0, 0]));
    expect(await output(changed, [0, 0, 0, 0])).not.toEqual(await output(rows, [0, 0, 0, 0]));
    expect((await output(rows, [0, 1, 0, 0])).slice(0, 3)).toEqual((await output(rows, [0, 0, 0, 0])).slice(0, 3));
    dispose(layerParams(layer));
    expect(on.live()).toBe(0);
  });

  it("ids of modalities may lie in rows of the batch", async () => {
    const on = float64();
    const { flatIds, inRows } = await results(on, () => {
      const router = fuseMoE({ k: 1 }).init(routerContext(on));
      const hidden = tensor(
        on,
        [1, 2, 3, 4].map((i) => [i, 1, -i, 0, 1, 2]),
      );
      const routed = (shape: readonly number[]): Tensor => {
        const modalityIds = on.tensor(Int32Array.of(0, 1, 1, 0), shape);
        const input = routerInput(on, { hidden, batch: 2, training: true });
        return sparse(router.route(router.params, { ...input, modalityIds })).experts;
      };
      return { flatIds: routed([4]), inRows: routed([2, 2]) };
    });
    expect(inRows).toEqual(flatIds);
  });
  it("refuses what cannot be, with the reason", async () => {
    const on = float64();
    const init =
      (options: Partial<FuseMoEOptions>, sizes = {}) =>
      () =>
        fuseMoE({ k: 1, ...options }).init(routerContext(on, { experts: 5, width: 6, ...sizes }));
    expect(init({ design: "disjoint" })).toThrow("5 experts in 2 pools, one for each modality; they must divide");
    expect(init({ design: "disjoint", k: 4 }, { experts: 6 })).toThrow("fuseMoE: k = 4 of 3 experts");
    expect(init({ design: "joint", modalities: 4 })).toThrow("4 modalities side by side in a width of 6");
    expect(init({ k: 6 })).toThrow("fuseMoE: k = 6 of 5 experts");
    expect(init({ modalities: 0 })).toThrow("modalities = 0");
    expect(init({ noiseFloor: 0 })).toThrow("noiseFloor = 0");
    expect(init({ entropy: -1 })).toThrow("entropy = -1");
    expect(() => fuseMoE(JSON.parse('{ "k": 1, "gate": "cosine" }'))).toThrow('gate = "cosine"');
    await expect(run({}, { ids: [0, 1] })).rejects.toThrow(
      "there are 2 modality ids for 4 tokens; pass input.modalityIds",
    );
    await expect(run({}, { missing: [0, 1] })).rejects.toThrow("input.missing is [2]; expected [4], 1 = missing");
    await expect(run({ design: "joint", modalities: 3 }, { missing: [0, 1] })).rejects.toThrow("expected [4, 3]");
    expect(fuseMoE({ k: 2 }).needs).toEqual(["modalityIds"]);
    expect(fuseMoE({ k: 2, design: "joint" }).needs).toEqual([]);
  });
});
