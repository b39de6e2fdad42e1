// What defineRouter fills in, checks and refuses, and what pluginFault says of values that are no plugin.
import { describe, expect, expectTypeOf, it } from "vitest";
import { UnsupportedError } from "../errors.ts";
import { defineRouter, pluginFault, type RouterDefinition, type RouterOptions } from "./define-router.ts";
import type { Router, RouterPlugin } from "./plan.ts";

const router: Router = {
  params: {},
  buffers: {},
  route: () => {
    throw new Error("not called");
  },
};
const rest = {
  causal: { training: true, evaluation: true },
  needs: [],
  plans: ["sparse"],
  init: () => router,
} satisfies Omit<RouterPlugin, "name" | "options">;

const nearest = defineRouter({
  name: "nearest",
  options: { k: 2, order: "near", bias: false, topP: null },
  plugin: ({ k }) => ({ ...rest, expertsPerToken: k, gives: ["logits"] }),
});

describe("defineRouter", () => {
  it("fills in defaults, and says them", () => {
    expect(nearest()).toMatchObject({ name: "nearest", expertsPerToken: 2, gives: ["logits"], plans: ["sparse"] });
    expect(nearest().options).toEqual({ k: 2, order: "near", bias: false, topP: null });
    expect(nearest({ k: 4, bias: true, topP: 0.5 }).options).toEqual({ k: 4, order: "near", bias: true, topP: 0.5 });
    expect(nearest({ k: undefined } as object).options).toMatchObject({ k: 2 });
    expect(nearest().init).toBe(rest.init);
  });
  it("gives types: options by their defaults", () => {
    type Options = NonNullable<Parameters<typeof nearest>[0]>;
    expectTypeOf<Options["k"]>().toEqualTypeOf<number | undefined>();
    expectTypeOf<Options["order"]>().toEqualTypeOf<string | undefined>();
    expectTypeOf<Options["bias"]>().toEqualTypeOf<boolean | undefined>();
    expectTypeOf(nearest()).toEqualTypeOf<RouterPlugin>();
  });
  it.each<[object, string]>([
    [{ q: 1 }, 'router nearest: there is no option "q"; its options are k, order, bias, topP'],
    [{ k: "2" }, 'router nearest: k = "2"; expected a number such as 2'],
    [{ k: Number.NaN }, "router nearest: k = NaN; expected a number such as 2"],
    [{ order: 1 }, "router nearest: order = 1; expected a string such as near"],
    [{ bias: "yes" }, 'router nearest: bias = "yes"; expected a boolean such as false'],
    [{ k: null }, "router nearest: k = null; expected a number such as 2"],
    [{ topP: [1] }, "router nearest: topP = 1; expected a number, a word or a boolean"],
  ])("refuses the options %j", (options, message) => {
    expect(() => nearest(options)).toThrow(message);
  });
  it.each<[string, Partial<RouterDefinition<RouterOptions>>, string]>([
    ["a name that no command line can hold", { name: "my router" }, "router my router: its name must be a word"],
    ["a name like that of a wrapped router", { name: "a+b" }, "router a+b: its name must be a word"],
    ["a card of something else", { card: { name: "other" } }, 'router one: its card is that of "other"'],
    ["a card that is no data", { card: { title: (() => "x") as never } }, "its card must be plain data"],
  ])("refuses %s at once", (_, change, message) => {
    const make = (): unknown => defineRouter({ name: "one", options: {}, plugin: () => rest, ...change });
    expect(make).toThrow(UnsupportedError);
    expect(make).toThrow(message);
  });
  it("refuses a plugin that is none, and one that its card belies", () => {
    const broken = (change: object, card = {}): (() => RouterPlugin) =>
      defineRouter({ name: "one", options: {}, card, plugin: () => ({ ...rest, ...change }) });
    expect(broken({ plans: [] })).toThrow("router one: plans must list the kinds of plan it returns");
    expect(broken({}, { plans: ["dense"] })).toThrow("router one: its card says plans [dense], the plugin [sparse]");
    expect(broken({}, { needs: ["host"] })).toThrow("router one: its card says needs [host], the plugin []");
    expect(broken({}, { plans: ["sparse"], needs: [], title: "One" })().name).toBe("one");
  });
});

describe("pluginFault", () => {
  it.each<[unknown, RegExp | undefined]>([
    [{ name: "fine", ...rest }, undefined],
    [{ name: "topK+capacity", ...rest, options: { router: { name: "topK", options: null } } }, undefined],
    [undefined, /^it is undefined, not an object/],
    [null, /it is null, not an object/],
    ["topK", /it is a string/],
    [() => 1, /it is a function, not an object; what defineRouter gives is the factory: export that itself/],
    [{ ...rest }, /its name must be a word/],
    [{ name: "x", ...rest, init: undefined }, /no init\(context\)/],
    [{ name: "x", ...rest, causal: { training: true } }, /causal must say/],
    [{ name: "x", ...rest, plans: "sparse" }, /plans must list/],
    [{ name: "x", ...rest, plans: ["sparce"] }, /plans must list/],
    [{ name: "x", ...rest, needs: undefined }, /needs must be a list/],
    [{ name: "x", ...rest, gives: ["gold"] }, /gives must be a list of scores, logits, probabilities, choices/],
    [{ name: "x", ...rest, expertsPerToken: -1 }, /expertsPerToken is -1/],
    [{ name: "x", ...rest, sharedExperts: 0.5 }, /sharedExperts is 0.5/],
    [{ name: "x", ...rest, options: { k: undefined } }, /options must be plain data/],
    [{ name: "x", ...rest, options: [1] }, /options must be plain data/],
  ])("of %j is %s", (value, fault) => {
    if (fault === undefined) expect(pluginFault(value)).toBeUndefined();
    else expect(pluginFault(value)).toMatch(fault);
  });
});
