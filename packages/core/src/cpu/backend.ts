// The reference backend: plain loops over typed arrays, sums in double precision. The oracle of every other backend;
// about fifty times slower than WebAssembly, so never a default.
import type { Backend, Operand, TypedArray } from "../backend.ts";
import { ShapeError } from "../errors.ts";
import { elementwise } from "./elementwise.ts";
import { matmul } from "./matmul.ts";
import { reduce } from "./reduce.ts";
import { rows } from "./rows.ts";
import { shape } from "./shape.ts";
import { sort } from "./sort.ts";
import { type CpuHandle, raw, sizeOf, storage } from "./storage.ts";

export interface CpuBackend extends Backend<CpuHandle> {
  downloadSync(x: Operand<CpuHandle>): TypedArray;
  /** Handles made and not yet freed. */
  live(): number;
}

/**
 * The reference backend in plain JavaScript. `precision: 64` holds "f32" tensors in Float64Array (and downloads them as
 * such), so results are full double precision: for tight tolerances and finite differences.
 *
 * @throws ShapeError from `upload` when the data do not fill the shape.
 */
export function cpu({ precision = 32 }: { precision?: 32 | 64 } = {}): CpuBackend {
  if (precision !== 32 && precision !== 64) {
    throw new ShapeError(`cpu: precision must be 32 or 64, found ${String(precision)}`);
  }
  let live = 0;
  const store = storage(precision, () => {
    live++;
  });
  const downloadSync = (x: Operand<CpuHandle>): TypedArray => raw(x).slice();
  return {
    name: precision === 64 ? "cpu64" : "cpu",
    kernels: {
      ...elementwise(store),
      ...shape(store),
      ...rows(store),
      ...reduce(store),
      ...matmul(store),
      ...sort(store),
    },
    upload(data, spec) {
      if (data.length !== sizeOf(spec.shape)) {
        throw new ShapeError(`upload: ${data.length} values do not fill the shape [${spec.shape.join(", ")}]`);
      }
      // A Uint16Array given for a 16-bit float is its bit pattern; any other array holds numbers.
      const bits = (spec.dtype === "f16" || spec.dtype === "bf16") && data instanceof Uint16Array;
      return store.hold(bits ? data.slice() : store.encode(data, spec.dtype));
    },
    download: async (x) => downloadSync(x),
    downloadSync,
    free(handle) {
      if (handle.data === undefined) throw new Error("cpu: a handle was freed twice");
      handle.data = undefined;
      live--;
    },
    live: () => live,
  };
}
