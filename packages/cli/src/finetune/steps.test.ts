// What a step that cannot be taken says to a person.
import { DeviceError, UnsupportedError } from "@switchyard/core";
import { expect, test } from "vitest";
import { progressBar } from "../progress.ts";
import { complete } from "./settings.ts";
import { NotFinite, train } from "./steps.ts";

const settings = complete({ rows: 4096, length: 16, learningRate: 0.3 }, { width: 32, context: 64 });
const bar = progressBar({ out: () => undefined, error: () => undefined });
const context = {
  ...{ bar, training: bar, signal: new AbortController().signal },
  ...{ note: () => undefined, begin: () => undefined },
};
const failing = (error: Error): Promise<unknown> =>
  train(
    { run: () => Promise.reject(error) },
    { steps: 3, settings, every: 300, save: () => Promise.resolve() },
    context,
  );

test("one that does not fit into memory names the options that need less", async () => {
  const heap = "wasm: out of memory: the result [4096, 16] f32 of linear needs 9.50 MB. Dispose of tensors";
  await expect(failing(new DeviceError(heap))).rejects.toThrow(
    "a step of 4096 x 16 tokens does not fit (wasm: out of memory: the result [4096, 16] f32 of linear needs 9.50 MB); " +
      "fewer --rows or a shorter --length need less",
  );
  const other = new DeviceError("wasm: the worker ended");
  await expect(failing(other)).rejects.toBe(other);
});

test("one that is not finite names a lower learning rate; other errors stay what they are", async () => {
  const steep = failing(new UnsupportedError("step 2 is not finite: the loss is NaN"));
  await expect(steep).rejects.toBeInstanceOf(NotFinite);
  await expect(steep).rejects.toThrow("after step 2: the learning rate 0.3 is too high for this model; start again");
  await expect(steep).rejects.toThrow("--lr 0.03");
  const other = new UnsupportedError("something else");
  await expect(failing(other)).rejects.toBe(other);
});
