// Dispatch and the lists of places against loops that look through everything.
import { dispatch, engine } from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import { GPU } from "gpu.js";
import { describe, expect, it } from "vitest";
import { gpujs } from "./backend.ts";
import { placesOf } from "./host.ts";
import { floatsOf } from "./storage.ts";

describe("places", () => {
  const lists = (ids: readonly number[], count: number): number[][] => {
    const all = placesOf(Int32Array.from(ids), count, (id) => id);
    expect(all.length).toBe(count + 1 + (all[count] ?? 0));
    return Array.from({ length: count }, (_, place) => [
      ...all.subarray(count + 1 + (all[place] ?? 0), count + 1 + (all[place + 1] ?? 0)),
    ]);
  };
  it.each([
    [[], 3],
    [[0, 0, 0], 1],
    [[2, 0, 2, -1, 5, 1, 2], 3],
    [[-1, 7], 2],
    [[1], 0],
    [[2 ** 31 - 1, -(2 ** 31), 1], 2],
  ] as const)("of %s among %s are in order", (ids, count) => {
    const naive = Array.from({ length: count }, (_, place) =>
      ids.flatMap((id: number, i: number) => (id === place ? [i] : [])),
    );
    expect(lists(ids, count)).toEqual(naive);
  });
});

describe("dispatch", () => {
  it("is what core's composite makes on the reference backend", async () => {
    const ids = Int32Array.from({ length: 31 * 3 }, (_, i) => ((i * i * 7 + i) % 9) - 2);
    const read = async (on: ReturnType<typeof engine>, bound: number): Promise<number[][]> => {
      const x = on.tensor(ids, [31, 3]);
      const { rows, slots, ends } = dispatch(x, { count: 5, bound });
      const values = await Promise.all([rows, slots, ends].map(async (y) => [...(await y.data())]));
      for (const y of [x, rows, slots, ends]) y.dispose();
      return values;
    };
    const backend = gpujs({ GPU, mode: "cpu" });
    for (const bound of [93, 40, 1, 0]) {
      expect(await read(engine(backend), bound)).toEqual(await read(engine(cpu()), bound));
    }
    await backend.dispose();
  });
});

describe("ids on the device", () => {
  it("outside every table stay outside", () => {
    const ids = Int32Array.of(0, 5, -7, 2 ** 24 - 1, 2 ** 24 + 1, 2 ** 31 - 1, -(2 ** 31));
    expect([...floatsOf("i32", ids)]).toEqual([0, 5, -1, 2 ** 24 - 1, 2 ** 24, 2 ** 24, -1]);
  });
  it("and halves are numbers", () => {
    expect([...floatsOf("bf16", Uint16Array.of(0x3f80, 0xc000))]).toEqual([1, -2]);
    expect([...floatsOf("u8", Uint8Array.of(0, 255))]).toEqual([0, 255]);
  });
});
