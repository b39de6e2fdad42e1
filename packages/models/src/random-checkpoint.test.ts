import { createHash } from "node:crypto";
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { CheckpointError, dispose, type Json } from "@switchyard/core";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { architectures } from "./architectures/families.ts";
import { mixtral } from "./architectures/mixtral.ts";
import { openCheckpoint } from "./checkpoint.ts";
import { makeEngine } from "./models.test-util.ts";
import { loadModel } from "./pretrained.ts";
import { type RandomCheckpointOptions, randomCheckpoint, randomTensors } from "./random-checkpoint.ts";
import { type TensorSource, toFloat32 } from "./safetensors.ts";
import type { Description } from "./source.ts";
import { readPiece, widen } from "./stored-matrix.ts";

type Config = { readonly [key: string]: Json };
const fixtures = fileURLToPath(new URL("../test/fixtures/", import.meta.url));
const configOf = (name: string): Config => JSON.parse(readFileSync(join(fixtures, name, "config.json"), "utf8"));
const folders = readdirSync(fixtures).filter((name) => existsSync(join(fixtures, name, "config.json")));
const architectureOf = (config: Config) => {
  const found = architectures.find(({ modelTypes }) => modelTypes.includes(String(config.model_type)));
  if (!found) throw new Error(`no architecture for ${config.model_type}`);
  return found;
};

let folder: string;
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), "random-checkpoint-"));
});
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const bytesOf = async (tensor: TensorSource): Promise<Uint8Array> => {
  const bytes = await tensor.bytes();
  if (!(bytes instanceof Uint8Array)) throw new Error(`${tensor.name} comes in pieces`);
  return bytes;
};
const hashes = (path: string): Record<string, string> =>
  Object.fromEntries(
    readdirSync(path)
      .sort()
      .map((name) => [
        name,
        createHash("sha256")
          .update(readFileSync(join(path, name)))
          .digest("hex"),
      ]),
  );

const packed = (bits: number, more: object) =>
  ({
    quant_method: "compressed-tensors",
    format: "pack-quantized",
    config_groups: { group_0: { targets: ["Linear"], weights: { num_bits: bits, ...more } } },
  }) as const;

describe("randomCheckpoint", () => {
  it.each(folders)("has the tensors of a real checkpoint of %s, and runs", async (name) => {
    const config = configOf(name);
    const path = join(folder, name);
    const real = await openCheckpoint(join(fixtures, name));
    const floats = new Set(real.names.map((one) => real.stored(one).dtype));
    const dtype = floats.has("F32") && !floats.has("BF16") ? "F32" : "BF16";
    const saved = await randomCheckpoint(path, { config, architecture: architectureOf(config) }, { dtype });
    const made = await openCheckpoint(path);
    const table = (checkpoint: typeof made) =>
      Object.fromEntries([...checkpoint.names].sort().map((one) => [one, checkpoint.stored(one)]));
    const expected = table(real);
    // One recorded checkpoint stores its router in F32 beside BF16; every other type is as recorded.
    const shapes = (of: typeof expected) =>
      Object.fromEntries(Object.entries(of).map(([key, { shape }]) => [key, shape]));
    expect(shapes(table(made))).toEqual(shapes(expected));
    if (!floats.has("F16")) expect(table(made)).toEqual(expected);
    expect(saved.tensors).toBe(made.names.length);
    expect(saved.bytes).toBe(made.names.reduce((n, one) => n + made.stored(one).bytes, 0));
    expect(made.config).toEqual(config);
    await Promise.all([real.close(), made.close()]);

    const engine = makeEngine();
    const { model, close } = await loadModel(path, { engine });
    const logits = await model.step(engine.tensor(Int32Array.of(1, 5, 2, 9), [1, 4]));
    const values = await logits.data();
    expect(values.every(Number.isFinite)).toBe(true);
    expect(new Set(values).size).toBeGreaterThan(values.length / 2);
    dispose(logits);
    await close();
  });

  it("gives the same bytes for the same seed, others for another, whatever the shards", async () => {
    const config = configOf("mixtral");
    const write = async (name: string, options: RandomCheckpointOptions): Promise<Record<string, string>> => {
      await randomCheckpoint(join(folder, name), { config, architecture: mixtral }, options);
      return hashes(join(folder, name));
    };
    const a = await write("a", { seed: 7 });
    expect(Object.keys(a)).toEqual(["config.json", "model.safetensors"]);
    expect(await write("b", { seed: 7 })).toEqual(a);
    expect((await write("c", { seed: 8 }))["model.safetensors"]).not.toBe(a["model.safetensors"]);
    expect((await write("d", { seed: 7 + 2 ** 32 }))["model.safetensors"]).not.toBe(a["model.safetensors"]);

    const sharded = await randomCheckpoint(
      join(folder, "b"),
      { config, architecture: mixtral },
      { seed: 7, shardBytes: 20_000 },
    );
    expect(sharded.files.length).toBeGreaterThan(2);
    expect(readdirSync(join(folder, "b")).sort()).toEqual(
      ["config.json", "model.safetensors.index.json", ...sharded.files].sort(),
    );
    const [one, many] = [await openCheckpoint(join(folder, "a")), await openCheckpoint(join(folder, "b"))];
    expect(many.names).toEqual(one.names);
    for (const name of one.names) expect(await many.read(name)).toEqual(await one.read(name));
    for (const file of sharded.files) {
      const size = readFileSync(join(folder, "b", file)).length;
      expect(size).toBeLessThan(20_000 + 20_000);
    }
    const index = JSON.parse(readFileSync(join(folder, "b", "model.safetensors.index.json"), "utf8"));
    expect(index.metadata.total_size).toBe(sharded.bytes);
    expect(Object.keys(index.weight_map)).toHaveLength(sharded.tensors);
    await Promise.all([one.close(), many.close()]);
  });

  /** One matrix, one norm, and biases that a router keeps. */
  const describing = (shape: readonly number[], more = {}): Description => {
    const whole = (name: string, own: readonly number[]) =>
      ({ kind: "whole", shape: own, pieces: [{ name, shape: own, ...more }] }) as const;
    const { blueprint } = mixtral.describe({
      config: configOf("mixtral"),
      names: Array(999).fill(""),
      stored: () => ({ shape: [], dtype: "", bytes: 0 }),
    });
    return {
      blueprint,
      sources: new Map([
        ["layers.0.attention.q", whole("q.weight", shape)],
        ["layers.0.attentionNorm", whole("norm.weight", [20_000])],
        ["layers.0.moe.buffers.bias", whole("correction", [20_000])],
      ]),
    };
  };
  const statistics = (x: Float32Array): { mean: number; deviation: number; fourth: number } => {
    const mean = x.reduce((a, b) => a + b, 0) / x.length;
    const power = (n: number): number => x.reduce((a, b) => a + (b - mean) ** n, 0) / x.length;
    return { mean, deviation: Math.sqrt(power(2)), fourth: power(4) / power(2) ** 2 };
  };

  it.each(["F32", "BF16", "F16"] as const)("draws normal numbers, norms around 1: %s", async (dtype) => {
    const tensors = randomTensors({}, describing([300, 400]), { dtype, scale: 0.05 });
    const values = await Promise.all(tensors.map(async (one) => toFloat32(await bytesOf(one), one.dtype, one.name)));
    expect(tensors.map((one) => one.dtype)).toEqual([dtype, dtype, "F32"]);
    const [q, norm, correction] = values.map(statistics);
    expect(q?.mean).toBeCloseTo(0, 3);
    expect(q?.deviation).toBeCloseTo(0.05, 3);
    expect(q?.fourth).toBeCloseTo(3, 0);
    expect(norm?.mean).toBeCloseTo(1, 2);
    expect(norm?.deviation).toBeCloseTo(0.05, 2);
    expect(correction?.deviation).toBeCloseTo(0.05, 2);
    // Neighbours, rows and tensors do not repeat each other.
    const [a, b] = values.slice(1) as [Float32Array, Float32Array];
    const together = a.reduce((n, x, i) => n + (x - 1) * (b[i] as number), 0) / a.length / 0.05 ** 2;
    expect(Math.abs(together)).toBeLessThan(0.04);
    const first = values[0] as Float32Array;
    const shifted = first.slice(1).reduce((n, x, i) => n + x * (first[i] as number), 0) / first.length / 0.05 ** 2;
    expect(Math.abs(shifted)).toBeLessThan(0.02);
  });

  it.each([
    ["fp8", { quant_method: "fp8", weight_block_size: [64, 128] }, [300, 400], {}],
    ["mxfp4", { quant_method: "mxfp4" }, [64, 320], { index: 1, of: 8, transposed: true }],
    ["int8", packed(8, { strategy: "channel" }), [300, 401], {}],
    ["int4", packed(4, { group_size: 32 }), [300, 416], {}],
  ] as const)("quantised matrices stand for such numbers: %s", async (_, quantization, shape, more) => {
    const config = { quantization_config: quantization };
    const tensors = randomTensors(config, describing(shape, more), { scale: 0.05 });
    const bytes = new Map<string, Uint8Array>();
    for (const one of tensors) bytes.set(one.name, await bytesOf(one));
    const stored = new Map(
      tensors.map(({ name, dtype, shape: own }) => [name, { dtype, shape: own, bytes: bytes.get(name)?.length ?? 0 }]),
    );
    const host = await readPiece(
      {
        config,
        names: [...stored.keys()],
        stored: (name) => stored.get(name) ?? { dtype: "", shape: [], bytes: 0 },
        read: async (name, range = [0, bytes.get(name)?.length ?? 0]) =>
          (bytes.get(name) ?? new Uint8Array()).slice(...range),
      },
      { name: "q.weight", shape, ...more },
    );
    expect(host.kind).toBe("codes");
    const { mean, deviation } = statistics(widen(host));
    expect(mean).toBeCloseTo(0, 2);
    expect(deviation).toBeGreaterThan(0.04);
    expect(deviation).toBeLessThan(0.065);
  });

  it("refuses what it cannot write, and leaves the folder as it was", async () => {
    const config = configOf("mixtral");
    const path = join(folder, "refused");
    const write = (changed: Config, options: RandomCheckpointOptions = {}) =>
      randomCheckpoint(path, { config: changed, architecture: mixtral }, options);
    await expect(write({ ...config, model_type: "bert" })).rejects.toThrow(
      /model_type is "bert", the architecture is for mixtral/,
    );
    await expect(write({ ...config, hidden_size: 47 })).rejects.toThrow(CheckpointError);
    await expect(write(config, { scale: 0 })).rejects.toThrow(/scale is 0/);
    await expect(write(config, { seed: 0.5 })).rejects.toThrow(/seed is 0.5/);
    await expect(write(config, { shardBytes: 0 })).rejects.toThrow(/shardBytes is 0/);
    for (const wrong of [{ quant_method: "awq" }, { quant_method: "fp8", weight_block_size: null }, packed(6, {})]) {
      await expect(write({ ...config, quantization_config: wrong })).rejects.toThrow(
        new RegExp(`quant_method "${wrong.quant_method}".*; random weights are written as floats`),
      );
    }
    expect(existsSync(path)).toBe(false);
    expect(() => randomTensors({ quantization_config: packed(4, { group_size: 32 }) }, describing([4, 48]))).toThrow(
      /rows of 48 numbers, which groups of 32 do not divide/,
    );
    expect(() =>
      randomTensors({ quantization_config: { quant_method: "mxfp4" } }, describing([4, 33], { index: 0, of: 2 })),
    ).toThrow(/needs a multiple of 32/);
    const twice = describing([4, 4]);
    const wrong = new Map(twice.sources).set("head", {
      kind: "whole",
      shape: [5, 4],
      pieces: [{ name: "q.weight", shape: [5, 4] }],
    });
    expect(() => randomTensors({}, { ...twice, sources: wrong })).toThrow(
      /"q.weight" is \[4,4\] for .* the description is wrong/,
    );

    await write(config);
    writeFileSync(join(path, "notes.txt"), "mine");
    writeFileSync(join(path, "tokenizer.json"), "{}");
    const before = hashes(path);
    await expect(write({ ...config, hidden_size: 47 })).rejects.toThrow();
    expect(hashes(path)).toEqual(before);
    await write(config, { seed: 2 });
    expect(readdirSync(path).sort()).toEqual(["config.json", "model.safetensors", "notes.txt"]);
  });
});
