// Folders: opening whole and sharded checkpoints, reading ranges, saving all or nothing.
import { mkdtemp, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { CheckpointError } from "@switchyard/core";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { openCheckpoint, readCheckpoint } from "./checkpoint.ts";
import { type FileToSave, saveFiles } from "./files.ts";
import { bytesSource, encodeSafetensors } from "./safetensors.ts";

let folder = "";
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), "switchyard-models-"));
});
afterEach(() => rm(folder, { recursive: true, force: true }));

const text = (value: string): Uint8Array => new TextEncoder().encode(value);
const plain = (name: string, content: string): FileToSave => ({ name, content: () => [text(content)] });
const weights = (file: string, tensors: Record<string, number[]>): FileToSave => ({
  name: file,
  content: () =>
    encodeSafetensors(
      Object.entries(tensors).map(([name, values]) => ({
        name,
        dtype: "F32",
        shape: [values.length],
        bytes: () => new Uint8Array(Float32Array.from(values).buffer),
      })),
    ),
});
const last = { last: "config.json" };

describe("openCheckpoint", () => {
  it("lists, describes and reads whole tensors and ranges", async () => {
    await saveFiles(
      folder,
      [plain("config.json", '{"a":1}'), weights("model.safetensors", { x: [1, 2, 3], y: [] })],
      last,
    );
    const checkpoint = await openCheckpoint(folder);
    expect(checkpoint.config).toEqual({ a: 1 });
    expect(checkpoint.names).toEqual(["x", "y"]);
    expect(checkpoint.stored("x")).toEqual({ shape: [3], dtype: "F32", bytes: 12 });
    expect([...new Float32Array((await checkpoint.read("x")).buffer)]).toEqual([1, 2, 3]);
    expect([...new Float32Array((await checkpoint.read("x", [4, 12])).buffer)]).toEqual([2, 3]);
    expect((await checkpoint.read("y")).length).toBe(0);
    await expect(checkpoint.read("x", [4, 16])).rejects.toThrow(/bytes 4 to 16 of tensor "x": it has 12/);
    await expect(checkpoint.read("z")).rejects.toThrow(/no tensor "z"/);
    expect(() => checkpoint.stored("toString")).toThrow(CheckpointError);
    expect(await checkpoint.json("tokenizer.json")).toBeUndefined();
    await checkpoint.close();
  });

  it("reads shards through their index", async () => {
    const index = { weight_map: { x: "model-1.safetensors", y: "model-2.safetensors" } };
    await saveFiles(
      folder,
      [
        plain("config.json", "{}"),
        plain("model.safetensors.index.json", JSON.stringify(index)),
        weights("model-1.safetensors", { x: [1] }),
        weights("model-2.safetensors", { y: [2, 3] }),
      ],
      last,
    );
    const checkpoint = await openCheckpoint(folder);
    expect([...checkpoint.names].sort()).toEqual(["x", "y"]);
    expect([...new Float32Array((await checkpoint.read("y")).buffer)]).toEqual([2, 3]);
    await checkpoint.close();
  });

  it("keeps reading the file it opened when a later save replaces it", async () => {
    const save = (value: number) =>
      saveFiles(folder, [plain("config.json", "{}"), weights("model.safetensors", { x: [value] })], last);
    await save(1);
    const checkpoint = await openCheckpoint(folder);
    await save(2);
    expect(new Float32Array((await checkpoint.read("x")).buffer)[0]).toBe(1);
    await checkpoint.close();
  });

  const open = (files: Record<string, string | Uint8Array>) =>
    readCheckpoint(async (name) => {
      const content = files[name];
      return content === undefined
        ? undefined
        : bytesSource(name, typeof content === "string" ? text(content) : content);
    }, "here");
  it.each([
    ["no config", {}, /here has no config.json/],
    ["a damaged config", { "config.json": '{"a":' }, /config.json is not valid JSON/],
    ["a list for a config", { "config.json": "[]" }, /must hold a JSON object/],
    ["no weights", { "config.json": "{}" }, /here has no model.safetensors/],
    ["an index without a map", { "config.json": "{}", "model.safetensors.index.json": "{}" }, /no weight_map/],
    [
      "an index that leads out of the folder",
      { "config.json": "{}", "model.safetensors.index.json": '{"weight_map":{"x":"../y.safetensors"}}' },
      /places "x" in .*no file name/,
    ],
    [
      "a tensor that its shard lacks",
      {
        "config.json": "{}",
        "model.safetensors.index.json": '{"weight_map":{"x":"y.safetensors"}}',
        "y.safetensors": Uint8Array.of(2, 0, 0, 0, 0, 0, 0, 0, 0x7b, 0x7d),
      },
      /lacks the tensor "x"/,
    ],
  ])("refuses %s", async (_, files, message) => {
    await expect(open(files)).rejects.toThrow(message);
    await expect(open(files)).rejects.toSatisfy(CheckpointError.isInstance);
  });
  it("refuses a folder that is not there", async () => {
    await expect(openCheckpoint(join(folder, "nowhere"))).rejects.toThrow(/has no config.json/);
  });
});

describe("saveFiles", () => {
  const state = async (): Promise<Record<string, string>> =>
    Object.fromEntries(
      await Promise.all(
        (await readdir(folder)).sort().map(async (name) => [name, await readFile(join(folder, name), "utf8")] as const),
      ),
    );
  const failing = (name: string): FileToSave => ({
    name,
    async *content() {
      yield text("half");
      throw new Error("the device went away");
    },
  });

  it("replaces files, removes stale ones and leaves strangers alone", async () => {
    await saveFiles(folder, [plain("config.json", "1"), plain("a", "1"), plain("stale", "1")], last);
    await writeFile(join(folder, "mine"), "kept");
    await saveFiles(folder, [plain("config.json", "2"), plain("a", "2")], {
      ...last,
      isStale: (name) => name === "stale",
    });
    expect(await state()).toEqual({ a: "2", "config.json": "2", mine: "kept" });
  });

  it("leaves the earlier files untouched when writing fails, and no temporary file", async () => {
    await saveFiles(folder, [plain("config.json", "1"), plain("a", "1")], last);
    await expect(saveFiles(folder, [plain("config.json", "2"), failing("a")], last)).rejects.toThrow(
      /cannot save to .*the device went away; nothing was changed/,
    );
    expect(await state()).toEqual({ a: "1", "config.json": "1" });
  });

  it("puts everything back when a rename fails half-way", async () => {
    await saveFiles(folder, [plain("config.json", "1"), plain("a", "1")], last);
    // A file that must leave but cannot be renamed: with its tag the name would be longer than 255 bytes.
    const stubborn = "s".repeat(250);
    await writeFile(join(folder, stubborn), "x");
    const save = saveFiles(folder, [plain("config.json", "2"), plain("a", "2"), plain("b", "2")], {
      ...last,
      isStale: (name) => name === stubborn,
    });
    await expect(save).rejects.toThrow(/cannot save to .*; nothing was changed/);
    expect(await state()).toEqual({ a: "1", "config.json": "1", [stubborn]: "x" });
  });

  it("removes the folders it made when it fails", async () => {
    const deep = join(folder, "x", "y");
    await expect(saveFiles(deep, [failing("a")], last)).rejects.toThrow();
    expect(await readdir(folder)).toEqual([]);
    await saveFiles(deep, [plain("config.json", "1")], last);
    expect(await readdir(deep)).toEqual(["config.json"]);
  });

  it.each([
    ["ENOSPC", "the disk is full"],
    ["EACCES", "permission denied"],
    ["EROFS", "the file system is read-only"],
  ])("says %s in words", async (code, words) => {
    const broken: FileToSave = {
      name: "a",
      async *content() {
        yield text("half");
        throw Object.assign(new Error(`${code}: from the system`), { code });
      },
    };
    const save = saveFiles(folder, [broken], last);
    await expect(save).rejects.toThrow(`cannot save to ${folder}: ${words}; nothing was changed`);
    await expect(save).rejects.toSatisfy(CheckpointError.isInstance);
    expect(await readdir(folder)).toEqual([]);
  });

  it("says what is wrong with the place", async () => {
    await writeFile(join(folder, "file"), "");
    const save = saveFiles(join(folder, "file", "run"), [plain("config.json", "1")], last);
    await expect(save).rejects.toThrow(/cannot make the folder .*: a part of the path is a file/);
    await expect(save).rejects.toSatisfy(CheckpointError.isInstance);
  });
});
