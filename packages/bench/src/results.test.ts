// The schema takes what is written and refuses what is damaged; the README documents every field.
import { readFileSync } from "node:fs";
import { CheckpointError } from "@switchyard/core";
import { describe, expect, test } from "vitest";
import { exampleResults } from "../test/example.ts";
import { parseResults } from "./results.ts";

describe("parseResults", () => {
  test("reads back what was written", () => {
    const results = exampleResults([1, 2]);
    expect(parseResults(JSON.stringify(results))).toEqual(results);
  });

  test("a damaged file is named with the place that does not fit", () => {
    const text = JSON.stringify(exampleResults());
    expect(() => parseResults(text.slice(0, 1000), "runs/a/results.json")).toThrow(CheckpointError);
    expect(() => parseResults(text.slice(0, 1000), "runs/a/results.json")).toThrow(
      "runs/a/results.json: not valid JSON",
    );
    const damaged = text.replace('"expertWidth":128', '"expertWidth":-128');
    expect(() => parseResults(damaged)).toThrow(/^results\.json: runs\.0\.expertWidth: .*>=0/);
    expect(() => parseResults('{"schema":"other"}')).toThrow(CheckpointError);
  });
});

test("every field of results.json is documented in the README", () => {
  const readme = readFileSync(new URL("../README.md", import.meta.url), "utf8");
  const fields = new Set<string>();
  const free = new Set(["versions", "machine", "settings"]); // records of names that vary
  const walk = (value: unknown): void => {
    if (Array.isArray(value)) for (const item of value) walk(item);
    else if (typeof value === "object" && value !== null) {
      for (const [name, inner] of Object.entries(value)) {
        fields.add(name);
        if (!free.has(name)) walk(inner);
      }
    }
  };
  walk(exampleResults([1, 2], 1));
  expect(fields.size).toBeGreaterThan(45);
  for (const field of fields) expect(readme, `field ${field}`).toMatch(new RegExp(`\`(\\w+\\.)?${field}(\\[\\])?\``));
});
