// The command from end to end on small made-up text: what it writes, prints and refuses, and that an interrupted run ends like an uninterrupted one.
import { createHash } from "node:crypto";
import { chmodSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseResults, type Results } from "@switchyard/bench";
import { engine } from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import { analyseTrace, fileSource, loadModel, readTrace } from "@switchyard/models";
import { afterAll, beforeAll, describe, expect, test, vi } from "vitest";
import { main } from "./main.ts";
import { routersFrom } from "./routers.ts";

const root = mkdtempSync(join(tmpdir(), "switchyard-cli-"));
afterAll(() => rmSync(root, { recursive: true }));
const path = (...parts: string[]): string => join(root, ...parts);

/** Sentences of a few hundred words that follow each other in a fixed manner. */
function prose(letters: string, sentences: number): string {
  let state = letters.length;
  const next = (n: number): number => {
    state = (state * 1_103_515_245 + 12_345) % 2 ** 31;
    return Math.floor((state / 2 ** 31) * n);
  };
  const words = Array.from({ length: 60 }, () =>
    Array.from({ length: 2 + next(5) }, () => letters[next(letters.length)]).join(""),
  );
  return Array.from(
    { length: sentences },
    () => `${Array.from({ length: 5 + next(6) }, () => words[next(60)]).join(" ")}.`,
  ).join("\n");
}

interface Ran {
  readonly code: number;
  readonly out: string;
  readonly error: string;
}

/** Runs the command; `stopAt` presses Ctrl-C when a line of progress matches. */
async function run(args: readonly string[], stopAt?: RegExp): Promise<Ran> {
  const control = new AbortController();
  let out = "";
  let error = "";
  const code = await main(args, {
    signal: control.signal,
    streams: {
      out: (text) => {
        out += text;
      },
      error: (text) => {
        error += text;
        if (stopAt?.test(text)) control.abort();
      },
    },
  });
  return { code, out, error };
}

const tiny = ["--size", "tiny", "--threads", "1", "--out", path("runs")];
const three = ["--router", "topK,switchRouter,reMoE"];
const text = [path("tales.txt"), path("letters")];
const results = (name: string): Results => parseResults(readFileSync(path("runs", name, "results.json"), "utf8"));
const timeless = ({ runs, baselines, domains, settings: { threads: _, ...settings } }: Results): unknown => ({
  baselines,
  domains,
  settings,
  runs: runs.map((one) => ({ ...one, seconds: 0, tokensPerSecond: 0 })),
});

beforeAll(() => {
  writeFileSync(path("tales.txt"), prose("abcdefgh", 200));
  mkdirSync(path("letters"));
  for (const name of ["a", "b"]) writeFileSync(path("letters", `${name}.txt`), prose("klmnoprstu", 100));
  writeFileSync(path("letters", "picture.png"), Uint8Array.of(137, 80, 78, 71, 0));
});

describe("train", () => {
  let whole: Ran;
  beforeAll(async () => {
    whole = await run(["train", ...text, ...tiny, ...three, "--steps", "12", "--name", "whole"]);
  }, 120_000);

  test("ends well, with a table, a sample and where the report is", () => {
    expect(whole.error).not.toContain("switchyard:");
    expect(whole.code).toBe(0);
    for (const router of ["topK", "switchRouter", "reMoE"])
      expect(whole.out).toMatch(new RegExp(`^${router} +\\d\\.\\d{3} `, "m"));
    expect(whole.out).toMatch(/^order-2 byte model +\d\.\d{3}/m);
    expect(whole.out).toMatch(/topK writes \(\d+ % of the words occur in the training text\)/);
    expect(whole.out).toContain(join("whole", "report.html"));
  });

  test("shows the progress of every run and what was passed over", () => {
    expect(whole.error).toContain("letters 0.01 MB (1 file without text passed over)");
    expect(whole.error).toMatch(/1\/3 topK seed 1 {2}step \d+\/12 {2}loss \d\.\d+ {2}\d+ tokens\/s {2}\d+s left/);
    expect(whole.error).toMatch(/3\/3 reMoE seed 1 {2}step 12\/12/);
  });

  test("leaves models, results and a report, and nothing else", () => {
    const names = [
      "reMoE-seed1",
      "report.html",
      "results.json",
      "run.json",
      "switchRouter-seed1",
      "topK-seed1",
      "traces",
    ];
    expect(readdirSync(path("runs", "whole")).sort()).toEqual(names);
    expect(readFileSync(path("runs", "whole", "report.html"), "utf8")).toContain("3 routers compared");
  });

  test("results.json is complete: equal steps and tokens, falling loss, equal active parameters in the experts", () => {
    const { runs, complete, domains, summary } = results("whole");
    expect(complete).toBe(true);
    expect(domains.map(({ name, files }) => [name, files])).toEqual([
      ["tales.txt", 1],
      ["letters", 2],
    ]);
    expect(runs.map(({ steps, tokens }) => [steps, tokens])).toEqual(Array(3).fill([12, 12 * 6 * 32]));
    for (const { checkpoints, training } of runs) {
      expect(training.bitsPerByte).toHaveLength(12);
      expect(checkpoints.at(-1)?.bitsPerByte).toBeLessThan((checkpoints[0]?.bitsPerByte ?? 0) - 0.2);
      expect(checkpoints.at(-1)?.layers).toHaveLength(2);
    }
    expect(runs.map(({ experts, expertWidth }) => [experts, expertWidth])).toEqual([
      [4, 32],
      [2, 64],
      [4, 32],
    ]);
    const active = summary.map(({ parameters }) => parameters.active);
    expect(Math.max(...active) - Math.min(...active)).toBeLessThan(0.02 * Math.max(...active));
  });

  test("the saved models load, and the top-k one has the OLMoE layout", async () => {
    const host = engine(cpu());
    const routers = (await routersFrom(["topK", "switchRouter", "reMoE"])).map(({ plugin }) => plugin);
    for (const name of ["topK", "switchRouter", "reMoE"]) {
      const folder = path("runs", "whole", `${name}-seed1`);
      const { model, tokenizer, close } = await loadModel(folder, { engine: host, routers });
      expect(model.layers).toBe(2);
      await close();
      expect(tokenizer?.decode(tokenizer.encode("abc"))).toBe("abc");
      const config = JSON.parse(readFileSync(join(folder, "config.json"), "utf8"));
      expect(config.model_type).toBe(name === "topK" ? "olmoe" : "switchyard");
    }
  });

  test("interrupted in two runs and resumed, it ends with the same numbers", async () => {
    const first = await run(
      ["train", ...text, ...tiny, ...three, "--steps", "12", "--name", "stopped"],
      /1\/3 topK seed 1 {2}step 5\//,
    );
    expect(first.code).toBe(130);
    expect(first.error).toContain("switchyard train --resume");
    expect(results("stopped")).toMatchObject({ complete: false, runs: [] });
    const folder = path("runs", "stopped");
    const second = await run(["train", "--resume", folder], /2\/3 switchRouter seed 1 {2}step 12\//);
    expect(second.code).toBe(130);
    expect(second.out).toMatch(/^topK +\d\.\d{3} /m);
    const third = await run(["train", "--resume", folder]);
    expect(third.code).toBe(0);
    expect(timeless(results("stopped"))).toEqual(timeless(results("whole")));
    expect(results("stopped").complete).toBe(true);
    // Traces and models too, byte for byte.
    const traces = results("whole").runs.flatMap(({ checkpoints }) => checkpoints.map(({ trace }) => trace ?? ""));
    const kept = readdirSync(path("runs", "stopped", "traces"), { recursive: true, withFileTypes: true });
    expect(kept.filter((entry) => entry.isFile())).toHaveLength(traces.length);
    for (const trace of traces) {
      const [a, b] = ["whole", "stopped"].map((one) => readFileSync(path("runs", one, trace)));
      expect(a?.equals(b ?? Buffer.of()), trace).toBe(true);
    }
    for (const name of ["topK-seed1", "switchRouter-seed1", "reMoE-seed1"]) {
      const [a, b] = ["whole", "stopped"].map((one) => readFileSync(path("runs", one, name, "model.safetensors")));
      expect(a?.equals(b ?? Buffer.of())).toBe(true);
    }
  });

  test("every checkpoint leaves a routing trace: same loads as the results, texts and domains, and they compare", async () => {
    const folder = path("runs", "whole");
    const hash = createHash("sha256")
      .update(readFileSync(join(folder, "topK-seed1", "tokenizer.json")))
      .digest("hex");
    for (const { router, checkpoints } of results("whole").runs) {
      expect(checkpoints.map(({ trace }) => trace)).toEqual(
        checkpoints.map(({ step }) => `traces/${router}-seed1/step-${String(step).padStart(4, "0")}.trace`),
      );
      for (const { trace = "", layers } of checkpoints) {
        const source = await fileSource(join(folder, trace));
        if (source === undefined) throw new Error("a file");
        const opened = await readTrace(source);
        expect(opened.header).toMatchObject({
          tokenizer: hash,
          labels: ["tales.txt", "letters"],
          tool: "switchyard train",
        });
        const analysis = await analyseTrace(opened);
        await source.close();
        for (const [i, { load, dead, expertsPerToken, entropy }] of layers.entries()) {
          const found = analysis.layers[i];
          expect([found?.dead.length, found?.expertsPerToken.toFixed(3)]).toEqual([dead, expertsPerToken.toFixed(3)]);
          expect(found?.entropy).toBeCloseTo(entropy, 2); // the trace keeps three digits
          const rows = found?.loadByLabel?.map((row) => row.map((n) => n / row.reduce((a, b) => a + b, 0)));
          for (const [domain, own] of load.entries())
            for (const [e, share] of own.entries()) expect(rows?.[domain]?.[e]).toBeCloseTo(share, 4);
        }
      }
    }
    const { checkpoints = [] } = results("whole").runs[0] ?? {};
    const [a, b] = checkpoints.slice(-2).map(({ trace = "" }) => join(folder, trace)) as [string, string];
    const compared = await run(["trace", "diff", a, b, "--json"]);
    expect(compared.error).toBe("");
    const { layers } = JSON.parse(compared.out);
    for (const [i, { fluctuation }] of (checkpoints.at(-1)?.layers ?? []).entries())
      expect(layers[i].sets).toBeCloseTo(fluctuation ?? -1, 4);
    const html = path("trace.html");
    expect((await run(["trace", "report", b, "--out", html])).code).toBe(0);
    expect(readFileSync(html, "utf8")).toContain("Routing of topK after 12 of 12 steps");
    expect(readFileSync(join(folder, "report.html"), "utf8")).toContain('href="traces/topK-seed1/step-0012.trace"');
  });

  test("a finished run resumed trains nothing and prints its table again", async () => {
    const before = readFileSync(path("runs", "whole", "topK-seed1", "model.safetensors"));
    const again = await run(["train", "--resume", path("runs", "whole")]);
    expect(again.code).toBe(0);
    expect(again.error).not.toMatch(/ step \d/);
    expect(again.out).toMatch(/^topK +\d\.\d{3} /m);
    expect(readFileSync(path("runs", "whole", "topK-seed1", "model.safetensors")).equals(before)).toBe(true);
  });

  test("--json prints results.json and nothing else; seeds give intervals", async () => {
    const { code, out } = await run([
      ...[
        "train",
        text[0] ?? "",
        "--size",
        "tiny",
        "--backend",
        "cpu",
        "--out",
        path("runs"),
        "--steps",
        "2",
        "--name",
        "json",
      ],
      ...["--json", "--router", "topK:k=1", "--seeds", "2", "--seed", "7"],
    ]);
    expect(code).toBe(0);
    const printed = parseResults(out);
    expect(printed).toEqual(results("json"));
    expect(printed.runs.map(({ router, seed }) => [router, seed])).toEqual([
      ["topK:k=1", 7],
      ["topK:k=1", 8],
    ]);
    expect(printed.summary[0]?.bitsPerByte.halfWidth).toBeGreaterThan(0);
  });

  test("--time fixes the steps, and a resumed run keeps them", async () => {
    const args = ["train", ...text, ...tiny, "--time", "8s", "--router", "topK", "--name", "timed"];
    const first = await run(args, /step \d+\//);
    expect(first.code).toBe(130);
    const { steps } = JSON.parse(readFileSync(path("runs", "timed", "run.json"), "utf8"));
    expect(steps).toBeGreaterThanOrEqual(10);
    expect((await run(["train", "--resume", path("runs", "timed")])).code).toBe(0);
    expect(results("timed").runs[0]?.steps).toBe(steps);
  });

  test("the first Ctrl-C saves, the second ends at once", async () => {
    const exit = vi.spyOn(process, "exit").mockImplementation(() => undefined as never);
    let pressed = 0;
    const press = (line: string): void => {
      if (/ step 1\//.test(line) && pressed++ === 0) for (const _ of [1, 2]) process.emit("SIGINT");
    };
    let error = "";
    const code = await main(["train", ...text, ...tiny, "--steps", "6", "--router", "topK", "--name", "pressed"], {
      streams: {
        out: () => undefined,
        error: (line) => {
          error += line;
          press(line);
        },
      },
    });
    expect(exit.mock.calls).toEqual([[130]]);
    exit.mockRestore();
    expect(code).toBe(130);
    expect(error).toContain("Finishing this step, then saving. Ctrl-C again ends at once.");
    expect(error).toMatch(/Saved\. Continue with: switchyard train --resume .*pressed/);
    expect(process.listenerCount("SIGINT")).toBe(0);
  });

  test("Ctrl-C before training leaves nothing", async () => {
    const { code, error } = await run(["train", ...text, ...tiny, "--name", "early"], /^Measuring/);
    expect(code).toBe(130);
    expect(error).toContain("nothing to save");
    expect(readdirSync(path("runs"))).not.toContain("early");
  });
});

describe("refusals are one line on standard error, with exit code 1, and leave no folder", () => {
  const refused = async (args: readonly string[], message: string): Promise<void> => {
    const before = readdirSync(root, { recursive: true }).sort();
    const { code, out, error } = await run(["train", ...args]);
    expect(error).toContain(message);
    expect(
      error
        .trimEnd()
        .split("\n")
        .filter((line) => line.startsWith("switchyard:")),
    ).toHaveLength(1);
    expect(error.trimEnd().split("\n").at(-1)).toMatch(/^switchyard: /);
    expect([code, out]).toEqual([1, ""]);
    expect(readdirSync(root, { recursive: true }).sort()).toEqual(before);
  };
  const basic = [...tiny, "--steps", "3", "--name", "refused"];

  beforeAll(() => {
    writeFileSync(path("empty.txt"), "");
    writeFileSync(path("binary.bin"), Uint8Array.of(1, 0, 2));
    writeFileSync(path("short.txt"), "a few words");
    writeFileSync(path("in-the-way"), "x");
  });

  test("routers", async () => {
    await refused(
      [...text, ...basic, "--router", "topK,best"],
      'unknown router "best"; the routers are topK, switchRouter, reMoE, expertChoice',
    );
    await refused([...text, ...basic, "--router", "expertChoice"], "looking at later tokens");
  });

  test("text", async () => {
    await refused([path("empty.txt"), ...basic], "empty.txt: empty; give a text file");
    await refused([path("binary.bin"), ...basic], "binary.bin: binary");
    await refused([path("short.txt"), ...basic], "11 bytes are too little");
    await refused([path("nowhere"), ...basic], "no such file or folder");
    await refused(basic, "no text: give files or folders, for example switchyard train novel.txt");
  });

  test("options", async () => {
    await refused([...text, ...basic, "--threads", "0"], "--threads takes a whole number from 1");
    await refused(
      [...text, "--out", path("runs"), "--backend", "cpu", "--threads", "2", "--name", "refused"],
      "the cpu backend has no threads to set",
    );
    await refused([...text, ...basic, "--layers", "3"], "unknown option --layers; the options are --time, ");
    // So many seeds that no machine is fast enough.
    await refused(
      [...text, ...tiny, "--time", "1s", "--seeds", "100", "--name", "refused"],
      "seconds are too short for 500 runs",
    );
  });

  test("folders", async () => {
    await refused(
      [...text, ...tiny, "--steps", "3", "--name", "whole"],
      "is not empty; choose another --name, or continue that run with --resume",
    );
    await refused(
      [...text, "--size", "tiny", "--backend", "cpu", "--out", path("in-the-way")],
      "a part of the path is a file",
    );
    await refused(["--resume", path("nowhere")], "there is no folder");
    await refused(["--resume", path("letters")], "holds no run.json");
    await refused(["--resume", path("runs", "whole"), "--size", "base"], "leave out --size");
    await refused(["--resume", path("runs", "whole"), ...text], "leave out");
  });

  test.skipIf(process.getuid?.() === 0 || process.platform === "win32")(
    "a read-only output folder (not as root)",
    async () => {
      mkdirSync(path("locked"));
      chmodSync(path("locked"), 0o500);
      await refused([...text, "--size", "tiny", "--backend", "cpu", "--out", path("locked")], "permission denied");
    },
  );

  test("a damaged run", async () => {
    const args = ["train", ...text, ...tiny, "--steps", "4", "--router", "topK", "--name", "damaged"];
    await run(args, /step 2\//);
    const snapshot = path("runs", "damaged", "interrupted.snapshot");
    const bytes = readFileSync(snapshot);
    bytes[bytes.length - 7] = (bytes.at(-7) ?? 0) ^ 16;
    writeFileSync(snapshot, bytes);
    await refused(["--resume", path("runs", "damaged")], "interrupted.snapshot: the snapshot is damaged");
    writeFileSync(path("runs", "damaged", "run.json"), "{}");
    await refused(["--resume", path("runs", "damaged")], "run.json: schema");
    writeFileSync(path("runs", "damaged", "run.json"), "{");
    await refused(["--resume", path("runs", "damaged")], "run.json: not valid JSON");
  });

  test("text that has changed since", async () => {
    writeFileSync(path("changing.txt"), prose("aeiou", 100));
    await run(
      ["train", path("changing.txt"), ...tiny, "--steps", "4", "--router", "topK", "--name", "changing"],
      /step 2\//,
    );
    writeFileSync(path("changing.txt"), prose("aeiouy", 100));
    await refused(["--resume", path("runs", "changing")], "the text has changed since");
  });
});

describe("help", () => {
  test.each([[[]], [["--help"]], [["help"]]])("%j shows the commands", async (args) => {
    expect(await run(args)).toMatchObject({ code: 0, out: expect.stringContaining("switchyard train PATH...") });
  });
  test("train --help lists every option and an example", async () => {
    const { code, out } = await run(["train", "--help"]);
    expect(code).toBe(0);
    for (const option of [
      "time",
      "steps",
      "size",
      "router",
      "backend",
      "threads",
      "seed",
      "seeds",
      "out",
      "name",
      "resume",
      "json",
    ]) {
      expect(out).toContain(`--${option}`);
    }
    expect(out).toContain("switchyard train novel.txt speeches/ --router topK,reMoE:k=1 --time 5m");
  });
  test.each([[["--version"]], [["generate", "--version"]], [["cache-sim", "--version"]]])("%j", async (args) => {
    const { version } = JSON.parse(readFileSync(new URL("../package.json", import.meta.url), "utf8"));
    expect(await run(args)).toEqual({ code: 0, out: `switchyard ${version}\n`, error: "" });
  });
  test("--version among other arguments is no question", async () => {
    expect(await run(["generate", "--version", "x"])).toMatchObject({ code: 1, out: "" });
    expect(await run(["teach", "--version"])).toMatchObject({ code: 1, out: "" });
  });
  test("an unknown command lists the known ones", async () => {
    expect(await run(["teach"])).toMatchObject({
      code: 1,
      error: expect.stringMatching(
        /^switchyard: unknown command "teach"; the commands are train, .*cache-sim and help\n$/,
      ),
    });
  });
});
