// Ten thousand damaged checkpoints, and what holds for every file: it is read to a consistent table or refused.
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { CheckpointError, engine, ShapeError, UnsupportedError } from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { olmoe } from "../src/architectures/olmoe.ts";
import { readCheckpoint } from "../src/checkpoint.ts";
import { bytesSource, encodeSafetensors, readHeader, type TensorSource } from "../src/safetensors.ts";
import { checkTable, judge, mutant, mutantJson, validCheckpoints } from "./mutants.ts";

describe("mutants of valid checkpoints", () => {
  it("start from valid checkpoints", async () => {
    for (const files of await validCheckpoints()) expect((await judge(files)).outcome).toBe("accepted");
  });

  it("are the same for the same seed, and differ between seeds", async () => {
    const valid = await validCheckpoints();
    expect(mutant(7, valid)).toEqual(mutant(7, valid));
    const different = new Set(Array.from({ length: 100 }, (_, seed) => JSON.stringify([...mutant(seed, valid)])));
    expect(different.size).toBeGreaterThan(80);
  });

  it("are read or refused by name, all ten thousand, in bounded work and memory", async () => {
    const valid = await validCheckpoints();
    const outcomes = new Map<string, number>();
    for (let seed = 0; seed < 10_000; seed++) {
      const files = mutant(seed, valid);
      const { outcome } = await judge(files).catch((error: unknown) => {
        throw new Error(`mutant ${seed}: ${error}`, { cause: error });
      });
      outcomes.set(outcome, (outcomes.get(outcome) ?? 0) + 1);
    }
    // The mutator is worth something only where it gets past the first checks: many reasons, and not too few acceptances.
    expect(outcomes.size, [...outcomes.keys()].join("\n")).toBeGreaterThan(40);
    expect(outcomes.get("accepted")).toBeGreaterThan(500);
    expect(outcomes.get("accepted")).toBeLessThan(5000);
    const seen = [...outcomes.keys()].join("\n");
    for (const reason of [
      /overlap/,
      /hole/,
      /twice/,
      /beyond/,
      /unknown dtype/,
      /nests/,
      /not allowed/,
      /pickle/,
      /lacks/,
    ]) {
      expect(seen).toMatch(reason);
    }
  });
});

describe("mutants of a config", () => {
  const folder = join(import.meta.dirname, "fixtures", "olmoe");
  const config = JSON.parse(readFileSync(join(folder, "config.json"), "utf8")) as Record<string, unknown>;
  const weights = new Uint8Array(readFileSync(join(folder, "model.safetensors")));
  const load = async (content: Uint8Array) => {
    const files = new Map([
      ["config.json", content],
      ["model.safetensors", weights],
    ]);
    const open = async (name: string) => {
      const bytes = files.get(name);
      return bytes && bytesSource(name, bytes);
    };
    return olmoe.read(await readCheckpoint(open, "here"), engine(cpu()), {});
  };

  it("load or are refused in words", async () => {
    const outcomes = new Map<string, number>();
    for (let seed = 0; seed < 400; seed++) {
      const outcome = await load(mutantJson(seed, config)).then(
        () => "loaded",
        (error: unknown) => {
          for (const kind of [CheckpointError, ShapeError, UnsupportedError]) {
            if (kind.isInstance(error)) return kind.name;
          }
          throw new Error(`mutant ${seed}: ${error}`, { cause: error });
        },
      );
      outcomes.set(outcome, (outcomes.get(outcome) ?? 0) + 1);
    }
    expect(outcomes.get("loaded")).toBeGreaterThan(50);
    expect(outcomes.get("CheckpointError")).toBeGreaterThan(50);
  });

  const huge = Number.MAX_SAFE_INTEGER;
  it.each([
    [
      "layers",
      { num_hidden_layers: huge },
      /asks for 9007199254740991 layers, but the checkpoint has only \d+ tensors/,
    ],
    ["experts", { num_experts: huge }, /asks for 9007199254740991 experts, but the checkpoint has only/],
    ["wide experts", { intermediate_size: 2 ** 40 }, /experts.0.gate_proj.weight" is .* but config.json asks for/],
    ["a wide model", { hidden_size: 2 ** 40, head_dim: 8 }, /but config.json asks for/],
    ["wide heads", { hidden_size: 2 ** 40 }, /heads? .*channels/],
    ["words", { vocab_size: huge }, /but config.json asks for/],
  ])("with too many %s are refused before memory is taken", async (_, change, message) => {
    await expect(load(new TextEncoder().encode(JSON.stringify({ ...config, ...change })))).rejects.toThrow(message);
  });
});

describe("the judge", () => {
  it("notices a table that does not fit its file", async () => {
    const bytes = (await validCheckpoints())[1]?.get("model.safetensors") ?? new Uint8Array(0);
    const good = await readHeader(bytesSource("x", bytes));
    checkTable(bytes, good);
    const [name, stored] = [...good.tensors][0] ?? [];
    if (name === undefined || !stored) throw new Error("one tensor");
    const bad = (change: object, called = name) => ({
      ...good,
      tensors: new Map([[called, { ...stored, ...change }]]),
    });
    expect(() => checkTable(bytes, bad({ from: stored.from - 4, to: stored.to - 4 }))).toThrow(/lies outside/);
    expect(() => checkTable(bytes, bad({ dtype: "F16" }))).toThrow(/is not F16/);
    expect(() => checkTable(bytes, bad({ to: stored.to - 4, shape: [5] }))).toThrow(/belongs to nobody/);
    expect(() => checkTable(bytes, bad({}, "other"))).toThrow(/other names/);
  });
});

const dtypes = { F32: 4, BF16: 2, U8: 1, I64: 8, F8_E4M3: 1 } as const;
const anyTensor = fc
  .record({
    name: fc.string({ unit: "binary", minLength: 1, maxLength: 40 }),
    dtype: fc.constantFrom(...(Object.keys(dtypes) as (keyof typeof dtypes)[])),
    shape: fc.array(fc.integer({ min: 0, max: 5 }), { maxLength: 4 }),
    fill: fc.integer({ min: 0, max: 255 }),
  })
  .filter(({ name }) => !name.split(".").includes("__proto__") && name !== "__metadata__");

describe("for any file", () => {
  it("what is written is read back: names, dtypes, shapes, bytes, metadata", async () => {
    const tensors = fc.uniqueArray(anyTensor, { selector: ({ name }) => name, maxLength: 8 });
    const word = fc.string({ unit: "grapheme", maxLength: 12 });
    const metadata = fc.dictionary(
      word.filter((key) => key !== "__proto__" && key !== "format"),
      word,
      { maxKeys: 4 },
    );
    await fc.assert(
      fc.asyncProperty(tensors, metadata, async (made, extra) => {
        const sources = made.map(({ name, dtype, shape, fill }): TensorSource => {
          const size = shape.reduce((n, d) => n * d, dtypes[dtype]);
          return { name, dtype, shape, bytes: () => new Uint8Array(size).fill(fill) };
        });
        const parts: Uint8Array[] = [];
        for await (const part of encodeSafetensors(sources, extra)) parts.push(part);
        const source = bytesSource("x", new Uint8Array(Buffer.concat(parts)));
        const found = await readHeader(source);
        expect(Object.fromEntries(found.metadata)).toEqual({ format: "pt", ...extra });
        expect([...found.tensors.keys()]).toEqual(made.map(({ name }) => name));
        for (const { name, dtype, shape, bytes } of sources) {
          const stored = found.tensors.get(name);
          expect(stored).toMatchObject({ dtype, shape });
          expect(await source.read(stored?.from ?? 0, stored?.to ?? -1)).toEqual(await bytes());
        }
      }),
      { seed: 3, numRuns: 300 },
    );
  });

  it("any header text is a consistent table or a CheckpointError", async () => {
    const word = fc.constantFrom(
      ...'{ } [ ] , : " \\ __metadata__ "a" "b" "dtype" "shape" "data_offsets" "F32" "U8" 0 1 4 8 -1 1e9'.split(" "),
      '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}',
      '"b":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}',
      '"c":{"dtype":"U8","shape":[0],"data_offsets":[4,4]}',
      '"__metadata__":{"a":"b"}',
      ",",
      ",",
    );
    const text = fc.oneof(
      fc.array(word, { maxLength: 9 }).map((words) => `{${words.join("")}}`),
      fc.uniqueArray(word, { maxLength: 6 }).map((words) => `{${words.join(",")}}`),
      fc.string({ unit: "binary", maxLength: 60 }).map((rest) => `{${rest}`),
      fc.json().map((value) => value),
    );
    let accepted = 0;
    await fc.assert(
      fc.asyncProperty(text, fc.constantFrom(0, 4, 8, 9), async (header, data) => {
        const raw = new TextEncoder().encode(header);
        const bytes = new Uint8Array(8 + raw.length + data);
        new DataView(bytes.buffer).setBigUint64(0, BigInt(raw.length), true);
        bytes.set(raw, 8);
        try {
          checkTable(bytes, await readHeader(bytesSource("x", bytes)));
          accepted++;
        } catch (error) {
          if (!CheckpointError.isInstance(error)) throw error;
        }
      }),
      { seed: 4, numRuns: 5000 },
    );
    expect(accepted).toBeGreaterThan(20);
  });
});
