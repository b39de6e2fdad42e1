// Routers by name, and the experts that keep the active parameters equal.
import { UnsupportedError } from "@switchyard/core";
import { describe, expect, test } from "vitest";
import { savedRouter } from "./model-arguments.ts";
import {
  allNamed,
  causalRouters,
  defaultRouters,
  expertSizes,
  routerFrom,
  routerNames,
  routersFrom,
} from "./routers.ts";

describe("routerFrom", () => {
  test("a name alone takes the defaults", async () => {
    expect((await routerFrom("topK")).plugin.options).toMatchObject({ k: 2 });
    expect((await routersFrom(defaultRouters)).map(({ plugin }) => plugin.name)).toEqual([...defaultRouters]);
  });

  test("options are numbers, booleans or words", async () => {
    const { label, plugin } = await routerFrom("topK:k=1:bias=true:order=topk-softmax:balance=0.05");
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
    ["fuseMoE", "needs the modality of each token"],
    ["moeFFD:level=image", "chooses by looking at later tokens"],
    ["expertRace:training=compete", "chooses by looking at later tokens"],
  ])("%s is refused", async (specification, message) => {
    await expect(routerFrom(specification)).rejects.toThrow(message);
  });

  test.each(causalRouters())("%s is found again by what a saved model says of it", async (name) => {
    const { plugin } = await routerFrom(name);
    const router = { name: plugin.name, options: plugin.options ?? null };
    const saved = savedRouter({ model_type: "switchyard", router });
    expect((await routerFrom(saved ?? "")).plugin.options).toEqual(plugin.options);
  });

  test("the same router twice is refused, with other options it is another", async () => {
    await expect(routersFrom(["topK", "topK"])).rejects.toThrow(new UnsupportedError('router "topK" is named twice'));
    expect(await routersFrom(["topK", "topK:k=1"])).toHaveLength(2);
  });
});

describe("routers that look ahead", () => {
  test.each([
    [
      "expertRace:training=compete",
      "with training=threshold:evaluation=threshold it looks back only, or use one of topK,",
    ],
    ["gshard:order=choices", "with order=tokens it looks back only"],
    ["moeFFD:level=image", "with level=token it looks back only"],
    ["topK+capacity:policy=probability", "with policy=position it looks back only"],
    ["sinkhorn", "into a language model; use one of topK, switchRouter"],
  ])("%s: the refusal names the way out", async (specification, message) => {
    await expect(routerFrom(specification)).rejects.toThrow(message);
  });
  test("and lists causal routers only", async () => {
    const { message } = (await routerFrom("sinkhorn").catch((error: Error) => error)) as Error;
    const listed = message.slice(message.indexOf("use one of ") + 11).split(", ");
    expect(listed).toEqual(causalRouters());
    expect(listed).toContain("expertRace");
    for (const not of ["sinkhorn", "expertChoice", "softMoE"]) expect(listed).not.toContain(not);
    for (const name of listed) await routerFrom(name);
  });
});

describe("wrappers", () => {
  test("stand behind the router, innermost first", async () => {
    const { label, plugin } = await routerFrom(
      "topK:k=1:balance=0+balanceLoss:balance=0.02+capacity:factor=1.5+jitter",
    );
    expect(label).toBe("topK:k=1:balance=0+balanceLoss:balance=0.02+capacity:factor=1.5+jitter");
    expect(plugin.name).toBe("topK+balanceLoss+capacity+jitter");
    expect(plugin.options).toMatchObject({ amount: 0.01, router: { options: { factor: 1.5 } } });
  });
  test.each([
    [
      "topK+love",
      'unknown wrapper "love"; the wrappers are capacity, sharedExperts, jitter, nullExperts, noise, balanceLoss, zLoss',
    ],
    ["topK+capacity:k=2", 'capacity has no option "k"; its options are factor, evaluation, policy, minimum'],
    ["topK+capacity:factor", '"factor" is not option=value'],
    ["topK+capacity:factor=-1", "factor = -1; expected a number from 0"],
    ["topK+balanceLoss", "topK has that loss already"],
    ["noisyTopK+noise", "noise stands between score and select"],
  ])("%s is refused", async (specification, message) => {
    await expect(routerFrom(specification)).rejects.toThrow(message);
  });
  test("numbers may have a plus", async () => {
    expect((await routerFrom("topK:k=2:balance=1e+0")).plugin.options).toMatchObject({ balance: 1 });
  });
  test("shared experts are among the active ones", async () => {
    const { plugin } = await routerFrom("topK:k=1+sharedExperts");
    expect(expertSizes(plugin, { experts: 8, expertWidth: 128 })).toEqual({ experts: 7, expertWidth: 128 });
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
  ])("%s: %i experts of %i", async (specification, experts, expertWidth) => {
    const { plugin } = await routerFrom(specification);
    expect(expertSizes(plugin, size)).toEqual({ experts, expertWidth });
    expect((plugin.expertsPerToken ?? 0) * expertWidth).toBe(256);
    expect(experts * expertWidth).toBe(8 * 128);
  });

  test("portions that do not divide are refused", async () => {
    for (const k of ["3", "1.5", "0"]) {
      const { plugin } = await routerFrom(`topK:k=${k}`);
      expect(() => expertSizes(plugin, size)).toThrow("choose a number that divides 256");
    }
  });
});

test("every router of the package can be named", async () => {
  const exported = Object.entries(await import("@switchyard/routers")).filter(
    ([, value]) => typeof value === "function",
  );
  expect(exported.map(([name]) => name).sort()).toEqual([...routerNames].sort());
});

test("all stands for every router that fits a language model, and adds to what is named", async () => {
  expect(allNamed(["topK", "reMoE"])).toEqual(["topK", "reMoE"]);
  expect(allNamed(["all"])).toEqual(causalRouters());
  expect(allNamed(["topK", "all", "topK:k=1"])).toEqual([...causalRouters(), "topK:k=1"]);
  expect(await routersFrom(allNamed(["all"]))).toHaveLength(causalRouters().length);
});

test("methods that do more than route bring their hooks", async () => {
  const hooksOf = async (name: string) => ((await routerFrom(name)).hooks?.(4) ?? []).map((hook) => hook.name);
  expect(await hooksOf("thor")).toEqual(["thor"]);
  expect(await hooksOf("competeSMoE+jitter")).toEqual(["competeSMoE"]);
  expect(await hooksOf("topK")).toEqual([]);
});
