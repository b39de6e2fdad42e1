// OLMoE: a checkpoint recorded with Hugging Face Transformers, our own export of it, and refusals.
import { mkdtemp, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import type { Engine, Json, Tree } from "@switchyard/core";
import { topK } from "@switchyard/routers/top-k";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { openCheckpoint, readCheckpoint } from "../checkpoint.ts";
import { fileSource } from "../files.ts";
import { generate } from "../generate.ts";
import type { Checkpoint } from "../model.ts";
import { loudModel, makeEngine, readAll, smallConfig } from "../models.test-util.ts";
import { loadModel, saveModel } from "../pretrained.ts";
import { bytesSource } from "../safetensors.ts";
import type { Transformer } from "../transformer.ts";
import { readFloats } from "../weights.ts";
import { olmoe, olmoeRefusal } from "./olmoe.ts";

const fixture = fileURLToPath(new URL("../../test/fixtures/olmoe", import.meta.url));
interface Golden {
  readonly prompts: readonly {
    readonly input_ids: number[];
    readonly greedy_ids: number[];
    readonly argmax_ids: number[];
  }[];
}

let on: Engine;
let model: Transformer;
let golden: Golden;
let recorded: Checkpoint;
let folder: string;
beforeAll(async () => {
  on = makeEngine();
  ({ model } = await loadModel(fixture, { engine: on }));
  golden = JSON.parse(await readFile(join(fixture, "golden.json"), "utf8"));
  recorded = await readCheckpoint(async (name) => {
    if (name === "config.json") return bytesSource(name, new TextEncoder().encode("{}"));
    return name === "model.safetensors" ? fileSource(join(fixture, "golden.safetensors")) : undefined;
  }, "golden");
  folder = await mkdtemp(join(tmpdir(), "switchyard-olmoe-"));
});
afterAll(() => rm(folder, { recursive: true, force: true }));

const worst = (a: ArrayLike<number>, b: ArrayLike<number>): number => {
  expect(a.length).toBe(b.length);
  return Array.from(a).reduce((most, x, i) => Math.max(most, Math.abs(x - (b[i] ?? Number.NaN))), 0);
};
const golden32 = (name: string): Promise<Float32Array> => readFloats(recorded, name, recorded.stored(name).shape);

describe("a recorded checkpoint", () => {
  it.each([0, 1])("gives the recorded logits and routing: prompt %i", async (i) => {
    const ids = golden.prompts[i]?.input_ids ?? [];
    const { logits, routed } = model.forward(model.params, on.tensor(Int32Array.from(ids), [1, ids.length]));
    const found = await logits.data();
    expect(worst(found, await golden32(`prompt${i}.logits`))).toBeLessThan(2e-4);
    const argmax = ids.map((_, t) => {
      const row = Array.from(found.slice(t * 256, (t + 1) * 256));
      return row.indexOf(Math.max(...row));
    });
    expect(argmax).toEqual(golden.prompts[i]?.argmax_ids);
    for (const [layer, { plan, logits: scores }] of routed.entries()) {
      if (plan.kind !== "sparse" || !scores) throw new Error("expected a sparse plan with logits");
      expect(worst(await scores.data(), await golden32(`prompt${i}.layers.${layer}.router_logits`))).toBeLessThan(1e-4);
      expect(worst(await plan.weights.data(), await golden32(`prompt${i}.layers.${layer}.topk_weights`))).toBeLessThan(
        2e-5,
      );
      const chosen = await recorded.read(`prompt${i}.layers.${layer}.topk_indices`);
      expect(Array.from(await plan.experts.data())).toEqual(Array.from(new Int32Array(chosen.buffer)));
    }
  });

  it.each([0, 1])("continues as recorded, with and without a cache: prompt %i", async (i) => {
    const { input_ids: prompt = [], greedy_ids: expected = [] } = golden.prompts[i] ?? {};
    for (const cache of [true, false]) {
      const ids: number[] = [];
      for await (const { id } of generate(model, { prompt, maxNew: 16, temperature: 0, cache })) ids.push(id);
      expect(ids).toEqual(expected);
    }
  });
});

describe("export", () => {
  it("writes the names and shapes of the Hub, and the bytes that were read", async () => {
    const target = join(folder, "again");
    expect(await saveModel(model, target)).toBe("olmoe");
    const [before, after] = [await openCheckpoint(fixture), await openCheckpoint(target)];
    expect([...after.names].sort()).toEqual([...before.names].sort());
    for (const name of before.names) {
      expect(after.stored(name)).toEqual(before.stored(name));
      expect(await after.read(name)).toEqual(await before.read(name));
    }
    const { transformers_version: _, ...config } = before.config;
    // Ids of special tokens belong to the tokenizer, and there is none here.
    const own = { bos_token_id: null, eos_token_id: null, pad_token_id: null, router_z_loss_coef: 0.001 };
    expect(after.config).toEqual({ ...config, ...own });
    await Promise.all([before.close(), after.close()]);
  });

  it.each([
    ["separate embeddings", {}],
    [
      "tied embeddings, clipped, renormalised",
      { tieEmbeddings: true, clipQkv: 0.5, router: topK({ k: 3, balance: 0.5, zLoss: 0 }) },
    ],
  ])("gives the same logits after reloading, bit for bit: %s", async (name, change) => {
    const config = {
      ...smallConfig,
      headSize: 2,
      qkNorm: "projection",
      router: topK({ k: 2, order: "softmax-topk" }),
    } as const;
    const original = loudModel(on, { ...config, ...change });
    await saveModel(original, join(folder, name));
    const { model: reloaded } = await loadModel(join(folder, name), { engine: on });
    const { router: a, ...rest } = original.config;
    const { router: b, ...same } = reloaded.config;
    expect(same).toEqual(rest);
    expect(b.options).toEqual(a.options);
    const ids = on.tensor(Int32Array.of(1, 2, 3, 4, 5, 6), [2, 3]);
    const run = async (m: Transformer) => Array.from(await m.forward(m.params, ids).logits.data());
    expect(await run(reloaded)).toEqual(await run(original));
    expect(await readAll(reloaded.params as Tree)).toEqual(await readAll(original.params as Tree));
  });

  const form = { ...smallConfig, headSize: 2, qkNorm: "projection" as const };
  it.each([
    [{ ...form, router: topK({ k: 1, order: "sigmoid" }) }, /order sigmoid/],
    [{ ...form, router: topK({ k: 2, topP: 0.5 }) }, /topP/],
    [{ ...form, router: topK({ k: 2, bias: true }) }, /bias/],
    [{ ...form, router: topK({ k: 2 }), qkNorm: "head" as const }, /train with qkNorm: "projection"/],
    [{ ...form, router: topK({ k: 2 }), headSize: 4 }, /heads \(4\) times headSize \(4\) is not width \(8\)/],
    [{ ...form, router: topK({ k: 2 }), sharedExperts: 1 }, /shared experts/],
    [form, /its router is plainTopK/],
  ])("names the reason why a model has another form", async (config, reason) => {
    const other = loudModel(on, config);
    expect(olmoeRefusal(other)).toMatch(reason);
    await expect(saveModel(other, join(folder, "refused"), { layout: "olmoe" })).rejects.toThrow(
      /cannot be saved in the OLMoE layout/,
    );
    await expect(openCheckpoint(join(folder, "refused"))).rejects.toThrow(/no config.json/);
  });
});

describe("reading", () => {
  /** The fixture with another config, and the error that reading it gives. */
  const readWith = async (change: Record<string, Json>, limit?: number): Promise<Transformer> => {
    const checkpoint = await openCheckpoint(fixture);
    try {
      const config = { ...checkpoint.config, ...change };
      return await olmoe.read({ ...checkpoint, config }, on, limit === undefined ? {} : { memory: limit });
    } finally {
      await checkpoint.close();
    }
  };
  it.each<[Record<string, Json>, RegExp]>([
    [{ hidden_act: "gelu" }, /"hidden_act" is "\\"gelu\\"", which this package cannot run; only "silu"/],
    [{ attention_bias: true }, /"attention_bias"/],
    [{ rope_scaling: { type: "yarn" } }, /"rope_scaling"/],
    [{ rope_parameters: { rope_theta: 7000, rope_type: "yarn" } }, /"rope_type"/],
    [{ num_hidden_layers: "2" }, /"num_hidden_layers" is .*expected a whole number from 1/],
    [{ num_experts: 9 }, /no tensor "model.layers.0.mlp.experts.8.gate_proj.weight"/],
    [{ num_experts: 7 }, /is \[8,48\], but config.json asks for \[7,48\]|does not call for/],
    [{ num_hidden_layers: 1 }, /holds \d+ tensors that its config.json does not call for/],
    [{ intermediate_size: 23 }, /is \[24,48\], but config.json asks for \[23,48\]/],
    [{ vocab_size: 300 }, /"model.embed_tokens.weight" is \[256,48\], but config.json asks for \[300,48\]/],
  ])("refuses %o and frees what was read", async (change, message) => {
    const live = on.live();
    await expect(readWith(change)).rejects.toThrow(message);
    expect(on.live()).toBe(live);
  });

  it("takes the rope settings of newer versions and the defaults of absent keys", async () => {
    const newer = await readWith({ rope_theta: null, rope_parameters: { rope_theta: 7000, rope_type: "default" } });
    expect(newer.config.ropeTheta).toBe(7000);
    expect((await readWith({ rms_norm_eps: null })).config.normEps).toBe(1e-5);
  });

  it("respects a memory limit", async () => {
    await expect(readWith({}, 1000)).rejects.toThrow(/needs \d+ bytes in f32, but the limit is 1000/);
  });
});
