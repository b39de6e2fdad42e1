// The cache of a transformer: keys, values and the routers' own state of earlier positions, per layer. Keys and values grow in place
// where the backend can (wasm, a batch of one), else by copying.
import {
  alias,
  concat,
  dispose,
  type Engine,
  mapTree,
  ShapeError,
  slice,
  type Tensor,
  type Tree,
  takeRows,
} from "@switchyard/core";
import type { KvCache } from "./model.ts";

type LayerState = {
  /** [batch, positions, kvHeads, headSize] */
  readonly keys: Tensor;
  readonly values: Tensor;
  /** Leaves [batch, positions, ...]: all positions so far, as the router returned them. */
  readonly router?: Tree;
};

/** The cache that `Transformer.newCache` makes. Its tensors belong to it, not to any scope: dispose it when done. */
export class TransformerCache implements KvCache {
  readonly #layers: (LayerState | undefined)[];
  #origins: readonly number[];

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

  append(layer: number, keys: Tensor, values: Tensor): void {
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
    if (!Number.isInteger(length) || length < 0 || length > this.length) {
      throw new ShapeError(`cache: cannot be cut to ${length} positions, it holds ${this.length}`);
    }
    // A layer may be longer than the others when a pass failed half-way.
    this.#change((x) =>
      slice(
        x,
        x.shape.map(() => 0),
        x.shape.map((size, axis) => (axis === 1 ? Math.min(length, size) : size)),
      ),
    );
  }

  dispose(): void {
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

/** Runs `make` in a scope and takes what it returns out of all scopes: the caller frees it. */
function own<T extends Tree>(engine: Engine, make: () => T): T {
  const kept: T[] = [];
  engine.scope(() => {
    kept.push(mapTree(make(), (x) => alias(x)));
  });
  return kept[0] as T;
}
