// Saves whose process is killed: a layer over the file system stops the program at its n-th operation, for every n, and
// the folder must then hold the earlier checkpoint or the new one, whole.
import { cp, mkdtemp, readdir, readFile, rm, symlink, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { CheckpointError } from "@switchyard/core";
import { topK } from "@switchyard/routers/top-k";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { openCheckpoint } from "./checkpoint.ts";
import { convertCheckpoint } from "./convert.ts";
import { type FileToSave, fileSource, finishSave, saveFiles } from "./files.ts";
import { loudModel, makeEngine, plainTopK, smallConfig } from "./models.test-util.ts";
import { loadModel, saveModel } from "./pretrained.ts";
import { encodeSafetensors } from "./safetensors.ts";
import { saveTuned } from "./tuning/save-tuned.ts";

/** `left`: operations until the end; `mode`: the process dies there, or that one operation fails. */
const fate = vi.hoisted(() => ({
  left: Number.POSITIVE_INFINITY,
  mode: "kill" as "kill" | "fail",
  /** With "fail": so many operations later another one fails, perhaps while the first failure is undone. */
  again: 0,
  log: [] as string[],
}));

vi.mock("./built-in.ts", async (original) => {
  const { builtIn } = await original<typeof import("./built-in.ts")>();
  /** True where the operation must not take place. */
  const ends = (what: string): boolean => {
    fate.log.push(what);
    fate.left--;
    return fate.mode === "kill" ? fate.left < 0 : fate.left === -1 || fate.left === -1 - fate.again;
  };
  const wrapped =
    <A extends unknown[], R>(what: string, act: (...args: A) => Promise<R>) =>
    async (...args: A): Promise<R> => {
      if (ends(what)) throw Object.assign(new Error(`stopped at ${what}`), { code: "EIO" });
      return act(...args);
    };
  return {
    builtIn: async (name: "node:fs/promises") => {
      const real = await builtIn(name);
      if (name !== "node:fs/promises") return real;
      return {
        ...real,
        ...Object.fromEntries(
          (["mkdir", "readdir", "rename", "rm", "rmdir"] as const).map((each) => [
            each,
            wrapped(each, real[each] as (...args: unknown[]) => Promise<unknown>),
          ]),
        ),
        open: wrapped("open", async (path: string, flags: string | number) => {
          const handle = await real.open(path, flags);
          return {
            stat: () => handle.stat(),
            read: handle.read.bind(handle),
            // Counted but not done: a killed process loses nothing that it wrote, and the tests would wait for the disk.
            sync: wrapped("sync", async () => undefined),
            // The operating system closes the files of a dead process.
            close: () => handle.close(),
            async write(piece: Uint8Array, from: number, length: number) {
              if (!ends("write")) return handle.write(piece, from, length);
              await handle.write(piece, from, length >> 1);
              throw new Error("stopped in the middle of a write");
            },
          };
        }),
      };
    },
  };
});

/** Runs `act` with all operations up to the n-th; says whether it came to its end. */
async function upTo(n: number, mode: "kill" | "fail", act: () => Promise<unknown>): Promise<boolean> {
  Object.assign(fate, { left: n, mode, log: [] });
  try {
    await act();
    return true;
  } catch (error) {
    if (!CheckpointError.isInstance(error)) throw error;
    return false;
  } finally {
    fate.left = Number.POSITIVE_INFINITY;
  }
}

let folder = "";
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), "switchyard-killed-"));
});
afterEach(() => rm(folder, { recursive: true, force: true }));

const plain = (name: string, content: string): FileToSave => ({ name, content: () => [Buffer.from(content)] });
const shard = (name: string, tensors: Record<string, number>): FileToSave => ({
  name,
  content: () =>
    encodeSafetensors(
      Object.entries(tensors).map(([name, value]) => ({
        name,
        dtype: "F32",
        shape: [1],
        bytes: () => new Uint8Array(Float32Array.of(value).buffer),
      })),
    ),
});

/** A checkpoint of this many shards (0: one file without an index) whose every part knows the number of the save. */
function content(save: number, shards: number): FileToSave[] {
  const rest = [plain("config.json", `{"save":${save}}`), plain("tokenizer.json", `{"save":${save}}`)];
  if (shards === 0) return [shard("model.safetensors", { a: save, b: save }), ...rest];
  const files = Array.from({ length: shards }, (_, i) => `model-${i + 1}-of-${shards}.safetensors`);
  const map = Object.fromEntries(files.map((file, i) => [`x${i}`, file]));
  return [
    ...files.map((file, i) => shard(file, { [`x${i}`]: save })),
    plain("model.safetensors.index.json", JSON.stringify({ weight_map: map })),
    ...rest,
  ];
}
const options = { last: "config.json", isStale: (name: string) => /^(model|tokenizer)/.test(name) };

/** Opens the folder and reads all of it: the numbers of the saves that its parts come from. */
async function found(): Promise<{ saves: Set<unknown>; names: readonly string[] }> {
  const checkpoint = await openCheckpoint(folder);
  const saves = new Set<unknown>([checkpoint.config.save, (await checkpoint.json("tokenizer.json"))?.save]);
  for (const name of checkpoint.names) saves.add(new Float32Array((await checkpoint.read(name)).buffer)[0]);
  await checkpoint.close();
  return { saves, names: checkpoint.names };
}

/** What a program sees that knows nothing of our record: undefined where it refuses the folder. */
async function seenByOthers(): Promise<Set<unknown> | undefined> {
  const names = await readdir(folder);
  if (!names.includes("config.json")) return undefined;
  const saves = new Set<unknown>();
  for (const name of names.filter((name) => /^(config|tokenizer)\.json$/.test(name))) {
    saves.add(JSON.parse(await readFile(join(folder, name), "utf8")).save);
  }
  for (const name of names.filter((name) => /^model.*\.safetensors$/.test(name))) {
    const bytes = await readFile(join(folder, name));
    saves.add(bytes.readFloatLE(bytes.length - 4));
  }
  return saves;
}

it("a conversion killed at any operation leaves the earlier checkpoint or the new one", async () => {
  const source = await mkdtemp(join(tmpdir(), "switchyard-killed-source-"));
  try {
    await saveFiles(source, content(2, 3), options);
    const kinds = new Set<unknown>();
    for (let n = 0; ; n++) {
      await rm(folder, { recursive: true, force: true });
      await saveFiles(folder, content(1, 2), options);
      await writeFile(join(folder, "notes.txt"), "mine");
      const convert = () => convertCheckpoint(source, folder, { replace: true, dtype: "bf16", shardBytes: 4 });
      const done = await upTo(n, "kill", convert);
      const what = `killed at operation ${n} (${fate.log.slice(0, n + 1).join(" ")})`;
      const checkpoint = await openCheckpoint(folder);
      const types = new Set(checkpoint.names.map((name) => checkpoint.stored(name).dtype));
      const [save] = [checkpoint.config.save];
      kinds.add(save);
      expect([[...types], checkpoint.names.length], what).toEqual(save === 1 ? [["F32"], 2] : [["BF16"], 3]);
      await checkpoint.close();
      const others = await seenByOthers();
      if (others) expect(others.has(1), what).not.toBe(others.has(2));
      if (done) {
        expect(save).toBe(2);
        break;
      }
    }
    expect([...kinds]).toEqual([1, 2]);
  } finally {
    await rm(source, { recursive: true });
  }
});

it("a tuned checkpoint killed at any operation is the earlier one or the new one", async () => {
  const source = await mkdtemp(join(tmpdir(), "switchyard-killed-source-"));
  const on = makeEngine();
  try {
    await saveModel(
      loudModel(on, { ...smallConfig, qkNorm: "projection", headSize: 2, router: topK({ k: 2 }) }),
      source,
    );
    const shards = `${source}-shards`;
    await convertCheckpoint(source, shards, { shardBytes: 4000 });
    const norm = on.tensor(
      Float32Array.from({ length: smallConfig.width }, (_, i) => i),
      [smallConfig.width],
    );
    const bytesOf = async (where: string): Promise<Map<string, Buffer>> => {
      const checkpoint = await openCheckpoint(where);
      const found = new Map<string, Buffer>();
      for (const name of checkpoint.names) found.set(name, Buffer.from(await checkpoint.read(name)));
      await checkpoint.close();
      return found;
    };
    const before = await bytesOf(shards);
    const seen = new Set<boolean>();
    for (let n = 0; ; n += 3) {
      await rm(folder, { recursive: true, force: true });
      await cp(shards, folder, { recursive: true });
      const done = await upTo(n, "kill", () => saveTuned(shards, folder, new Map([["norm", norm]]), { replace: true }));
      const what = `killed at operation ${n} (${fate.log.slice(0, n + 1).join(" ")})`;
      const found = await bytesOf(folder);
      const fresh = found.get("model.norm.weight")?.readFloatLE(4) === 1;
      seen.add(fresh);
      for (const [name, bytes] of before) {
        if (name !== "model.norm.weight") expect(found.get(name)?.equals(bytes), `${name}, ${what}`).toBe(true);
        else expect(found.get(name)?.equals(bytes), what).toBe(!fresh);
      }
      if (done) break;
    }
    expect([...seen]).toEqual([false, true]);
  } finally {
    for (const one of [source, `${source}-shards`]) await rm(one, { recursive: true, force: true });
  }
});

describe("a save killed at any operation", () => {
  it.each([
    ["one file after one file", 0, 0],
    ["shards after other shards", 3, 2],
    ["the same shards again", 2, 2],
    ["one file after shards", 2, 0],
    ["shards after one file", 0, 3],
  ])("leaves the earlier checkpoint or the new one: %s", async (_, before, after) => {
    const outcomes = new Map<string, number>();
    for (let n = 0; ; n++) {
      await rm(folder, { recursive: true, force: true });
      await saveFiles(folder, content(1, before), options);
      await writeFile(join(folder, "notes.txt"), "mine");
      const done = await upTo(n, "kill", () => saveFiles(folder, content(2, after), options));
      const { saves, names } = await found();
      const what = `killed at operation ${n} (${fate.log.slice(0, n + 1).join(" ")})`;
      expect([...saves], what).toHaveLength(1);
      const [save] = saves;
      expect(names.length, what).toBe((save === 1 ? before : after) || 2);
      const others = await seenByOthers();
      if (others) expect([...others], what).toHaveLength(1);
      outcomes.set(`${save}${others ? "" : ", others refuse"}`, n);
      // The next save finds its way, whatever it meets, and leaves nothing lying.
      await saveFiles(folder, content(3, after), options);
      expect([...(await found()).saves], what).toEqual([3]);
      const expected = [...content(3, after).map(({ name }) => name), "notes.txt"].sort();
      expect((await readdir(folder)).sort(), what).toEqual(expected);
      if (done) {
        expect(save).toBe(2);
        break;
      }
    }
    expect([...outcomes.keys()].sort()).toEqual(["1", "2", "2, others refuse"]);
  });

  it("leaves nothing or the new one where there was none", async () => {
    const outcomes = new Set<unknown>();
    for (let n = 0; ; n++) {
      await rm(folder, { recursive: true, force: true });
      const done = await upTo(n, "kill", () => saveFiles(folder, content(2, 2), options));
      const state: unknown = await found().catch((error: unknown) => error);
      if (CheckpointError.isInstance(state)) {
        expect(String(state)).toMatch(/has no config.json/);
        outcomes.add("nothing");
      } else {
        expect(state).toMatchObject({ saves: new Set([2]) });
        outcomes.add("new");
      }
      if (done) break;
    }
    expect(outcomes).toEqual(new Set(["nothing", "new"]));
  });

  it("is finished by finishSave, even when that is killed at any operation too", async () => {
    let finished = 0;
    for (let n = 0; ; n++) {
      await rm(folder, { recursive: true, force: true });
      await saveFiles(folder, content(1, 2), options);
      const done = await upTo(n, "kill", () => saveFiles(folder, content(2, 3), options));
      if (done) break;
      if (!(await readdir(folder)).includes(".switchyard-save.json")) continue;
      const state = await readdir(folder);
      for (let m = 0; ; m++) {
        const whole = await upTo(m, "kill", () => finishSave(folder));
        expect([...(await found()).saves]).toEqual([2]);
        if (whole) break;
      }
      expect(state.length).toBeGreaterThan(0);
      expect(await finishSave(folder)).toBe(false);
      expect([...((await seenByOthers()) ?? [])]).toEqual([2]);
      finished++;
    }
    expect(finished).toBeGreaterThan(5);
  });

  it("holds for whole models", async () => {
    const on = makeEngine();
    const routers = [plainTopK(2)];
    const models = [loudModel(on, smallConfig), loudModel(on, { ...smallConfig, layers: 3 })];
    const [first, second] = models;
    if (!first || !second) throw new Error("two models");
    const seen = new Set<number>();
    for (let n = 0; ; n++) {
      await rm(folder, { recursive: true, force: true });
      await saveModel(first, folder);
      const done = await upTo(n, "kill", () => saveModel(second, folder));
      const { model, close } = await loadModel(folder, { engine: on, routers });
      seen.add(model.layers);
      await close();
      if (done) break;
    }
    expect([...seen]).toEqual([2, 3]);
  });
});

describe("a save in which any one operation fails", () => {
  it("leaves the earlier or the new checkpoint, and says truly whether something changed", async () => {
    const outcomes = new Set<string>();
    for (let n = 0; ; n++) {
      await rm(folder, { recursive: true, force: true });
      await saveFiles(folder, content(1, 3), options);
      Object.assign(fate, { left: n, mode: "fail", log: [] });
      const error: unknown = await saveFiles(folder, content(2, 2), options).catch((thrown: unknown) => thrown);
      fate.left = Number.POSITIVE_INFINITY;
      const [save, ...more] = (await found()).saves;
      expect(more).toEqual([]);
      if (error === undefined) break;
      expect(CheckpointError.isInstance(error)).toBe(true);
      const unchanged = /nothing was changed|cannot (make|finish)|cannot read/.test(String(error));
      expect(save, String(error)).toBe(unchanged ? 1 : 2);
      outcomes.add(unchanged ? "unchanged" : "new");
      if (/nothing was changed/.test(String(error))) {
        expect((await readdir(folder)).filter((name) => name.startsWith("."))).toEqual([]);
      }
    }
    expect(outcomes).toEqual(new Set(["unchanged", "new"]));
  });
});

describe("a save in which two operations fail, so that undoing may fail too", () => {
  it("leaves one whole checkpoint, and the next save tidies up", async () => {
    const outcomes = new Set<string>();
    for (let again = 1; again <= 8; again++) {
      for (let n = 0; ; n++) {
        await rm(folder, { recursive: true, force: true });
        await saveFiles(folder, content(1, 2), options);
        Object.assign(fate, { left: n, mode: "fail", again, log: [] });
        const error: unknown = await saveFiles(folder, content(2, 0), options).catch((thrown: unknown) => thrown);
        Object.assign(fate, { left: Number.POSITIVE_INFINITY, again: 0 });
        const [save, ...more] = (await found()).saves;
        const what = `operations ${n} and ${n + again}: ${error}`;
        expect(more, what).toEqual([]);
        if (error === undefined) break;
        if (/undoing it failed too/.test(String(error))) outcomes.add(`${save}`);
        if (/nothing was changed|as they were/.test(String(error))) expect(save, what).toBe(1);
        await saveFiles(folder, content(3, 0), options);
        expect((await readdir(folder)).sort(), what).toEqual(["config.json", "model.safetensors", "tokenizer.json"]);
      }
    }
    expect([...outcomes].sort()).toEqual(["1", "2"]);
  });
});

describe("two saves at once", () => {
  it("of one process wait for each other", async () => {
    await Promise.all([1, 2, 3].map((save) => saveFiles(folder, content(save, save), options)));
    const { saves, names } = await found();
    expect([...saves]).toEqual([3]);
    expect(names).toHaveLength(3);
  });

  it("go on after one that failed", async () => {
    const broken: FileToSave = {
      name: "a",
      // biome-ignore lint/correctness/useYield: it fails before its first piece
      async *content() {
        throw new Error("the device went away");
      },
    };
    const failed = saveFiles(folder, [broken], options);
    const good = saveFiles(folder, content(2, 0), options);
    await expect(failed).rejects.toThrow(/the device went away/);
    await good;
    expect([...(await found()).saves]).toEqual([2]);
  });
});

describe("the record of a save", () => {
  const record = (value: unknown) =>
    writeFile(join(folder, ".switchyard-save.json"), typeof value === "string" ? value : JSON.stringify(value));
  const good = { version: 1, tag: "0123abcd", last: "config.json", files: ["config.json"], stale: [] };

  it.each([
    ["another version", { ...good, version: 2 }],
    ["a tag with a path", { ...good, tag: "/../../x" }],
    ["a file outside the folder", { ...good, files: ["../config.json"] }],
    ["a stale file outside the folder", { ...good, stale: ["/etc/passwd"] }],
    ["no list of files", { ...good, files: {} }],
    ["null", null],
  ])("is refused with %s", async (_, value) => {
    await saveFiles(folder, content(1, 0), options);
    await record(value);
    await expect(openCheckpoint(folder)).rejects.toThrow(/switchyard-save.json is no record of a save/);
    await expect(saveFiles(folder, content(2, 0), options)).rejects.toThrow(/is no record of a save/);
    await expect(finishSave(folder)).rejects.toSatisfy(CheckpointError.isInstance);
  });

  it("is refused where it is no JSON or too long", async () => {
    await record('{"version":1,');
    await expect(openCheckpoint(folder)).rejects.toThrow(/switchyard-save.json is not valid JSON/);
    await record(" ".repeat(1_000_001));
    await expect(openCheckpoint(folder)).rejects.toThrow(/1000001 bytes; at most 1000000/);
  });

  it("refuses to list names that are none", async () => {
    await expect(saveFiles(folder, [plain("a:b", "1"), plain("config.json", "1")], options)).rejects.toThrow(
      /"a:b" is no file name/,
    );
    expect(await readdir(folder)).toEqual([]);
  });
});

describe("leftovers", () => {
  it("of the same files go with the next save; other files stay", async () => {
    const names = [".config.json.0123abcd.new", ".tokenizer.json.0123abcd.old", ".other.0123abcd.new", ".config.json"];
    for (const name of names) await writeFile(join(folder, name), "x");
    await saveFiles(folder, content(1, 0), options);
    expect((await readdir(folder)).filter((name) => name.startsWith(".")).sort()).toEqual([
      ".config.json",
      ".other.0123abcd.new",
    ]);
  });

  it("do not hinder the save of one file through its own name", async () => {
    await symlink("nowhere", join(folder, ".one.0123abcd.new"));
    await saveFiles(folder, [plain("one", "1")], { last: "one" });
    expect(await readdir(folder)).toEqual(["one"]);
    const source = await fileSource(join(folder, "one"));
    expect(source?.size).toBe(1);
    await source?.close();
  });
});
