// Folders: opening whole and sharded checkpoints, reading ranges, saving all or nothing.
import { execFileSync } from "node:child_process";
import { mkdir, mkdtemp, readdir, readFile, rename, rm, symlink, writeFile } from "node:fs/promises";
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
    const target = new Uint8Array(16);
    await checkpoint.readInto?.(target.subarray(4, 12), "x", 4);
    expect([...new Float32Array(target.buffer)]).toEqual([0, 2, 3, 0]);
    await expect(checkpoint.readInto?.(target, "x", 0)).rejects.toThrow(/bytes 0 to 16 of tensor "x": it has 12/);
    await expect(checkpoint.readInto?.(target.subarray(0, 4), "x", -4)).rejects.toThrow(CheckpointError);
    const got: number[] = [];
    const put = (bytes: Uint8Array, at: number): void => {
      for (const [i, byte] of bytes.entries()) got[at + i] = byte;
    };
    await checkpoint.readParts?.([{ name: "x", from: 3, to: 12, put }]);
    expect(got).toEqual([...(await checkpoint.read("x", [3, 12]))]);
    const part = { name: "x", from: 0, to: 12, put: () => expect.fail("nothing may be read") };
    await expect(checkpoint.readParts?.([part, { ...part, to: 16 }])).rejects.toThrow(
      /bytes 0 to 16 of tensor "x": it has/,
    );
    await expect(checkpoint.readParts?.([part, { ...part, name: "z" }])).rejects.toThrow(/no tensor "z"/);
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
  const placed = (file: string) => ({
    "config.json": "{}",
    "model.safetensors.index.json": JSON.stringify({ weight_map: { x: file } }),
  });
  it.each([
    "../y.safetensors",
    "sub/y.safetensors",
    "/tmp/y.safetensors",
    "..\\y.safetensors",
    "C:\\y.safetensors",
    "C:y.safetensors",
    "\\\\server\\share\\y.safetensors",
    "y\u0000.safetensors",
    "nul.safetensors",
    "COM1.safetensors",
    "y.txt",
    `${"y".repeat(250)}.safetensors`,
    "",
    ".",
    "..",
  ])("refuses an index that places a tensor in %j", async (file) => {
    await expect(open(placed(file))).rejects.toThrow(/the index places "x" in .*, which is no file name/);
  });
  it.each(["pytorch_model-00001-of-00002.bin", "x.pt", "x.PTH", "x.ckpt", "x.pkl"])(
    "refuses an index that places a tensor in the pickle %s",
    async (file) => {
      await expect(open(placed(file))).rejects.toThrow(/places "x" in .*Python pickle.*any program.*save_pretrained/);
    },
  );
  it.each(["pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "model.pt", "model.pth"])(
    "says that %s is a pickle and what to do",
    async (name) => {
      const message = new RegExp(`here has no safetensors files, only "${name}".*pickle.*safe_serialization=True`);
      await expect(open({ "config.json": "{}", [name]: "" })).rejects.toThrow(message);
    },
  );
  const manyShards = Object.fromEntries(Array.from({ length: 10_001 }, (_, i) => [`t${i}`, `${i}.safetensors`]));
  const manyTensors = Object.fromEntries(Array.from({ length: 200_001 }, (_, i) => [`t${i}`, "a.safetensors"]));
  it.each([
    ["a key of the config twice", { "config.json": '{"a":1,"a":2}' }, /config.json has the key "a" twice/],
    ["__proto__ in the config", { "config.json": '{"a":[{"__proto__":{}}]}' }, /config.json has the key "__proto__"/],
    ["a deep config", { "config.json": `{"a":${"[".repeat(1e6)}` }, /config.json nests more than 64/],
    ["a config that is not UTF-8", { "config.json": Uint8Array.of(0x7b, 0xff, 0x7d) }, /config.json .*not UTF-8/],
    ["a config over 16 MB", { "config.json": `{"a":"${" ".repeat(16_000_000)}"}` }, /at most 16000000 are allowed/],
    [
      "a tensor twice in the index",
      {
        "config.json": "{}",
        "model.safetensors.index.json": '{"weight_map":{"x":"a.safetensors","x":"b.safetensors"}}',
      },
      /index.json has the key "x" twice/,
    ],
    [
      "__proto__ in the index",
      { "config.json": "{}", "model.safetensors.index.json": '{"weight_map":{"__proto__":"a.safetensors"}}' },
      /index.json has the key "__proto__"/,
    ],
    [
      "an index of 10,001 files",
      { "config.json": "{}", "model.safetensors.index.json": JSON.stringify({ weight_map: manyShards }) },
      /lists over 10000 files/,
    ],
    [
      "an index of 200,001 tensors",
      { "config.json": "{}", "model.safetensors.index.json": JSON.stringify({ weight_map: manyTensors }) },
      /lists more than 200000 tensors/,
    ],
  ])("refuses %s", async (_, files, message) => {
    await expect(open(files)).rejects.toThrow(message);
    await expect(open(files)).rejects.toSatisfy(CheckpointError.isInstance);
  });
  it("refuses a config that its source cuts short", async () => {
    const source = { ...bytesSource("config.json", text("{}")), size: 3 };
    await expect(readCheckpoint(async () => source, "here")).rejects.toThrow(/0 to 3 were asked for, 2 came back/);
  });
  it("refuses a tensor that its source cuts short", async () => {
    const parts: Uint8Array[] = [];
    for await (const part of weights("", { x: [1, 2] }).content()) parts.push(part);
    const whole = bytesSource("model.safetensors", new Uint8Array(Buffer.concat(parts)));
    const read = async (from: number, to: number) =>
      (await whole.read(from, to)).subarray(0, to === whole.size ? -1 : to);
    const open = async (name: string) =>
      name === "config.json" ? bytesSource(name, text("{}")) : name === whole.name ? { ...whole, read } : undefined;
    const checkpoint = await readCheckpoint(open, "here");
    await expect(checkpoint.read("x")).rejects.toThrow(/were asked for, 7 came back/);
  });
  it("reads a vocabulary that holds __proto__, but not twice", async () => {
    const weights = Uint8Array.of(2, 0, 0, 0, 0, 0, 0, 0, 0x7b, 0x7d);
    const files = { "config.json": "{}", "model.safetensors": weights };
    const good = await open({ ...files, "tokenizer.json": '{"vocab":{"__proto__":5}}' });
    expect(Object.entries((await good.json("tokenizer.json"))?.vocab ?? {})).toEqual([["__proto__", 5]]);
    const bad = await open({ ...files, "tokenizer.json": '{"vocab":{"a":5,"a":6}}' });
    await expect(bad.json("tokenizer.json")).rejects.toThrow(/tokenizer.json has the key "a" twice/);
  });
  it("refuses a folder that is not there", async () => {
    await expect(openCheckpoint(join(folder, "nowhere"))).rejects.toThrow(/has no config.json/);
    await saveFiles(folder, [plain("config.json", "{}")], { last: "config.json" });
    const file = join(folder, "config.json");
    await expect(openCheckpoint(file)).rejects.toThrow(/cannot read .*config\.json: it is a file, not a folder$/);
  });
});

describe.skipIf(process.platform === "win32")("links and other odd files in a folder", () => {
  const good = () => [plain("config.json", '{"a":1}'), weights("model.safetensors", { x: [1] })];
  let outside = "";
  beforeEach(async () => {
    outside = await mkdtemp(join(tmpdir(), "switchyard-outside-"));
    await saveFiles(outside, good(), last);
  });
  afterEach(() => rm(outside, { recursive: true, force: true }));

  it.each(["config.json", "model.safetensors"])("refuses %s as a link out of the folder", async (name) => {
    await saveFiles(folder, good(), last);
    await rm(join(folder, name));
    await symlink(join(outside, name), join(folder, name));
    await expect(openCheckpoint(folder)).rejects.toThrow(/it is a link that leads out of the folder, to .*followLinks/);
    await expect(openCheckpoint(folder)).rejects.toSatisfy(CheckpointError.isInstance);
    const checkpoint = await openCheckpoint(folder, { followLinks: true });
    expect(checkpoint.names).toEqual(["x"]);
    await checkpoint.close();
  });

  it("refuses a tokenizer and a shard that are such links", async () => {
    await saveFiles(folder, good(), last);
    await symlink(join(outside, "config.json"), join(folder, "tokenizer.json"));
    const checkpoint = await openCheckpoint(folder);
    await expect(checkpoint.json("tokenizer.json")).rejects.toThrow(/leads out of the folder/);
    await checkpoint.close();
    await symlink(join(outside, "model.safetensors"), join(folder, "y.safetensors"));
    await writeFile(join(folder, "model.safetensors.index.json"), '{"weight_map":{"x":"y.safetensors"}}');
    await expect(openCheckpoint(folder)).rejects.toThrow(/y.safetensors: it is a link that leads out/);
  });

  it("takes links inside the folder, and a folder that is a link itself", async () => {
    await saveFiles(folder, good(), last);
    await rename(join(folder, "model.safetensors"), join(folder, "weights"));
    await symlink("weights", join(folder, "model.safetensors"));
    await symlink(folder, join(outside, "link"));
    const checkpoint = await openCheckpoint(join(outside, "link"));
    expect(checkpoint.names).toEqual(["x"]);
    await checkpoint.close();
  });

  it("takes the layout of the Hub's cache, and only its blobs", async () => {
    const [blobs, snapshot] = [
      join(folder, "models--a--b", "blobs"),
      join(folder, "models--a--b", "snapshots", "0f3a"),
    ];
    await mkdir(snapshot, { recursive: true });
    await saveFiles(blobs, good(), last);
    for (const name of ["config.json", "model.safetensors"]) {
      await symlink(join("..", "..", "blobs", name), join(snapshot, name));
    }
    const checkpoint = await openCheckpoint(snapshot);
    expect(checkpoint.names).toEqual(["x"]);
    await checkpoint.close();
    await rm(join(snapshot, "model.safetensors"));
    await symlink(join("..", "..", "refs"), join(snapshot, "model.safetensors"));
    await writeFile(join(folder, "models--a--b", "refs"), "x");
    await expect(openCheckpoint(snapshot)).rejects.toThrow(/leads out of the folder/);
  });

  it("refuses a link that leads to itself, a folder and a pipe, and does not wait for its writer", async () => {
    await saveFiles(folder, good(), last);
    const path = join(folder, "model.safetensors");
    await rm(path);
    await symlink("model.safetensors", path);
    await expect(openCheckpoint(folder)).rejects.toThrow(/cannot read .*: a link leads back to itself/);
    await rm(path);
    await mkdir(path);
    await expect(openCheckpoint(folder)).rejects.toThrow(/model.safetensors: it is not a file/);
    await rm(path, { recursive: true });
    execFileSync("mkfifo", [path]);
    await expect(openCheckpoint(folder)).rejects.toThrow(/model.safetensors: it is not a file/);
  });

  it("names the pickle it finds, whatever it is called", async () => {
    await saveFiles(folder, [plain("config.json", "{}"), plain("weights-7.pth", "x"), plain("a.bin.txt", "x")], last);
    await expect(openCheckpoint(folder)).rejects.toThrow(/has no safetensors files, only "weights-7.pth".*pickle/);
    await rm(join(folder, "weights-7.pth"));
    await expect(openCheckpoint(folder)).rejects.toThrow(/has no model.safetensors$/);
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
    const inTheWay = saveFiles(join(folder, "file"), [plain("config.json", "1")], last);
    await expect(inTheWay).rejects.toThrow(/cannot make the folder .*file: a file of that name is in the way/);
  });

  it.skipIf(process.platform !== "linux")(
    "refuses a file system that takes no folders, and does not wait",
    async () => {
      const save = saveFiles("/proc/no-such/model", [plain("config.json", "1")], last);
      await expect(save).rejects.toThrow(
        "cannot make the folder /proc/no-such/model: /proc takes no new folders; choose another place",
      );
    },
  );

  it("makes the folders above, and takes them away again where saving fails", async () => {
    const deep = join(folder, "a", "b", "c");
    const broken: FileToSave = {
      name: "a",
      async *content() {
        yield text("half");
        throw new Error("half-way");
      },
    };
    await expect(saveFiles(deep, [broken], last)).rejects.toThrow("half-way; nothing was changed");
    expect(await readdir(folder)).toEqual([]);
    await saveFiles(deep, [plain("config.json", "1")], last);
    expect(await readdir(deep)).toEqual(["config.json"]);
  });
});
