// Of which text --esft takes its statistics.
import { engine, random } from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import { transformer } from "@switchyard/models";
import { topK } from "@switchyard/routers/top-k";
import { expect, test } from "vitest";
import { progressBar } from "../progress.ts";
import { batchesOf, cutText } from "./data.ts";
import { chosenExperts } from "./plan.ts";
import { complete } from "./settings.ts";

test("--esft goes once through the text that is trained on, batch by batch, and stops when asked", async () => {
  const on = engine(cpu());
  const sizes = { vocabulary: 16, width: 8, layers: 1, heads: 2, experts: 4, hidden: 8, context: 16 };
  const model = transformer(on, { ...sizes, router: topK({ k: 2 }) }, random(on, 1));
  const settings = complete({ esft: 0.5, rows: 2, length: 8 }, model);
  const content = Array.from({ length: 120 }, (_, i) => (i * i) % 16);
  const how = { share: 0.1, length: 8, vocabulary: 16 };
  const text = cutText({ files: [{ name: "ids", content }], sha256: "" }, how);
  const batches = batchesOf(text, settings);
  const asked: number[] = [];
  const batch = (index: number): ReturnType<typeof batches> => {
    asked.push(index);
    return batches(index);
  };
  const control = new AbortController();
  const bar = progressBar({ out: () => undefined, error: () => undefined });
  const context = { bar, training: bar, signal: control.signal, note: () => undefined, begin: () => undefined };
  const config = await chosenExperts(model, settings, { text, batch }, context);
  // 108 tokens, 16 in a batch.
  expect(asked).toEqual([0, 1, 2, 3, 4, 5]);
  expect(config?.experts["0"]?.length).toBeGreaterThan(0);
  expect(await chosenExperts(model, complete({}, model), { text, batch }, context)).toBeUndefined();
  control.abort();
  await expect(chosenExperts(model, settings, { text, batch }, context)).rejects.toBe(control.signal.reason);
  expect(asked).toHaveLength(6);
});
