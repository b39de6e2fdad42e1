// Different experts as one set, and parts of plans: names, widths, streaming, refusals. The suite of experts holds the
// arithmetic to plain loops.
import { describe, expect, test } from "vitest";
import { ShapeError } from "../errors.ts";
import { ffn } from "../moe/experts.ts";
import { float64, floats, ids, noise, numbers } from "../moe/moe.test-util.ts";
import type { Experts } from "../moe/plan.ts";
import { random } from "../random.ts";
import { adapter } from "./adapter.ts";
import { heterogeneous, planPart } from "./heterogeneous.ts";
import { lora } from "./lora.ts";
import { lowDimensional } from "./low-dimensional.ts";

const width = 3;
const layout = { batch: 1, sequence: 4, past: 0 };

describe("heterogeneous", () => {
  test("counts, names and losses are those of its sets", async () => {
    const e = float64();
    const from = (name: string) => ({ engine: e, random: random(e, 1).at(name) });
    const set = heterogeneous({
      deep: lowDimensional({ count: 2, width, low: 1, hidden: 2, ...from("deep") }),
      wide: ffn({ count: 3, width, hidden: 4, ...from("wide") }),
    });
    expect(set.count).toBe(5);
    expect(Object.keys(set.params)).toEqual(["deep", "wide"]);
    expect(set.mixed).toBeUndefined();
    expect(set.stream).toBeUndefined();
    expect(set.spatial).toBeUndefined();
    const rows = floats(e, noise(12), [4, width]);
    const told: string[] = [];
    const { losses = {} } = set.apply(set.params, rows, ids(e, [1, 2, 2, 3, 4], [5]), layout, (name, _, ends) =>
      told.push(`${name} [${ends.shape}]`),
    );
    expect(Object.keys(losses)).toEqual(["deep.reconstruction"]);
    expect(losses["deep.reconstruction"]?.weight).toBe(0.1);
    expect(told).toContain("wide.up [3]");
    expect(told).toContain("deep.shared.encoder [2]");
  });

  test("a set of neighbours makes the whole one spatial; streamed sets are refused", () => {
    const e = float64();
    const plain = adapter({ count: 2, width, engine: e, random: random(e, 1) });
    expect(heterogeneous({ a: { ...plain, spatial: true }, b: plain }).spatial).toBe(true);
    const streamed: Experts = { ...plain, stream: async (rows) => rows };
    expect(() => heterogeneous({ a: plain, b: streamed })).toThrow(/experts of "b" are streamed/);
  });

  test("sets of different output widths, a set without parameters, no set at all are refused", () => {
    const e = float64();
    const from = { engine: e, random: random(e, 1) };
    for (const name of ["shared", "a.b", ""])
      expect(() => heterogeneous({ [name]: adapter({ count: 1, width, ...from }) })).toThrow(
        `a set is called "${name}"`,
      );

    const set = heterogeneous({
      narrow: lora({ count: 1, width, out: 2, rank: 1, ...from }),
      wide: lora({ count: 1, width, rank: 1, ...from }),
    });
    const rows = floats(e, noise(12), [4, width]);
    const ends = ids(e, [1, 2], [2]);
    expect(() => set.apply(set.params, rows, ends, layout)).toThrow(
      '"wide" gives f32 [4, 3], the sets before it f32 [4, 2]; expected one width',
    );
    expect(() => set.apply({}, rows, ends, layout)).toThrow('lack "narrow"');
    expect(() => heterogeneous({})).toThrow(ShapeError);
  });
});

describe("planPart", () => {
  test("of a sparse plan: ids counted from the first, the rest empty; weights and bound stay", async () => {
    const e = float64();
    const weights = floats(e, [1, 2, 3, 4, 5, 6], [3, 2]);
    const plan = { kind: "sparse", experts: ids(e, [0, 3, 2, -1, 4, 1], [3, 2]), weights, bound: 5 } as const;
    const part = planPart(plan, { first: 1, count: 3 });
    expect(await numbers(part.experts)).toEqual([-1, 2, 1, -1, -1, 0]);
    expect(part.weights).toBe(weights);
    expect(part.bound).toBe(5);
  });
  test("of a dense plan: its columns", async () => {
    const e = float64();
    const plan = { kind: "dense", weights: floats(e, [1, 2, 3, 4, 5, 6], [2, 3]) } as const;
    expect(await numbers(planPart(plan, { first: 1, count: 2 }).weights)).toEqual([2, 3, 5, 6]);
    expect(() => planPart(plan, { first: 2, count: 2 })).toThrow("experts 2..3 of a plan for 3");
    expect(() => planPart(plan, { first: -1, count: 2 })).toThrow(ShapeError);
    expect(() => planPart(plan, { first: 0, count: 0 })).toThrow(ShapeError);
  });
});
