import { dispose, type Tensor } from "@switchyard/core";
import type { Layout, Routed } from "@switchyard/core/moe";
import { routerContext, routerInput, testRouter } from "@switchyard/testing";
import { describe, expect, it } from "vitest";
import { deepseekFamilies } from "../test/families/deepseek.ts";
import { flat, float64, given, readVectors, results, sparse, tensor, unmet } from "../test/vectors.ts";
import { type DeepSeekV2Options, deepSeekV2 } from "./deep-seek-v2.ts";

testRouter({ plugin: ({ k = 2 }) => deepSeekV2({ k, balance: 1 }), weights: "sum to at most 1" });
// Six experts: the suite's cyclic shift by two moves whole groups.
testRouter({
  plugin: ({ experts, k = 3 }) => {
    const groups = experts % 3 === 0 ? 3 : 1;
    const keptGroups = Math.min(k === experts ? groups : 2, groups);
    return deepSeekV2({
      k: Math.min(k, experts),
      groups,
      keptGroups,
      normalise: true,
      deviceBalance: 1,
      communication: 1,
    });
  },
  sizes: { experts: 6, width: 5 },
  weights: "sum to 1",
});

describe("deepSeekV2 meets its vectors", () => {
  const { cases, tolerance } = readVectors("deepseek");
  it.each(cases.map((one) => [one.id, one] as const))("%s", async (_, one) => {
    expect(await unmet(given(deepseekFamilies, "deepseek"), one, tolerance)).toEqual([]);
  });
});

describe("deepSeekV2", () => {
  interface Call {
    readonly probabilities: readonly (readonly number[])[];
    readonly layout?: Layout;
    readonly mask?: readonly number[];
    readonly training?: boolean;
  }
  const route = async (
    options: DeepSeekV2Options,
    { probabilities, layout, mask, training = true }: Call,
  ): Promise<{ ids: number[]; weights: number[]; losses: Record<string, number> }> => {
    const on = float64();
    const experts = probabilities[0]?.length ?? 0;
    const router = deepSeekV2(options).init(routerContext(on, { experts }));
    let names: readonly string[] = [];
    const found = await results<string>(on, () => {
      const logits = tensor(
        on,
        probabilities.map((row) => row.map(Math.log)),
      );
      const base = routerInput(on, { hidden: logits, training, ...(mask ? { mask } : {}) });
      const routed = router.select?.(logits, { ...base, ...(layout ? { layout } : {}) }) as Routed;
      names = Object.keys(routed.losses);
      const values = Object.entries(routed.losses).map(([name, { value }]): [string, Tensor] => [name, value]);
      return { ids: sparse(routed).experts, weights: sparse(routed).weights, ...Object.fromEntries(values) };
    });
    dispose([router.params, router.buffers]);
    const losses = Object.fromEntries(names.map((name) => [name, flat(found[name] ?? Number.NaN)[0] ?? Number.NaN]));
    return { ids: flat(found.ids ?? []), weights: flat(found.weights ?? []), losses };
  };
  const close = (found: readonly number[], expected: readonly number[]): void =>
    expect(found.map((x) => x.toFixed(12))).toEqual(expected.map((x) => x.toFixed(12)));
  const row = [0.3, 0.05, 0.05, 0.2, 0.15, 0.25];

  it("weights are probabilities, times the scale, divided by their sum on request", async () => {
    close((await route({ k: 2 }, { probabilities: [row] })).weights, [0.3, 0.25]);
    close((await route({ k: 2, scale: 16 }, { probabilities: [row] })).weights, [4.8, 4]);
    close((await route({ k: 2, normalise: true }, { probabilities: [row] })).weights, [0.3 / 0.55, 0.25 / 0.55]);
  });
  it("a group is judged by its best expert", async () => {
    // Groups {0, 1, 2} with 0.4 in sum and {3, 4, 5} with 0.6: the best expert lies in the first.
    const found = await route({ k: 2, groups: 2, keptGroups: 1 }, { probabilities: [row] });
    expect(found.ids).toEqual([0, 1]); // 1 and 2 tie
  });

  /** The three losses as the paper writes them, by loops over one sequence. */
  const lossesByHand = (
    probabilities: readonly (readonly number[])[],
    chosen: readonly (readonly number[])[],
    { groups, keptGroups }: { groups: number; keptGroups: number },
  ): number[] => {
    const [n, experts, k] = [probabilities.length, probabilities[0]?.length ?? 0, chosen[0]?.length ?? 0];
    const size = experts / groups;
    const f = Array.from({ length: experts }, (_, e) => {
      const count = chosen.filter((ids) => ids.includes(e)).length;
      return (experts / (k * n)) * count;
    });
    const P = f.map((_, e) => probabilities.reduce((total, p) => total + (p[e] ?? 0), 0) / n);
    let [expert, device, communication] = [0, 0, 0];
    for (const [e, share] of f.entries()) expert += share * (P[e] ?? 0);
    for (let i = 0; i < groups; i++) {
      const members = Array.from({ length: size }, (_, j) => i * size + j);
      const mean = members.reduce((total, e) => total + (f[e] ?? 0), 0) / size;
      const mass = members.reduce((total, e) => total + (P[e] ?? 0), 0);
      const sent = chosen.filter((ids) => ids.some((e) => members.includes(e))).length;
      device += mean * mass;
      communication += (groups / (keptGroups * n)) * sent * mass;
    }
    return [expert, device, communication];
  };
  const many = [
    row,
    [0.1, 0.1, 0.4, 0.1, 0.2, 0.1],
    [0.05, 0.25, 0.1, 0.35, 0.15, 0.1],
    [0.2, 0.1, 0.1, 0.05, 0.5, 0.05],
  ];
  const limit = { groups: 3, keptGroups: 2 };
  const chosenOf = (ids: readonly number[], k: number): number[][] =>
    Array.from({ length: ids.length / k }, (_, t) => ids.slice(t * k, (t + 1) * k));

  it("the losses over experts, groups and communication equal the paper's sums", async () => {
    const { ids, losses } = await route({ k: 3, ...limit }, { probabilities: many });
    expect(Object.keys(losses)).toEqual(["balance", "deviceBalance", "communication"]);
    close(Object.values(losses), lossesByHand(many, chosenOf(ids, 3), limit));
  });
  it("they are means over the sequences, and leave padding out", async () => {
    const { ids } = await route({ k: 3, ...limit }, { probabilities: many });
    const chosen = chosenOf(ids, 3);
    const layout = { batch: 2, sequence: 2, past: 0 };
    const apart = await route({ k: 3, ...limit }, { probabilities: many, layout });
    const halves = [0, 2].map((t) => lossesByHand(many.slice(t, t + 2), chosen.slice(t, t + 2), limit));
    close(
      Object.values(apart.losses),
      [0, 1, 2].map((i) => ((halves[0]?.[i] ?? 0) + (halves[1]?.[i] ?? 0)) / 2),
    );
    const padded = await route({ k: 3, ...limit }, { probabilities: many, mask: [1, 1, 1, 0] });
    close(Object.values(padded.losses), lossesByHand(many.slice(0, 3), chosen.slice(0, 3), limit));
  });
  it("there are none over groups without groups, none at weight 0, none in evaluation", async () => {
    const names = async (options: DeepSeekV2Options, training = true): Promise<string[]> =>
      Object.keys((await route(options, { probabilities: many, training })).losses);
    expect(await names({ k: 2 })).toEqual(["balance"]);
    expect(await names({ k: 2, ...limit, balance: 0, deviceBalance: 0 })).toEqual(["communication"]);
    expect(await names({ k: 2, ...limit, communication: 0, balance: 0 })).toEqual(["deviceBalance"]);
    expect(await names({ k: 2, ...limit }, false)).toEqual([]);
  });
  it("uniform routing has a balance loss of 1", async () => {
    // All four equal experts are taken: f = 1 and P = 1/4.
    const { losses } = await route({ k: 4 }, { probabilities: [[0.25, 0.25, 0.25, 0.25]] });
    close([losses.balance ?? Number.NaN], [1]);
  });
  it("refuses options that cannot be", () => {
    const init = (options: DeepSeekV2Options): unknown =>
      deepSeekV2(options).init(routerContext(float64(), { experts: 8 }));
    expect(() => deepSeekV2({ k: 2, groups: 1.5 })).toThrow("deepSeekV2: groups = 1.5; expected a whole number from 1");
    expect(() => deepSeekV2({ k: 2, groups: 2, keptGroups: 0 })).toThrow("keptGroups = 0 of 2 groups");
    expect(() => deepSeekV2({ k: 2, scale: Number.NaN })).toThrow("scale = NaN");
    expect(() => deepSeekV2({ k: 2, communication: -1 })).toThrow("communication = -1");
    expect(() => init({ k: 0 })).toThrow("deepSeekV2: k = 0 of 8 experts");
    expect(() => init({ k: 2, groups: 5 })).toThrow("8 experts do not split into 5 groups");
    expect(() => init({ k: 3, groups: 4, keptGroups: 1 })).toThrow("1 of 4 groups hold only 2 experts");
  });
});
