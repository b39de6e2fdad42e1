// npm run golden -- DIR [--backend NAMES]: checkpoints with recorded outputs, each loaded as a user loads it and compared in every number
// that was recorded, within the tolerances of its golden.json: hidden states, router logits, weights and logits; chosen experts and greedy
// tokens exactly. DIR is such a folder or holds some. One line per folder and backend with the largest differences, then `N passed, N
// failed`; the exit code is 1 when something failed. A backend that is not there counts as failed: it was asked for.
import { existsSync, readdirSync, statSync } from "node:fs";
import { basename, join, resolve } from "node:path";
import { parseArgs } from "node:util";
import { type Backend, type Engine, engine } from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import { tfjs } from "@switchyard/kernels/tfjs";
import { wasm } from "@switchyard/kernels/wasm";
import { webgpu } from "@switchyard/kernels/webgpu";
import { loadModel } from "@switchyard/models";
import { compareGolden, type Golden, type GoldenReport, openGolden } from "../packages/models/src/golden.test-util.ts";
import { useSoftwareDriver } from "./software-gpu.ts";

interface Opened {
  readonly engine: Engine;
  close(): void;
}

function opened<H>(backend: Backend<H>): Opened {
  return { engine: engine(backend), close: () => backend.dispose?.() };
}

/** The backends by name; each throws where it is not to be had. */
export const backends: Readonly<Record<string, () => Promise<Opened>>> = {
  reference: async () => opened(cpu()),
  wasm: async () => opened(await wasm({ threads: 1 })),
  wasm2: async () => opened(await wasm({ threads: 2 })),
  webgpu: async () => {
    useSoftwareDriver();
    return opened(await webgpu());
  },
  tfjs: async () => {
    const tf = await import("@tensorflow/tfjs-core");
    await import("@tensorflow/tfjs-backend-cpu");
    return opened(await tfjs({ tf, backend: "cpu" }));
  },
};

export interface GoldenOptions {
  /** Names of `backends`. */
  readonly backends: readonly string[];
  say(line: string): void;
}

/** Compares all folders in `folder`, or `folder` itself. Throws an Error when there is nothing to compare. */
export async function checkGolden(
  folder: string,
  { backends: names, say }: GoldenOptions,
): Promise<{ passed: number; failed: number }> {
  const folders = foldersOf(folder);
  const total = { passed: 0, failed: 0 };
  const count = (good: boolean, line: string, more: readonly string[] = []): void => {
    total[good ? "passed" : "failed"]++;
    say(line);
    for (const one of more) say(`  ${one}`);
  };
  for (const name of names) {
    const open = Object.hasOwn(backends, name) ? backends[name] : undefined;
    if (!open) throw new Error(`there is no backend "${name}"; the backends are ${Object.keys(backends).join(", ")}`);
    let backend: Opened;
    try {
      backend = await open();
    } catch (error) {
      count(false, `${name}: not available: ${words(error)}`);
      continue;
    }
    try {
      for (const one of folders) {
        const about = `${basename(one)} on ${name}`;
        try {
          const report = await check(one, backend.engine);
          const good = report.failures.length === 0;
          count(good, `${about}: ${good ? "passed" : "FAILED"}: ${summary(report)}`, report.failures);
        } catch (error) {
          count(false, `${about}: FAILED: ${words(error)}`);
        }
      }
    } finally {
      backend.close();
    }
  }
  say(`${total.passed} passed, ${total.failed} failed`);
  return total;
}

const isGolden = (folder: string): boolean =>
  ["golden.json", "golden.safetensors", "config.json"].some((name) => existsSync(join(folder, name)));

/** Folders with any file of the layout: what lacks the others is a failure, not an absence. */
function foldersOf(folder: string): string[] {
  const status = statSync(folder, { throwIfNoEntry: false });
  if (!status) throw new Error(`there is no folder ${folder}`);
  if (!status.isDirectory()) throw new Error(`${folder} is a file; name the folder that it lies in`);
  if (isGolden(folder)) return [folder];
  const found = readdirSync(folder)
    .sort()
    .map((name) => join(folder, name))
    .filter((path) => statSync(path, { throwIfNoEntry: false })?.isDirectory() && isGolden(path));
  if (found.length === 0) {
    throw new Error(`${folder} has no checkpoint with recorded outputs: folders with config.json and golden.json`);
  }
  return found;
}

async function check(folder: string, on: Engine): Promise<GoldenReport & { readonly prompts: number }> {
  const held = on.live();
  if (!existsSync(join(folder, "golden.json"))) throw new Error("there is no golden.json");
  const golden = await openGolden(folder);
  try {
    checkForm(golden.golden);
    const { model, close } = await loadModel(folder, { engine: on });
    let report: GoldenReport;
    try {
      report = await compareGolden(golden, model);
    } finally {
      await close();
    }
    const left = on.live() - held;
    const leak = left === 0 ? [] : [`${left} tensors were not freed`];
    return { ...report, failures: [...report.failures, ...leak], prompts: golden.golden.prompts.length };
  } finally {
    await golden.close();
  }
}

/** Throws an Error that says what golden.json lacks. */
function checkForm({ tolerance, moe_layers, prompts }: Partial<Golden>): void {
  const ids = (x: unknown): boolean => Array.isArray(x) && x.length > 0 && x.every((id) => Number.isInteger(id));
  for (const name of ["logits_max_abs", "hidden_max_abs", "router_logits_max_abs", "topk_weights_max_abs"] as const) {
    const bound = tolerance?.[name];
    if (!(typeof bound === "number" && bound >= 0)) {
      throw new Error(`golden.json: tolerance.${name} is ${JSON.stringify(bound ?? null)}; expected a number from 0`);
    }
  }
  if (!Array.isArray(moe_layers)) throw new Error("golden.json: moe_layers is no list of layers");
  if (!Array.isArray(prompts) || prompts.length === 0) throw new Error("golden.json: there are no prompts");
  for (const [i, prompt] of prompts.entries()) {
    for (const name of ["input_ids", "greedy_ids", "argmax_ids"] as const) {
      if (!ids(prompt?.[name])) throw new Error(`golden.json: prompts[${i}].${name} is no list of token ids`);
    }
  }
}

function summary({ largest, wrongIds, compared, prompts }: GoldenReport & { readonly prompts: number }): string {
  const most = (...kinds: readonly (keyof GoldenReport["largest"])[]): string => {
    const all = kinds.map((kind) => largest[kind]);
    return (all.some(Number.isNaN) ? Number.NaN : Math.max(...all)).toExponential(1);
  };
  const hidden = most("embed", "attention", "moeInput", "moeOutput", "hidden", "finalNorm");
  const wrong = Object.values(wrongIds).reduce((sum, n) => sum + n, 0);
  return (
    `logits ${most("logits", "forwardLogits", "greedyLogits", "cachedLogits")}, hidden states ${hidden}, router logits ` +
    `${most("routerLogits")}, top-k weights ${most("topkWeights")}; ${prompts} prompts, ${compared.greedy} greedy tokens, ` +
    (wrong === 0 ? "all ids equal" : `${wrong} ids differ`)
  );
}

const words = (error: unknown): string => (error instanceof Error ? error.message : String(error));

async function main(args: readonly string[]): Promise<number> {
  const { values, positionals } = parseArgs({
    args: [...args],
    allowPositionals: true,
    options: { backend: { type: "string", default: "wasm" } },
  });
  const [folder, ...more] = positionals;
  if (folder === undefined || more.length > 0) {
    throw new Error(
      `one folder is needed, found ${positionals.length}: npm run golden -- DIR [--backend ${Object.keys(backends).join(",")}]`,
    );
  }
  // npm starts scripts in the root; INIT_CWD is where it was called.
  const path = resolve(process.env.INIT_CWD ?? process.cwd(), folder);
  const names = values.backend.split(",").map((name) => name.trim());
  const { failed } = await checkGolden(path, { backends: names, say: (line) => console.log(line) });
  return failed > 0 ? 1 : 0;
}

if (process.argv[1] === import.meta.filename) {
  main(process.argv.slice(2)).then(
    (code) => {
      process.exitCode = code;
    },
    (error) => {
      console.error(`golden: ${words(error)}`);
      process.exitCode = 1;
    },
  );
}
