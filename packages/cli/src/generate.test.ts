// The command on small checkpoints: ids and text are those of the function, every strategy is there with its options, and Ctrl-C ends a text.
import { existsSync, mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { engine, random } from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import type { RouterPlugin } from "@switchyard/core/moe";
import { decodingStrategies, generate, loadModel, saveModel, transformer } from "@switchyard/models";
import { reMoE } from "@switchyard/routers/re-moe";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { runCommand } from "./run.test-util.ts";
import { fixture, saveSmallModel } from "./small-model.test-util.ts";
import { optionsOf, strategyNames } from "./strategies.ts";

const root = mkdtempSync(join(tmpdir(), "switchyard-generate-"));
afterAll(() => rmSync(root, { recursive: true }));
const small = join(root, "small");
beforeAll(() => saveSmallModel(small));
const run = (...args: string[]) => runCommand(["generate", ...args, "--backend", "cpu"]);

/** What the function gives. */
async function expected(
  folder: string,
  options: Omit<Parameters<typeof generate>[1], "tokenizer">,
  routers: readonly RouterPlugin[] = [],
) {
  const { model, tokenizer, close } = await loadModel(folder, { engine: engine(cpu()), routers });
  const ids: number[] = [];
  let text = "";
  for await (const token of generate(model, { ...options, ...(tokenizer ? { tokenizer } : {}) })) {
    ids.push(token.id);
    text += token.text;
  }
  await close();
  return { ids, text };
}

describe("a checkpoint without a tokenizer", () => {
  const { prompts } = JSON.parse(readFileSync(join(fixture("mixtral"), "golden.json"), "utf8"));
  const [{ input_ids: ids, greedy_ids: greedy }] = prompts;
  const args = [fixture("mixtral"), "--ids", ids.join(","), "--max-new", "16", "--ignore-eos"];

  test("takes ids and prints them", async () => {
    const { code, out, error } = await run(...args);
    expect([code, out]).toEqual([0, `${greedy.join(",")}\n`]);
    expect(error).toMatch(/^16 tokens in \d+\.\d s, \d+\.\d tokens\/s with the prompt; ended by --max-new\n$/);
  });
  test("also as they come, and with --stop-ids", async () => {
    expect((await run(...args, "--stream")).out).toBe(`${greedy.join(",")}\n`);
    const [, , third] = greedy;
    const stopped = await run(...args.slice(0, -1), "--stop-ids", `${third}`);
    expect(stopped.out).toBe(`${greedy.slice(0, greedy.indexOf(third)).join(",")}\n`);
    expect(stopped.error).toContain("ended by itself");
  });
  test("says what to give instead of text", async () => {
    expect((await run(fixture("mixtral"), "--prompt", "x")).error).toMatch(/--prompt needs a tokenizer: .*--ids 1,2,3/);
    expect((await run(...args, "--stop", "x")).error).toMatch(/--stop needs a tokenizer: .*--stop-ids 1,2/);
  });
});

test("writes text: greedy, or sampled where an option of sampling is given", async () => {
  const plain = await run(small, "--prompt", "A whale", "--max-new", "8");
  const greedy = await expected(small, { prompt: "A whale", maxNew: 8, strategy: decodingStrategies.greedy() });
  expect([plain.code, plain.out]).toEqual([0, `${greedy.text}\n`]);
  const drawn = await run(
    small,
    "--prompt",
    "A whale",
    "--max-new",
    "8",
    "--temperature",
    "2",
    "--top-k",
    "50",
    "--seed",
    "7",
    "--json",
  );
  const sampled = await expected(small, { prompt: "A whale", maxNew: 8, temperature: 2, topK: 50, seed: 7 });
  const { schema, strategy, ids, text, ending, logProbabilities } = JSON.parse(drawn.out);
  expect({ schema, strategy, ids, text, ending }).toEqual({
    ...{ schema: "switchyard/generate/1", strategy: "sample", ids: sampled.ids, text: sampled.text, ending: "maxNew" },
  });
  expect(logProbabilities).toHaveLength(8);
  expect((await run(small, "--prompt", "A whale", "--max-new", "8", "--stream")).out).toBe(plain.out);
});

test("ends before a stop string", async () => {
  const { text } = await expected(small, { prompt: "A whale", maxNew: 12, strategy: decodingStrategies.greedy() });
  const end = text.slice(3, 5);
  const { out, error } = await run(
    small,
    "--prompt",
    "A whale",
    "--max-new",
    "12",
    "--stop",
    "never said",
    "--stop",
    end,
  );
  expect(out).toBe(`${text.slice(0, text.indexOf(end))}\n`);
  expect(error).toContain("ended by --stop");
});

test.each<[string, string[], () => Parameters<typeof generate>[1]["strategy"]]>([
  [
    "beam",
    ["--beams", "3", "--length-penalty", "-0.5"],
    () => decodingStrategies.beam({ width: 3, lengthPenalty: -0.5 }),
  ],
  [
    "selfContrast",
    ["--beta", "0.7", "--alpha", "0.2", "--weak-rank", "1"],
    () => decodingStrategies.selfContrast({ beta: 0.7, alpha: 0.2, weakRank: 1 }),
  ],
  [
    "selfContrast",
    // So far from the weak routing that another one would say other tokens.
    ["--alpha", "0.001", "--beta", "50", "--weak-rank", "random"],
    () => decodingStrategies.selfContrast({ alpha: 0.001, beta: 50, weak: { random: 0 } }),
  ],
  [
    "selfContrast",
    ["--draw", "--strong-experts", "3"],
    () => decodingStrategies.selfContrast({ sample: true, strong: { k: 3 } }),
  ],
  [
    "contrastiveSearch",
    ["--alpha", "0.4", "--candidates", "3"],
    () => decodingStrategies.contrastiveSearch({ alpha: 0.4, candidates: 3 }),
  ],
  [
    "doLa",
    ["--layers", "0,1", "--temperature", "0.5"],
    () => decodingStrategies.doLa({ layers: [0, 1], temperature: 0.5 }),
  ],
  [
    "dynamicRouting",
    ["--threshold", "0.6", "--experts", "3"],
    () => decodingStrategies.dynamicRouting({ threshold: 0.6, k: 3 }),
  ],
  ["ensembleRouting", ["--experts", "4"], () => decodingStrategies.ensembleRouting({ k: 4 })],
  [
    "selfConsistency",
    ["--samples", "3", "--answer", "(.).", "--temperature", "1.5"],
    () =>
      decodingStrategies.selfConsistency({
        samples: 3,
        answer: ({ text }) => /(.)./u.exec(text)?.[1],
        strategy: decodingStrategies.sample({ temperature: 1.5 }),
      }),
  ],
])("--strategy %s %j", async (name, options, make) => {
  const strategy = make();
  const { ids } = await expected(small, { prompt: "A whale", maxNew: 5, seed: 3, ...(strategy ? { strategy } : {}) });
  const { code, out, error } = await run(
    small,
    "--prompt",
    "A whale",
    "--max-new",
    "5",
    "--seed",
    "3",
    "--strategy",
    name,
    ...options,
    "--json",
  );
  expect([code, error]).toEqual([0, ""]);
  expect(JSON.parse(out)).toMatchObject({ strategy: name, ids });
});

test("contrastive decoding opens its amateur", async () => {
  const { code, out } = await run(
    small,
    "--prompt",
    "A",
    "--max-new",
    "3",
    "--strategy",
    "contrastive",
    "--amateur",
    small,
    "--json",
  );
  expect(code).toBe(0);
  // Against itself nothing is left but which tokens are plausible.
  expect(JSON.parse(out).ids).toHaveLength(3);
});

test("one token is one, and a run that fails leaves no empty trace in the way", async () => {
  const trace = join(root, "failed.trace");
  const failed = await run(fixture("olmoe"), "--ids", "999999", "--trace", trace);
  expect([failed.code, existsSync(trace)]).toEqual([1, false]);
  const one = await run(fixture("olmoe"), "--ids", "1", "--max-new", "1", "--ignore-eos", "--trace", trace);
  expect(one.error).toMatch(/^1 token in /);
  const { out } = await runCommand(["cache-sim", trace]);
  expect(out).toMatch(/^olmoe \(olmoe\): 1 token, \d+ layers of up to \d+ experts, \d+ requests$/m);
});

test("in little memory the same ids come, and a trace foretells what was read", async () => {
  const trace = join(root, "run.trace");
  const args = ["--ids", "1,2,3,4", "--max-new", "6", "--ignore-eos", "--json"];
  const wholeTrace = join(root, "whole.trace");
  const all = await run(fixture("olmoe"), ...args, "--trace", wholeTrace);
  // As much as it takes at least, and a few experts more.
  const [, least = "", unit] =
    /needs ([\d.]+) (kB|MB) of memory/.exec((await run(fixture("olmoe"), ...args, "--memory", "1kB")).error) ?? [];
  const bytes = Math.round(Number(least) * (unit === "MB" ? 1e6 : 1e3)) + 80_000;
  const memory = ["--memory", `${bytes}`, "--policy", "lfu", "--trace", trace];
  const little = await run(fixture("olmoe"), ...args, ...memory);
  const [whole, streamed] = [JSON.parse(all.out), JSON.parse(little.out)];
  expect(streamed.ids).toEqual(whole.ids);
  expect(streamed.logProbabilities).toEqual(whole.logProbabilities);
  expect("streaming" in whole).toBe(false);
  expect(streamed.streaming.requests).toBeGreaterThan(streamed.streaming.hits);
  const { model, close } = await loadModel(fixture("olmoe"), { engine: engine(cpu()), memory: bytes });
  const { capacity = 0, expertBytes = 0 } = model.streamed ?? {};
  await close();
  // The run in memory foretells it as well.
  for (const file of [trace, wholeTrace]) {
    const size = ["--memory", `${capacity * expertBytes}`, "--policy", "lfu"];
    const simulated = await runCommand(["cache-sim", file, ...size, "--json"]);
    const [{ total }] = JSON.parse(simulated.out).results;
    expect([total.requests, total.bytesRead]).toEqual([streamed.streaming.requests, streamed.streaming.bytesRead]);
  }
  const said = await run(fixture("olmoe"), ...args.slice(0, -1), ...memory.slice(0, 4));
  expect(said.error).toMatch(/\d+ experts kept in memory: \d+\.\d % of experts were there, \d+\.\d+ kB read/);
});

test("opens models in our own layout with the router they were saved with", async () => {
  const folder = join(root, "own");
  const on = engine(cpu());
  const sizes = { vocabulary: 31, width: 8, layers: 2, heads: 2, experts: 4, hidden: 8, context: 32 };
  const model = transformer(on, { ...sizes, router: reMoE({ k: 1 }) }, random(on, 1));
  expect(await saveModel(model, folder)).toBe("switchyard");
  const { ids } = await expected(folder, { prompt: [1, 2], maxNew: 4, strategy: decodingStrategies.greedy() }, [
    reMoE({ k: 1 }),
  ]);
  const { code, out } = await run(folder, "--ids", "1,2", "--max-new", "4");
  expect([code, out]).toEqual([0, `${ids.join(",")}\n`]);
  const other = await run(folder, "--ids", "1,2", "--router", "topK:k=2");
  expect([other.code, other.error]).toEqual([1, expect.stringMatching(/needs the router reMoE/)]);
});

test("Ctrl-C ends the text and keeps what there is", async () => {
  const many = ["--max-new", "50", "--ignore-eos"];
  const all = await run(small, "--prompt", "A whale", ...many);
  const { code, out, error } = await runCommand(
    ["generate", small, "--prompt", "A whale", ...many, "--stream", "--backend", "cpu"],
    /\S/,
  );
  expect(code).toBe(130);
  expect(all.out.startsWith(out.trimEnd())).toBe(true);
  expect(out.length).toBeLessThan(all.out.length);
  expect(error).toMatch(/Stopping after this token.*\n\d+ tokens? in .*; stopped\n$/s);
  expect(process.listenerCount("SIGINT")).toBe(0);
});

test("explains itself, every strategy with its options", async () => {
  const { code, out } = await run("--help");
  expect(code).toBe(0);
  for (const part of ["--prompt", "--ids", "--stream", "--memory", "EXAMPLE"]) expect(out).toContain(part);
  for (const name of strategyNames)
    expect(out.replace(/\n {20}/g, " ")).toContain(
      `  ${name.padEnd(18)}${optionsOf[name].map((one) => `--${one}`).join(" ")}`,
    );
});

test.each([
  [[], /generate takes one checkpoint folder/],
  [["a"], /generate needs a prompt/],
  [["a", "--ids", "1", "--strategy", "best"], /--strategy takes greedy, sample, beam, .*found "best"/],
  [
    ["a", "--ids", "1", "--beta", "1"],
    /--beta is for --strategy selfContrast, contrastive; greedy takes --repetition-penalty/,
  ],
  [["a", "--ids", "1", "--strategy", "beam", "--top-k", "3"], /--top-k is for --strategy sample, doLa, /],
  [["a", "--ids", "1", "--top-p", "2"], /sample: topP is 2/],
  [["a", "--ids", "1", "--strategy", "contrastive"], /needs --amateur DIR/],
  [["a", "--ids", "1", "--strategy", "selfConsistency"], /needs --answer REGEX/],
  [["a", "--ids", "1", "--strategy", "selfConsistency", "--answer", "("], /--answer takes a regular expression/],
  [["a", "--ids", "1", "--strategy", "doLa", "--layers", "top"], /--layers takes low, high or numbers/],
  [["a", "--ids", "1", "--json", "--stream"], /--stream and --json exclude each other/],
  [["a", "--ids", "1", "--stop-ids", "1", "--ignore-eos"], /exclude each other/],
  [["a", "--ids", "1", "--system", "x"], /--system needs --chat/],
  [
    ["a", "--ids", "1", "--strategy", "beam", "--beams", "100000"],
    /--beams takes a whole number from 1 to 256 \(each is computed at once .* in memory\), found "100000"/,
  ],
  [
    ["a", "--ids", "1", "--strategy", "selfConsistency", "--answer", "x", "--samples", "9999999"],
    /--samples takes a whole number from 1 to 1024 \(.*memory\)/,
  ],
  [
    ["a", "--ids", "1", "--strategy", "contrastiveSearch", "--candidates", "257"],
    /--candidates takes a whole number from 1 to 256 \(.*memory\)/,
  ],
  [
    ["a", "--ids", "1", "--trace", import.meta.filename],
    /cannot write .*generate\.test\.ts \(--trace\): there is such a file already; delete it, or name another one$/m,
  ],
  [["a", "--ids", "1", "--max-new", "-1"], /--max-new takes a whole number from 0/],
  [["a", "--ids", "1", "--policy", "lru"], /--policy says which experts are kept in --memory/],
  [["a", "--ids", "1"], /a has no config\.json/],
  [[fixture("olmoe"), "--ids", "1", "--chat"], /--chat takes --prompt TEXT/],
  [
    [fixture("olmoe"), "--ids", "1", "--router", "topK:k=1"],
    /--router is for models in our own layout; .*olmoe has model_type "olmoe".*leave it out/,
  ],
])("refuses %j", async (args, message) => {
  const { code, out, error } = await run(...args);
  expect([code, out]).toEqual([1, ""]);
  expect(error).toMatch(message);
  expect(error.trim().split("\n")).toHaveLength(1);
});
