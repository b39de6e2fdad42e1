// What does not fit is refused from the headers, with the numbers and with what would.
import type { CheckpointSummary } from "@switchyard/models";
import { expect, test } from "vitest";
import { checkFit, checkTypes } from "./fit.ts";

const part = (name: CheckpointSummary["parts"][number]["name"], parameters: number, types = ["BF16"]) => ({
  name,
  parameters,
  bytes: 2 * parameters,
  types,
});
const model = (experts: number, others: number): CheckpointSummary => ({
  modelType: "olmoe",
  ...{ layers: 16, width: 2048, vocabulary: 50304, context: 4096, groups: [] },
  parameters: { total: experts + others, active: others },
  bytes: 2 * (experts + others),
  parts: [part("experts", experts), part("attention", others)],
});

test("training everything takes 16 bytes for a parameter, adapters what is stored", () => {
  const [small, large] = [model(2e8, 1e7), model(2.5e8, 1e7)];
  expect(() => checkFit(small, {})).not.toThrow();
  expect(() => checkFit(large, { source: "m" })).toThrow(
    "fine-tuning m needs 4.16 GB (16 bytes for each of 260 million trained parameters), and the heap of the wasm backend has 3.50 GB; " +
      "train low-rank matrices (--lora attention), or use --backend webgpu on a large device, or a smaller model",
  );
  expect(() => checkFit(large, { lora: ["attention"] })).not.toThrow();
  expect(() => checkFit(large, { backend: "webgpu" })).not.toThrow();
  expect(() => checkFit(model(2e9, 1e8), { lora: ["attention"] })).toThrow("its weights as they are stored");
});

test("of chosen experts all of the stack count, of other parts their values", () => {
  expect(() => checkFit(model(1e8, 5e8), { esft: 0.1 })).toThrow(
    "needs 3.60 GB (16 bytes for each of 100 million trained parameters, 4 for each other)",
  );
  expect(() => checkFit(model(1e8, 4e8), { esft: 0.1 })).not.toThrow();
});

test("parts that are quantised are named, with parts that are not", () => {
  const mixed: CheckpointSummary = {
    ...model(1e6, 1e5),
    parts: [part("experts", 1e6, ["F32", "F8_E4M3"]), part("attention", 1e5), part("routers", 10), part("norms", 5)],
  };
  expect(() => checkTypes(mixed, ["attention", "router"], "m")).not.toThrow();
  expect(() => checkTypes(mixed, ["attention", "experts"], "m")).toThrow(
    "the experts of m are quantised (F32, F8_E4M3), and what is trained could not be saved in that form. Train other parts: --lora attention,router",
  );
  const all = { ...mixed, parts: [part("experts", 1e6, ["U8"])] };
  expect(() => checkTypes(all, ["experts"], "m")).toThrow("Take the unquantised checkpoint");
});
