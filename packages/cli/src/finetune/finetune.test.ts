// Fine-tuning from end to end: the loss falls, what is frozen keeps its bytes, what is measured is what was saved, and a run that was
// interrupted ends as one that was not.
import {
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { openCheckpoint, readTokenizer } from "@switchyard/models";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { main } from "../main.ts";
import { type Ran, runCommand } from "../run.test-util.ts";
import { fixture } from "../small-model.test-util.ts";
import { changes, prose, trainTiny, weightsOf } from "./finetune.test-util.ts";
import { type FinetuneResult, resultText } from "./result.ts";

const home = mkdtempSync(join(tmpdir(), "switchyard-finetune-"));
const at = (...parts: string[]): string => join(home, ...parts);
afterAll(() => rmSync(home, { recursive: true }));

/** A model in the OLMoE layout, and one in our own. */
let [olmoe, own] = ["", ""];
beforeAll(async () => {
  writeFileSync(at("old.txt"), prose("abcdefgh", 400));
  writeFileSync(at("new.txt"), prose("klmnoprstu", 300));
  writeFileSync(at("more.txt"), prose("klmnoprstu", 60));
  [olmoe = "", own = ""] = await trainTiny(home, at("old.txt"), ["topK", "switchRouter"]);
}, 120_000);

const how = ["--threads", "1", "--length", "32"];
const tune = (from: string, out: string, ...more: string[]): Promise<Ran> =>
  runCommand(["finetune", from, at(out), "--text", at("new.txt"), ...how, ...more]);
const resultOf = (out: string): FinetuneResult => JSON.parse(readFileSync(at(out, "finetune.json"), "utf8"));
const fine = ({ code, error }: Ran): void => expect([code, error.includes("switchyard:")], error).toEqual([0, false]);

describe("everything, of a model in the OLMoE layout", () => {
  let whole: Ran;
  beforeAll(async () => {
    whole = await tune(olmoe, "whole", "--text", at("more.txt"), "--steps", "80", "--lr", "0.005");
  });

  test("the loss on held-out text falls by a clear margin, and everything is told", () => {
    fine(whole);
    const result = resultOf("whole");
    const { before, after, trained, training, tokens, text } = result;
    expect(after.loss).toBeLessThan(before.loss - 0.5);
    expect(after.perplexity).toBeCloseTo(Math.exp(after.loss), 6);
    expect(training.loss).toHaveLength(80);
    expect(training.learningRate[0]).toBeCloseTo(0.005 / 4, 8);
    expect(Math.max(...training.learningRate)).toBe(0.005);
    expect(training.learningRate.at(-1)).toBeLessThan(0.001);
    expect(training.learningRate.at(-1)).toBeGreaterThanOrEqual(0.0005);
    expect(tokens).toBe(80 * 4 * 32);
    expect(trained.parameters).toBe(trained.of);
    expect(text.files.map(({ name }) => name)).toEqual(["new.txt", "more.txt"]);
    for (const { tokens: all, heldOut } of text.files) expect(heldOut).toBe(Math.round(0.05 * all));
    expect(text.training + text.heldOut).toBe(text.files.reduce((sum, file) => sum + file.tokens, 0));
    expect(whole.out).toMatch(new RegExp(`^loss +${before.loss.toFixed(4)} +${after.loss.toFixed(4)}$`, "m"));
    expect(whole.out).toMatch(/^bits per byte +\d+\.\d{4} +\d+\.\d{4}$/m);
    expect(whole.out).toMatch(/^trained {2}(\d+) of \1 parameters \(100 %\)$/m);
    expect(whole.out).toMatch(/^kept {5}0 of 44 tensors byte-identical$/m);
    expect(whole.out).not.toContain("--lr");
    expect(resultText({ ...result, after: { ...after, loss: before.loss + 1 } }, "x")).toContain(
      "text rose: try fewer steps",
    );
    expect(whole.error).toMatch(/Training {2}50 % {2}40\/80 {2}loss \d\.\d{3} {2}\d+ tokens\/s {2}\d+s left/);
  });

  test("leaves a checkpoint of the same layout and finetune.json, and nothing else", async () => {
    expect(readdirSync(at("whole")).sort()).toEqual([...readdirSync(olmoe), "finetune.json"].sort());
    for (const name of ["config.json", "tokenizer.json"]) {
      expect(readFileSync(at("whole", name)).equals(readFileSync(join(olmoe, name)))).toBe(true);
    }
    expect((await runCommand(["generate", at("whole"), "--prompt", "no", "--max-new", "4"])).code).toBe(0);
  });

  test("what is measured is what was saved: eval finds the same on the held-out ids", async () => {
    const checkpoint = await openCheckpoint(olmoe);
    const { tokenizer } = await readTokenizer(checkpoint);
    await checkpoint.close();
    let nats = 0;
    let scored = 0;
    for (const [i, name] of ["new.txt", "more.txt"].entries()) {
      const ids = tokenizer?.encode(readFileSync(at(name), "utf8"), { addSpecial: true }) ?? [];
      const held = resultOf("whole").text.files[i]?.heldOut ?? 0;
      writeFileSync(at("held.txt"), Array.from(ids.slice(-held)).join(" "));
      const windows = ["--context", "33", "--stride", "16", "--threads", "1"];
      const { out } = await runCommand(["eval", at("whole"), "--ids", at("held.txt"), ...windows, "--json"]);
      const found = JSON.parse(out);
      nats += found.nats;
      scored += found.scored;
    }
    expect(scored).toBe(resultOf("whole").after.tokens);
    expect(nats / scored).toBeCloseTo(resultOf("whole").after.loss, 12);
  });

  test("an expert that no token chose keeps its bytes", async () => {
    writeFileSync(at("one-id.txt"), "5 ".repeat(200));
    const args = ["finetune", olmoe, at("unused"), "--ids", at("one-id.txt"), ...how, "--steps", "3", "--lr", "1e-5"];
    fine(await runCommand(args));
    const names = (await changes(olmoe, at("unused"))).filter((name) => name.includes(".experts."));
    // The same token everywhere: two of four experts in either layer, three matrices each.
    expect(names).toHaveLength(2 * 2 * 3);
  });

  test("--json prints finetune.json, which names tensors and checksums; more text in OUT is replaced when that is asked", async () => {
    const again = await tune(olmoe, "whole", "--steps", "2", "--replace", "--json");
    fine(again);
    expect(JSON.parse(again.out)).toEqual(resultOf("whole"));
    const { certificate, settings } = resultOf("whole");
    // 0.04 / 32, the width.
    expect(settings).toMatchObject({ steps: 2, rows: 4, length: 32, holdOut: 0.05, seed: 1, learningRate: 0.00125 });
    expect(certificate.totals.tensors).toBe(44);
    expect(certificate.tensors).toHaveLength(44 - certificate.totals.kept);
    expect(certificate.files.find(({ name }) => name === "config.json")?.copied).toBe(true);
  });
});

describe("chosen experts", () => {
  test("--esft in our own layout: the loss falls, and all but the chosen experts keep their bytes", async () => {
    fine(await tune(own, "esft", "--steps", "60", "--lr", "0.02", "--esft", "0.2"));
    const { before, after, trained } = resultOf("esft");
    expect(after.loss).toBeLessThan(before.loss - 0.1);
    const config = JSON.parse(readFileSync(at("esft", "expert_cfg.json"), "utf8"));
    expect(config).toMatchObject({ shared_experts: false, non_expert_modules: false });
    expect(Object.values(config.experts).map((ids) => (ids as number[]).length)).toEqual([1, 1]);
    const expected = [0, 1].flatMap((layer) =>
      ["gateUp", "down"].map((name) => `params.layers.${layer}.moe.experts.${name}[${config.experts[layer][0]}]`),
    );
    expect((await changes(own, at("esft"))).sort()).toEqual(expected.sort());
    // Half of the experts of a layer, each 3 x 32 x 64.
    expect(trained).toMatchObject({ experts: config.experts, parameters: 2 * 3 * 32 * 64 });
  });

  test("--experts takes the file of another run; --lora puts adapters beside these experts alone", async () => {
    const config = { experts: { "0": [2], "1": [] }, shared_experts: false, non_expert_modules: false };
    writeFileSync(at("cfg.json"), JSON.stringify(config));
    const asked = ["--steps", "20", "--lr", "0.01", "--experts", at("cfg.json")];
    const names = (after: string): Promise<string[]> => changes(olmoe, at(after));
    fine(await tune(olmoe, "named", ...asked));
    const expert = ["down_proj", "gate_proj", "up_proj"].map((name) => `model.layers.0.mlp.experts.2.${name}.weight`);
    expect((await names("named")).sort()).toEqual(expert);
    expect(JSON.parse(readFileSync(at("named", "expert_cfg.json"), "utf8"))).toEqual(config);
    fine(await tune(olmoe, "adapted", ...asked, "--lora", "experts,attention"));
    const changed = await names("adapted");
    expect(changed.filter((name) => name.includes("experts")).sort()).toEqual(expert);
    expect(changed.filter((name) => !name.includes("experts"))).toHaveLength(2 * 4);
  });

  test("a run is not resumed with other experts", async () => {
    const file = at("more.json");
    const write = (ids: number[]): void => {
      const experts = { "0": ids, "1": [] };
      writeFileSync(file, JSON.stringify({ experts, shared_experts: false, non_expert_modules: false }));
    };
    write([1, 2]);
    const args = ["finetune", olmoe, at("other"), "--text", at("new.txt"), ...how, "--steps", "9", "--experts", file];
    expect((await runCommand(args, /Training {2}33 %/)).code).toBe(130);
    write([1, 3]);
    expect((await runCommand([...args, "--resume"])).error).toMatch(/more\.json has changed since the run in/);
    write([1, 2]);
    fine(await runCommand([...args, "--resume"]));
  });

  test("tuned again without them, expert_cfg.json of the earlier tuning does not come along", async () => {
    fine(await tune(at("named"), "twice", "--steps", "2"));
    expect(existsSync(at("twice", "expert_cfg.json"))).toBe(false);
    // A folder of that name is none.
    mkdirSync(at("folder", "expert_cfg.json"), { recursive: true });
    fine(await tune(olmoe, "folder", "--steps", "2", "--replace"));
    expect(readdirSync(at("folder"))).toContain("expert_cfg.json");
    expect(resultOf("twice").source).toBe(at("named"));
  });
});

describe("adapters", () => {
  test("the loss falls, and what has no adapter keeps its bytes", async () => {
    const ran = await tune(olmoe, "lora", "--steps", "80", "--lora", "experts,attention,router", "--rank", "4");
    fine(ran);
    const { before, after, trained, settings } = resultOf("lora");
    expect(after.loss).toBeLessThan(before.loss - 0.1);
    // 0.4 / 32, the width.
    expect(settings).toMatchObject({
      lora: ["experts", "attention", "router"],
      rank: 4,
      alpha: 8,
      learningRate: 0.0125,
    });
    expect(trained.tensors.every((path) => /\.lora\/2\.[ab]$/.test(path))).toBe(true);
    const changed = await changes(olmoe, at("lora"));
    expect(
      changed.filter((name) => !/(self_attn\.[qkvo]_proj|mlp\.experts\.\d\.\w+|mlp\.gate)\.weight$/.test(name)),
    ).toEqual([]);
    expect(changed).toHaveLength(2 * (4 + 3 * 4 + 1));
    expect(ran.out).toMatch(/^trained {2}\d+ parameters of low-rank matrices \(rank 4\) beside \d+ parameters$/m);
  });
});

describe("an interrupted run", () => {
  const steps = ["--steps", "30", "--lr", "0.004", "--lora", "experts,embed", "--esft", "0.3", "--seed", "5"];
  beforeAll(async () => fine(await tune(olmoe, "straight", ...steps)));

  test("saves, says how to go on, and ends with the same bytes as an uninterrupted one", async () => {
    const args = ["finetune", olmoe, at("stopped"), "--text", at("new.txt"), ...how, ...steps];
    const first = await runCommand(args, /Training {2}30 %/);
    expect(first.code).toBe(130);
    expect(first.error).toContain("Finishing this step, then saving. Ctrl-C again ends at once.");
    expect(first.error).toMatch(/Saved after step \d+ of 30\. Continue with: switchyard finetune --resume .*stopped\n/);
    // No checkpoint: it would be taken for a tuned one.
    expect(readdirSync(at("stopped"))).toEqual([".finetune"]);
    expect((await runCommand(["eval", at("stopped"), "--text", at("new.txt")])).error).toContain("has no config.json");
    expect((await runCommand(args)).error).toContain(
      "holds an unfinished run: go on with switchyard finetune --resume",
    );

    const second = await runCommand(["finetune", "--resume", at("stopped"), "--threads", "1"], /Training {2}60 %/);
    expect(second.code).toBe(130);
    // The same command with --resume does too.
    fine(await runCommand([...args, "--resume"]));
    expect(weightsOf(at("stopped")).equals(weightsOf(at("straight")))).toBe(true);
    const [a, b] = [resultOf("stopped"), resultOf("straight")];
    for (const key of ["settings", "before", "after", "training", "trained", "text", "tokens"] as const) {
      expect(a[key], key).toEqual(b[key]);
    }
    expect(readdirSync(at("stopped")).sort()).toEqual(readdirSync(at("straight")).sort());
  });

  test("that was killed goes on from its latest snapshot; one that was killed while saving ends, too", async () => {
    const taken: string[] = [];
    const streams = {
      out: () => undefined,
      error(text: string) {
        const when = /Training {2}(50|100) %/.exec(text)?.[1];
        if (when === undefined) return;
        taken.push(at(`killed-${when}`));
        cpSync(at("running"), at(`killed-${when}`), { recursive: true });
      },
    };
    const args = ["finetune", olmoe, at("running"), "--text", at("new.txt"), ...how, ...steps];
    expect(await main([...args, "--snapshot-every", "0.001s"], { streams })).toBe(0);
    expect(taken).toHaveLength(2);
    for (const folder of taken) {
      expect(readdirSync(join(folder, ".finetune")).sort()).toEqual(["run.json", "state.snapshot"]);
      const file = join(folder, ".finetune", "run.json");
      const state = JSON.parse(readFileSync(file, "utf8"));
      expect(state.seconds).toBeGreaterThan(0.01);
      writeFileSync(file, JSON.stringify({ ...state, seconds: 1000 }));
      fine(await runCommand(["finetune", "--resume", folder, "--threads", "1"]));
      expect(weightsOf(folder).equals(weightsOf(at("straight")))).toBe(true);
      // The time before it was killed counts.
      expect(JSON.parse(readFileSync(join(folder, "finetune.json"), "utf8")).seconds).toBeGreaterThan(1000);
    }
  });

  test("without room for a snapshot training goes on, and says so", async () => {
    const told: string[] = [];
    const snapshot = at("full", ".finetune", "state.snapshot");
    const streams = {
      out: () => undefined,
      error(text: string) {
        told.push(text);
        // Stands in the way of the file.
        if (text.includes("Training  50 %")) mkdirSync(join(snapshot, "x"), { recursive: true });
      },
    };
    expect(await main(["finetune", olmoe, at("full"), "--text", at("new.txt"), ...how, ...steps], { streams })).toBe(0);
    expect(told.join("")).toMatch(
      /^No snapshot: cannot save to .*\. Training goes on; it could not be resumed from here\.$/m,
    );
    expect(weightsOf(at("full")).equals(weightsOf(at("straight")))).toBe(true);
    expect(readdirSync(at("full")).sort()).toEqual(readdirSync(at("straight")).sort());
  });

  test("Ctrl-C without room for a snapshot says that, not that all is well", async () => {
    let told = "";
    const streams = {
      out: () => undefined,
      error(text: string) {
        told += text;
        if (!/Training {2}50 %/.test(text)) return;
        mkdirSync(join(at("crowded"), ".finetune", "state.snapshot", "x"), { recursive: true });
        process.emit("SIGINT");
      },
    };
    const args = ["finetune", olmoe, at("crowded"), "--text", at("new.txt"), ...how, ...steps];
    expect(await main(args, { streams })).toBe(1);
    expect(told).toMatch(/^switchyard: cannot save to .*crowded.*$/m);
    expect(told).not.toContain("Stopped");
    expect(existsSync(at("crowded"))).toBe(false);
  });

  test("that another process goes on with ends, and leaves everything to that one", async () => {
    const file = at("taken", ".finetune", "run.json");
    let told = "";
    const streams = {
      out: () => undefined,
      error(text: string) {
        told += text;
        if (/Training {2}50 %/.test(text)) {
          writeFileSync(file, JSON.stringify({ ...JSON.parse(readFileSync(file, "utf8")), run: "another" }));
        }
      },
    };
    const args = ["finetune", olmoe, at("taken"), "--text", at("new.txt"), ...how, ...steps];
    expect(await main(args, { streams })).toBe(1);
    expect(told).toContain("is no longer this one's: another process has gone on with it");
    expect(told).not.toContain("What was trained is kept");
    expect(readdirSync(at("taken"))).toEqual([".finetune"]);
    expect(JSON.parse(readFileSync(file, "utf8")).run).toBe("another");
  });

  test("that was started in OUT while another one was loading stays", async () => {
    const file = at("raced", ".finetune", "run.json");
    let told = "";
    const streams = {
      out: () => undefined,
      error(text: string) {
        told += text;
        if (text.includes("tokens to train on")) writeFileSync(file, '{"run":"another"}');
      },
    };
    const args = ["finetune", olmoe, at("raced"), "--text", at("new.txt"), ...how, ...steps];
    expect(await main(args, { streams })).toBe(1);
    expect(told).toContain("holds an unfinished run: go on with switchyard finetune --resume");
    expect(readFileSync(file, "utf8")).toBe('{"run":"another"}');
  });

  test("is not resumed with another text, checkpoint or setting", async () => {
    cpSync(olmoe, at("source"), { recursive: true });
    cpSync(at("new.txt"), at("text.txt"));
    const args = ["finetune", at("source"), at("changed"), "--text", at("text.txt"), ...how, ...steps];
    expect((await runCommand(args, /Training {2}30 %/)).code).toBe(130);
    const resumed = async (...more: string[]): Promise<string> => {
      const { code, error } = await runCommand(["finetune", "--resume", at("changed"), ...more]);
      expect([code, existsSync(at("changed", ".finetune", "state.snapshot"))]).toEqual([1, true]);
      return error;
    };
    expect(await resumed("--lr", "0.1")).toContain("it was started with 0.004, now --lr is 0.1; leave --lr out");
    expect(await resumed("--time", "5m")).toContain("it was started without it, now --time is 300");
    writeFileSync(at("text.txt"), "other words");
    expect(await resumed()).toContain("the text has changed since the run");
    cpSync(at("new.txt"), at("text.txt"));
    const weights = weightsOf(olmoe);
    weights[weights.length - 1] = 7;
    writeFileSync(at("source", "model.safetensors"), weights);
    expect(await resumed()).toMatch(/the checkpoint .*source has changed since the run/);
    cpSync(join(olmoe, "model.safetensors"), at("source", "model.safetensors"));
    writeFileSync(at("source", "config.json"), `${readFileSync(join(olmoe, "config.json"), "utf8")} `);
    expect(await resumed()).toMatch(/the checkpoint .*source has changed since the run/);
    cpSync(join(olmoe, "config.json"), at("source", "config.json"));
    const state = JSON.parse(readFileSync(at("changed", ".finetune", "run.json"), "utf8"));
    const rows = { ...state, settings: { ...state.settings, rows: -4 } };
    writeFileSync(at("changed", ".finetune", "run.json"), JSON.stringify(rows));
    expect(await resumed()).toMatch(/^switchyard: .*run\.json: .*rows/m);
    writeFileSync(at("changed", ".finetune", "run.json"), "{}");
    expect(await resumed()).toContain("run.json");
  });

  test("before training began leaves nothing", async () => {
    const control = new AbortController();
    control.abort();
    const told: string[] = [];
    const streams = { out: () => undefined, error: (text: string) => void told.push(text) };
    const args = ["finetune", olmoe, at("early"), "--text", at("new.txt"), ...how, "--steps", "3"];
    expect(await main(args, { streams, signal: control.signal })).toBe(130);
    expect(told).toEqual(["Stopped; nothing is kept.\n"]);
    expect(existsSync(at("early"))).toBe(false);
  });

  test("--time fixes the steps before the run begins", async () => {
    fine(await tune(olmoe, "timed", "--time", "6s"));
    const { settings, seconds } = resultOf("timed");
    expect(settings.time).toBe(6);
    expect(settings.steps).toBeGreaterThanOrEqual(10);
    expect(seconds).toBeLessThan(30);
    // Measuring the speed leaves no trace: the same steps without it end with the same bytes.
    fine(await tune(olmoe, "counted", "--steps", `${settings.steps}`));
    expect(weightsOf(at("timed")).equals(weightsOf(at("counted")))).toBe(true);
    const { error } = await tune(olmoe, "short", "--time", "0.1s");
    expect(error).toMatch(
      /seconds are too short for this model and text: ten steps and the evaluations need \d+; give more time/,
    );
    expect(existsSync(at("short"))).toBe(false);
  });
});

test("changes that the stored type cannot show are counted, with what helps", async () => {
  expect((await runCommand(["convert", olmoe, at("bf16"), "--dtype", "bf16"])).code).toBe(0);
  const ran = await tune(at("bf16"), "unseen", "--steps", "3", "--lr", "1e-7");
  fine(ran);
  const { changed, unshown } = resultOf("unseen").certificate.values;
  expect(unshown / changed).toBeGreaterThan(0.9);
  expect(ran.out).toMatch(/^rounded {2}9\d\.\d % of \d+ changes are too small for the stored type$/m);
  expect(ran.out).toContain("try a higher --lr than 1e-7, or tune a copy in f32");
});

describe("checkpoints of the families", () => {
  const ids = Array.from({ length: 300 }, (_, i) => (i * i * 7 + i) % 61).join(" ");
  const tuneIds = async (name: string, out: string, ...more: string[]): Promise<Ran> => {
    writeFileSync(at("ids.txt"), ids);
    const args = [fixture(name), at(out), "--ids", at("ids.txt"), "--threads", "1", "--length", "16", "--rows", "2"];
    return runCommand(["finetune", ...args, "--steps", "6", ...more]);
  };

  test.each([
    ["mixtral", ["--lr", "0.003"]],
    ["gpt_oss", ["--esft", "0.3", "--lr", "0.003"]],
    ["jetmoe", ["--lora", "attention,router"]],
    ["deepseek_v2", ["--lora", "experts,shared,dense"]],
    ["deepseek_v3_fp8", ["--lora", "router,head", "--lr", "0.05"]],
    ["qwen3_moe", ["--lora", "attention", "--lr", "0.05"]],
  ])("%s %j", async (name, more) => {
    fine(await tuneIds(name, `family-${name}`, ...more));
    const { before, after, certificate } = resultOf(`family-${name}`);
    expect(after.loss).toBeLessThan(before.loss);
    expect((await changes(fixture(name), at(`family-${name}`))).length).toBeGreaterThan(0);
    expect(certificate.values.changed).toBeGreaterThan(0);
  });

  test("--lora with --esft: adapters beside chosen experts, and beside all of the other parts", async () => {
    fine(await tuneIds("qwen2_moe", "chosen", "--lora", "experts,shared,attention", "--esft", "0.3"));
    const names = await changes(fixture("qwen2_moe"), at("chosen"));
    const { experts = {} } = resultOf("chosen").trained;
    const chosen = Object.entries(experts).flatMap(([layer, ids]) => ids.map((id) => `${layer} ${id}`));
    const found = names.flatMap((name) => {
      const [, layer, expert] = /layers\.(\d+)\.mlp\.experts\.(\d+)\./.exec(name) ?? [];
      return expert === undefined ? [] : [`${layer} ${expert}`];
    });
    expect([...new Set(found)].sort()).toEqual(chosen.sort());
    expect(names.filter((name) => /\.shared_expert\.\w+\.weight$/.test(name))).toHaveLength(
      3 * Object.keys(experts).length,
    );
    expect(names.some((name) => name.includes(".self_attn."))).toBe(true);
  });

  test.each([
    ["gpt_oss_mxfp4", [], "the experts of"],
    [
      "deepseek_v3_fp8",
      ["--lora", "experts"],
      "quantised (F32, F8_E4M3), and what is trained could not be saved in that form",
    ],
    ["deepseek_v3_fp8", ["--lora", "attention"], "Train other parts: --lora router,embed,head"],
  ])("%s %j is refused before training", async (name, more, message) => {
    const { code, error } = await tuneIds(name, "quantised", ...more);
    expect(error).toContain(message);
    expect([code, existsSync(at("quantised"))]).toEqual([1, false]);
  });
});

describe("refusals are one line, and leave no folder", () => {
  const text = (): string[] => ["--text", at("new.txt")];
  const refused = async (args: readonly string[], message: string | RegExp): Promise<void> => {
    const before = readdirSync(home).sort();
    const { code, out, error } = await runCommand(["finetune", ...args]);
    expect(error.trimEnd().split("\n").at(-1)).toMatch(/^switchyard: /);
    expect(error).toMatch(message);
    expect([code, out]).toEqual([1, ""]);
    expect(readdirSync(home).sort()).toEqual(before);
  };

  test("folders", async () => {
    await refused([olmoe], "finetune takes a checkpoint folder and a folder to write to");
    await refused([at("nowhere"), at("x"), ...text()], "has no config.json");
    cpSync(olmoe, at("damaged"), { recursive: true });
    const weights = weightsOf(olmoe);
    // The whole of the last tensor of the file, at the least.
    for (let i = weights.length - 64; i < weights.length; i += 4) weights.writeFloatLE(Number.NaN, i);
    writeFileSync(at("damaged", "model.safetensors"), weights);
    await refused([at("damaged"), at("x"), ...text(), ...how], "the model's logits at position 1 are not finite");
    await refused([olmoe, olmoe, ...text()], "is the checkpoint itself");
    await refused([olmoe, join(olmoe, "deeper", "x"), ...text()], "lies in the folder of the checkpoint");
    symlinkSync(olmoe, at("link"));
    await refused([olmoe, at("link", "x"), ...text()], "lies in the folder of the checkpoint");
    mkdirSync(at("nest", "deeper"), { recursive: true });
    symlinkSync(at("nest", "deeper"), at("deep-link"));
    await refused([at("nest"), at("deep-link", "x"), ...text()], "lies in the folder of the checkpoint");
    await refused(
      [olmoe, at("whole"), ...text()],
      /is not empty: it holds .* replace \(--replace\) the checkpoint there/,
    );
    await refused([olmoe, at("new.txt"), ...text()], "is a file; choose a folder");
    await refused(["--resume", at("whole")], "is finished: finetune.json tells about it");
    await refused(["--resume", at("nowhere")], "there is no folder");
  });

  test("texts", async () => {
    const cut = (file: string, ...more: string[]): string[] => [olmoe, at("x"), "--text", at(file), ...more];
    writeFileSync(at("empty.txt"), "");
    writeFileSync(at("brief.txt"), prose("klmnoprstu", 3));
    await refused([olmoe, at("x")], "needs a text: --text FILE, or --ids FILE");
    await refused(cut("missing.txt"), "missing.txt: there is no such file");
    mkdirSync(at("texts"));
    await refused(cut("texts"), "texts: it is a folder, and a file is needed");
    await refused(cut("empty.txt"), "it has 0 tokens, and even the shortest windows need 6; give more text");
    await refused(cut("brief.txt"), /it has \d+ tokens, windows of 64 need 130 .*; --length \d+ would fit/);
    await refused(cut("new.txt", "--length", "65"), "--length is 65, but the model's context is 64");
    await refused([olmoe, at("x"), "--ids", at("new.txt")], "takes token ids");
    writeFileSync(at("large.txt"), "1 2 3 99999");
    await refused(
      [olmoe, at("x"), "--ids", at("large.txt")],
      /large.txt: id 99999 is not in the model's vocabulary of \d+/,
    );
    await refused([fixture("mixtral"), at("x"), ...text()], /--text needs a tokenizer: .* Give token ids: --ids FILE/);
  });

  test("options", async () => {
    const given = (...more: string[]): string[] => [olmoe, at("x"), ...text(), ...more];
    await refused(given("--lora", "heads"), /--lora takes parts out of experts, shared, .*, found "heads"/);
    await refused(given("--lora", "norms"), '--lora: this model has no matrix in "norms"');
    await refused(given("--rank", "4"), "--rank goes with --lora");
    await refused(given("--esft-by", "token"), "--esft-by goes with --esft");
    await refused(given("--lora", "attention", "--esft", "0.1"), "name them too: --lora experts,attention");
    await refused(given("--esft", "0.1", "--experts", "x.json"), "--esft and --experts exclude each other");
    await refused(given("--steps", "3", "--time", "3m"), "--steps and --time exclude each other");
    await refused(given("--time", "soon"), '--time takes a time such as 90s, 10m or 1h, found "soon"');
    await refused(given("--hold-out", "1"), "--hold-out takes a number from 0.001 to 0.9");
    await refused(given("--router", "topK"), "--router is for models in our own layout");
    writeFileSync(at("bad-cfg.json"), '{"experts":{"0":[9],"1":[]}}');
    await refused(given("--experts", at("bad-cfg.json")), "trains expert 9 of block 0");
  });

  test("a learning rate that is too high says so, and leaves no unfinished run", async () => {
    const args = [olmoe, at("x"), ...text(), ...how, "--steps", "5", "--lr", "1e30"];
    await refused(
      args,
      /the loss is no longer a number after step \d: the learning rate 1e\+30 is too high .*, such as --lr 1e\+29/,
    );
    // Not one with a snapshot either: going on would only repeat it.
    await refused([...args, "--snapshot-every", "0.001s"], "the loss is no longer a number after step 1");
  });
});
