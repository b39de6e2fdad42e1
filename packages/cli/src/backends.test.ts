// Every backend trains the model of `switchyard train` as the wasm backend does: the same losses, step by step.
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseResults } from "@switchyard/bench";
import { MissingPackageError, UnsupportedError } from "@switchyard/core";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { type BackendName, backendNames, openBackend } from "./backends.ts";
import { main } from "./main.ts";

const STEPS = 24;
const root = mkdtempSync(join(tmpdir(), "switchyard-backends-"));
afterAll(() => rmSync(root, { recursive: true }));

/** Bits per byte of every training step. */
async function losses(backend: BackendName): Promise<readonly number[]> {
  let out = "";
  let error = "";
  const streams = {
    out(text: string) {
      out += text;
    },
    error(text: string) {
      error += text;
    },
  };
  const args = [
    "--size",
    "tiny",
    "--steps",
    `${STEPS}`,
    "--router",
    "topK",
    "--out",
    root,
    "--name",
    backend,
    "--json",
  ];
  const code = await main(["train", join(root, "text.txt"), "--backend", backend, ...args], { streams });
  if (code !== 0) throw new Error(error);
  const [run] = parseResults(out).runs;
  return run?.training.bitsPerByte ?? [];
}

/** Why a backend cannot run here; undefined when it can. */
async function missing(name: BackendName): Promise<string | undefined> {
  try {
    (await openBackend(name, undefined)).close();
    return undefined;
  } catch (error) {
    if (!UnsupportedError.isInstance(error) && !MissingPackageError.isInstance(error)) throw error;
    if (process.env.SWITCHYARD_REQUIRE_GPU === "1") throw error;
    return error.message;
  }
}

const others = backendNames.filter((name) => name !== "wasm");
const absent = new Map<BackendName, string>();
for (const name of others) {
  const why = await missing(name);
  if (why !== undefined) {
    absent.set(name, why);
    console.warn(`the ${name} backend is not tested here: ${why}`);
  }
}

describe("training losses", () => {
  let expected: readonly number[];
  beforeAll(async () => {
    const words = ["switch", "yard", "expert", "router", "token", "gate", "train", "track", "signal", "engine"];
    let state = 7;
    const next = (): string => {
      state = (state * 1_103_515_245 + 12_345) % 2 ** 31;
      return words[Math.floor((state / 2 ** 31) * words.length)] ?? "";
    };
    const sentence = (): string => `${Array.from({ length: 8 }, next).join(" ")}.`;
    writeFileSync(join(root, "text.txt"), Array.from({ length: 300 }, sentence).join("\n"));
    expected = await losses("wasm");
    expect(expected).toHaveLength(STEPS);
    expect(expected.at(-1)).toBeLessThan((expected[0] ?? 0) / 1.5);
  }, 60_000);

  test.each(others.filter((name) => !absent.has(name)))(
    "%s: the first 20 steps within 1e-4 of wasm's, and finite to the end",
    async (name) => {
      const found = await losses(name);
      expect(found).toHaveLength(STEPS);
      const off = found.slice(0, 20).map((loss, i) => Math.abs(loss / (expected[i] ?? Number.NaN) - 1));
      expect(Math.max(...off)).toBeLessThan(1e-4);
      expect(found.every(Number.isFinite)).toBe(true);
    },
    240_000,
  );
});

test("threads are for wasm", async () => {
  await expect(openBackend("webgpu", 2)).rejects.toThrow(/--threads: the webgpu backend/);
});
