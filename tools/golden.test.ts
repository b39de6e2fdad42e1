// npm run golden: every recorded checkpoint passes on every backend, and every way a number, a file or a folder can be wrong is told
// apart, counted and named.
import { spawnSync } from "node:child_process";
import { cpSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, describe, expect, test } from "vitest";
import { root } from "./child.mjs";
import { backends, checkGolden } from "./golden.ts";

const fixtures = join(root, "packages", "models", "test", "fixtures");
const recorded = readdirSync(fixtures, { withFileTypes: true })
  .filter((entry) => entry.isDirectory())
  .map(({ name }) => name)
  .sort();
const home = mkdtempSync(join(tmpdir(), "switchyard-golden-"));
afterAll(() => rmSync(home, { recursive: true }));

let folders = 0;
/** A folder that holds a copy of one recorded checkpoint, changed. */
function folder(change: (path: string) => void, name = "granitemoe"): string {
  const path = join(home, `${folders++}`);
  cpSync(join(fixtures, name), join(path, name), { recursive: true });
  change(join(path, name));
  return path;
}

async function checked(path: string, names: readonly string[] = ["wasm"]) {
  const lines: string[] = [];
  const total = await checkGolden(path, { backends: names, say: (line) => lines.push(line) });
  return { ...total, lines };
}

interface Tensors {
  readonly [name: string]: { readonly data_offsets: readonly [number, number] };
}
/** Adds to the first number of a tensor of a safetensors file. */
function add(path: string, tensor: string, change: (view: DataView, at: number) => void): void {
  const bytes = readFileSync(path);
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  const length = Number(view.getBigUint64(0, true));
  const header = JSON.parse(bytes.subarray(8, 8 + length).toString()) as Tensors;
  const found = header[tensor];
  if (!found) throw new Error(`no ${tensor}, only ${Object.keys(header)}`);
  change(view, 8 + length + found.data_offsets[0]);
  writeFileSync(path, bytes);
}
const float =
  (by: number) =>
  (view: DataView, at: number): void =>
    view.setFloat32(at, view.getFloat32(at, true) + by, true);

/** Why the backend cannot be had, printed; "": it can. SWITCHYARD_REQUIRE_GPU=1 (CI) makes its absence a failure. */
async function unavailable(name: string): Promise<string> {
  try {
    (await backends[name]?.())?.close();
    return "";
  } catch (error) {
    if (process.env.SWITCHYARD_REQUIRE_GPU === "1") throw error;
    const why = error instanceof Error ? error.message : String(error);
    console.warn(`golden tests on ${name} skipped: ${why}`);
    return why;
  }
}

describe("every recorded checkpoint passes", () => {
  // The reference backend: packages/models/src/architectures/golden.test.ts.
  test.for(["wasm", "wasm2", "tfjs", "webgpu"])("on %s", { timeout: 240_000 }, async (name, { skip }) => {
    const missing = name === "webgpu" ? await unavailable(name) : "";
    skip(missing !== "", missing);
    const { lines, passed, failed } = await checked(fixtures, [name]);
    expect(lines.filter((line) => /FAILED|^ {2}/.test(line))).toEqual([]);
    expect([passed, failed]).toEqual([recorded.length, 0]);
    expect(lines.slice(0, -1).map((line) => line.split(" on ")[0])).toEqual(recorded);
    const figures = /: passed: logits \d\.\de-\d, hidden states \d\.\de-\d, router logits \d\.\de-\d, top-k weights /;
    for (const line of lines.slice(0, -1)) {
      expect(line).toMatch(figures);
      expect(line).toMatch("; 2 prompts, 32 greedy tokens, all ids equal");
    }
    expect(lines.at(-1)).toBe(`${recorded.length} passed, 0 failed`);
  });
});

describe("what is not as recorded fails, by name and by how much:", () => {
  const shifted = (tensor: string, by: number) => (path: string) =>
    add(join(path, "golden.safetensors"), tensor, float(by));

  test.each([
    ["prompt0.logits", /^ {2}logits differ by 0\.00\d+, allowed 0\.0002$/, /passed|FAILED: logits 1\.0e-3/],
    ["prompt1.layers.1.hidden", /^ {2}hidden differ by 0\.00\d+, allowed 0\.0002$/, /hidden states 1\.0e-3/],
    ["prompt1.layers.0.attn_out", /^ {2}attention differ by/, /hidden states 1\.0e-3/],
    [
      "prompt0.layers.0.router_logits",
      /^ {2}routerLogits differ by 0\.00\d+, allowed 0\.0001$/,
      /router logits 1\.0e-3/,
    ],
    ["prompt0.layers.0.topk_weights", /^ {2}topkWeights differ by/, /top-k weights 1\.0e-3/],
    ["prompt1.greedy_logits", /^ {2}greedyLogits differ by/, /logits 1\.0e-3/],
  ])("%s", async (tensor, message, figure) => {
    const { lines, passed, failed } = await checked(folder(shifted(tensor, 1e-3)));
    expect(lines[0]).toMatch(/^granitemoe on wasm: FAILED: logits /);
    expect(lines[0]).toMatch(figure);
    expect(
      lines.find((line) => message.test(line)),
      lines.join("\n"),
    ).toBeDefined();
    expect([passed, failed, lines.at(-1)]).toEqual([0, 1, "0 passed, 1 failed"]);
  });

  test("less than the tolerance passes", async () => {
    const { passed, failed } = await checked(folder(shifted("prompt0.logits", 1e-4)));
    expect([passed, failed]).toEqual([1, 0]);
  });

  test("a chosen expert and a greedy token", async () => {
    const flipped = folder((path) => {
      add(join(path, "golden.safetensors"), "prompt0.layers.0.topk_indices", (view, at) =>
        view.setInt32(at, view.getInt32(at, true) + 1, true),
      );
      const golden = JSON.parse(readFileSync(join(path, "golden.json"), "utf8"));
      golden.prompts[1].greedy_ids[15] += 1;
      writeFileSync(join(path, "golden.json"), JSON.stringify(golden));
    });
    const { lines } = await checked(flipped);
    expect(lines[0]).toMatch(/FAILED: .*; 2 prompts, 32 greedy tokens, 3 ids differ$/);
    expect(lines.slice(1, -1)).toEqual(["  1 topkIndices differ", "  1 greedy differ", "  1 greedyCached differ"]);
  });

  test("a weight, and a setting", async () => {
    const weight = folder((path) =>
      add(join(path, "model.safetensors"), "model.layers.0.self_attn.o_proj.weight", float(0.3)),
    );
    expect((await checked(weight)).failed).toBe(1);
    const setting = folder((path) => {
      const config = JSON.parse(readFileSync(join(path, "config.json"), "utf8"));
      writeFileSync(join(path, "config.json"), JSON.stringify({ ...config, residual_multiplier: 1 }));
    });
    expect((await checked(setting)).lines[0]).toMatch(/^granitemoe on wasm: FAILED: logits /);
  });

  test("a number that is none", async () => {
    const { lines } = await checked(folder(shifted("prompt0.final_norm", Number.NaN)));
    expect(lines[0]).toMatch(/FAILED: .*hidden states NaN/);
  });
});

describe("a folder", () => {
  test("may be a checkpoint itself", async () => {
    const { lines } = await checked(join(fixtures, "mixtral"));
    expect(lines.length).toBe(2);
    expect(lines[0]).toMatch(/^mixtral on wasm: passed: /);
  });

  test.each<[string, (path: string) => void, RegExp]>([
    ["without golden.json", (path) => rmSync(join(path, "golden.json")), /FAILED: there is no golden\.json$/],
    ["without golden.safetensors", (path) => rmSync(join(path, "golden.safetensors")), /FAILED: .*recorded/],
    ["without weights", (path) => rmSync(join(path, "model.safetensors")), /FAILED: .* has no model\.safetensors/],
    [
      "with another model",
      (path) => writeFileSync(join(path, "config.json"), '{"model_type":"x"}'),
      /model_type is "x"/,
    ],
    ["with broken JSON", (path) => writeFileSync(join(path, "golden.json"), "{"), /golden\.json is not valid JSON/],
    [
      "without a tolerance",
      (path) => writeFileSync(join(path, "golden.json"), "{}"),
      /tolerance\.logits_max_abs is null/,
    ],
    [
      "without prompts",
      (path) => {
        const golden = JSON.parse(readFileSync(join(path, "golden.json"), "utf8"));
        writeFileSync(join(path, "golden.json"), JSON.stringify({ ...golden, prompts: [] }));
      },
      /there are no prompts/,
    ],
    [
      "with odd prompts",
      (path) => {
        const golden = JSON.parse(readFileSync(join(path, "golden.json"), "utf8"));
        writeFileSync(join(path, "golden.json"), JSON.stringify({ ...golden, prompts: [{ input_ids: [1] }] }));
      },
      /prompts\[0\]\.greedy_ids is no list of token ids/,
    ],
    [
      "with a cut file",
      (path) => {
        const file = join(path, "golden.safetensors");
        writeFileSync(file, readFileSync(file).subarray(0, 5000));
      },
      /FAILED: .*safetensors/,
    ],
  ])("%s is one failure with its reason; the others still run", async (_, change, message) => {
    const path = folder(change);
    cpSync(join(fixtures, "qwen3_moe"), join(path, "z"), { recursive: true });
    const { lines } = await checked(path);
    expect(lines[0]).toMatch(/^granitemoe on wasm: FAILED: /);
    expect(lines[0]).toMatch(message);
    expect(lines[1]).toMatch(/^z on wasm: passed: /);
    expect(lines.slice(2)).toEqual(["1 passed, 1 failed"]);
  });

  test("that is missing, a file or holds nothing of the kind is refused in words", async () => {
    await expect(checked(join(home, "nowhere"))).rejects.toThrow(/^there is no folder .*nowhere$/);
    await expect(checked(join(fixtures, "README.md"))).rejects.toThrow(/README\.md is a file; name the folder/);
    const empty = join(home, "empty");
    mkdirSync(join(empty, "inner"), { recursive: true });
    await expect(checked(empty)).rejects.toThrow(/has no checkpoint with recorded outputs/);
  });
});

test("several backends run one after the other; one that is not there fails with its reason", async () => {
  const path = join(fixtures, "qwen3_moe");
  const { lines } = await checked(path, ["reference", "wasm"]);
  expect(lines.map((line) => line.replace(/: logits.*/, ""))).toEqual([
    "qwen3_moe on reference: passed",
    "qwen3_moe on wasm: passed",
    "2 passed, 0 failed",
  ]);
  await expect(checked(path, ["cuda"])).rejects.toThrow(
    'there is no backend "cuda"; the backends are reference, wasm, wasm2, webgpu, tfjs',
  );
});

describe("as a program", () => {
  const run = (args: readonly string[], more: NodeJS.ProcessEnv = {}) => {
    const { INIT_CWD: _, ...env } = process.env;
    const program = [join(root, "tools", "golden.ts"), ...args];
    const options = { encoding: "utf8", cwd: fixtures, env: { ...env, ...more } } as const;
    const { status, stdout, stderr } = spawnSync(process.execPath, program, options);
    return { status, stdout, stderr };
  };

  test("it exits with 0 where all pass and with 1 otherwise", () => {
    const good = run(["qwen3_moe", "--backend", "wasm, reference"]);
    expect(good).toMatchObject({ status: 0, stderr: "" });
    expect(good.stdout).toMatch(
      /^qwen3_moe on wasm: passed: .*\nqwen3_moe on reference: passed: .*\n2 passed, 0 failed\n$/,
    );
    const bad = run([folder((path) => rmSync(join(path, "golden.json")))]);
    expect(bad).toMatchObject({ status: 1, stderr: "" });
    expect(bad.stdout).toMatch(/\n0 passed, 1 failed\n$/);
  });

  test("a backend without a device is a failure", () => {
    // A driver that is not there, whatever the machine has.
    const none = join(home, "none.json");
    const { status, stdout } = run(["qwen3_moe", "--backend", "webgpu"], {
      VK_DRIVER_FILES: none,
      VK_ICD_FILENAMES: none,
    });
    expect(stdout).toMatch(/^webgpu: not available: .*\n0 passed, 1 failed\n$/s);
    expect(status).toBe(1);
  });

  test("it says in one line what it needs", () => {
    expect(run([])).toMatchObject({
      status: 1,
      stdout: "",
      stderr:
        "golden: one folder is needed, found 0: npm run golden -- DIR [--backend reference,wasm,wasm2,webgpu,tfjs]\n",
    });
    expect(run(["a", "b"]).stderr).toMatch("found 2");
    expect(run(["qwen3_moe", "--backend", "cuda"]).stderr).toMatch(/^golden: there is no backend "cuda"; .*\n$/);
    expect(run(["nowhere"]).stderr).toMatch(/^golden: there is no folder .*nowhere\n$/);
  });
});
