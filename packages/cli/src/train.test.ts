// What a run is made of: its time, and the contender of a router with the hooks of its method.
import { engine } from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import { tokenizer, trainTokenizer } from "@switchyard/models";
import { expect, test } from "vitest";
import { routerFrom } from "./routers.ts";
import { sizes } from "./sizes.ts";
import { contenderOf, defaultTime } from "./train.ts";

test("three minutes for up to five routers, and as much for each further one", () => {
  expect([1, 5, 6, 30].map(defaultTime)).toEqual([180, 180, 216, 1080]);
});

test("a contender brings the hooks of its method, made for the layers of the model and anew for every run", async () => {
  const text = tokenizer(await trainTokenizer(["the whale and the sea"], { vocabulary: 260 }));
  const tokenCounts = new Float64Array(text.vocabulary);
  const made = async (name: string) =>
    contenderOf(engine(cpu()), await routerFrom(name), sizes.tiny, { text, tokenCounts });
  const thor = await made("thor");
  const [first, second] = [thor.hooks?.(), thor.hooks?.()];
  expect(first?.map(({ name, passes }) => [name, passes])).toEqual([["thor", 2]]);
  expect(first?.[0]).not.toBe(second?.[0]);
  expect((await made("competeSMoE")).hooks?.()).toHaveLength(1);
  expect((await made("topK")).hooks).toBeUndefined();
});
