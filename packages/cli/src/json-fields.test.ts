// --json: one line of valid JSON, every field of which the README names in the row of its command.
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, expect, test } from "vitest";
import { runCommand } from "./run.test-util.ts";
import { fixture, sampleText, saveSmallModel } from "./small-model.test-util.ts";

const home = mkdtempSync(join(tmpdir(), "switchyard-json-"));
const at = (name: string): string => join(home, name);
afterAll(() => rmSync(home, { recursive: true }));
beforeAll(async () => {
  await saveSmallModel(at("small"));
  writeFileSync(at("text.txt"), sampleText);
  await runCommand(["generate", at("small"), "--ids", "1,2", "--max-new", "2", "--trace", at("run.trace")]);
});

const readme = readFileSync(new URL("../README.md", import.meta.url), "utf8");
const section = readme.split(/^## /m).find((part) => part.startsWith("What --json prints\n")) ?? "";

test.each<[string, readonly string[]]>([
  ["generate", [at("small"), "--prompt", "A whale", "--max-new", "2", "--threads", "1"]],
  ["generate", [fixture("mixtral"), "--ids", "1,2", "--max-new", "2", "--memory", "1.3MB", "--threads", "1"]],
  ["eval", [at("small"), "--text", at("text.txt"), "--threads", "1"]],
  ["logits", [at("small"), "--ids", "1,2", "--out", at("all.safetensors"), "--threads", "1"]],
  ["convert", [at("small"), at("copy")]],
  ["finetune", [at("small"), at("tuned"), "--text", at("text.txt"), "--length", "8", "--steps", "1", "--threads", "1"]],
  ["cache-sim", [at("run.trace")]],
])("%s %j", async (command, args) => {
  const { code, out, error } = await runCommand([command, ...args, "--json"]);
  expect([code, out.trim().split("\n").length], error).toEqual([0, 1]);
  const found: { readonly [key: string]: unknown } = JSON.parse(out);
  expect(found.schema).toBe(`switchyard/${command}/1`);
  const row = section.split("\n").find((line) => line.startsWith(`| \`${command}\` |`));
  for (const key of Object.keys(found).filter((one) => one !== "schema")) expect(row, key).toContain(`\`${key}\``);
  if (args.includes("--memory")) {
    expect(Object.keys(found.streaming ?? {})).toEqual(["requests", "hits", "prefetches", "bytesRead"]);
  }
});
