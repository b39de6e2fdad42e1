// Both files of a model hold the same numbers: read with a GGUF reader written from the format's description, and as a checkpoint.
import { mkdtemp, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { engine } from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import { loadModel, openCheckpoint, toFloat32 } from "@switchyard/models";
import { afterAll, beforeAll, expect, it } from "vitest";
import { type ModelSizes, type Twins, type Weights, writeTwins } from "./twins.ts";

const sizes: ModelSizes = {
  layers: 2,
  width: 64,
  heads: 4,
  kvHeads: 2,
  headSize: 16,
  experts: 3,
  k: 2,
  hidden: 32,
  vocabulary: 300,
  context: 64,
};

interface Stored {
  readonly shape: readonly number[];
  /** 0: f32, 8: q8_0. */
  readonly type: number;
  readonly values: Float32Array;
}

function readGguf(bytes: Buffer): { readonly keys: Map<string, unknown>; readonly tensors: Map<string, Stored> } {
  let at = 0;
  const take = (n: number): Buffer => {
    at += n;
    return bytes.subarray(at - n, at);
  };
  const u32 = (): number => take(4).readUInt32LE();
  const u64 = (): number => Number(take(8).readBigUInt64LE());
  const text = (): string => take(u64()).toString("utf8");
  const value = (type: number): unknown => {
    if (type === 4) return u32();
    if (type === 5) return take(4).readInt32LE();
    if (type === 6) return take(4).readFloatLE();
    if (type === 8) return text();
    if (type !== 9) throw new Error(`value type ${type}`);
    const item = u32();
    return Array.from({ length: u64() }, () => value(item));
  };
  expect(take(4).toString("latin1")).toBe("GGUF");
  expect(u32()).toBe(3);
  const [count, pairs] = [u64(), u64()];
  const keys = new Map(Array.from({ length: pairs }, () => [text(), value(u32())] as const));
  const infos = Array.from({ length: count }, () => {
    const name = text();
    const shape = Array.from({ length: u32() }, u64).reverse();
    return { name, shape, type: u32(), offset: u64() };
  });
  const data = Math.ceil(at / 32) * 32;
  const tensors = new Map<string, Stored>();
  for (const { name, shape, type, offset } of infos) {
    at = data + offset;
    const values = new Float32Array(shape.reduce((n, d) => n * d, 1));
    for (let i = 0; i < values.length; ) {
      if (type === 0) values[i++] = take(4).readFloatLE();
      else {
        const [scale = 0] = toFloat32(Uint8Array.from(take(2)), "F16", name);
        for (let j = 0; j < 32; j++) values[i++] = take(1).readInt8() * scale;
      }
    }
    tensors.set(name, { shape, type, values });
  }
  expect(at).toBeLessThanOrEqual(bytes.length);
  return { keys, tensors };
}

let folder: string;
let twins: Readonly<Record<Weights, Twins>>;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), "switchyard-twins-"));
  twins = await writeTwins(folder, sizes);
});
afterAll(() => rm(folder, { recursive: true, force: true }));

/** A matrix of the checkpoint, int8 ones times their scales. */
async function stored(checkpoint: string, name: string): Promise<Float32Array> {
  const open = await openCheckpoint(checkpoint);
  try {
    const { dtype, shape } = open.stored(name);
    const bytes = await open.read(name);
    if (dtype !== "I8") return toFloat32(bytes, dtype, name);
    const scales = toFloat32(await open.read(`${name}_scale`), "F16", name);
    expect(scales.length).toBe(((shape[0] ?? 0) * (shape[1] ?? 0)) / 32);
    return Float32Array.from(bytes, (code, i) => ((code << 24) >> 24) * (scales[Math.floor(i / 32)] as number));
  } finally {
    await open.close();
  }
}

it.each(["f32", "int8"] as const)("holds the same %s numbers in both files", async (weights) => {
  const { checkpoint, gguf } = twins[weights];
  const { keys, tensors } = readGguf(await readFile(gguf));
  expect(keys.get("general.architecture")).toBe("qwen3moe");
  expect(keys.get("qwen3moe.expert_used_count")).toBe(2);
  expect((keys.get("tokenizer.ggml.tokens") as string[]).length).toBe(sizes.vocabulary);
  // Outside the layers 3; in a layer 9 and 3 of experts.
  expect(tensors.size).toBe(3 + sizes.layers * 12);
  const pairs = [
    ["token_embd", "model.embed_tokens", [300, 64], 0],
    ["output", "lm_head", [300, 64], 8],
    ["output_norm", "model.norm", [64], 0],
    ["blk.1.attn_q", "model.layers.1.self_attn.q_proj", [64, 64], 8],
    ["blk.0.attn_v", "model.layers.0.self_attn.v_proj", [32, 64], 8],
    ["blk.0.attn_k_norm", "model.layers.0.self_attn.k_norm", [16], 0],
    ["blk.1.ffn_gate_inp", "model.layers.1.mlp.gate", [3, 64], 0],
  ] as const;
  for (const [theirs, ours, shape, type] of pairs) {
    const tensor = tensors.get(`${theirs}.weight`);
    expect(tensor?.shape).toEqual(shape);
    expect(tensor?.type).toBe(weights === "int8" ? type : 0);
    expect(tensor?.values).toEqual(await stored(checkpoint, `${ours}.weight`));
  }
  const down = tensors.get("blk.1.ffn_down_exps.weight");
  expect(down?.shape).toEqual([3, 64, 32]);
  for (let e = 0; e < sizes.experts; e++) {
    const own = down?.values.subarray(e * 64 * 32, (e + 1) * 64 * 32);
    expect(own).toEqual(await stored(checkpoint, `model.layers.1.mlp.experts.${e}.down_proj.weight`));
  }
});

it("makes checkpoints that load, int8 ones with logits near those of f32", async () => {
  const logits: Float32Array[] = [];
  for (const weights of ["f32", "int8"] as const) {
    const { model, close } = await loadModel(twins[weights].checkpoint, { engine: engine(cpu()) });
    try {
      const ids = model.engine.tensor(Int32Array.of(5, 17, 299), [1, 3]);
      logits.push(Float32Array.from(await (await model.step(ids)).data()));
    } finally {
      await close();
    }
  }
  const [f32, int8] = logits as [Float32Array, Float32Array];
  const largest = Math.max(...f32.map(Math.abs));
  expect(largest).toBeGreaterThan(0);
  const worst = Math.max(...f32.map((z, i) => Math.abs(z - (int8[i] as number))));
  expect(worst / largest).toBeLessThan(0.1);
  expect(worst).toBeGreaterThan(0);
});
