// Loading from a description that somebody else wrote: what does not fit is refused, and all that was read is freed.
import { fileURLToPath } from "node:url";
import { expect, it } from "vitest";
import { architecture } from "./architectures/architecture.ts";
import { mixtral } from "./architectures/mixtral.ts";
import { makeEngine } from "./models.test-util.ts";
import { loadModel } from "./pretrained.ts";
import type { Source } from "./source.ts";

const folder = fileURLToPath(new URL("../test/fixtures/mixtral", import.meta.url));

it.each<[string, (sources: Map<string, Source>) => void, RegExp]>([
  [
    "a router without its weight",
    (sources) => sources.delete("layers.1.moe.router.weight"),
    /the router's "layers.1.moe.router.weight" \[4,64\] has no source in this checkpoint/,
  ],
  [
    "a bias for a router that has none",
    (sources) => sources.set("layers.1.moe.router.bias", sources.get("norm") as Source),
    /has a source for "layers.1.moe.router.bias", which the model has not/,
  ],
  [
    "a parameter without a source",
    (sources) => sources.delete("layers.0.attention.q"),
    /the parameter "layers.0.attention.q" \[64,64\] has no source/,
  ],
])("refuses %s", async (_, change, message) => {
  const engine = makeEngine();
  const mine = architecture({
    modelTypes: ["mixtral"],
    describe(checkpoint) {
      const description = mixtral.describe(checkpoint);
      const sources = new Map(description.sources);
      change(sources);
      return { ...description, sources, ignores: () => true };
    },
  });
  await expect(loadModel(folder, { engine, architectures: [mine] })).rejects.toThrow(message);
  expect(engine.live()).toBe(0);
});
