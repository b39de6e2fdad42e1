// Routers by name, and the experts that keep the active parameters equal.
import { UnsupportedError } from "@switchyard/core";
import { describe, expect, test } from "vitest";
import { defaultRouters, expertSizes, routerFrom, routerNames, routersFrom } from "./routers.ts";

describe("routerFrom", () => {
  test("a name alone takes the defaults", () => {
    expect(routerFrom("topK").plugin.options).toMatchObject({ k: 2 });
    expect(routersFrom(defaultRouters).map(({ plugin }) => plugin.name)).toEqual([...defaultRouters]);
  });

  test("options are numbers, booleans or words", () => {
    const { label, plugin } = routerFrom("topK:k=1:bias=true:order=topk-softmax:balance=0.05");
    expect(label).toBe("topK:k=1:bias=true:order=topk-softmax:balance=0.05");
    expect(plugin.options).toMatchObject({ k: 1, bias: true, order: "topk-softmax", balance: 0.05 });
  });

  test.each([
    ["topk", 'unknown router "topk"; the routers are topK, switchRouter, reMoE, expertChoice'],
    ["", 'unknown router ""'],
    ["topK:k", '"k" is not option=value; write for example topK:k=2'],
    ["topK:q=3", 'topK has no option "q"; its options are k, '],
    ["topK:balance=much", "balance"],
    ["expertChoice", "chooses by looking at later tokens"],
    ["expertRace:training=compete", "chooses by looking at later tokens"],
  ])("%s is refused", (specification, message) => {
    expect(() => routerFrom(specification)).toThrow(message);
  });

  test("the same router twice is refused, with other options it is another", () => {
    expect(() => routersFrom(["topK", "topK"])).toThrow(new UnsupportedError('router "topK" is named twice'));
    expect(routersFrom(["topK", "topK:k=1"])).toHaveLength(2);
  });
});

describe("expertSizes", () => {
  const size = { experts: 8, expertWidth: 128 };
  test.each([
    ["topK", 8, 128],
    ["reMoE", 8, 128],
    ["switchRouter", 4, 256],
    ["topK:k=1", 4, 256],
    ["topK:k=4", 16, 64],
  ])("%s: %i experts of %i", (specification, experts, expertWidth) => {
    const { plugin } = routerFrom(specification);
    expect(expertSizes(plugin, size)).toEqual({ experts, expertWidth });
    expect((plugin.expertsPerToken ?? 0) * expertWidth).toBe(256);
    expect(experts * expertWidth).toBe(8 * 128);
  });

  test("portions that do not divide are refused", () => {
    for (const k of ["3", "1.5", "0"]) {
      expect(() => expertSizes(routerFrom(`topK:k=${k}`).plugin, size)).toThrow("choose a number that divides 256");
    }
  });
});

test("every router of the package can be named", async () => {
  const exported = Object.entries(await import("@switchyard/routers")).filter(
    ([, value]) => typeof value === "function",
  );
  expect(exported.map(([name]) => name).sort()).toEqual([...routerNames].sort());
});
