// The counts of what was trained.
import { engine } from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import { expect, test } from "vitest";
import { trainedParts } from "./result.ts";

test("what layers share is one parameter, and of chosen experts only theirs count", () => {
  const on = engine(cpu());
  const tensor = (...shape: number[]) => on.tensor(new Float32Array(shape.reduce((n, d) => n * d, 1)), shape);
  const shared = tensor(3, 5);
  const params = {
    "layers.0.moe.router.gru": shared,
    "layers.1.moe.router.gru": shared,
    "layers.0.moe.experts.down": tensor(4, 2, 7),
    "layers.1.moe.experts.down": tensor(4, 2, 7),
    norm: tensor(7),
  };
  const all = trainedParts(params, { experts: undefined, total: 200 });
  expect(all.parts).toEqual([
    { part: "experts", tensors: 2, parameters: 112 },
    { part: "router", tensors: 1, parameters: 15 },
    { part: "norms", tensors: 1, parameters: 7 },
  ]);
  expect(all.parameters).toBe(112 + 15 + 7);
  expect(all.tensors).toHaveLength(4);
  const experts = { experts: { "0": [1, 3], "1": [] }, shared_experts: true, non_expert_modules: true };
  expect(trainedParts(params, { experts, total: 200 }).parts[0]).toEqual({
    part: "experts",
    tensors: 1,
    parameters: 28,
  });
});
