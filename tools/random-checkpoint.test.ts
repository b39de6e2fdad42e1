// npm run random-checkpoint: what it writes opens and has the sizes asked for; what is wrong is said.
import { mkdtempSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { openCheckpoint } from "@switchyard/models";
import { afterAll, expect, test } from "vitest";
import { root } from "./child.mjs";
import { writeRandom } from "./random-checkpoint.ts";

const home = mkdtempSync(join(tmpdir(), "switchyard-random-"));
afterAll(() => rmSync(home, { recursive: true }));
const fixture = join(root, "packages", "models", "test", "fixtures", "granitemoe");
const run = async (...args: string[]): Promise<string> => {
  const lines: string[] = [];
  await writeRandom(args, (line) => lines.push(line));
  return lines.join("\n");
};

test("writes what a config asks for, in shards", async () => {
  const out = join(home, "out");
  const said = await run(fixture, out, "--dtype", "F16", "--seed", "3", "--scale", "0.1", "--shard-size", "50kB");
  expect(said).toMatch(/out: \d+ tensors, [\d.]+ kB in \d+ files$/);
  const checkpoint = await openCheckpoint(out);
  expect(new Set(checkpoint.names.map((name) => checkpoint.stored(name).dtype))).toEqual(new Set(["F16"]));
  expect(readdirSync(out).filter((name) => name.endsWith(".safetensors")).length).toBeGreaterThan(2);
  await checkpoint.close();
  expect(await run(join(fixture, "config.json"), join(home, "whole"))).toMatch(/in 1 file$/);
});

test("says what is wrong", async () => {
  expect(await run("--help")).toContain("--shard-size");
  await expect(run(fixture)).rejects.toThrow(/two arguments are needed, found 1/);
  await expect(run(join(home, "none"), home)).rejects.toThrow(/there is no .*none; name a config\.json/);
  await expect(run(home, join(home, "x"))).rejects.toThrow(/there is no .*config\.json; name/);
  await expect(run(fixture, home, "--dtype", "F8")).rejects.toThrow(/--dtype must be F32, BF16 or F16, found F8/);
  await expect(run(fixture, home, "--shard-size", "5 apples")).rejects.toThrow(/write it like 3GB/);
  await expect(run(fixture, home, "--seed", "x")).rejects.toThrow(/seed is NaN/);
  writeFileSync(join(home, "config.json"), '{"model_type": "bert"}');
  await expect(run(home, join(home, "bert"))).rejects.toThrow(/model_type is "bert"; known are mixtral/);
});
