// Tuned checkpoints: what changed has the nearest values of the stored type, everything else its bytes, and what cannot be written leaves
// nothing behind. The oracle reads files with JSON.parse and plain loops.
import { mkdtempSync } from "node:fs";
import { cp, mkdir, mkdtemp, readdir, readFile, rm, symlink, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { type Json, leaves, random, type Tensor } from "@switchyard/core";
import type { RouterPlugin } from "@switchyard/core/moe";
import { adamw, trainer } from "@switchyard/core/train";
import { hash } from "@switchyard/routers/hash";
import { rMoE } from "@switchyard/routers/r-moe";
import { reMoE } from "@switchyard/routers/re-moe";
import { topK } from "@switchyard/routers/top-k";
import { afterAll, afterEach, beforeEach, describe, expect, it } from "vitest";
import { describeCheckpoint } from "../architectures/find.ts";
import { mixtral } from "../architectures/mixtral.ts";
import { qwen3Moe } from "../architectures/qwen3-moe.ts";
import { openCheckpoint } from "../checkpoint.ts";
import { readOrigin } from "../conversion/origin.ts";
import { convertCheckpoint } from "../convert.ts";
import { folderFiles } from "../files.ts";
import type { LanguageModel } from "../model.ts";
import { loudModel, makeEngine, plainTopK, smallConfig } from "../models.test-util.ts";
import { loadModel, saveModel } from "../pretrained.ts";
import { randomCheckpoint } from "../random-checkpoint.ts";
import {
  copyFixture,
  encoded,
  expectCopies,
  golden,
  nearestOf,
  type Raw,
  rawTensors,
  valueAt,
} from "../raw-checkpoint.test-util.ts";
import { piecesOf } from "../source.ts";
import { randomWindows } from "../task.ts";
import { transformer } from "../transformer.ts";
import { compare, compareHeaders } from "./compare.ts";
import { withLora } from "./lora.ts";
import { isLora } from "./parts.ts";
import { bytesOfRows, chunksOf, patched, patchesOf } from "./patches.ts";
import { type SaveTunedOptions, saveTuned, type TunedProgress } from "./save-tuned.ts";
import { changedParameters, tuned, tuningTask } from "./task.ts";

const fixtures = mkdtempSync(join(tmpdir(), "switchyard-tuned-fixtures-"));
afterAll(() => rm(fixtures, { recursive: true }));
const fixture = (name: string): string => copyFixture(name, join(fixtures, name));

let root = "";
beforeEach(async () => {
  root = await mkdtemp(join(tmpdir(), "switchyard-tuned-"));
});
afterEach(() => rm(root, { recursive: true, force: true }));
const path = (...parts: string[]): string => join(root, ...parts);

const on = makeEngine();
const routers: readonly RouterPlugin[] = [plainTopK(2), topK({ k: 2 })];

interface Values {
  readonly shape: readonly number[];
  readonly data: Float32Array;
}
type Given = ReadonlyMap<string, Omit<Values, "data"> & { readonly data: Float32Array | Int32Array }>;

/** All parameters and buffers of a checkpoint as the model has them, in f32. */
async function valuesOf(folder: string, known = routers): Promise<Map<string, Values>> {
  const { model, close } = await loadModel(folder, { engine: on, weights: "f32", routers: known });
  const found = new Map<string, Values>();
  const add = async (name: string, x: Tensor): Promise<void> => {
    found.set(name, { shape: x.shape, data: Float32Array.from(await x.data()) });
  };
  for (const [name, x] of leaves(model.params)) await add(name, x);
  for (const [i, { layer, part }] of model.routing.entries()) {
    for (const [name, x] of leaves(model.buffers[i] ?? {})) {
      await add(`layers.${layer}.${part === "attention" ? "attention" : "moe"}.buffers.${name}`, x);
    }
  }
  await close();
  return found;
}

/** Names of the stored tensors that hold a parameter, as the architecture says. */
async function namesOf(folder: string, known = routers): Promise<Map<string, string[]>> {
  const checkpoint = await openCheckpoint(folder);
  const { sources } = describeCheckpoint(checkpoint, { routers: known });
  await checkpoint.close();
  return new Map([...sources].map(([at, source]) => [at, [...new Set([...piecesOf(source)].map(({ name }) => name))]]));
}

async function save(source: string, target: string, values: Given, options: SaveTunedOptions = {}) {
  const changed = new Map([...values].map(([name, { data, shape }]) => [name, on.tensor(data, shape)]));
  const live = on.live();
  try {
    return await saveTuned(source, target, changed, { routers, ...options });
  } finally {
    expect(on.live()).toBe(live);
    for (const x of changed.values()) x.dispose();
  }
}

/** Every number another one, by amounts of all sizes. */
const moved = ({ shape, data }: Values): Values => ({
  shape,
  data: data.map((x, i) => x * (1 + Math.sin(i + 1) / 2 ** (i % 12)) + 1e-3 * Math.cos(i)),
});

const numbersIn = ({ bytes, dtype }: Raw): number => bytes.length / (dtype === "F64" ? 8 : dtype === "F32" ? 4 : 2);
const numberOf = ({ bytes, dtype }: Raw, i: number): number =>
  dtype === "F64" ? bytes.readDoubleLE(8 * i) : valueAt(bytes, dtype, i);

/** Changes one parameter of each kind, in its last layer, saves, and compares everything. */
async function checkEachKind(source: string, target: string): Promise<void> {
  const [values, names, before] = [await valuesOf(source), await namesOf(source), await rawTensors(source)];
  expect([...values.keys()].sort()).toEqual([...names.keys()].sort());
  const typeOf = (at: string): string => before.get(names.get(at)?.[0] ?? "")?.dtype ?? "quantised";
  const floats = [...values].filter(([at]) => ["F64", "F32", "F16", "BF16"].includes(typeOf(at)));
  const kinds = new Map(floats.map(([at, x]) => [at.replace(/\d+/, "N"), [at, moved(x)] as const]));
  const changed = new Map(kinds.values());
  const certificate = await save(source, target, changed);

  const [after, loaded] = [await rawTensors(target), await valuesOf(target)];
  const wrong: unknown[] = [];
  const counts = { changed: 0, rounded: 0, unshown: 0 };
  for (const [at, { data }] of values) {
    const fresh = changed.get(at)?.data;
    const type = typeOf(at);
    for (const [i, old] of data.entries()) {
      const x = fresh?.[i] ?? old;
      const expected = type === "F64" ? x : nearestOf(x, type);
      const found = loaded.get(at)?.data[i];
      if (found !== (fresh ? expected : old)) wrong.push([at, i, old, x, found]);
      if (x === old) continue;
      counts.changed++;
      if (expected !== x) counts.rounded++;
      if (expected === old) counts.unshown++;
    }
  }
  expect(wrong).toEqual([]);
  expect(certificate.values).toEqual(counts);

  const touched = new Set([...changed.keys()].flatMap((at) => names.get(at) ?? []));
  const others: { name: string; values: number }[] = [];
  for (const [name, raw] of before) {
    const now = after.get(name) as Raw;
    expect([now.dtype, now.shape, now.file]).toEqual([raw.dtype, raw.shape, raw.file]);
    if (now.bytes.equals(raw.bytes)) continue;
    expect(touched.has(name), name).toBe(true);
    let count = 0;
    for (let i = 0; i < numbersIn(raw); i++) if (!Object.is(numberOf(raw, i), numberOf(now, i))) count++;
    others.push({ name, values: count });
  }
  const byName = (a: { name: string }, b: { name: string }): number => (a.name < b.name ? -1 : 1);
  expect(certificate.tensors.map(({ name, values: count }) => ({ name, values: count })).sort(byName)).toEqual(
    others.sort(byName),
  );
  expect(others).toHaveLength(touched.size);
  expect(certificate.totals).toMatchObject({ tensors: before.size, kept: before.size - others.length });
  // Whatever is no file of weights is a copy, and so is the start of every file of weights.
  expect((await readdir(target)).sort()).toEqual((await readdir(source)).sort());
  for (const name of await readdir(source)) {
    const [a, b] = [await readFile(join(source, name)), await readFile(join(target, name))];
    const end = name.endsWith(".safetensors") ? 8 + Number(a.readBigUInt64LE(0)) : a.length;
    expect(a.subarray(0, end).equals(b.subarray(0, end)), name).toBe(true);
    expect(a.length).toBe(b.length);
  }
}

/** A checkpoint with all its F32 tensors in F64, beside numbers that f32 has not. */
async function inDoubles(folder: string): Promise<string> {
  const raw = await rawTensors(folder);
  const doubles = Object.fromEntries(
    [...raw].map(([name, tensor]) => {
      const values = Float64Array.from({ length: numbersIn(tensor) }, (_, i) => numberOf(tensor, i) * (1 + 2 ** -40));
      return [name, { dtype: "F64", shape: tensor.shape, bytes: new Uint8Array(values.buffer) }];
    }),
  );
  const target = `${folder}-doubles`;
  await mkdir(target, { recursive: true });
  await writeFile(join(target, "model.safetensors"), await encoded(doubles));
  await cp(join(folder, "config.json"), join(target, "config.json"));
  return target;
}

describe("nothing changed", () => {
  it.each(golden)("%s: every file is a copy", async (name) => {
    const source = fixture(name);
    const nothing = await save(source, path("none"), new Map());
    await expectCopies(source, path("none"));
    const same = await save(source, path("same"), await valuesOf(source));
    await expectCopies(source, path("same"));
    for (const { changed, values, tensors, totals, files } of [nothing, same]) {
      expect({ changed, values, tensors }).toEqual({
        ...{ changed: false, values: { changed: 0, rounded: 0, unshown: 0 }, tensors: [] },
      });
      expect(totals.kept).toBe(totals.tensors);
      expect(files.target.every(({ copied }) => copied)).toBe(true);
    }
  });

  it("keeps zeros of either sign, NaN, infinities, and doubles that f32 has not", async () => {
    const source = fixture("olmoe");
    const raw = await rawTensors(source);
    const odd = raw.get("model.norm.weight") as Raw;
    [-0, Number.NaN, Number.POSITIVE_INFINITY].forEach((x, i) => {
      odd.bytes.writeFloatLE(x, 4 * i);
    });
    odd.bytes.writeUInt32LE(0xffc12345, 12);
    await writeFile(join(source, "model.safetensors"), await encoded(Object.fromEntries(raw)));
    const values = await valuesOf(source);
    const data = (values.get("norm") as Values).data;
    data[0] = 0;
    await save(source, path("same"), values);
    await expectCopies(source, path("same"));
    data[4] = 7;
    await save(source, path("other"), values);
    const norm = (await rawTensors(path("other"))).get("model.norm.weight") as Raw;
    expect(norm.bytes.subarray(0, 16).equals(odd.bytes.subarray(0, 16))).toBe(true);
    expect(norm.bytes.readFloatLE(16)).toBe(7);

    const doubles = await inDoubles(fixture("qwen2_moe"));
    await save(doubles, path("doubles"), await valuesOf(doubles));
    await expectCopies(doubles, path("doubles"));
  });
});

describe("one parameter of each kind", () => {
  it.each(golden)("%s: the nearest values, all else the same bytes", (name) =>
    checkEachKind(fixture(name), path("out")),
  );

  const variants: [string, Parameters<typeof convertCheckpoint>[2]][] = [
    ["mixtral", { experts: "fused", dtype: "bf16" }],
    ["phimoe", { experts: "fused", dtype: "f16", shardBytes: 50_000 }],
    ["deepseek_v3", { dtype: "bf16", shardBytes: 40_000 }],
    ["gpt_oss", { dtype: "bf16", shardBytes: 30_000 }],
    ["granitemoe", { dtype: "f16" }],
    ["jetmoe", { dtype: "bf16" }],
    ["olmoe", { dtype: "bf16", shardBytes: 1 }],
    ["qwen3_moe", { dtype: "f16", experts: "fused" }],
  ];
  it.each(variants)("%s as %o", async (name, options) => {
    await convertCheckpoint(fixture(name), path("source"), options);
    await checkEachKind(path("source"), path("out"));
  });

  it.each(["gpt_oss", "mixtral"])("%s in doubles", async (name) =>
    checkEachKind(await inDoubles(await oneFile(fixture(name))), path("out")),
  );

  it("models of our own: the OLMoE layout, and ours with its routers", async () => {
    const [plain, ours] = [loudModel(on, smallConfig), loudModel(on, { ...smallConfig, tieEmbeddings: true })];
    const olmoe = loudModel(on, { ...smallConfig, headSize: 2, router: topK({ k: 2 }), qkNorm: "projection" });
    for (const [model, layout] of [
      [plain, "switchyard"],
      [ours, "switchyard"],
      [olmoe, "olmoe"],
    ] as const) {
      const folder = `${layout}-${model.blueprint.tieEmbeddings}`;
      expect(await saveModel(model, path(folder))).toBe(layout);
      await checkEachKind(path(folder), path(`${folder}-out`));
    }
    await expect(saveTuned(path("switchyard-false"), path("x"), new Map())).rejects.toThrow(
      /needs the router plainTopK/,
    );
  });

  it("routers with buffers, whole numbers among them, and with parameters that layers share", async () => {
    const folder = (name: string): Promise<string> =>
      saveModel(transformer(on, { ...smallConfig, router: all[name] as RouterPlugin }, random(on, 3)), path(name));
    const all: Record<string, RouterPlugin> = { reMoE: reMoE({ k: 2 }), hash: hash(), rMoE: rMoE({ size: 3 }) };
    for (const name of Object.keys(all)) {
      await folder(name);
      const options = { routers: Object.values(all) };
      const values = await valuesOf(path(name), options.routers);
      const [before, stored] = [await rawTensors(path(name)), await namesOf(path(name), options.routers)];
      const pick =
        name === "reMoE" ? "layers.1.moe.buffers.lambda" : name === "hash" ? "layers.1.moe.buffers.table" : "";
      const changed: Map<string, Omit<Values, "data"> & { readonly data: Float32Array | Int32Array }> = new Map();
      if (pick) {
        const { shape, data } = values.get(pick) as Values;
        const next = name === "hash" ? Int32Array.from(data, (x) => (x + 1) % 5) : data.map((x) => x * 1.5);
        changed.set(pick, { shape, data: next });
      } else {
        // The cell of both layers is one, and stored under the first path.
        const cells = [...values].filter(([at]) => at.startsWith("layers.0.moe.router.cell."));
        expect(cells.length).toBeGreaterThan(0);
        for (const [at, x] of cells) changed.set(at, moved(x));
        expect(stored.has(cells[0]?.[0].replace(".0.", ".1.") as string)).toBe(false);
      }
      const { tensors } = await save(path(name), path(`${name}-out`), changed, options);
      expect(tensors.map((tensor) => tensor.name).sort()).toEqual(
        [...changed.keys()].flatMap((at) => stored.get(at)).sort(),
      );
      const loaded = await valuesOf(path(`${name}-out`), options.routers);
      for (const [at, { data }] of values) {
        const fresh =
          changed.get(at) ?? changed.get(at.replace("layers.1.moe.router.cell", "layers.0.moe.router.cell"));
        expect(loaded.get(at)?.data, at).toEqual(Float32Array.from(fresh?.data ?? data));
      }
      const after = await rawTensors(path(`${name}-out`));
      expect([...after].map(([at, { dtype, shape }]) => [at, dtype, shape])).toEqual(
        [...before].map(([at, { dtype, shape }]) => [at, dtype, shape]),
      );
    }
    const table = { shape: [smallConfig.vocabulary], data: new Float32Array(smallConfig.vocabulary) };
    const at = "layers.0.moe.buffers.table";
    await expect(save(path("hash"), path("x"), new Map([[at, table]]), { routers: [hash()] })).rejects.toThrow(
      /table" is f32; give its values in i32$/,
    );
  });
});

it("what layers share is trained as one, by itself and by an adapter, and saved once", async () => {
  const sharing = [rMoE({ size: 3 })];
  const draw = random(on, 4);
  const fresh = transformer(on, { ...smallConfig, router: sharing[0] as RouterPlugin }, draw);
  await saveModel(fresh, path("in"));
  const ids = Int32Array.from({ length: 40 }, (_, i) => i % 13);
  const { batch } = randomWindows(ids, { batch: 2, sequence: 8, random: draw });
  const sequence = on.tensor(ids.subarray(0, 9), [1, 9]);
  const logits = async (one: LanguageModel): Promise<Float64Array> =>
    Float64Array.from(await (await one.step(sequence, { positions: "all" })).data());
  for (const kind of ["whole", "lora"]) {
    const { model } = await loadModel(path("in"), { engine: on, routers: sharing });
    const before = await logits(model);
    const own = kind === "lora" ? withLora(model, { parts: ["router", "experts"], rank: 2, random: draw }) : model;
    const trains = kind === "lora" ? isLora : (at: string): boolean => at.includes("router");
    const run = trainer(on, tuningTask(own, { trains, batch }), { optimiser: adamw({ learningRate: 0.05 }) });
    await run.run({ until: 3 });
    const changed = changedParameters(own, run.params, run.buffers);
    const { tensors } = await saveTuned(path("in"), path(kind), changed, { routers: sharing });
    expect(tensors.filter(({ name }) => name.includes(".cell.")).length, kind).toBe(kind === "lora" ? 2 : 4);
    const again = await loadModel(path(kind), { engine: on, routers: sharing });
    const [expected, found] = [await logits(tuned(own, run.params)), await logits(again.model)];
    const difference = (a: Float64Array): number => Math.max(...expected.map((x, i) => Math.abs(x - (a[i] as number))));
    expect(difference(found), kind).toBeLessThan(1e-6);
    expect(difference(before), kind).toBeGreaterThan(1e-4);
    await again.close();
    for (const x of changed.values()) x.dispose();
  }
  const { model, close } = await loadModel(path("in"), { engine: on, routers: sharing });
  const half = { trains: (at: string) => at.startsWith("layers.1."), batch };
  expect(() => tuningTask(model, half)).toThrow(
    /"layers\.1\.moe\.router\.cell\S+" and "layers\.0\.moe\.router\.cell\S+" are one tensor, .* train both or neither/,
  );
  await close();
});

/** Doubles are made of one file. */
async function oneFile(folder: string): Promise<string> {
  const target = `${folder}-one`;
  await convertCheckpoint(folder, target, { shardBytes: 1e9, replace: true });
  return target;
}

describe("two experts of a stack", () => {
  it.each([
    [
      "mixtral",
      "separate",
      "layers.1.moe.experts.gateUp",
      (e: number) => [`block_sparse_moe.experts.${e}.w1.weight`, `block_sparse_moe.experts.${e}.w3.weight`],
    ],
    ["qwen3_moe", "separate", "layers.1.moe.experts.down", (e: number) => [`mlp.experts.${e}.down_proj.weight`]],
    ["qwen3_moe", "fused", "layers.1.moe.experts.down", "mlp.experts.down_proj"],
    ["mixtral", "fused", "layers.1.moe.experts.gateUp", "mlp.experts.gate_up_proj"],
    ["gpt_oss", undefined, "layers.1.moe.experts.gateUp", "mlp.experts.gate_up_proj"],
    ["gpt_oss", undefined, "layers.1.moe.experts.gateUpBias", "mlp.experts.gate_up_proj_bias"],
    ["jetmoe", undefined, "layers.1.attention.experts.input", "self_attention.experts.input_linear.weight"],
    ["granitemoe", undefined, "layers.1.moe.experts.gateUp", "block_sparse_moe.input_linear.weight"],
  ] as const)("%s, %s, %s: the others keep their bytes", async (name, experts, at, stored) => {
    await convertCheckpoint(fixture(name), path("in"), experts ? { experts } : {});
    const values = (await valuesOf(path("in"))).get(at) as Values;
    const [count = 0] = values.shape;
    const size = values.data.length / count;
    const chosen = new Set([0, count - 1]);
    const data = values.data.map((x, i) => (chosen.has(Math.floor(i / size)) ? x + 0.5 : x));
    await save(path("in"), path("out"), new Map([[at, { shape: values.shape, data }]]));
    const [before, after] = [await rawTensors(path("in")), await rawTensors(path("out"))];
    const expected = new Set<string>();
    for (let e = 0; e < count; e++) {
      const names = typeof stored === "function" ? stored(e) : [stored];
      for (const short of names) {
        const full = `model.layers.1.${short}`;
        const [a, b] = [before.get(full)?.bytes as Buffer, after.get(full)?.bytes as Buffer];
        const part =
          typeof stored === "function" ? [0, a.length] : [(e * a.length) / count, ((e + 1) * a.length) / count];
        expect(a.subarray(...part).equals(b.subarray(...part)), `${full} of ${e}`).toBe(!chosen.has(e));
        if (chosen.has(e)) expected.add(full);
      }
    }
    for (const [other, { bytes }] of before) {
      expect(after.get(other)?.bytes.equals(bytes), other).toBe(!expected.has(other));
    }
  });

  it("gpt_oss: matrices lie as [in, out], rows of gate and up in turn", async () => {
    const source = fixture("gpt_oss");
    const values = (await valuesOf(source)).get("layers.0.moe.experts.gateUp") as Values;
    const [experts = 0, rows = 0, width = 0] = values.shape;
    const data = Float32Array.from(values.data, (_, i) => i);
    await save(source, path("out"), new Map([["layers.0.moe.experts.gateUp", { shape: values.shape, data }]]));
    const raw = (await rawTensors(path("out"))).get("model.layers.0.mlp.experts.gate_up_proj") as Raw;
    expect(raw.shape).toEqual([experts, width, rows]);
    const wrong: unknown[] = [];
    for (let e = 0; e < experts; e++) {
      for (let c = 0; c < width; c++) {
        for (let r = 0; r < rows; r++) {
          const row = r % 2 === 0 ? r / 2 : rows / 2 + (r - 1) / 2;
          const found = valueAt(raw.bytes, raw.dtype, (e * width + c) * rows + r);
          if (found !== nearestOf((e * rows + row) * width + c, raw.dtype)) wrong.push([e, c, r, found]);
        }
      }
    }
    expect(wrong).toEqual([]);
  });
});

it("a stored head follows the embedding that it is tied to", async () => {
  const source = fixture("granitemoe");
  const raw = await rawTensors(source);
  const config = JSON.parse(await readFile(join(source, "config.json"), "utf8"));
  await writeFile(join(source, "config.json"), JSON.stringify({ ...config, tie_word_embeddings: true }));
  const embed = raw.get("model.embed_tokens.weight") as Raw;
  await writeFile(
    join(source, "model.safetensors"),
    await encoded({ ...Object.fromEntries(raw), "lm_head.weight": { ...embed, bytes: Buffer.from(embed.bytes) } }),
  );
  const values = await valuesOf(source);
  expect(values.has("head")).toBe(false);
  const fresh = moved(values.get("embed") as Values);
  const { tensors } = await save(source, path("out"), new Map([["embed", fresh]]));
  expect(tensors.map(({ name }) => name).sort()).toEqual(["lm_head.weight", "model.embed_tokens.weight"]);
  const after = await rawTensors(path("out"));
  expect(after.get("lm_head.weight")?.bytes.equals(after.get("model.embed_tokens.weight")?.bytes as Buffer)).toBe(true);
  expect((await valuesOf(path("out"))).get("embed")?.data).toEqual(fresh.data);
});

describe("quantised parts", () => {
  const config: { [key: string]: Json } = {
    model_type: "qwen3_moe",
    ...{ vocab_size: 40, hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1 },
    ...{ head_dim: 8, num_experts: 3, num_experts_per_tok: 2, moe_intermediate_size: 8, intermediate_size: 24 },
    ...{ max_position_embeddings: 64, norm_topk_prob: true },
    quantization_config: {
      quant_method: "compressed-tensors",
      format: "pack-quantized",
      config_groups: {
        group_0: {
          targets: ["Linear"],
          weights: { num_bits: 4, type: "int", symmetric: true, strategy: "group", group_size: 8 },
        },
      },
    },
  };

  it.each([
    [
      "deepseek_v3_fp8",
      "layers.1.moe.experts.gateUp",
      /"model\.layers\.1\.mlp\.experts\.\d\.\w+\.weight" stores it quantised \(F8_E4M3, F32\)/,
    ],
    [
      "gpt_oss_mxfp4",
      "layers.1.moe.experts.down",
      /"model\.layers\.1\.mlp\.experts\.down_proj_blocks" stores it quantised \(U8\)/,
    ],
    [
      "packed",
      "layers.1.attention.o",
      /"model\.layers\.1\.self_attn\.o_proj\.weight_packed" stores it quantised \(I32, I64, BF16\)/,
    ],
  ])("%s: refused where they changed, kept where they did not", async (name, at, message) => {
    if (name === "packed") await randomCheckpoint(path("in"), { config, architecture: qwen3Moe });
    const source = name === "packed" ? path("in") : fixture(name);
    const values = await valuesOf(source);
    const router = [...values.keys()].find((one) => one.endsWith("router.weight")) as string;
    values.set(router, moved(values.get(router) as Values));
    const { tensors } = await save(source, path("kept"), values);
    expect(tensors).toHaveLength(1);
    const last = values.get(at) as Values;
    last.data[last.data.length - 1] = 3;
    const listed = await readdir(root);
    await expect(save(source, path("out"), values)).rejects.toThrow(message);
    await expect(save(source, path("out"), new Map([[at, last]]))).rejects.toThrow(
      /Train other parts.*nothing was written/,
    );
    expect(await readdir(root)).toEqual(listed);
  });
});

it("notices every byte that is not what it must be", async () => {
  await convertCheckpoint(fixture("qwen3_moe"), path("in"), { experts: "fused" });
  const at = "layers.1.moe.experts.down";
  const { shape, data } = (await valuesOf(path("in"))).get(at) as Values;
  const half = data.length / 2;
  // The first half of the experts changes, and there a number that is too close to the one that was there.
  const fresh = on.tensor(
    data.map((x, i) => (i === 3 ? x * (1 + 2 ** -20) : i < half ? x + 0.5 : x)),
    shape,
  );
  const { values } = await saveTuned(path("in"), path("out"), new Map([[at, fresh]]));
  expect(values.unshown).toBe(1);
  const files = await folderFiles(path("in"));
  const checkpoint = await openCheckpoint(path("in"));
  const origin = await readOrigin(path("in"), files, checkpoint);
  const { patches } = patchesOf(origin, describeCheckpoint(checkpoint, {}), new Map([[at, fresh]]));
  const check = async (): Promise<void> => {
    const { open } = await folderFiles(path("out"));
    await compareHeaders(origin, new Set(["model.safetensors"]), open);
    const output = await openCheckpoint(path("out"));
    try {
      await compare(origin, output, patches, () => undefined);
    } finally {
      await output.close();
    }
  };
  await check();
  const raw = await rawTensors(path("out"));
  const whole = await readFile(path("out", "model.safetensors"));
  const down = raw.get("model.layers.1.mlp.experts.down_proj") as Raw;
  const embed = raw.get("model.embed_tokens.weight") as Raw;
  const start = (bytes: Buffer): number => whole.indexOf(bytes);
  const cases: [string, number, RegExp][] = [
    ["a changed value", start(down.bytes), /holds .* where "layers\.1\.moe\.experts\.down" has/],
    ["the value that the type could not show", start(down.bytes) + 6, /holds .* where/],
    ["a value of another expert", start(down.bytes) + down.bytes.length - 2, /holds .* where/],
    [
      "a value of another tensor",
      start(embed.bytes) + 10,
      /1 values of "model\.embed_tokens\.weight" are others.*0 were/,
    ],
    ["the header", whole.indexOf('"pt"') + 1, /the header of model\.safetensors is another/],
  ];
  for (const [what, byte, message] of cases) {
    const wrong = Buffer.from(whole);
    wrong[byte] = (wrong[byte] as number) ^ 1;
    await writeFile(path("out", "model.safetensors"), wrong);
    await expect(check(), what).rejects.toThrow(message);
  }
  await checkpoint.close();
  fresh.dispose();
});

it.each([
  // gate and up alternate, and every matrix is transposed
  ["gpt_oss", "layers.1.moe.experts.gateUp"],
  ["gpt_oss", "layers.1.moe.experts.gateUpBias"],
  // gate, then up
  ["granitemoe", "layers.1.moe.experts.gateUp"],
  ["qwen3_moe", "layers.1.moe.experts.gateUp"],
])("rows of %s's %s that are written a few at a time are those that are written at once", async (name, at) => {
  const folder = fixture(name);
  const { shape, data } = moved((await valuesOf(folder)).get(at) as Values);
  const fresh = on.tensor(data, shape);
  const checkpoint = await openCheckpoint(folder);
  const origin = await readOrigin(folder, await folderFiles(folder), checkpoint);
  const { patches } = patchesOf(origin, describeCheckpoint(checkpoint, {}), new Map([[at, fresh]]));
  expect(patches.size).toBeGreaterThan(0);
  for (const patch of patches.values()) {
    const { rows, transposed } = patch;
    const read = async (chunk: readonly [number, number]): Promise<number[]> =>
      Array.from((await patched(checkpoint, patch, { entry: 0, chunk })).bytes);
    const whole = await read([0, rows]);
    // Columns of a transposed matrix are rows of the file only all together.
    const step = transposed ? rows : 3;
    const parts: number[] = [];
    for (let from = 0; from < rows; from += step) parts.push(...(await read([from, Math.min(rows, from + step)])));
    expect(parts).toEqual(whole);
    expect(whole).not.toEqual(Array.from(await checkpoint.read(patch.tensor.name, bytesOfRows(patch, 0, [0, rows]))));
    // Of long rows few are in memory at once.
    const long = { ...patch, rows: 5, inner: 1 << 21 };
    const spans = transposed
      ? [[0, 5]]
      : [
          [0, 2],
          [2, 4],
          [4, 5],
        ];
    expect([...chunksOf(long)]).toEqual(spans);
  }
  await checkpoint.close();
  fresh.dispose();
});

describe("refuses", () => {
  const norm = (data: Float32Array): Map<string, Values> => new Map([["norm", { shape: [data.length], data }]]);
  const normOf = async (folder: string): Promise<Values> => (await valuesOf(folder)).get("norm") as Values;

  it.each([
    ["NaN", Number.NaN, /"model\.norm\.weight" hold NaN where the source has .*; did the training diverge/],
    ["infinity", Number.NEGATIVE_INFINITY, /hold -Infinity/],
    ["what the type cannot hold", 65_520, /hold 65520, which its type F16 cannot; convert the source/],
  ])("%s, before anything is written", async (_, x, message) => {
    await convertCheckpoint(fixture("mixtral"), path("in"), { dtype: "f16" });
    const { data } = await normOf(path("in"));
    data[2] = x;
    await expect(save(path("in"), path("out"), norm(data))).rejects.toThrow(message);
    expect(await readdir(root)).toEqual(["in"]);
    data[2] = 65_519;
    const { values } = await save(path("in"), path("out"), norm(data));
    expect(values).toEqual({ changed: 1, rounded: 1, unshown: 0 });
  });

  it("unknown paths, other shapes and types", async () => {
    const source = fixture("mixtral");
    const { data, shape } = await normOf(source);
    const attempt = (name: string, x: Tensor): Promise<unknown> => saveTuned(source, path("out"), new Map([[name, x]]));
    const good = on.tensor(data, shape);
    const double = on.tensor(Float32Array.from([...data, ...data]), [data.length * 2]);
    const ids = on.tensor(Int32Array.from(data), shape);
    await expect(attempt("layers.0.attention.z", good)).rejects.toThrow(
      /has no parameter "layers\.0\.attention\.z"; it has \d+, such as "embed"/,
    );
    await expect(attempt("norm", double)).rejects.toThrow(/"norm" is \[\d+\], and \[\d+\] in the checkpoint/);
    await expect(attempt("norm", ids)).rejects.toThrow(/"norm" is i32; give its values in f32/);
    expect(await readdir(root)).toEqual([]);
    // What layers share is stored once, and comes under each of its paths.
    await saveTuned(
      source,
      path("out"),
      new Map([
        ["norm", good],
        ["layers.1.norm", good],
      ]),
    );
    await expectCopies(source, path("out"));
    for (const x of [good, double, ids]) x.dispose();
  });

  it("the source itself, folders in it, and what is not empty", async () => {
    const source = fixture("mixtral");
    await cp(source, path("in"), { recursive: true });
    await symlink(path("in"), path("link"));
    await mkdir(path("in", "deeper"));
    await symlink(path("in", "deeper"), path("deep-link"));
    for (const [target, message] of [
      [path("in"), /is the source folder itself/],
      [path("link"), /is the source folder itself/],
      [path("in", "tuned"), /cannot tune .*lies in the source folder/],
      [path("link", "a", "b"), /lies in the source folder/],
      [path("deep-link", "a"), /lies in the source folder/],
    ] as const)
      await expect(saveTuned(path("in"), target, new Map())).rejects.toThrow(message);
    await rm(path("in", "deeper"), { recursive: true });
    await mkdir(path("out"));
    await writeFile(path("out", "notes.txt"), "mine");
    const values = norm((await normOf(source)).data.map((x) => x + 1));
    await expect(save(source, path("out"), values)).rejects.toThrow(/is not empty: it holds "notes\.txt"/);
    expect(await readdir(path("out"))).toEqual(["notes.txt"]);
    // What belongs to the checkpoint that is replaced would be read together with the new one.
    await writeFile(path("out", "model.safetensors.index.json"), "{}");
    await writeFile(path("out", "model-00001-of-00002.safetensors"), "old");
    await save(source, path("out"), values, { replace: true });
    expect((await readdir(path("out"))).sort()).toEqual([...(await readdir(source)), "notes.txt"].sort());
    expect(await readFile(path("out", "notes.txt"), "utf8")).toBe("mine");
    expect((await normOf(path("out"))).data).toEqual(values.get("norm")?.data);
    await expectCopies(source, path("in"));
  });

  it("families that it does not know", async () => {
    await cp(fixture("mixtral"), path("in"), { recursive: true });
    const config = JSON.parse(await readFile(path("in", "config.json"), "utf8"));
    await writeFile(path("in", "config.json"), JSON.stringify({ ...config, model_type: "whale" }));
    await expect(saveTuned(path("in"), path("out"), new Map())).rejects.toThrow(
      /model_type is "whale"; this version loads/,
    );
    const architectures = [{ ...mixtral, modelTypes: ["whale"] }];
    await saveTuned(path("in"), path("out"), new Map(), { architectures });
    await expectCopies(path("in"), path("out"));
  });
});

it("tells how far it is, and stops when asked, in every stage", async () => {
  const source = fixture("mixtral");
  const { shape, data } = (await valuesOf(source)).get("layers.0.attention.q") as Values;
  const values = new Map([["layers.0.attention.q", moved({ shape, data })]]);
  const steps: TunedProgress[] = [];
  await save(source, path("out"), values, { onProgress: (progress) => steps.push(progress) });
  const stages = ["checking", "writing", "comparing", "checksums"] as const;
  expect([...new Set(steps.map(({ stage }) => stage))]).toEqual(stages);
  for (const stage of stages) {
    const own = steps.filter((step) => step.stage === stage);
    expect(
      own.every(({ done }, i) => done >= (own[i - 1]?.done ?? 0)),
      stage,
    ).toBe(true);
    expect(own.at(-1)?.done, stage).toBe(own.at(-1)?.total);
  }
  const listed = await readdir(path("out"));
  for (const stage of stages) {
    const stop = new AbortController();
    const options = {
      ...{ signal: stop.signal, replace: true },
      onProgress: (progress: TunedProgress) => progress.stage === stage && stop.abort(new Error("enough")),
    };
    await expect(
      save(source, path("out"), new Map([["norm", moved((await valuesOf(source)).get("norm") as Values)]]), options),
    ).rejects.toThrow("enough");
    expect(await readdir(path("out"))).toEqual(listed);
    expect((await valuesOf(path("out"))).get("layers.0.attention.q")?.data).toEqual(
      values.get("layers.0.attention.q")?.data,
    );
  }
  await expect(save(source, path("new"), values, { signal: AbortSignal.abort(new Error("at once")) })).rejects.toThrow(
    "at once",
  );
  expect(await readdir(root)).toEqual(["out"]);
});

it("leaves out other weights where these changed, and keeps headers of any order and spelling", async () => {
  const source = fixture("olmoe");
  const file = await readFile(join(source, "model.safetensors"));
  const length = Number(file.readBigUInt64LE(0));
  const { __metadata__: _, ...tensors } = JSON.parse(file.toString("utf8", 8, 8 + length));
  const header = `${JSON.stringify({ ...Object.fromEntries(Object.entries(tensors).reverse()), __metadata__: { z: "1" } }, null, 1)}   `;
  const start = Buffer.alloc(8);
  start.writeBigUInt64LE(BigInt(Buffer.byteLength(header)));
  await writeFile(
    join(source, "model.safetensors"),
    Buffer.concat([start, Buffer.from(header), file.subarray(8 + length)]),
  );
  await checkEachKind(source, path("out"));
  await writeFile(join(source, "pytorch_model.bin"), "x");
  await mkdir(join(source, "onnx"));
  const values = new Map([["norm", moved((await valuesOf(source)).get("norm") as Values)]]);
  const { files } = await save(source, path("more"), values);
  expect(files.leftOut).toEqual([
    { name: "onnx", reason: "a folder" },
    { name: "pytorch_model.bin", reason: "other weights, which would not be the tuned ones" },
  ]);
  expect(await readdir(path("more"))).not.toContain("pytorch_model.bin");
});
