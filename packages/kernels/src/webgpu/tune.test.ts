// The tuner: its rule with a clock of the test's own, one real run, and the table's way into the backend.
import { describe, expect, it } from "vitest";
import { call, hasGpu, testGpu, uniform } from "./call.test-util.ts";
import { matmulKernels } from "./kernels/matmul.ts";
import { classKey, defaultTile, type ShapeClass, tileFor, tiles } from "./kernels/tiles.ts";
import { contest, tune } from "./tune.ts";
import { tilesFor, tuned } from "./tuned.ts";

/** Times by candidate, one after the other; the last repeats. The first is the warm-up's. */
const clockOf = (times: Readonly<Record<string, readonly number[]>>) => {
  const calls: string[] = [];
  return {
    calls,
    async measure(name: string): Promise<number> {
      const own = times[name] ?? [];
      const nth = calls.filter((other) => other === name).length;
      calls.push(name);
      return own[Math.min(nth, own.length - 1)] ?? Number.NaN;
    },
  };
};
const always = async (): Promise<boolean> => true;

describe("contest", () => {
  it("takes the fastest candidate that beats the default by the margin", async () => {
    const { measure } = clockOf({ standard: [10], a: [9], b: [8], c: [9.9] });
    const outcome = await contest({ candidates: ["standard", "a", "b", "c"], measure, agrees: always });
    expect(outcome).toEqual({ winner: "b", medians: { standard: 10, a: 9, b: 8, c: 9.9 } });
  });
  it("keeps the default against a gain below the margin", async () => {
    const { measure } = clockOf({ standard: [10], a: [9.6] });
    expect((await contest({ candidates: ["standard", "a"], measure, agrees: always })).winner).toBe("standard");
    const again = clockOf({ standard: [10], a: [9.6] });
    const loose = { candidates: ["standard", "a"], measure: again.measure, agrees: always, margin: 0.03 };
    expect((await contest(loose)).winner).toBe("a");
  });
  it("goes by medians of the measured rounds: neither the warm-up nor an outlier counts", async () => {
    const { measure } = clockOf({ standard: [1, 10, 10, 10, 1, 10, 10], a: [50, 8, 90, 8, 8, 8] });
    const outcome = await contest({ candidates: ["standard", "a"], measure, agrees: always, rounds: 5 });
    expect(outcome).toEqual({ winner: "a", medians: { standard: 10, a: 8 } });
  });
  it("never takes a candidate whose results differ, nor measures it", async () => {
    const { measure, calls } = clockOf({ standard: [10], wrong: [1], a: [9] });
    const agrees = async (name: string): Promise<boolean> => name !== "wrong";
    const outcome = await contest({ candidates: ["standard", "wrong", "a"], measure, agrees });
    expect(outcome.winner).toBe("a");
    expect(calls).not.toContain("wrong");
  });
  it("asks for the gain twice", async () => {
    // Warm-up and three rounds, then the same again: lucky only at first.
    const { measure, calls } = clockOf({ standard: [10], lucky: [8, 8, 8, 8, 10], b: [9.9] });
    const outcome = await contest({ candidates: ["standard", "lucky", "b"], measure, agrees: always, rounds: 3 });
    expect(outcome).toEqual({ winner: "standard", medians: { standard: 10, lucky: 8, b: 9.9 } });
    expect(calls.filter((name) => name === "lucky").length).toBe(8);
    expect(calls.filter((name) => name === "b").length).toBe(4);
  });
  it("never takes a candidate whose time is not a number", async () => {
    const { measure } = clockOf({ standard: [10], broken: [Number.NaN] });
    expect((await contest({ candidates: ["standard", "broken"], measure, agrees: always })).winner).toBe("standard");
  });
  it("candidates take turns, forwards and backwards", async () => {
    const { measure, calls } = clockOf({ standard: [1], a: [1], b: [1] });
    await contest({ candidates: ["standard", "a", "b"], measure, agrees: always, rounds: 2 });
    expect(calls.join(" ")).toBe("standard a b standard a b b a standard");
  });
  it("measures nothing where there is no choice", async () => {
    const { measure, calls } = clockOf({ standard: [1] });
    const alone = await contest({ candidates: ["standard", "a"], measure, agrees: async () => false });
    expect(alone.winner).toBe("standard");
    expect(calls).toEqual([]);
    await expect(contest({ candidates: [], measure, agrees: always })).rejects.toThrow(/needs candidates/);
  });
});

const shape: ShapeClass = { kind: "dense", layouts: "kk", format: "f32", m: 32, n: 32, k: 64, count: 1 };

describe("tables", () => {
  it("the user's entries go before those of the package, of this adapter only", () => {
    expect(tilesFor("no such adapter", undefined)).toBeUndefined();
    const stored = { mine: { x: "old", z: "old" }, other: { y: "old" } };
    expect(tilesFor("mine", undefined, stored)).toEqual({ x: "old", z: "old" });
    expect(tilesFor("mine", { mine: { x: "new" }, other: { y: "new" } }, stored)).toEqual({ x: "new", z: "old" });
    expect(tilesFor("third", { third: { x: "new" } }, stored)).toEqual({ x: "new" });
  });
  it("the stored table names tiles that exist", () => {
    const names = Object.values(tuned).flatMap((classes) => Object.values(classes));
    expect(names.filter((name) => !tiles.some((tile) => tile.name === name))).toEqual([]);
  });
  it("a class covers sizes up to the next power of four", () => {
    expect(classKey({ ...shape, m: 17, n: 5000, k: 1 })).toBe("dense kk f32 64x4096x16 one");
    expect(classKey({ ...shape, m: 64, n: 65, k: 300, count: 3 })).toBe("dense kk f32 64x256x1024 many");
  });
  it("defaults by kind of device and size; every default is a tile that exists", () => {
    const limits = {
      maxBufferSize: 2 ** 28,
      maxStorageBufferBindingSize: 2 ** 27,
      maxStorageBuffersPerShaderStage: 8,
      maxComputeWorkgroupStorageSize: 16_384,
      maxComputeInvocationsPerWorkgroup: 256,
      maxComputeWorkgroupsPerDimension: 65_535,
    };
    const on = (software: boolean, sizes: Partial<ShapeClass>) =>
      defaultTile({ software, limits }, { ...shape, ...sizes });
    expect(on(true, { m: 512 }).staged).toBe(false);
    for (const m of [9, 16, 17, 32, 33, 4096]) {
      const tile = on(false, { m, n: 2048 });
      expect(tiles).toContain(tile);
      expect(tile.staged).toBe(true);
      expect(tile.rows).toBe(m <= 16 ? 16 : m <= 33 ? 32 : 64);
    }
  });
});

describe.skipIf(!hasGpu)("tune", () => {
  if (!hasGpu) return;
  it("gives a table of plain JSON that the kernels follow", async () => {
    const on = testGpu();
    // Every look at the clock is a tick: all runs take the same time.
    let ticks = 0;
    const seen: string[] = [];
    const table = await tune(on.device, {
      shapes: [
        shape,
        { ...shape, kind: "blocks", format: "int4", m: 16, count: 2 },
        { ...shape, kind: "outer", layouts: "rr", count: 2 },
      ],
      rounds: 1,
      clock: () => ticks++,
      onProgress: ({ shape: { kind }, outcome, done, total }) => {
        seen.push(`${kind} ${done}/${total} ${Object.keys(outcome.medians).length}`);
      },
    });
    // So nobody beats the default; every tile gave the default's bits.
    const rivals = tiles.filter(({ staged }) => staged !== on.software).length;
    expect(seen).toEqual([`dense 1/3 ${rivals}`, `blocks 2/3 ${rivals}`, `outer 3/3 ${rivals}`]);
    expect(Object.values(table)).toEqual([{}]);
    expect(JSON.parse(JSON.stringify(table))).toEqual(table);

    const other = tiles.find((tile) => tile !== defaultTile(on, shape) && tile.staged !== on.software);
    if (!other) throw new Error("there is no second tile");
    const tuned = { ...on, tiles: { [classKey(shape)]: other.name } };
    expect(tileFor(tuned, shape)).toBe(other);
    expect(tileFor({ ...on, tiles: { [classKey(shape)]: "no such tile" } }, shape)).toBe(defaultTile(on, shape));
    const { linear } = matmulKernels(tuned);
    const before = on.pipelines();
    const [x, w] = [uniform(1, [32, 64]), uniform(2, [32, 64])];
    await call(on, linear, [x, w], [{ shape: [32, 32], dtype: "f32" }]);
    expect(on.pipelines()).toBe(before + 1);
  });

  it("refuses sizes that no loader fits", async () => {
    const shapes = [{ ...shape, m: 17 }];
    await expect(tune(testGpu().device, { shapes })).rejects.toThrow(/multiples of 16/);
  });
});
