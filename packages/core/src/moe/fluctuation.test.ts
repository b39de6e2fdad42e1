// Routing change against loops over sets, and its edges.
import { expect, test } from "vitest";
import { routingChange, routingHistory } from "./fluctuation.ts";
import { close, float64, floats, ids, numbers } from "./moe.test-util.ts";

const e = float64();
const read = async (
  before: readonly (readonly number[])[],
  after: readonly (readonly number[])[],
  options: { experts: number; mask?: readonly number[] },
): Promise<number[]> => {
  const table = (rows: readonly (readonly number[])[]) => ids(e, rows.flat(), [rows.length, rows[0]?.length ?? 0]);
  const { experts, mask } = options;
  const change = routingChange(table(before), table(after), {
    experts,
    ...(mask ? { mask: floats(e, mask, [mask.length]) } : {}),
  });
  return (await Promise.all([change.sets, change.overlap, change.firsts].map(numbers))).flat();
};

test("agrees with loops over sets", async () => {
  const draw = (seed: number): number[][] => {
    let state = seed;
    return Array.from({ length: 40 }, () => {
      const left = [0, 1, 2, 3, 4];
      return Array.from({ length: 3 }, () => {
        state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
        return left.splice(Math.floor((state / 2 ** 32) * left.length), 1)[0] ?? -1;
      });
    });
  };
  const [before, after] = [draw(1), draw(2)];
  let [sets, overlap, firsts] = [0, 0, 0];
  before.forEach((own, t) => {
    const other = after[t] ?? [];
    const common = own.filter((id) => other.includes(id)).length;
    sets += Number(common < 3) / 40;
    overlap += (1 - common / 3) / 40;
    firsts += Number(own[0] !== other[0]) / 40;
  });
  expect(sets).toBeGreaterThan(0.5);
  close(await read(before, after, { experts: 5 }), [sets, overlap, firsts]);
  expect(await read(before, before, { experts: 5 })).toEqual([0, 0, 0]);
});

test("order within a set matters to the first expert only", async () => {
  expect(await read([[0, 1]], [[1, 0]], { experts: 2 })).toEqual([0, 0, 1]);
});

test("empty slots, null experts, other k, padding", async () => {
  expect(await read([[-1, -1]], [[-1, -1]], { experts: 3 })).toEqual([0, 0, 0]);
  expect(await read([[0, -1]], [[-1, -1]], { experts: 3 })).toEqual([1, 1, 1]);
  // 3 is a null expert of three: as good as none.
  expect(await read([[0, 3]], [[0, -1]], { experts: 3 })).toEqual([0, 0, 0]);
  expect(await read([[2]], [[2, 1]], { experts: 3 })).toEqual([1, 0.5, 0]);
  const rows = [[0], [1], [2]];
  expect(await read(rows, [[0], [2], [1]], { experts: 3, mask: [1, 1, 0] })).toEqual([0.5, 0.5, 0.5]);
  expect(await read(rows, [[0], [2], [1]], { experts: 3, mask: [0, 0, 0] })).toEqual([0, 0, 0]);
  expect(await read([], [], { experts: 3 })).toEqual([0, 0, 0]);
});

test("refuses lists of other tokens", () => {
  const [one, two] = [ids(e, [0], [1, 1]), ids(e, [0, 1], [2, 1])];
  expect(() => routingChange(one, two, { experts: 2 })).toThrow(
    "routingChange: ids are i32 [1, 1] and i32 [2, 1]; expected i32 [tokens, k] of the same tokens",
  );
  expect(() => routingChange(two, two, { experts: 2, mask: floats(e, [1], [1]) })).toThrow(/the mask is f32 \[1\]/);
});

test("saturation compares with the last checkpoint, the change rate with the next one", async () => {
  const rows = [
    [
      [0, 1],
      [2, 3],
    ],
    [
      [1, 2],
      [2, 3],
    ],
    [
      [1, 3],
      [3, 2],
    ],
  ];
  const run = async (tokens: number, mask?: readonly number[]): Promise<readonly number[][]> => {
    const { saturation, changeRate } = routingHistory(
      rows.map((one) => ids(e, one.flat(), [tokens, 2])),
      { experts: 4, ...(mask ? { mask: floats(e, mask, [tokens]) } : {}) },
    );
    const all = async (list: typeof saturation) => (await Promise.all(list.map(numbers))).flat();
    return [await all(saturation), await all(changeRate)];
  };
  expect(await run(2)).toEqual([
    [0.75, 0.75, 1],
    [0.25, 0.25],
  ]);
  expect(await run(2, [1, 0])).toEqual([
    [0.5, 0.5, 1],
    [0.5, 0.5],
  ]);
  expect(() => routingHistory([], { experts: 2 })).toThrow("no checkpoints");
});
