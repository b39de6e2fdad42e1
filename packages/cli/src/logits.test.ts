// The command on a recorded checkpoint: the file holds what was recorded, and every refusal is one line.
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileSource, readHeader, toFloat32 } from "@switchyard/models";
import { afterAll, beforeAll, expect, test } from "vitest";
import { runCommand } from "./run.test-util.ts";
import { fixture, saveSmallModel } from "./small-model.test-util.ts";

const root = mkdtempSync(join(tmpdir(), "switchyard-logits-"));
afterAll(() => rmSync(root, { recursive: true }));
const path = (name: string): string => join(root, name);
const run = (...args: string[]) => runCommand(["logits", ...args]);
const out = path("logits.safetensors");
const fresh = path("not-written.safetensors");

beforeAll(() => saveSmallModel(path("small")));

async function tensors(file: string) {
  const source = await fileSource(file);
  if (!source) throw new Error(`no ${file}`);
  const { metadata, tensors: list } = await readHeader(source);
  const read = async (name: string): Promise<Float32Array> => {
    const { from = 0, to = 0 } = list.get(name) ?? {};
    return toFloat32(await source.read(from, to), "F32", name);
  };
  return { metadata, list, read, close: () => source.close() };
}

test.each(["--backend=cpu", "--threads=1"])("writes what the model computes (%s)", async (how) => {
  const { prompts } = JSON.parse(readFileSync(join(fixture("mixtral"), "golden.json"), "utf8"));
  const [{ input_ids: ids, argmax_ids: largest }] = prompts;
  const {
    code,
    out: text,
    error,
  } = await run(fixture("mixtral"), "--ids", ids.join(","), "--out", out, "--replace", how);
  expect([code, error]).toEqual([0, ""]);
  expect(text).toContain(`mixtral (mixtral): ${ids.length} tokens, `);
  expect(text).toMatch(/^next id +logit +probability$/m);
  expect(text).toMatch(new RegExp(`^${largest.at(-1)} `, "m"));
  const [found, recorded] = [await tensors(out), await tensors(join(fixture("mixtral"), "golden.safetensors"))];
  const names = [...recorded.list.keys()].filter((name) => /^prompt0\.(?!greedy)/.test(name));
  expect([...found.list.keys()].map((name) => `prompt0.${name}`).sort()).toEqual(names.sort());
  const [logits, expected] = [await found.read("logits"), await recorded.read("prompt0.logits")];
  let apart = 0;
  for (const [i, x] of expected.entries()) apart = Math.max(apart, Math.abs(x - (logits[i] ?? Number.NaN)));
  expect(apart).toBeLessThanOrEqual(2e-4);
  expect(found.metadata.get("ids")).toBe(JSON.stringify(ids));
  await Promise.all([found.close(), recorded.close()]);
});

test("takes text where there is a tokenizer, and prints JSON", async () => {
  const { code, out: text } = await run(
    path("small"),
    "--prompt",
    "A whale",
    "--out",
    path("text.safetensors"),
    "--backend",
    "cpu",
    "--json",
  );
  expect(code).toBe(0);
  const { schema, ids, argmax, next, tensors: list } = JSON.parse(text);
  expect(schema).toBe("switchyard/logits/1");
  expect(argmax).toHaveLength(ids.length);
  expect(argmax.at(-1)).toBe(next[0].id);
  expect(typeof next[0].text).toBe("string");
  expect(list).toHaveLength(2 * 7 + 3);
});

test("writes over a file only when asked to, and whole", async () => {
  const file = path("there.safetensors");
  writeFileSync(file, "mine");
  const args = [fixture("olmoe"), "--ids", "1", "--out", file, "--backend", "cpu"];
  const { code, error } = await run(...args);
  expect([code, readFileSync(file, "utf8")]).toEqual([1, "mine"]);
  expect(error).toMatch(
    /there\.safetensors \(--out\): there is such a file already; .* or --replace puts the new one in/,
  );
  const failed = await run(fixture("olmoe"), "--ids", "1,999999", ...args.slice(3), "--replace");
  expect([failed.code, readFileSync(file, "utf8")]).toEqual([1, "mine"]);
  const replaced = await run(...args, "--replace");
  expect([replaced.code, replaced.error]).toEqual([0, ""]);
  expect(replaced.out).toMatch(/^olmoe \(olmoe\): 1 token, \d+ tensors, /);
  const { list, close } = await tensors(file);
  expect(list.has("logits")).toBe(true);
  await close();
  expect(readdirSync(root).filter((name) => name.startsWith("."))).toEqual([]);
});

test("explains itself", async () => {
  const { code, out: text } = await run("--help");
  expect(code).toBe(0);
  for (const part of ["--ids", "--out", "--memory", "router_logits", "EXAMPLE"]) expect(text).toContain(part);
});

beforeAll(() => writeFileSync(path("file"), "x"));
test.each([
  [[], /logits takes one checkpoint folder, found none/],
  [["a"], /logits needs a prompt: --prompt TEXT, or --ids 1,2,3/],
  [["a", "--ids", "1", "--prompt", "x"], /exclude each other/],
  [["a", "--ids", "1,x"], /--ids takes token ids separated by commas, such as 1,2,3, found "x"/],
  [["a", "--ids", "1"], /needs a file to write: --out FILE\.safetensors, found null/],
  [["a", "--ids", "1", "--out", "x.json"], /found "x\.json"/],
  [["a", "--ids", "1", "--out", fresh, "--backend", "cuda"], /--backend takes wasm, webgpu/],
  [["a", "--ids", "1", "--out", fresh], /a has no config\.json/],
  [
    [fixture("olmoe"), "--ids", "1,999999", "--out", fresh, "--backend", "cpu"],
    /id 999999 is not in a vocabulary of 256/,
  ],
  [
    [fixture("olmoe"), "--prompt", "x", "--out", fresh, "--backend", "cpu"],
    /--prompt needs a tokenizer: .*Give token ids/,
  ],
  [
    [fixture("olmoe"), "--ids", "1", "--out", path("file/x.safetensors"), "--backend", "cpu"],
    /a part of the path is a file|in the way/,
  ],
])("refuses %j", async (args, message) => {
  const { code, out: text, error } = await run(...args);
  expect([code, text]).toEqual([1, ""]);
  expect(error).toMatch(message);
  expect(error.trim().split("\n")).toHaveLength(1);
});
