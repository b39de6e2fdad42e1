// The command on a small made-up trace: its table, its JSON, and every refusal in one line.
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { type TraceHeader, traceFile, traceWriter } from "@switchyard/models";
import { afterAll, beforeAll, expect, test } from "vitest";
import { main } from "./main.ts";

const root = mkdtempSync(join(tmpdir(), "switchyard-cache-"));
afterAll(() => rmSync(root, { recursive: true }));
const path = join(root, "run.trace");

async function run(...args: string[]): Promise<{ code: number; out: string; error: string }> {
  let out = "";
  let error = "";
  const streams = {
    out: (text: string) => {
      out += text;
    },
    error: (text: string) => {
      error += text;
    },
  };
  const code = await main(["cache-sim", ...args], { streams });
  return { code, out, error };
}

async function write(file: string, expertBytes?: number): Promise<void> {
  const header: TraceHeader = {
    format: "moe-routing-trace",
    version: 1,
    model: { name: "whale" },
    layers: [{ index: 0, experts: 4, slots: 1, plan: "sparse", ...(expertBytes ? { expertBytes } : {}) }],
    tokenizer: null,
    labels: [],
    sequences: [],
    types: { experts: "i8", weights: null, logits: null },
  };
  const writer = await traceWriter(await traceFile(file), header);
  // 0 1 2 0 1 2, one token per pass.
  const experts = Int32Array.of(0, 1, 2, 0, 1, 2);
  const pass = Uint32Array.from(experts.keys());
  const column = new Int32Array(6);
  const sequence = new Uint32Array(6);
  await writer.write({ tokens: 6, pass, sequence, position: column, token: column, layers: [{ experts }] });
  await writer.close();
}

beforeAll(async () => {
  await write(path, 2_000_000);
  await write(join(root, "unsized.trace"));
  writeFileSync(join(root, "text.trace"), "not a trace at all");
});

test("prints a line for each policy and size", async () => {
  const { code, out, error } = await run(path, "--experts-per-layer", "2,4", "--policy", "lru,belady");
  expect([code, error]).toEqual([0, ""]);
  expect(out).toContain("whale: 6 tokens, 1 layer of up to 4 experts, 6 requests");
  expect(out).toMatch(/^policy {2}experts per layer {2}hit rate {2}misses {2}loaded ahead {6}read$/m);
  expect(out).toMatch(/^lru +2 +0\.0 % +6 +0 +12\.00 MB$/m);
  expect(out).toMatch(/^belady +2 +33\.3 % +4 +0 +8\.00 MB$/m);
  expect(out).toMatch(/^lru +4 +50\.0 % +3 +0 +6\.00 MB$/m);
});

test("takes a memory, and prints JSON with every layer", async () => {
  const { code, out } = await run(path, "--memory", "5MB,6MB", "--policy", "lru", "--json");
  expect(code).toBe(0);
  const { schema, tokens, layers, results } = JSON.parse(out);
  expect([schema, tokens, layers]).toEqual(["switchyard/cache-sim/1", 6, [{ index: 0, experts: 4 }]]);
  const found = results.map(({ capacity, shared, total }: { capacity: number; shared: boolean; total: object }) => [
    capacity,
    shared,
    (total as { misses: number }).misses,
  ]);
  expect(found).toEqual([
    [2, true, 6],
    [3, true, 3],
  ]);
  expect(results[0].layers).toHaveLength(1);
});

test("says when the size of an expert is unknown, and takes it as an option", async () => {
  const file = join(root, "unsized.trace");
  const without = await run(file, "--policy", "lru");
  expect(without.out.match(/^lru +(1|2|4) /gm)).toHaveLength(3);
  expect(without.error).toContain("--expert-bytes");
  const given = await run(file, "--policy", "lru", "--expert-bytes", "1KiB", "--experts-per-layer", "0");
  expect([given.error, given.out.match(/6\.14 kB/g)?.length]).toEqual(["", 1]);
});

test("explains itself", async () => {
  const { code, out } = await run("--help");
  expect(code).toBe(0);
  for (const part of ["--experts-per-layer", "--memory", "belady", "EXAMPLE"]) expect(out).toContain(part);
});

test.each([
  [[], /takes one routing trace, found none/],
  [["a", "b"], /found "a", "b"/],
  [["none.trace"], /cannot read none.trace: there is no such file/],
  [[join(root, "text.trace")], /MOETRACE: not a routing trace/],
  [[path, "--policy", "fifo"], /--policy takes lru, lfu, belady, prefetch, found "fifo"/],
  [[path, "--experts-per-layer", "2,x"], /--experts-per-layer takes whole numbers from 0, found "x"/],
  [[path, "--memory", "3 apples"], /--memory takes a size such as 512MB, 3GB or 2GiB, found "3 apples"/],
  [[path, "--memory", "3GB", "--experts-per-layer", "1"], /exclude each other/],
  [[path, "--sizes", "3"], /unknown option --sizes; the options are --experts-per-layer, --memory/],
  [[join(root, "unsized.trace"), "--memory", "1GB"], /found unknown bytes; give expertBytes/],
])("refuses %j", async (args, message) => {
  const { code, error } = await run(...args);
  expect(code).toBe(1);
  expect(error).toMatch(message);
  expect(error.trim().split("\n")).toHaveLength(1);
});
