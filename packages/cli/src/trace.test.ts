// inspect and trace on recorded checkpoints and a small model with a tokenizer: what they print and write, and every refusal in one line.
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { main } from "./main.ts";
import { runCommand } from "./run.test-util.ts";
import { fixture, sampleText, saveSmallModel } from "./small-model.test-util.ts";

const root = mkdtempSync(join(tmpdir(), "switchyard-trace-"));
afterAll(() => rmSync(root, { recursive: true }));
const path = (name: string): string => join(root, name);
const inspect = (...args: string[]) => runCommand(["inspect", ...args]);
const trace = (...args: string[]) => runCommand(["trace", ...args]);
const cpu = ["--backend", "cpu"];

beforeAll(async () => {
  await saveSmallModel(path("small"));
  writeFileSync(path("prose.txt"), sampleText.repeat(4));
  writeFileSync(path("code.txt"), "const whale = { ship: 1 };\n".repeat(4));
  writeFileSync(path("empty.txt"), "");
});

describe("inspect", () => {
  test("tells architecture, parameters and bytes without loading weights", async () => {
    const { code, out, error } = await inspect(fixture("deepseek_v2"), "--backend", "webgpu");
    expect([code, error]).toEqual([0, ""]);
    expect(out).toMatch(/\(deepseek_v2\): 3 layers, width 48, vocabulary 256, context 128/);
    expect(out).toMatch(/^layers 1 to 2 {2}attention {5}latent: 4 heads, rank 16$/m);
    expect(out).toMatch(/^experts +46\.1k +184\.32 kB +39\.2 % +F32$/m);
    expect(out).toMatch(/^parameters {2}118k in all, 88\.7k \(75\.5 %\) active for a token$/m);
  });

  test("with ids it tells the routing too, as JSON on request", async () => {
    const { code, out, error } = await inspect(fixture("jetmoe"), "--ids", "1,2,3,4,5", "--json", ...cpu);
    expect([code, error]).toEqual([0, ""]);
    const { schema, modelType, parameters, complete, routing } = JSON.parse(out);
    expect([schema, modelType, complete, routing.tokens]).toEqual(["switchyard/inspect/1", "jetmoe", true, 5]);
    expect(parameters.active).toBeLessThan(parameters.total);
    expect(routing.layers.map(({ index, name }: { index: number; name?: string }) => [index, name])).toEqual([
      [0, "attention"],
      [0, undefined],
      [1, "attention"],
      [1, undefined],
    ]);
    for (const { load, expertsPerToken } of routing.layers) {
      expect(load.reduce((a: number, b: number) => a + b, 0)).toBe(10);
      expect(expertsPerToken).toBe(2);
    }
  });

  test("with texts it prints a line per layer and writes the report", async () => {
    const report = path("inspect.html");
    const texts = ["--text", path("prose.txt"), "--text", path("code.txt")];
    const { code, out, error } = await inspect(path("small"), ...texts, "-o", report, ...cpu);
    expect([code, error]).toEqual([0, ""]);
    expect(out).toMatch(/^layer +experts +each +busiest +weight +dead +over +evenness +entropy +pairs +told$/m);
    expect(out).toMatch(/^1 +4 +2\.00 +\d\.\d\d +\d\.\d\d +\d .* \d+ %$/m);
    expect(out).toContain(`Report: ${report}`);
    const html = readFileSync(report, "utf8");
    expect(html).toContain("<h3>prose.txt</h3>");
    expect(html).toContain('" whale"');
  });
});

describe("trace", () => {
  const record = (out: string, ...more: string[]) =>
    trace(path("small"), "--text", path("prose.txt"), "--text", path("code.txt"), "-o", path(out), ...cpu, ...more);

  test("records texts, compares the records and makes a report of one", async () => {
    const first = await record("a.trace", "--tokens", "60", "--json");
    expect([first.code, first.error]).toEqual([0, ""]);
    const { schema, complete, tokens, layers, bytes } = JSON.parse(first.out);
    expect([schema, complete, tokens, layers]).toEqual(["switchyard/trace/1", true, 120, 2]);
    expect(readFileSync(path("a.trace")).length).toBe(bytes);
    expect((await record("b.trace", "--tokens", "60", "--logits")).out).toMatch(
      /^small \(olmoe\): 120 tokens, .* in .*b\.trace\n$/,
    );

    const cache = await runCommand(["cache-sim", path("a.trace"), "--policy", "lru"]);
    // Experts of 3 x 16 x 16 numbers; all four of both layers are read once.
    expect(cache.out).toMatch(new RegExp(`^lru +4 .* ${((2 * 4 * 3 * 16 * 16 * 4) / 1000).toFixed(2)} kB$`, "m"));

    const same = await trace("diff", path("a.trace"), path("b.trace"));
    expect([same.code, same.error]).toEqual([0, ""]);
    expect(same.out).toContain("120 tokens in both");
    expect(same.out).toMatch(/^all layers +0\.0 % +0\.0 % +0\.0 %$/m);
    expect(same.out).toMatch(/^code\.txt +0\.0 % +0\.0 % +0\.0 % +60$/m);
    expect(same.out).toMatch(/^other experts, by layer and text +prose\.txt +code\.txt$/m);
    expect(same.out).toMatch(/^layer 1 +0\.0 % +0\.0 %$/m);
    const { schema: kind, layers: differences } = JSON.parse(
      (await trace("diff", path("a.trace"), path("b.trace"), "--json")).out,
    );
    expect([kind, differences.length]).toEqual(["switchyard/trace-diff/1", 2]);

    const made = await trace("report", path("a.trace"));
    expect([made.code, made.error]).toEqual([0, ""]);
    const html = readFileSync(path("a.trace.html"), "utf8");
    // The trace names its tokens, so their text stands here without the tokenizer.
    expect(html).toContain('"runs":[["text 1 · prose.txt",60],["text 2 · code.txt",60]]');
    expect(html).toContain('" whale"');
    const again = await trace("report", path("a.trace"), "-o", path("other.html"), "--tokenizer", path("small"));
    expect(again.out).toMatch(/^Report: .*other\.html \(\d+\.\d+ kB\)\n$/);
    expect(readFileSync(path("other.html"), "utf8")).toBe(html);
  });

  test("cuts long texts into windows, and says that other windows are other tokens", async () => {
    expect((await record("long.trace", "--tokens", "60")).code).toBe(0);
    expect((await record("short.trace", "--tokens", "60", "--context", "25")).code).toBe(0);
    const { code, error } = await trace("diff", path("long.trace"), path("short.trace"));
    expect(code).toBe(1);
    expect(error).toMatch(
      /token 25 is id \d+ at position 25 of sequence 0 in A and id \d+ at position 0 of sequence 1 in B/,
    );
  });

  test("refuses to write over a file, and leaves none where it fails", async () => {
    writeFileSync(path("there.trace"), "mine");
    const { code, error } = await record("there.trace");
    expect([code, readFileSync(path("there.trace"), "utf8")]).toEqual([1, "mine"]);
    expect(error).toMatch(/there is such a file already/);
    const said: string[] = [];
    const streams = { out: (text: string) => said.push(text), error: (text: string) => said.push(text) };
    const stopped = ["trace", path("small"), "--ids", "1", "-o", path("failed.trace"), ...cpu];
    expect(await main(stopped, { streams, signal: AbortSignal.abort() })).toBe(130);
    expect(said).toEqual(["Stopped before anything was recorded.\n"]);
    expect(existsSync(path("failed.trace"))).toBe(false);
    const failed = await trace(path("small"), "--ids", "1,99999", "-o", path("failed.trace"), ...cpu);
    expect([failed.code, existsSync(path("failed.trace"))]).toEqual([1, false]);
  });
});

test.each([
  [
    ["inspect", "--help"],
    ["--text", "--out", "--ids", "EXAMPLE"],
  ],
  [
    ["trace", "--help"],
    ["--text", "--out", "trace diff", "trace report", "EXAMPLE"],
  ],
  [
    ["trace", "diff", "--help"],
    ["--json", "EXAMPLE", "other experts"],
  ],
  [
    ["trace", "report", "--help"],
    ["--tokenizer", "EXAMPLE"],
  ],
])("%j explains itself", async (args, parts) => {
  const { code, out } = await runCommand(args);
  expect(code).toBe(0);
  for (const one of parts) expect(out).toContain(one);
});

test.each([
  [["inspect"], /inspect takes one checkpoint folder, found none/],
  [["inspect", "none"], /none has no config\.json/],
  [["inspect", fixture("olmoe"), "--out", "x.html"], /needs a text: --text FILE, or --ids 1,2,3/],
  [["inspect", fixture("olmoe"), "--ids", "1", "--text", "README.md"], /exclude each other/],
  [["inspect", fixture("olmoe"), "--ids", "1,x"], /--ids takes token ids separated by commas/],
  [["inspect", fixture("olmoe"), "--text", path("none.txt")], /cannot read .*none\.txt: there is no such file/],
  [["trace", "a"], /trace needs a file to write: -o FILE\.trace/],
  [["trace", "a", "-o", "x.trace"], /trace needs a text: --text FILE, or --ids 1,2,3; found neither/],
  [["trace", "a", "-x", "x.trace"], /unknown option/],
  [["trace", "diff", "a"], /trace diff takes two routing traces, found "a"/],
  [["trace", "diff", "a", "b"], /cannot read a: there is no such file/],
  [["trace", "report", "a"], /cannot read a: there is no such file/],
  [["trace", "report"], /trace report takes one routing trace, found none/],
])("refuses %j", async (args, message) => {
  const { code, out, error } = await runCommand(args);
  expect([code, out]).toEqual([1, ""]);
  expect(error).toMatch(message);
  expect(error.trim().split("\n")).toHaveLength(1);
});

test.each([
  [[fixture("olmoe"), "--text", "README.md"], /--text needs a tokenizer/],
  [[fixture("olmoe"), "--ids", "1,999"], /ids: id 999 is not in a vocabulary of 256/],
  [[fixture("olmoe"), "--ids", "1", "--context", "4096"], /--context is 4096, but the model's context is \d+/],
  [[path("small"), "--text", path("empty.txt")], /empty\.txt is empty/],
])("refuses to record %j", async (args, message) => {
  const { code, error } = await trace(...args, "-o", path("refused.trace"), ...cpu);
  expect(code).toBe(1);
  expect(error).toMatch(message);
  expect(error.trim().split("\n")).toHaveLength(1);
});
