import { readdirSync } from "node:fs";
import { engine } from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import { describe, expect, it } from "vitest";
import { families } from "./families/index.ts";
import { differences, float32Tolerance, float64, readVectors, unmet } from "./vectors.ts";

const files = readdirSync(new URL("fixtures", import.meta.url)).map((name) => name.replace(".json", ""));

describe.each(files)("vectors %s", (file) => {
  const { family, cases, tolerance } = readVectors(file);
  const run = families[family];
  it("have a family that computes every expected name", async () => {
    if (!run) throw new Error(`no family "${family}"; there are ${Object.keys(families).join(", ")}`);
    expect(cases.length).toBeGreaterThan(0);
    for (const one of cases)
      expect(Object.keys(await run(one, float64())).sort()).toEqual(Object.keys(one.expected).sort());
  });
  // On wasm, which the routers' tests cannot reach, `npm run vectors` and its test do the same.
  it("hold in float32 too", async () => {
    if (!run) throw new Error("no case");
    for (const one of cases) {
      const found = await run(one, engine(cpu()));
      for (const [name, value] of Object.entries(one.expected)) {
        expect(differences(value, found[name], float32Tolerance(value)), `${one.id} ${name}`).toEqual([]);
      }
    }
  });
  it("can fail", async () => {
    const [one] = cases;
    if (!run || !one) throw new Error("no case");
    for (const name of Object.keys(one.expected)) {
      const moved = JSON.parse(JSON.stringify(one.expected[name]), (_, value) =>
        typeof value === "number" ? value + 1e-6 + 3 * tolerance.rel * Math.abs(value) : value,
      );
      const lines = await unmet(run, { ...one, expected: { [name]: moved } }, tolerance);
      expect(lines[0]).toMatch(`${one.id} ${name}: entry 0`);
    }
    expect(await unmet(run, { ...one, expected: { surprise: 1 } }, tolerance)).toEqual([
      `${one.id} surprise: nothing was computed under this name`,
    ]);
  });
});
