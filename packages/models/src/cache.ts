// The cache of a transformer: keys, values and the routers' own state of earlier positions, per layer. Keys and values grow in place
// where the backend can (wasm, a batch of one), else by copying.
import {
  alias,
  concat,
  type DType,
  dispose,
  type Engine,
  leaves,
  mapTree,
  ShapeError,
  slice,
  type Tensor,
  type Tree,
  takeRows,
} from "@switchyard/core";
import type { KvCache } from "./model.ts";

const elementBytes: Readonly<Record<DType, number>> = { f32: 4, i32: 4, f16: 2, bf16: 2, u8: 1 };

type LayerState = {
  /** [batch, positions, kvHeads, headSize] */
  readonly keys: Tensor;
  readonly values: Tensor;
  /** Leaves [batch, positions, ...]: all positions so far, as the router returned them. */
  readonly router?: Tree;
};

/** What a layer keeps of a position: heads and their size. */
export interface CacheSizes {
  readonly keys: readonly [heads: number, size: number];
  readonly values: readonly [heads: number, size: number];
}

/** The cache that `Transformer.newCache` makes. Its tensors belong to it, not to any scope: dispose it when done. */
export class TransformerCache implements KvCache {
  readonly #layers: (LayerState | undefined)[];
  #origins: readonly number[];
  #disposed = false;

  constructor(layers: number, batch: number) {
    if (!(Number.isSafeInteger(batch) && batch > 0)) {
      throw new ShapeError(`cache: ${batch} rows, expected a whole number from 1`);
    }
    this.#layers = new Array<undefined>(layers).fill(undefined);
    this.#origins = Array.from({ length: batch }, (_, row) => row);
  }

  get batch(): number {
    return this.#origins.length;
  }

  get origins(): readonly number[] {
    return this.#origins;
  }

  get length(): number {
    return Math.min(...this.#layers.map((state) => state?.keys.shape[1] ?? 0));
  }

  get bytes(): number {
    const held = this.#layers.flatMap((state) => (state ? leaves({ ...state }) : []));
    return held.reduce((sum, [, { size, dtype }]) => sum + size * elementBytes[dtype], 0);
  }

  /** Throws ShapeError for a cache that was disposed or filled by a model with other layers, which would compute nonsense or fail half-way. */
  checkFits(layers: readonly CacheSizes[]): void {
    this.#checkAlive();
    if (this.#layers.length !== layers.length) {
      throw new ShapeError(
        `cache: it is of a model with ${this.#layers.length} layers, this one has ${layers.length}; use model.newCache(batch)`,
      );
    }
    for (const [layer, state] of this.#layers.entries()) {
      for (const part of ["keys", "values"] as const) {
        const [, , heads, size] = state?.[part].shape ?? [];
        const [expectedHeads, expectedSize] = layers[layer]?.[part] ?? [];
        if (state === undefined || (heads === expectedHeads && size === expectedSize)) continue;
        throw new ShapeError(
          `cache: its ${part} of layer ${layer} have ${heads} heads of ${size}, those of this model ${expectedHeads} of ` +
            `${expectedSize}: another model filled it; use model.newCache(batch)`,
        );
      }
    }
  }

  #checkAlive(): void {
    if (this.#disposed) throw new ShapeError("cache: it was disposed; make another one with model.newCache(batch)");
  }

  append(layer: number, keys: Tensor, values: Tensor): void {
    this.#checkAlive();
    if (!(layer in this.#layers)) throw new ShapeError(`cache: layer ${layer} of ${this.#layers.length}`);
    for (const x of [keys, values]) {
      if (x.shape.length !== 4 || x.shape[0] !== this.batch) {
        throw new ShapeError(
          `cache: keys and values must be [batch, sequence, kvHeads, headSize] with batch ${this.batch}, ` +
            `found [${x.shape}]`,
        );
      }
    }
    if (this.#layers[layer] === undefined) {
      this.#layers[layer] = own(keys.engine, () => ({ keys, values }));
      return;
    }
    this.#extend(layer, "keys", keys);
    this.#extend(layer, "values", values);
  }

  /** The old tensor is given away, so that a backend can append in place; when that fails, it is as it was. */
  #extend(layer: number, part: "keys" | "values", x: Tensor): void {
    const old = this.#layers[layer] as LayerState;
    const put = (tensor: Tensor): void => {
      this.#layers[layer] = { ...old, [part]: alias(tensor) };
    };
    x.engine.scope(() => {
      const gift = x.engine.give(old[part]);
      try {
        put(concat([gift, x], 1));
      } catch (error) {
        put(gift);
        throw error;
      }
    });
  }

  /** All keys and values so far, [batch, positions, kvHeads, headSize]; undefined before the first append. */
  layer(layer: number): LayerState | undefined {
    return this.#layers[layer];
  }

  /** Takes over what a router returned as its new state. */
  setRouter(layer: number, router: Tree): void {
    const old = this.#layers[layer];
    if (!old) throw new ShapeError(`cache: layer ${layer} has no keys yet`);
    this.#layers[layer] = { ...old, router: own(old.keys.engine, () => router) };
    if (old.router) dispose(old.router);
  }

  reorder(rows: readonly number[]): void {
    const wrong = rows.find((row) => !Number.isInteger(row) || row < 0 || row >= this.batch);
    if (wrong !== undefined) throw new ShapeError(`cache: cannot take row ${wrong} of a batch of ${this.batch}`);
    this.#change((x) => takeRows(x, x.engine.root.tensor(Int32Array.from(rows), [rows.length])));
    this.#origins = rows.map((row) => this.#origins[row] as number);
  }

  truncate(length: number): void {
    this.#checkLength(length, "cut");
    // A layer may be longer than the others when a pass failed half-way.
    this.#change((x) => firstPositions(x, length));
  }

  #checkLength(length: number, verb: string): void {
    this.#checkAlive();
    if (Number.isInteger(length) && length >= 0 && length <= this.length) return;
    throw new ShapeError(`cache: cannot be ${verb} to ${length} positions, it holds ${this.length}`);
  }

  /** A new cache of its own with the first `length` positions of this one. */
  copy(length: number): TransformerCache {
    this.#checkLength(length, "copied");
    const copied = new TransformerCache(this.#layers.length, this.batch);
    copied.#origins = this.#origins;
    try {
      for (const [layer, state] of this.#layers.entries()) {
        if (!state || length === 0) continue;
        copied.#layers[layer] = own(state.keys.engine, () => mapTree({ ...state }, (x) => firstPositions(x, length)));
      }
    } catch (error) {
      copied.dispose();
      throw error;
    }
    return copied;
  }

  dispose(): void {
    this.#disposed = true;
    for (const state of this.#layers) if (state) dispose({ ...state });
    this.#layers.fill(undefined);
  }

  /** All layers are made anew before anything old goes, so that a failure leaves the cache as it was. */
  #change(change: (x: Tensor) => Tensor): void {
    const changed = this.#layers.map((old) => old && own(old.keys.engine, () => mapTree({ ...old }, change)));
    for (const [layer, state] of changed.entries()) {
      const old = this.#layers[layer];
      this.#layers[layer] = state;
      if (old) dispose({ ...old });
    }
  }
}

/** [batch, positions, ...] -> [batch, length or fewer, ...] */
const firstPositions = (x: Tensor, length: number): Tensor =>
  slice(
    x,
    x.shape.map(() => 0),
    x.shape.map((size, axis) => (axis === 1 ? Math.min(length, size) : size)),
  );

/** Runs `make` in a scope and takes what it returns out of all scopes: the caller frees it. */
function own<T extends Tree>(engine: Engine, make: () => T): T {
  const kept: T[] = [];
  engine.scope(() => {
    kept.push(mapTree(make(), (x) => alias(x)));
  });
  return kept[0] as T;
}
