// Conversions: copies are copies, values are rounded as the formats say, both layouts of experts hold the same numbers, and the
// certificate notices what is wrong. The oracle reads files with JSON.parse and plain loops.
import { createHash } from "node:crypto";
import { mkdtempSync } from "node:fs";
import { cp, mkdir, mkdtemp, readdir, readFile, rm, symlink, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import fc from "fast-check";
import { afterAll, afterEach, beforeEach, describe, expect, it } from "vitest";
import { openCheckpoint } from "./checkpoint.ts";
import { compareTensors } from "./conversion/compare.ts";
import { type ConvertOptions, readOrigin } from "./conversion/origin.ts";
import { convertCheckpoint } from "./convert.ts";
import { folderFiles, saveFiles } from "./files.ts";
import {
  copyFixture,
  encoded,
  expectCopies,
  golden,
  nearestOf,
  type Raw,
  rawTensors,
  valueAt,
} from "./raw-checkpoint.test-util.ts";

/** The recorded checkpoints, without what was recorded. */
const fixtures = mkdtempSync(join(tmpdir(), "switchyard-convert-fixtures-"));
afterAll(() => rm(fixtures, { recursive: true }));
const fixture = (name: string): string => copyFixture(name, join(fixtures, name));

let root = "";
beforeEach(async () => {
  root = await mkdtemp(join(tmpdir(), "switchyard-convert-"));
});
afterEach(() => rm(root, { recursive: true, force: true }));
const path = (...parts: string[]): string => join(root, ...parts);

const sum = async (file: string): Promise<string> =>
  createHash("sha256")
    .update(await readFile(file))
    .digest("hex");

async function write(folder: string, files: Readonly<Record<string, string | Uint8Array>>): Promise<void> {
  await mkdir(folder, { recursive: true });
  for (const [name, content] of Object.entries(files)) await writeFile(join(folder, name), content);
}

const f32 = (...values: number[]): { dtype: string; shape: number[]; bytes: Uint8Array } => ({
  dtype: "F32",
  shape: [values.length],
  bytes: new Uint8Array(Float32Array.from(values).buffer),
});

describe("nothing asked", () => {
  it.each(golden)("%s: every file is a copy, and the certificate covers every byte", async (name) => {
    const { changed, totals, tensors, kept, dropped, files } = await convertCheckpoint(fixture(name), path("out"));
    await expectCopies(fixture(name), path("out"));
    const raw = await rawTensors(fixture(name));
    const bytes = [...raw.values()].reduce((total, tensor) => total + tensor.bytes.length, 0);
    expect({ changed, kept, dropped, totals }).toEqual({
      ...{ changed: false, kept: [], dropped: [] },
      totals: {
        source: { tensors: raw.size, bytes },
        target: { tensors: raw.size, bytes },
        ...{ same: raw.size, converted: 0, moved: 0 },
      },
    });
    expect(tensors.map((tensor) => tensor.name).sort()).toEqual([...raw.keys()].sort());
    for (const { name: file, sha256, copied } of [...files.source, ...files.target]) {
      expect([sha256, copied]).toEqual([await sum(join(fixture(name), file)), true]);
    }
    expect(files.leftOut).toEqual([]);
  });

  it("also where what is asked is already so", async () => {
    const same: [string, ConvertOptions][] = [
      ["qwen3_moe", { dtype: "bf16", experts: "separate" }],
      ["olmoe", { dtype: "f32", shardBytes: 1e9 }],
      ["deepseek_v3_fp8", { dtype: "bf16" }],
    ];
    for (const [name, options] of same) {
      const { changed } = await convertCheckpoint(fixture(name), path(name), options);
      await expectCopies(fixture(name), path(name));
      expect(changed).toBe(false);
    }
  });

  it("keeps headers of any order and spelling, metadata and unusual files", async () => {
    const header =
      '{ "b" :{"data_offsets":[4,8],"shape":[1],"dtype":"F32"},\n"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"__metadata__":{"z":"1","format":"pt"}}  ';
    const start = Buffer.alloc(8);
    start.writeBigUInt64LE(BigInt(header.length));
    const file = Buffer.concat([start, Buffer.from(header), Buffer.from([1, 2, 3, 4, 0, 0, 128, 63])]);
    const config = '{"model_type":"x", "eps": 1e-05,\n"big": 12345678901234567890}';
    await write(path("in"), {
      "model.safetensors": file,
      "config.json": config,
      "chat_template.jinja": "{{ a }}",
      "pytorch_model.bin": "x",
    });
    await convertCheckpoint(path("in"), path("out"));
    await expectCopies(path("in"), path("out"));
  });
});

describe("dtype", () => {
  it.each(golden)("%s: to bf16, f16 and f32, each value the nearest", async (name) => {
    for (const dtype of ["bf16", "f16", "f32"] as const) {
      const type = dtype.toUpperCase();
      const out = path(dtype);
      const { kept, values, totals } = await convertCheckpoint(fixture(name), out, { dtype });
      const [before, after] = [await rawTensors(fixture(name)), await rawTensors(out)];
      expect([...after.keys()].sort()).toEqual([...before.keys()].sort());
      const keep = new Set(kept.map((one) => one.name));
      let [count, rounded] = [0, 0];
      for (const [tensor, { dtype: from, shape, bytes, file }] of before) {
        const found = after.get(tensor);
        expect([found?.shape, found?.file]).toEqual([shape, file]);
        if (keep.has(tensor) || from === type) {
          expect([found?.dtype, found?.bytes.equals(bytes)]).toEqual([from, true]);
          continue;
        }
        expect(found?.dtype).toBe(type);
        const n = shape.reduce((a, b) => a * b, 1);
        const wrong: unknown[] = [];
        for (let i = 0; i < n; i++) {
          const x = valueAt(bytes, from, i);
          const y = valueAt(found?.bytes as Buffer, type, i);
          if (!Object.is(y, nearestOf(x, type))) wrong.push([i, x, y]);
          if (x !== y) rounded++;
        }
        expect(wrong).toEqual([]);
        count += n;
      }
      expect({ converted: values.converted, rounded: values.rounded }).toEqual({ converted: count, rounded });
      const config = await readFile(join(out, "config.json"), "utf8");
      const old = await readFile(join(fixture(name), "config.json"), "utf8");
      const named = { bf16: "bfloat16", f16: "float16", f32: "float32" }[dtype];
      // One value changes in the text, and only where a tensor did.
      expect(config).toBe(totals.converted ? old.replace(/("torch_dtype": )"\w+"/, `$1"${named}"`) : old);
    }
  });

  it("names what it never changes, with the reason", async () => {
    const { kept } = await convertCheckpoint(fixture("deepseek_v3_fp8"), path("fp8"), { dtype: "f16" });
    const reasonOf = (ending: string): string | undefined => kept.find(({ name }) => name.endsWith(ending))?.reason;
    expect(reasonOf("mlp.down_proj.weight")).toMatch(/F8_E4M3: quantised/);
    expect(reasonOf("mlp.down_proj.weight_scale_inv")).toMatch(/belongs to the quantised weights/);
    expect(reasonOf("e_score_correction_bias")).toMatch(/which experts/);
    expect(reasonOf("input_layernorm.weight")).toBeUndefined();
    const packed = await convertCheckpoint(fixture("gpt_oss_mxfp4"), path("fp4"), { dtype: "f32" });
    expect(new Set(packed.kept.map(({ name }) => name.replace(/.*\./, "")))).toEqual(
      new Set(["down_proj_blocks", "down_proj_scales", "gate_up_proj_blocks", "gate_up_proj_scales"]),
    );
  });

  it("keeps scales, zeros and shapes of compressed-tensors, and plain scales not", async () => {
    const i32 = { dtype: "I32", shape: [1], bytes: new Uint8Array(4) };
    const tensors = {
      "a.weight_packed": i32,
      "a.weight_scale": f32(1),
      "a.weight_shape": { dtype: "I64", shape: [1], bytes: new Uint8Array(8) },
      "a.weight_zero_point": i32,
      "b.scale": f32(1),
    };
    await write(path("in"), { "model.safetensors": await encoded(tensors), "config.json": "{}" });
    const { kept } = await convertCheckpoint(path("in"), path("out"), { dtype: "bf16" });
    expect(kept.map(({ name }) => name).sort()).toEqual(Object.keys(tensors).slice(0, 4).sort());
    // Nothing said which type: now something does, at the end of the same text.
    expect(await readFile(path("out", "config.json"), "utf8")).toBe('{"torch_dtype": "bfloat16"}');
  });

  it("refuses what is too large, or saturates; infinity and NaN stay", async () => {
    const values = [65_519.99, 65_520, -1e30, Number.POSITIVE_INFINITY, Number.NaN, 1e-10, -0];
    await write(path("in"), {
      "model.safetensors": await encoded({ "x.y": f32(...values) }),
      "config.json": '{"dtype":"float32"}',
    });
    await expect(convertCheckpoint(path("in"), path("out"), { dtype: "f16" })).rejects.toThrow(
      /"x\.y" holds 65520, and the largest number of F16 is 65504; choose another dtype, or saturate/,
    );
    expect(await readdir(root)).toEqual(["in"]);
    const { values: counts } = await convertCheckpoint(path("in"), path("out"), { dtype: "f16", saturate: true });
    const { bytes } = (await rawTensors(path("out"))).get("x.y") as Raw;
    expect(values.map((_, i) => valueAt(bytes, "F16", i))).toEqual([
      ...[65_504, 65_504, -65_504, Number.POSITIVE_INFINITY, Number.NaN, 0, -0],
    ]);
    expect(counts).toEqual({ converted: 7, rounded: 4, toZero: 1, saturated: 2 });
    expect(await readFile(path("out", "config.json"), "utf8")).toBe('{"dtype":"float16"}');
  });
});

describe("experts", () => {
  const separateFamilies = ["deepseek_v2", "deepseek_v3", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe"];

  it.each(separateFamilies)("%s: fused and back, with the names of Transformers 5", async (name) => {
    const fused = await convertCheckpoint(fixture(name), path("fused"), { experts: "fused" });
    const [before, after] = [await rawTensors(fixture(name)), await rawTensors(path("fused"))];
    const w = name === "mixtral" || name === "phimoe";
    for (const [tensor, { dtype, shape, bytes }] of before) {
      const [, layer, expert, matrix] =
        /^model\.layers\.(\d+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight$/.exec(tensor) ?? [];
      if (expert === undefined) {
        const renamed = w
          ? tensor.replace("block_sparse_moe.gate", name === "phimoe" ? "mlp.router" : "mlp.gate")
          : tensor;
        expect(after.get(renamed)?.bytes.equals(bytes), tensor).toBe(true);
        expect(after.get(renamed)?.shape).toEqual(shape);
        continue;
      }
      const role = matrix === "w2" || matrix === "down_proj" ? "down_proj" : "gate_up_proj";
      const all = after.get(`model.layers.${layer}.mlp.experts.${role}`) as Raw;
      const [rows = 0, columns = 0] = shape;
      const times = role === "down_proj" ? 1 : 2;
      expect([all.dtype, all.shape.slice(1)]).toEqual([dtype, [times * rows, columns]]);
      const second = matrix === "w3" || matrix === "up_proj";
      const from = (Number(expert) * times + Number(second)) * bytes.length;
      expect(all.bytes.subarray(from, from + bytes.length).equals(bytes), tensor).toBe(true);
    }
    expect(fused.totals.target.tensors).toBeLessThan(before.size);
    expect(fused.totals.target.bytes).toBe(fused.totals.source.bytes);
    expect(await readFile(path("fused", "config.json"))).toEqual(await readFile(join(fixture(name), "config.json")));

    await convertCheckpoint(path("fused"), path("back"), { experts: "separate" });
    if (name !== "mixtral") await expectCopies(fixture(name), path("back"));
    else {
      // Its experts lay in several files each; fused, they are in one.
      const back = await rawTensors(path("back"));
      expect([...back.keys()].sort()).toEqual([...before.keys()].sort());
      for (const [tensor, { bytes }] of before) expect(back.get(tensor)?.bytes.equals(bytes)).toBe(true);
    }
  });

  it("fuses and converts at once", async () => {
    await convertCheckpoint(fixture("mixtral"), path("both"), { experts: "fused", dtype: "bf16", shardBytes: 60_000 });
    await convertCheckpoint(fixture("mixtral"), path("first"), { experts: "fused" });
    await convertCheckpoint(path("first"), path("then"), { dtype: "bf16", shardBytes: 60_000 });
    await expectCopies(path("both"), path("then"));
  });

  it.each([
    ["granitemoe", "separate", /"granitemoe" has one layout of experts only; those with two are deepseek_v2/],
    ["gpt_oss", "separate", /"gpt_oss" has one layout/],
    ["jetmoe", "fused", /"jetmoe" has one layout/],
    ["deepseek_v3_fp8", "fused", /is stored as F8_E4M3; only F32, F16 and BF16 experts can change their layout/],
  ] as const)("refuses %s to %s", async (name, experts, message) => {
    await expect(convertCheckpoint(fixture(name), path("out"), { experts })).rejects.toThrow(message);
    expect(await readdir(root)).toEqual([]);
  });

  it("refuses missing experts, other shapes and both layouts at once", async () => {
    const matrix = { ...f32(1, 2), shape: [1, 2] };
    const name = (e: number, which: string): string => `m.mlp.experts.${e}.${which}_proj.weight`;
    const all = Object.fromEntries([0, 1].flatMap((e) => ["gate", "up"].map((which) => [name(e, which), matrix])));
    const attempt = async (tensors: Parameters<typeof encoded>[0]): Promise<unknown> => {
      await write(path("in"), { "model.safetensors": await encoded(tensors), "config.json": '{"model_type":"olmoe"}' });
      return convertCheckpoint(path("in"), path("out"), { experts: "fused" });
    };
    const { [name(0, "up")]: _, ...lacking } = all;
    await expect(attempt(lacking)).rejects.toThrow(/expert 0 lacks "m\.mlp\.experts\.0\.up_proj\.weight"/);
    await expect(attempt({ ...all, [name(1, "up")]: { ...matrix, shape: [2, 1] } })).rejects.toThrow(/has \[2,1\] in/);
    await expect(attempt({ ...all, [name(7, "up")]: matrix })).rejects.toThrow(
      /expert 7, but earlier experts are missing/,
    );
    await expect(attempt({ ...all, "m.mlp.experts.gate_up_proj": { ...f32(1), shape: [1, 1, 1] } })).rejects.toThrow(
      /two tensors would be named "m\.mlp\.experts\.gate_up_proj"/,
    );
    const half = { dtype: "BF16", shape: [1, 2], bytes: new Uint8Array(4) };
    await expect(attempt({ ...all, [name(1, "gate")]: half })).rejects.toThrow(/is BF16, others F32; ask for a dtype/);
  });
});

describe("shards", () => {
  it("splits and joins, with an index that others read", async () => {
    await convertCheckpoint(fixture("olmoe"), path("many"), { shardBytes: 100_000 });
    const index = JSON.parse(await readFile(path("many", "model.safetensors.index.json"), "utf8"));
    const raw = await rawTensors(path("many"));
    expect(index.weight_map).toEqual(Object.fromEntries([...raw].map(([name, { file }]) => [name, file])));
    const sizes = new Map<string, number>();
    for (const { file, bytes } of raw.values()) sizes.set(file, (sizes.get(file) ?? 0) + bytes.length);
    expect(index.metadata.total_size).toBe([...sizes.values()].reduce((a, b) => a + b, 0));
    expect([...sizes.keys()]).toEqual(
      sizes.size > 3 ? expect.arrayContaining(["model-00001-of-00005.safetensors"]) : [],
    );
    for (const size of sizes.values()) expect(size).toBeLessThanOrEqual(100_000);
    const joined = await convertCheckpoint(path("many"), path("one"), { shardBytes: 1e9 });
    await expectCopies(fixture("olmoe"), path("one"));
    expect(joined.files.leftOut).toEqual([
      { name: "model.safetensors.index.json", reason: "there is one file of weights now" },
    ]);
  });

  it("keeps files that need no change, and the entries of the index", async () => {
    const { files } = await convertCheckpoint(fixture("mixtral"), path("out"), { dtype: "f16" });
    expect(files.target.filter(({ copied }) => copied).map(({ name }) => name)).not.toContain("config.json");
    const index = JSON.parse(await readFile(path("out", "model.safetensors.index.json"), "utf8"));
    expect(index.metadata).toEqual({ total_parameters: 119_616, total_size: 478_464 / 2 });
  });

  it("gives a tensor larger than a shard a file of its own", async () => {
    const { files } = await convertCheckpoint(fixture("olmoe"), path("out"), { shardBytes: 1 });
    const raw = await rawTensors(path("out"));
    expect(files.target.filter(({ name }) => /^model-/.test(name))).toHaveLength(raw.size);
  });
});

it("converts checkpoints of any tensors, and every byte is where the certificate says", {
  timeout: 120_000,
}, async () => {
  const sizes = { F32: 4, F16: 2, BF16: 2, I64: 8, U8: 1, F8_E4M3: 1, BOOL: 1, I32: 4 };
  const tensor = fc.record({
    name: fc.string({ minLength: 1, maxLength: 12 }).filter((name) => !name.includes("__")),
    dtype: fc.constantFrom(...(Object.keys(sizes) as (keyof typeof sizes)[])),
    shape: fc.array(fc.integer({ min: 0, max: 5 }), { maxLength: 3 }),
    file: fc.integer({ min: 0, max: 2 }),
    seed: fc.nat(),
  });
  let run = 0;
  await fc.assert(
    fc.asyncProperty(
      fc.uniqueArray(tensor, { selector: ({ name }) => name, minLength: 1, maxLength: 9 }),
      fc.record(
        {
          dtype: fc.constantFrom("f32", "f16", "bf16"),
          shardBytes: fc.integer({ min: 1, max: 300 }),
          saturate: fc.constant(true),
        },
        { requiredKeys: ["saturate"] },
      ),
      async (list, options) => {
        const [source, target] = [path(`in${run}`), path(`out${run++}`)];
        const files = [...new Set(list.map(({ file }) => file))];
        const single = files.length === 1;
        const nameOf = (file: number): string => (single ? "model.safetensors" : `model-${file}.safetensors`);
        const contents: Record<string, Uint8Array | string> = { "config.json": "{}", "notes.md": "x" };
        for (const file of files) {
          const own = list.filter((one) => one.file === file);
          contents[nameOf(file)] = await encoded(
            Object.fromEntries(
              own.map(({ name, dtype, shape, seed }) => {
                const bytes = Uint8Array.from({ length: shape.reduce((a, b) => a * b, 1) * sizes[dtype] }, (_, i) =>
                  dtype === "BOOL" ? i & 1 : (Math.imul(seed + i, 2_654_435_761) >>> 24) & 0xff,
                );
                return [name, { dtype, shape, bytes }];
              }),
            ),
          );
        }
        if (!single) {
          const map = Object.fromEntries(list.map(({ name, file }) => [name, nameOf(file)]));
          contents["model.safetensors.index.json"] = JSON.stringify({ weight_map: map });
        }
        await write(source, contents);
        const { tensors, totals } = await convertCheckpoint(source, target, options as ConvertOptions);
        const [before, after] = [await rawTensors(source), await rawTensors(target)];
        expect(totals.source.tensors).toBe(list.length);
        expect(tensors.map(({ name }) => name).sort()).toEqual([...before.keys()].sort());
        for (const { name, to } of tensors) {
          const [range] = to;
          const [old, fresh] = [before.get(name) as Raw, after.get(name) as Raw];
          expect(range).toEqual({ name, dtype: fresh.dtype, file: fresh.file, from: 0, to: fresh.bytes.length });
          if (old.dtype === fresh.dtype) expect(fresh.bytes.equals(old.bytes)).toBe(true);
          else {
            const n = old.shape.reduce((a, b) => a * b, 1);
            const most = fresh.dtype === "F16" ? 65_504 : 2 ** 127 * (2 - 2 ** -7);
            for (let i = 0; i < n; i++) {
              const x = nearestOf(valueAt(old.bytes, old.dtype, i), fresh.dtype);
              const expected = Number.isFinite(valueAt(old.bytes, old.dtype, i))
                ? Math.max(-most, Math.min(most, x))
                : x;
              expect(valueAt(fresh.bytes, fresh.dtype, i)).toBe(fresh.dtype === "F32" ? x : expected);
            }
          }
        }
        await openCheckpoint(target).then((checkpoint) => checkpoint.close());
      },
    ),
    { numRuns: 40 },
  );
});

describe("the certificate", () => {
  it("notices a wrong byte, a missing tensor and one too many", async () => {
    const origin = async (folder: string) => {
      const checkpoint = await openCheckpoint(folder);
      return { origin: await readOrigin(folder, await folderFiles(folder), checkpoint), checkpoint };
    };
    const tensors = { a: f32(1, 2, 3), b: f32(4) };
    const save = async (folder: string, content: Parameters<typeof encoded>[0]) =>
      write(path(folder), { "model.safetensors": await encoded(content), "config.json": "{}" });
    await save("in", tensors);
    await save("wrong", { ...tensors, a: f32(1, 2, 4) });
    await save("missing", { a: tensors.a });
    await save("more", { ...tensors, c: f32(1) });
    await save("other", { ...tensors, a: { ...f32(1, 2, 3), shape: [3, 1] } });
    const { origin: from, checkpoint: source } = await origin(path("in"));
    const check = async (folder: string): Promise<unknown> => {
      const { checkpoint } = await origin(path(folder));
      return compareTensors(from, checkpoint, new Map(), {}).finally(() => checkpoint.close());
    };
    await expect(check("in")).resolves.toMatchObject({ totals: { same: 2 } });
    await expect(check("wrong")).rejects.toThrow(/damaged: byte 10 of "a" is not what "a" of the source gives/);
    await expect(check("missing")).rejects.toThrow(/not complete: "b" is not there/);
    await expect(check("more")).rejects.toThrow(/bytes 0 to 4 of the written "c" have no source/);
    await expect(check("other")).rejects.toThrow(/"a" is \[3\], but "a" there is \[3,1\]/);
    await source.close();
  });

  it("is worked out before the files count: what it throws leaves the folder as it was", async () => {
    await write(path("out"), { "config.json": "old", "model.safetensors": "old" });
    const file = { name: "config.json", content: () => [Buffer.from("new")] };
    const verify = async (open: (name: string) => Promise<{ size: number; close(): Promise<void> } | undefined>) => {
      const found = await open("config.json");
      expect(found?.size).toBe(3);
      await found?.close();
      expect(await open("other.json")).toBeUndefined();
      throw new Error("not what was asked for");
    };
    await expect(saveFiles(path("out"), [file], { last: "config.json", verify })).rejects.toThrow(
      /nothing was changed/,
    );
    expect(await readdir(path("out"))).toEqual(["config.json", "model.safetensors"]);
    expect(await readFile(path("out", "config.json"), "utf8")).toBe("old");
  });
});

describe("folders", () => {
  it("refuses the source, folders in it, and what is not empty", async () => {
    await cp(fixture("olmoe"), path("in"), { recursive: true });
    await symlink(path("in"), path("link"));
    const before = await readdir(path("in"));
    await expect(convertCheckpoint(path("in"), path("in"))).rejects.toThrow(/is the source folder itself/);
    await expect(convertCheckpoint(path("in"), path("link"))).rejects.toThrow(/is the source folder itself/);
    await expect(convertCheckpoint(path("in"), path("link", "a", "b"))).rejects.toThrow(/lies in the source folder/);
    await expect(convertCheckpoint(path("link"), path("in", "out"))).rejects.toThrow(/lies in the source folder/);
    expect(await readdir(path("in"))).toEqual(before);
    await write(path("full"), { "notes.txt": "mine" });
    await expect(convertCheckpoint(path("in"), path("full"))).rejects.toThrow(
      /not empty: it holds "notes\.txt".*replace/,
    );
    await expect(convertCheckpoint(path("nowhere"), path("out"))).rejects.toThrow(/nowhere has no config\.json/);
  });

  it("replaces an earlier checkpoint whole, and leaves what is not part of one", async () => {
    await convertCheckpoint(fixture("mixtral"), path("out"));
    await write(path("out"), { "notes.txt": "mine", "merges.txt": "of the earlier tokenizer" });
    await convertCheckpoint(fixture("olmoe"), path("out"), { replace: true });
    expect((await readdir(path("out"))).sort()).toEqual([...(await readdir(fixture("olmoe"))), "notes.txt"].sort());
  });

  it("follows no link out, and copies no folder and no other weights, but names them", async () => {
    await cp(fixture("olmoe"), path("in"), { recursive: true });
    await write(path("elsewhere"), { secret: "x" });
    await write(path("in", "original"), { a: "x" });
    await symlink(path("elsewhere", "secret"), path("in", "vocab.txt"));
    await write(path("in"), { "consolidated.safetensors": "x" });
    const { files } = await convertCheckpoint(path("in"), path("out"), { dtype: "bf16" });
    expect(files.leftOut).toEqual([
      { name: "consolidated.safetensors", reason: "other weights, which would not be the converted ones" },
      { name: "original", reason: "a folder" },
      { name: "vocab.txt", reason: "a link that leads out of the folder" },
    ]);
    expect((await readdir(path("out"))).sort()).toEqual((await readdir(fixture("olmoe"))).sort());
  });

  it("reads the cache of the Hugging Face Hub, whose files are links, and writes files", async () => {
    const [snapshot, blobs] = [path("models--a", "snapshots", "0123"), path("models--a", "blobs")];
    await cp(fixture("olmoe"), blobs, { recursive: true });
    await mkdir(snapshot, { recursive: true });
    for (const name of await readdir(blobs)) await symlink(join("..", "..", "blobs", name), join(snapshot, name));
    const { files } = await convertCheckpoint(snapshot, path("out"));
    await expectCopies(fixture("olmoe"), path("out"));
    expect(files.leftOut).toEqual([]);
    expect((await readdir(path("out"), { withFileTypes: true })).every((entry) => entry.isFile())).toBe(true);
  });

  it("reads an interrupted save through its record", async () => {
    // Killed when all was written: the new files count, under their temporary names.
    const weights = await encoded({ a: f32(1) });
    await write(path("in"), {
      ".switchyard-save.json": JSON.stringify({
        ...{ version: 1, tag: "0123abcd", last: "config.json", files: ["config.json", "model.safetensors"] },
        stale: ["tokenizer.json"],
      }),
      ".config.json.0123abcd.new": "{}",
      ".model.safetensors.0123abcd.new": weights,
      "tokenizer.json": "old",
    });
    await convertCheckpoint(path("in"), path("out"));
    expect((await readdir(path("out"))).sort()).toEqual(["config.json", "model.safetensors"]);
    expect(weights.equals(await readFile(path("out", "model.safetensors")))).toBe(true);
  });

  it("ends at a signal and leaves nothing", async () => {
    const control = new AbortController();
    const stages = new Set<string>();
    const onProgress: ConvertOptions["onProgress"] = ({ stage, done, total }) => {
      expect(done).toBeLessThanOrEqual(total);
      stages.add(stage);
      if (stage === "comparing") control.abort(new Error("enough"));
    };
    const run = convertCheckpoint(fixture("olmoe"), path("out"), { dtype: "f16", onProgress, signal: control.signal });
    await expect(run).rejects.toThrow(/^enough$/);
    expect([...stages]).toEqual(["writing", "comparing"]);
    expect(await readdir(root)).toEqual([]);
  });
});
