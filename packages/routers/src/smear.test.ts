import {
  autodiff,
  dispose,
  grad,
  leaves,
  mapTree,
  mul,
  random,
  square,
  sub,
  sum,
  type Tensor,
  type Tree,
  watch,
} from "@switchyard/core";
import { type Experts, ffn, glu, layerInput, layerParams, moe, moeLayer, type RouterInput } from "@switchyard/core/moe";
import { routerContext, routerInput, testRouter } from "@switchyard/testing";
import { describe, expect, it } from "vitest";
import { smearFamily } from "../test/families/ensemble.ts";
import { flat, float64, readVectors, results, tensor, unmet } from "../test/vectors.ts";
import { type SmearOptions, smear } from "./smear.ts";

testRouter({ plugin: () => smear(), weights: "sum to 1" });
testRouter({ plugin: () => smear({ normaliseWeights: false, decoding: true }), weights: "sum to 1" });
testRouter({
  plugin: () => smear({ normaliseWeights: false, expertDropout: 0.4, epsilon: 0.3, jitter: 0.2 }),
  weights: "sum to 1",
});

describe("smear meets its vectors", () => {
  const { cases, tolerance } = readVectors("smear");
  it.each(cases.map((one) => [one.id, one] as const))("%s", async (_, one) => {
    expect(await unmet(smearFamily, one, tolerance)).toEqual([]);
  });
});

describe("smear", () => {
  const on = float64();
  const rows = [
    [1, 0.5],
    [-1, 2],
    [0.3, -0.7],
    [2, 1],
  ];
  /** A router whose choice matters: large weights. */
  const loud = (options: SmearOptions, experts = 3) => {
    const router = smear(options).init(routerContext(on, { experts, width: 2 }));
    const params = { ...(router.params as Record<string, Tensor>) };
    params.weight?.dispose();
    params.weight = on.tensor(random(on, 3).host("normal", 2 * experts), [experts, 2]);
    params.gain?.dispose();
    if (params.gain) params.gain = on.tensor(Float64Array.of(1, 2), [2]);
    return { ...router, params };
  };
  /** The p of each group and the groups. */
  const route = async (
    options: SmearOptions,
    x: readonly (readonly number[])[],
    more: (input: RouterInput) => Partial<RouterInput> = () => ({}),
  ): Promise<{ p: number[][]; groups: number[] }> => {
    const router = loud(options);
    const { p, groups } = await results(on, () => {
      const base = routerInput(on, { hidden: tensor(on, x) });
      const { plan } = router.route(router.params, { ...base, ...more(base) });
      const [coefficients] = plan.kind === "merge" ? plan.coefficients : [];
      if (plan.kind !== "merge" || !coefficients) throw new Error(`found a plan of kind ${plan.kind}`);
      return { p: coefficients, groups: plan.groups };
    });
    dispose(router.params);
    return { p: p as number[][], groups: flat(groups) };
  };
  const close = (a: readonly number[] | undefined, b: readonly number[] | undefined): void => {
    expect(a).toHaveLength(b?.length ?? -1);
    a?.forEach((value, i) => {
      expect(value).toBeCloseTo(b?.[i] ?? Number.NaN, 12);
    });
  };
  const inTwoRows = (): Partial<RouterInput> => ({ layout: { batch: 2, sequence: 2, past: 0 } });

  it("samples do not see each other, tokens of a sample share one mixture", async () => {
    const { p, groups } = await route({}, rows, inTwoRows);
    expect(groups).toEqual([0, 0, 1, 1]);
    close(p[0], (await route({}, rows.slice(0, 2))).p[0]);
    close(p[1], (await route({}, rows.slice(2))).p[0]);
    expect(Math.abs((p[0]?.[0] ?? 0) - (p[1]?.[0] ?? 0))).toBeGreaterThan(0.01);
  });
  it("padding enters no mean and has no mixture", async () => {
    const { p, groups } = await route({}, rows, () => ({
      layout: { batch: 1, sequence: 4, past: 0, mask: tensor(on, [[0, 1, 1, 0]]) },
    }));
    expect(groups).toEqual([-1, 0, 0, -1]);
    close(p[0], (await route({}, rows.slice(1, 3))).p[0]);
  });
  it("named samples may lie anywhere; names beyond the last have no mixture", async () => {
    const layout = (mask?: Tensor) => ({
      batch: 2,
      sequence: 2,
      past: 0,
      samples: on.tensor(Int32Array.of(1, 0, 1, 7), [4]),
      ...(mask ? { mask } : {}),
    });
    const pick = (...tokens: number[]): number[][] => tokens.map((t) => rows[t] ?? []);
    const named = await route({ samples: 3 }, rows, () => ({ layout: layout() }));
    expect(named.groups).toEqual([1, 0, 1, 7]);
    expect(named.p).toHaveLength(3);
    close(named.p[0], (await route({}, pick(1))).p[0]);
    close(named.p[1], (await route({}, pick(0, 2))).p[0]);
    const masked = await route({ samples: 3 }, rows, () => ({
      layout: layout(
        tensor(on, [
          [1, 1],
          [0, 1],
        ]),
      ),
    }));
    expect(masked.groups).toEqual([1, 0, -1, 7]);
    close(masked.p[1], (await route({}, pick(0))).p[0]);
    await expect(route({}, rows, () => ({ layout: layout() }))).rejects.toThrow("pass samples, the most in one call");

    const experts = ffn({ count: 3, width: 2, hidden: 4, bias: true, engine: on, random: random(on, 1) });
    const layer = moeLayer(smear({ samples: 3 }), { engine: on, width: 2 }, { experts });
    const { output } = await results(on, () => ({
      output: moe(layer, layerParams(layer), layerInput(layer, tensor(on, rows), { layout: layout() })).output,
    }));
    const outputs = (output as number[][]).map((row) => row.some((value) => value !== 0));
    expect(outputs).toEqual([true, true, true, false]);
    dispose(layerParams(layer));
  });

  // A router that always takes expert 1: logits of 0, a bias so large that the others are 0 to the last bit.
  const sure = (params: Tree): Tree =>
    mapTree(params, (x, path) =>
      path === "router.weight"
        ? on.tensor(new Float64Array(x.size), x.shape)
        : path === "router.bias"
          ? on.tensor(Float64Array.of(0, 2000, 0), [3])
          : x,
    );
  it.each([
    ["ffn", (bias: boolean) => ffn({ count: 3, width: 2, hidden: 4, bias, engine: on, random: random(on, 1) })],
    ["glu", (bias: boolean) => glu({ count: 3, width: 2, hidden: 4, bias, engine: on, random: random(on, 1) })],
  ] as const)(
    "with a one-hot p the output of %s is that of the one expert",
    async (_, make: (bias: boolean) => Experts) => {
      for (const bias of [false, true]) {
        const start = make(bias);
        // Biases start at 0, where they would not show.
        const params = mapTree(start.params, (x, path) =>
          on.tensor(random(on, 4).at(path).host("normal", x.size), x.shape),
        );
        const experts = { ...start, params };
        const layer = moeLayer(smear(), { engine: on, width: 2 }, { experts });
        const found = await results(on, () => {
          const x = tensor(on, rows);
          const merged = moe(layer, sure(layerParams(layer)), layerInput(layer, x, inTwoRows())).output;
          const { output } = experts.apply(params, x, on.tensor(Int32Array.of(0, 4, 4), [3]), {
            batch: 2,
            sequence: 2,
            past: 0,
          });
          return { merged, alone: output };
        });
        expect(flat(found.merged).some((value) => Math.abs(value) > 0.1)).toBe(true);
        close(flat(found.merged), flat(found.alone));
        dispose([start.params, layerParams(layer)]);
      }
    },
  );
  it("one mixture is not the mixture of the outputs, unless the experts are linear", async () => {
    // For squared outputs f(x) = down (up x)², merging differs from averaging; the vectors hold numbers for both.
    const experts = ffn({ count: 3, width: 2, hidden: 4, squared: true, engine: on, random: random(on, 1) });
    const layer = moeLayer(smear(), { engine: on, width: 2 }, { experts });
    const found = await results(on, () => {
      const input = layerInput(layer, tensor(on, rows));
      const { output, routed } = moe(layer, layerParams(layer), input);
      const weights = routed.probabilities as Tensor;
      const route = () => ({ plan: { kind: "dense", weights } as const, losses: {} });
      const average = moe({ ...layer, router: { ...layer.router, route } }, layerParams(layer), input).output;
      return { output, average };
    });
    expect(Math.abs((flat(found.output)[0] ?? 0) - (flat(found.average)[0] ?? 0))).toBeGreaterThan(1e-3);
    dispose(layerParams(layer));
  });
  it("learns through every parameter, router and experts: a gradient step lowers the loss", async () => {
    const experts = ffn({ count: 3, width: 2, hidden: 4, bias: true, engine: on, random: random(on, 1) });
    const layer = moeLayer(smear({ normaliseWeights: false }), { engine: on, width: 2 }, { experts });
    const loss = (params: Tree): Tensor => {
      const { output } = moe(layer, params, layerInput(layer, tensor(on, rows), inTwoRows()));
      return sum(square(sub(output, tensor(on, [...rows].reverse()))));
    };
    const found = await results(on, () => {
      const params = watch(autodiff(on), layerParams(layer));
      const slopes = new Map(leaves(grad(loss(params), params)));
      for (const [path, slope] of slopes)
        expect([path, on.read(slope).some((value) => value !== 0)]).toEqual([path, true]);
      const moved = mapTree(layerParams(layer), (x, path) => sub(x, mul(slopes.get(path) as Tensor, 0.01)));
      return { before: loss(layerParams(layer)), after: loss(moved) };
    });
    expect(flat(found.after)[0]).toBeLessThan(0.99 * (flat(found.before)[0] ?? 0));
    dispose(layerParams(layer));
  });

  // One sample per row of one token: 400 samples of the same token.
  const many = Array.from({ length: 400 }, () => [1, 0.5]);
  const each = (training: boolean) => (): Partial<RouterInput> => ({
    training,
    layout: { batch: 400, sequence: 1, past: 0 },
  });
  it("expert dropout leaves experts out of single samples, never all, and divides by what is left", async () => {
    const [plain = []] = (await route({}, [[1, 0.5]])).p;
    const { p } = await route({ expertDropout: 0.6 }, many, each(true));
    const kinds = new Map<string, number>();
    for (const row of p) {
      const kept = row.map((value) => value > 0);
      const total = plain.reduce((sum, value, e) => sum + (kept[e] ? value : 0), 0);
      close(
        row,
        plain.map((value, e) => (kept[e] ? value / total : 0)),
      );
      kinds.set(String(kept), (kinds.get(String(kept)) ?? 0) + 1);
    }
    expect(kinds.size).toBe(7); // every set but the empty one
    // Dropped by 0.6 each, or all of them and therefore none: 0.4³ + 0.6³.
    expect(Math.abs((kinds.get("true,true,true") ?? 0) / 400 - 0.28)).toBeLessThan(0.08);
    close((await route({ expertDropout: 1 }, many, each(true))).p[0], plain);
    expect((await route({ expertDropout: 0.6 }, many, each(false))).p[7]).toEqual(plain);
  });
  it("epsilon sends that share of the samples through the plain mean", async () => {
    const { p } = await route({ epsilon: 0.3 }, many, each(true));
    const uniform = p.filter((row) => row.every((value) => Math.abs(value - 1 / 3) < 1e-12)).length;
    expect(Math.abs(uniform / 400 - 0.3)).toBeLessThan(0.08);
    expect(new Set(p.map(String)).size).toBe(2);
    expect(new Set((await route({ epsilon: 0.3 }, many, each(false))).p.map(String)).size).toBe(1);
  });
  it("jitter moves the mean in training only, a little", async () => {
    const [plain = []] = (await route({}, [[1, 0.5]])).p;
    const { p } = await route({ jitter: 0.1, normaliseWeights: false }, many, each(true));
    expect(new Set(p.map(String)).size).toBeGreaterThan(1);
    expect((await route({ jitter: 0.1 }, many, each(false))).p[0]).toEqual(plain);
  });

  it("decoding keeps the mixture of the prompt, token by token or several at once", async () => {
    const router = loud({ decoding: true });
    const step = (x: number[][], past: number, cache?: Tree) => {
      const input = routerInput(on, { hidden: tensor(on, x), past, batch: 2, ...(cache ? { cache } : {}) });
      const { plan, cache: next } = router.route(router.params, input);
      if (plan.kind !== "merge" || !plan.coefficients[0] || !next) throw new Error("no mixture, or no cache");
      return { p: plan.coefficients[0], cache: next };
    };
    const found = await results(on, () => {
      const prompt = step(rows, 0); // two rows of two tokens
      const third = step([rows[1] ?? [], rows[0] ?? []], 2, prompt.cache);
      const more = step(rows, 3, third.cache);
      expect(leaves(more.cache).map(([name, x]) => [name, x.shape])).toEqual([["mixture", [2, 5, 3]]]);
      return { prompt: prompt.p, third: third.p, more: more.p };
    });
    expect(found.third).toEqual(found.prompt);
    expect(found.more).toEqual(found.prompt);
    on.scope(() => {
      const input = routerInput(on, { hidden: tensor(on, [[1, 2]]), past: 3 });
      expect(() => router.route(router.params, input)).toThrow("it got no cache of its own");
      const cache = { mixture: on.tensor(new Float64Array(6), [1, 2, 3]) };
      expect(() => router.route(router.params, { ...input, cache })).toThrow("its own cache is [1,2,3]");
      const samples = on.tensor(Int32Array.of(0), [1]);
      expect(() => router.route(router.params, { ...input, layout: { ...input.layout, samples } })).toThrow(
        "leave layout.samples out",
      );
      return undefined;
    });
    dispose(router.params);
  });
  it("refuses to decode with a cache unless asked, and experts that cannot be mixed", () => {
    const router = smear().init(routerContext(on, { experts: 3, width: 2 }));
    on.scope(() => {
      const input = routerInput(on, { hidden: tensor(on, [[1, 2]]), past: 3 });
      expect(() => router.route(router.params, input)).toThrow(/1 new tokens after 3 cached ones.*decoding: true/);
      return undefined;
    });
    dispose(router.params);
    const { mixed: _, ...rigid } = ffn({ count: 2, width: 2, hidden: 3, engine: on, random: random(on, 1) });
    expect(() => moeLayer(smear(), { engine: on, width: 2 }, { experts: rigid })).toThrow(
      "these experts have no mixed()",
    );
    dispose(rigid.params);
  });
  it("refuses options that cannot be", () => {
    expect(() => smear({ expertDropout: 1.5 })).toThrow("expertDropout = 1.5; expected a probability");
    expect(() => smear({ epsilon: -1 })).toThrow("epsilon = -1");
    expect(() => smear({ samples: 0 })).toThrow("samples = 0; expected a whole number from 1");
  });
});
