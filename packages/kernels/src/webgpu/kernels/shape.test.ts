// Kernels that move elements against index arithmetic spelled out: every storage type, sizes that fill no word and no tile, both ways of
// transposing, folded dispatches and split tensors.
import type { DType, Spec, TypedArray } from "@switchyard/core";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { call, type Host, hasGpu, host, testGpu } from "../call.test-util.ts";
import type { Gpu, OwnedGpu, WebgpuHandle } from "../device.ts";
import { shapeKernels } from "./shape.ts";

type Shape = readonly number[];
const sizeOf = (shape: Shape): number => shape.reduce((n, d) => n * d, 1);
const dtypes: readonly DType[] = ["f32", "i32", "f16", "u8"];

/** Elements that tell their place; for u8 at least modulo a prime. */
function numbered(shape: Shape, dtype: DType, from = 1): Host {
  const values = Array.from({ length: sizeOf(shape) }, (_, i) => from + i);
  if (dtype === "f32") return host(Float32Array.from(values), shape, dtype);
  if (dtype === "i32") return host(Int32Array.from(values), shape, dtype);
  if (dtype === "u8")
    return host(
      Uint8Array.from(values, (v) => v % 251),
      shape,
      dtype,
    );
  return host(
    Uint16Array.from(values, (v) => v % 65521),
    shape,
    dtype,
  );
}
const unravel = (flat: number, shape: Shape): number[] => {
  const index: number[] = [];
  for (let axis = shape.length - 1, rest = flat; axis >= 0; axis--) {
    index.unshift(rest % (shape[axis] as number));
    rest = Math.floor(rest / (shape[axis] as number));
  }
  return index;
};
const ravel = (index: Shape, shape: Shape): number =>
  index.reduce((flat, i, axis) => flat * (shape[axis] as number) + i, 0);
/** What a result of this shape holds when its entry at `index` is x's at source(index), or 0. */
const moved = (x: Host, shape: Shape, source: (index: number[]) => number[] | undefined): number[] =>
  Array.from({ length: sizeOf(shape) }, (_, i) => {
    const index = source(unravel(i, shape));
    return index ? (x.data[ravel(index, x.shape)] as number) : 0;
  });

describe.skipIf(!hasGpu)("shape kernels", () => {
  if (!hasGpu) return;
  let gpu: OwnedGpu;
  let kernels: ReturnType<typeof shapeKernels>;
  /** As on a graphics card: through workgroup memory. */
  let hardware: typeof kernels;
  beforeAll(() => {
    gpu = testGpu();
    kernels = shapeKernels({ ...gpu, software: true });
    hardware = shapeKernels({ ...gpu, software: false });
  });
  afterAll(() => gpu.dispose());
  const run = async (table: typeof kernels, name: string, inputs: readonly Host[], shape: Shape, attrs: object) => {
    const dtype = (inputs[0] as Host).dtype;
    return [...((await call(gpu, table[name], inputs, [{ shape, dtype }], attrs))[0] as TypedArray)];
  };

  it("reshape is a view", () => {
    const handle = gpu.alloc({ shape: [6], dtype: "f32" });
    expect(kernels.reshape([{ shape: [6], dtype: "f32", handle }], [{ shape: [2, 3], dtype: "f32" }], {})).toEqual([
      handle,
    ]);
    gpu.free(handle);
  });

  it.each([
    [
      [5, 7],
      [1, 0],
    ],
    [
      [64, 96],
      [1, 0],
    ],
    [
      [33, 65],
      [1, 0],
    ],
    [
      [2, 3, 5],
      [2, 0, 1],
    ],
    [
      [3, 40, 36],
      [0, 2, 1],
    ],
    [
      [2, 34, 3, 36],
      [0, 3, 2, 1],
    ],
    [
      [2, 3, 4, 8],
      [0, 2, 1, 3],
    ],
    [
      [2, 3, 4, 5],
      [3, 1, 0, 2],
    ],
    [
      [36, 2, 8, 4],
      [2, 3, 1, 0],
    ],
    [
      [2, 1, 3, 2, 2, 3],
      [5, 3, 1, 4, 0, 2],
    ],
    [
      [4, 1, 6],
      [1, 2, 0],
    ],
    [
      [4, 1, 6],
      [0, 2, 1],
    ],
    [
      [0, 4],
      [1, 0],
    ],
    [[7], [0]],
    [[], []],
  ] as readonly (readonly [number[], number[]])[])("transposes %j by %j", async (shape, perm) => {
    const to = perm.map((axis) => shape[axis] as number);
    for (const dtype of dtypes) {
      const x = numbered(shape, dtype);
      const exact = moved(x, to, (index) => shape.map((_, axis) => index[perm.indexOf(axis)] as number));
      expect(await run(kernels, "transpose", [x], to, { perm }), dtype).toEqual(exact);
      // A program per packing and rank: compiling them is what takes time here.
      if (dtype !== "f32" && shape.length > 3) continue;
      expect(await run(hardware, "transpose", [x], to, { perm }), `${dtype} through tiles`).toEqual(exact);
    }
  });

  it.each([
    [[7], [2], [3]],
    [[64], [8], [32]],
    [
      [5, 7],
      [1, 2],
      [3, 4],
    ],
    [
      [6, 16],
      [2, 4],
      [3, 8],
    ],
    [
      [5, 8],
      [1, 0],
      [3, 8],
    ],
    [
      [5, 7],
      [2, 0],
      [3, 7],
    ],
    [
      [2, 3, 5],
      [1, 0, 2],
      [1, 3, 3],
    ],
    [
      [3, 4, 6],
      [0, 2, 0],
      [3, 2, 6],
    ],
    [
      [2, 3, 2, 3, 2, 3],
      [1, 0, 0, 1, 0, 2],
      [1, 2, 2, 2, 1, 1],
    ],
    [
      [5, 7],
      [2, 3],
      [0, 4],
    ],
    [[3], [1], [1]],
  ] as readonly (readonly [number[], number[], number[]])[])("slices %j at %j to %j", async (shape, start, size) => {
    for (const dtype of dtypes) {
      const x = numbered(shape, dtype);
      const exact = moved(x, size, (index) => index.map((i, axis) => i + (start[axis] as number)));
      expect(await run(kernels, "slice", [x], size, { start, size }), dtype).toEqual(exact);
      expect(await run(hardware, "slice", [x], size, { start, size }), dtype).toEqual(exact);
    }
  });

  it.each([
    [[3], [1], [2]],
    [
      [2, 3],
      [0, 2],
      [1, 0],
    ],
    [
      [2, 3, 2],
      [1, 0, 0],
      [0, 0, 3],
    ],
    [
      [3, 8],
      [1, 4],
      [2, 4],
    ],
    [
      [2, 3, 4],
      [0, 1, 0],
      [0, 0, 0],
    ],
    [
      [0, 2],
      [2, 0],
      [1, 1],
    ],
    [
      [1, 1],
      [0, 0],
      [0, 3],
    ],
    [[], [], []],
  ] as readonly (readonly [number[], number[], number[]])[])("pads %j by %j and %j", async (shape, before, after) => {
    const to = shape.map((d, axis) => d + (before[axis] as number) + (after[axis] as number));
    for (const dtype of dtypes) {
      const x = numbered(shape, dtype);
      const exact = moved(x, to, (index) => {
        const own = index.map((i, axis) => i - (before[axis] as number));
        return own.every((i, axis) => i >= 0 && i < (shape[axis] as number)) ? own : undefined;
      });
      expect(await run(kernels, "pad", [x], to, { before, after }), dtype).toEqual(exact);
      expect(await run(hardware, "pad", [x], to, { before, after }), dtype).toEqual(exact);
    }
  });

  it.each([
    [[], [3]],
    [[1], [2, 5]],
    [[5], [3, 5]],
    [[8], [3, 8]],
    [
      [3, 1],
      [3, 5],
    ],
    [
      [2, 1, 4],
      [2, 3, 4],
    ],
    [
      [2, 1, 3, 1, 2],
      [2, 2, 3, 3, 2],
    ],
    [[1], [0]],
    [[5], [1, 5]],
  ] as readonly (readonly [number[], number[]])[])("broadcasts %j to %j", async (shape, to) => {
    for (const dtype of dtypes) {
      const x = numbered(shape, dtype);
      const exact = moved(x, to, (index) => {
        const own = index.slice(index.length - shape.length);
        return own.map((i, axis) => (shape[axis] === 1 ? 0 : i));
      });
      expect(await run(kernels, "broadcastTo", [x], to, { shape: to }), dtype).toEqual(exact);
    }
  });

  it.each([
    [[[3], [4], [5]], 0],
    [
      [
        [2, 3],
        [2, 1],
        [2, 5],
      ],
      1,
    ],
    [
      [
        [2, 4],
        [2, 8],
      ],
      1,
    ],
    [
      [
        [2, 3],
        [0, 3],
        [4, 3],
      ],
      0,
    ],
    [
      [
        [2, 3, 4],
        [2, 2, 4],
      ],
      1,
    ],
    [
      [
        [3, 5, 3],
        [3, 2, 3],
        [3, 1, 3],
      ],
      1,
    ],
    [
      [
        [1, 3, 5],
        [1, 2, 5],
      ],
      1,
    ],
    [[[5, 2]], 0],
    [[[0], [0]], 0],
  ] as readonly (readonly [number[][], number])[])("concatenates %j along %i", async (shapes, axis) => {
    const to = (shapes[0] as number[]).map((d, i) =>
      i === axis ? shapes.reduce((n, s) => n + (s[axis] as number), 0) : d,
    );
    for (const dtype of dtypes) {
      const xs = shapes.map((shape, i) => numbered(shape, dtype, 1 + 40 * i));
      const exact = Array.from({ length: sizeOf(to) }, (_, flat) => {
        const index = unravel(flat, to);
        let which = 0;
        while ((index[axis] as number) >= ((xs[which] as Host).shape[axis] as number)) {
          index[axis] = (index[axis] as number) - ((xs[which] as Host).shape[axis] as number);
          which++;
        }
        const x = xs[which] as Host;
        return x.data[ravel(index, x.shape)] as number;
      });
      expect(await run(kernels, "concat", xs, to, { axis }), dtype).toEqual(exact);
      expect(await run(hardware, "concat", xs, to, { axis }), dtype).toEqual(exact);
    }
  });

  it("folds dispatches that exceed the workgroups of a dimension", async () => {
    const small = testGpu({ maxComputeWorkgroupsPerDimension: 3 });
    const x = numbered([97, 101], "f32");
    const exact = moved(x, [101, 97], ([i, j]) => [j as number, i as number]);
    for (const software of [true, false]) {
      const table = shapeKernels({ ...small, software } satisfies Gpu);
      const [y] = await call(small, table.transpose, [x], [{ shape: [101, 97], dtype: "f32" }], { perm: [1, 0] });
      expect([...(y as TypedArray)]).toEqual(exact);
    }
    small.dispose();
  });

  describe("on a device that binds 4096 bytes at once", () => {
    let split: OwnedGpu;
    let table: typeof kernels;
    beforeAll(() => {
      split = testGpu({ maxStorageBufferBindingSize: 4096 });
      table = shapeKernels(split);
    });
    afterAll(() => split.dispose());

    it.each(dtypes)("slices along axis 0 and puts together again: %s", async (dtype) => {
      for (const row of [62, 7, 3]) {
        const rows = Math.ceil(9000 / row);
        const x = numbered([rows, row], dtype);
        for (const [from, size] of [
          [0, 5],
          [11, rows - 11],
          [rows - 1, 1],
          [3, Math.floor(rows / 2)],
        ] as const) {
          const spec: Spec = { shape: [size, row], dtype };
          const [y] = await call(split, table.slice, [x], [spec], { start: [from, 0], size: spec.shape });
          expect([...(y as TypedArray)]).toEqual([...x.data.subarray(from * row, (from + size) * row)]);
        }
        const cut = Math.floor(rows / 3);
        const parts = [
          host(x.data.slice(0, cut * row), [cut, row], dtype),
          host(x.data.slice(cut * row), [rows - cut, row], dtype),
        ];
        const [whole] = await call(split, table.concat, parts, [{ shape: [rows, row], dtype }], { axis: 0 });
        expect([...(whole as TypedArray)]).toEqual([...x.data]);
      }
    });

    it("says that a transpose takes one buffer only, and keeps no storage", () => {
      const x = split.upload(new Float32Array(4000), { shape: [400, 10], dtype: "f32" });
      const before = split.memory().used;
      const operand = { shape: [400, 10], dtype: "f32" as const, handle: x };
      expect(() => table.transpose([operand], [{ shape: [10, 400], dtype: "f32" }], { perm: [1, 0] })).toThrow(
        /transpose: a tensor of 16000 bytes lies in \d+ buffers/,
      );
      expect(split.memory().used).toBe(before);
    });

    it("returns views where nothing moves", () => {
      const handle: WebgpuHandle = split.alloc({ shape: [3, 1], dtype: "f32" });
      const x = { shape: [3, 1], dtype: "f32" as const, handle };
      expect(table.transpose([x], [{ shape: [1, 3], dtype: "f32" }], { perm: [1, 0] })).toEqual([handle]);
      expect(table.broadcastTo?.([x], [{ shape: [1, 3, 1], dtype: "f32" }], {})).toEqual([handle]);
      split.free(handle);
    });
  });
});
