// The command on small checkpoints: its figures are those of the functions, Ctrl-C gives what there is, refusals are one line.
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { engine } from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import { evaluateText, evaluateTokens, loadModel } from "@switchyard/models";
import { afterAll, beforeAll, expect, test } from "vitest";
import { runCommand } from "./run.test-util.ts";
import { fixture, sampleText, saveSmallModel } from "./small-model.test-util.ts";

const root = mkdtempSync(join(tmpdir(), "switchyard-eval-"));
afterAll(() => rmSync(root, { recursive: true }));
const path = (name: string): string => join(root, name);
const run = (...args: string[]) => runCommand(["eval", ...args, "--backend", "cpu"]);
const ids = Array.from({ length: 90 }, (_, i) => (37 * i) % 256);

beforeAll(async () => {
  await saveSmallModel(path("small"));
  writeFileSync(path("text.txt"), sampleText);
  writeFileSync(path("long.txt"), sampleText.repeat(20));
  writeFileSync(path("ids.txt"), ids.map((id, i) => `${id}${i % 2 ? "\n" : ", "}`).join(""));
  writeFileSync(path("binary"), Uint8Array.of(255, 254, 0));
});

test("gives the figures of a text", async () => {
  const on = engine(cpu());
  const { model, tokenizer, close } = await loadModel(path("small"), { engine: on });
  if (!tokenizer) throw new Error("no tokenizer");
  const expected = await evaluateText(model, tokenizer, sampleText, { context: 20, stride: 5 });
  await close();
  const { code, out, error } = await run(path("small"), "--text", path("text.txt"), "--context", "20", "--stride", "5");
  expect([code, error]).toEqual([0, ""]);
  expect(out).toContain(`perplexity      ${expected.perplexity.toFixed(4)}`);
  expect(out).toContain(`bits per byte   ${expected.bitsPerByte?.toFixed(4)}`);
  expect(out).toContain(
    `foretold        ${expected.scored} of ${expected.tokens} tokens, ${expected.bytes} bytes, in ${expected.windows} windows`,
  );
});

test("takes ids, and prints JSON", async () => {
  const on = engine(cpu());
  const { model, close } = await loadModel(fixture("olmoe"), { engine: on });
  const expected = await evaluateTokens(model, ids, { context: 32 });
  await close();
  const { code, out } = await run(fixture("olmoe"), "--ids", path("ids.txt"), "--context", "32", "--json");
  expect(code).toBe(0);
  expect(JSON.parse(out)).toMatchObject({ schema: "switchyard/eval/1", complete: true, ...expected });
});

test("records a trace", async () => {
  const trace = path("eval.trace");
  const args = [path("small"), "--text", path("text.txt"), "--context", "20", "--trace", trace];
  const { code } = await run(...args);
  expect(code).toBe(0);
  const { out } = await runCommand(["cache-sim", trace, "--policy", "lru"]);
  expect(out).toContain("small (olmoe): ");
});

test("Ctrl-C gives the figures of what has been read", async () => {
  const slow = [path("small"), "--text", path("long.txt"), "--context", "20", "--stride", "1", "--chunk", "1"];
  const { code, out, error } = await runCommand(["eval", ...slow, "--backend", "cpu"], /^Evaluating/);
  expect(code).toBe(130);
  expect(out).toMatch(/perplexity +\d/);
  expect(error).toMatch(/Evaluating {2}\d+ % {2}perplexity \d+\.\d+ {2}.*left/);
  expect(error).toMatch(/Finishing this pass\..*\nStopped after \d+ %\.\n$/s);
  expect(process.listenerCount("SIGINT")).toBe(0);
});

test("explains itself", async () => {
  const { code, out } = await run("--help");
  expect(code).toBe(0);
  for (const part of ["--text", "--ids", "--stride", "--context", "--memory", "EXAMPLE"]) expect(out).toContain(part);
});

test.each([
  [[], /eval takes one checkpoint folder, found none/],
  [["a"], /--text FILE, or --ids FILE with token ids; found neither/],
  [["a", "--text", "x", "--ids", "y"], /found both/],
  [["a", "--text", "nowhere.txt"], /cannot read nowhere\.txt: there is no such file/],
  [["a", "--text", path("binary")], /binary is no text in UTF-8/],
  [["a", "--text", path("text.txt"), "--stride", "0"], /--stride takes a whole number from 1, found "0"/],
  [["a", "--ids", path("text.txt")], /text\.txt takes token ids .*found "A"/],
  [[fixture("olmoe"), "--text", path("text.txt")], /--text needs a tokenizer: .*Give token ids: --ids FILE/],
  [
    [fixture("olmoe"), "--ids", path("ids.txt"), "--context", "1000000"],
    /context is 1000000, expected a whole number from 2 to/,
  ],
])("refuses %j", async (args, message) => {
  const { code, out, error } = await run(...args);
  expect([code, out]).toEqual([1, ""]);
  expect(error).toMatch(message);
  expect(error.trim().split("\n")).toHaveLength(1);
});
