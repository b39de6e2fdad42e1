// Tensors, their counted storage, and trees of them. A tensor knows its engine; nothing here knows how to compute.
import type { DType, Spec, TypedArray } from "./backend.ts";
import type { Engine } from "./engine.ts";

/** A value on an engine. Immutable; each Tensor object is one reference to storage that may be shared by views. */
export interface Tensor extends Spec {
  readonly engine: Engine;
  /** Number of elements. */
  readonly size: number;
  /** Copies the elements to the host, row-major. Rejects when the tensor was disposed or the device failed. */
  data(): Promise<TypedArray>;
  /** Drops this reference; storage is freed with its last reference. Calling it again does nothing. */
  dispose(): void;
}

/** Parameters, buffers, caches: records and lists whose leaves are tensors. */
export type Tree = Tensor | { readonly [name: string]: Tree } | readonly Tree[];

/** Storage shared by views: freed when the last reference goes. `content` is a device handle or, on a decorator, the inner tensor. */
export interface Storage<C> {
  count: number;
  readonly content: C;
}

/** The frames of `scope`: one stack per backend, shared by all decorators around it. */
export interface Scopes {
  readonly frames: Frame[];
}
export type Frame = Set<Scoped>;
/** What a frame disposes when its scope ends. */
export interface Scoped {
  frame: Frame | undefined;
  dispose(): void;
}

/** The one implementation of Tensor. Engines create it; everyone else sees `Tensor`. */
export class Stored<C> implements Tensor, Scoped {
  readonly engine: Engine;
  readonly shape: readonly number[];
  readonly dtype: DType;
  declare readonly format?: string;
  readonly size: number;
  readonly storage: Storage<C>;
  /** The caller gave this reference away: an op may overwrite the storage. */
  given = false;
  /** The frame that will dispose this tensor. */
  frame: Frame | undefined;
  private disposed = false;
  private readonly free: (content: C) => void;
  private readonly read: (x: Stored<C>) => Promise<TypedArray>;

  constructor(
    engine: Engine,
    spec: Spec,
    storage: Storage<C>,
    device: { free(content: C): void; read(x: Stored<C>): Promise<TypedArray> },
  ) {
    this.engine = engine;
    this.shape = spec.shape;
    this.dtype = spec.dtype;
    if (spec.format !== undefined) this.format = spec.format;
    this.size = sizeOf(spec.shape);
    this.storage = storage;
    this.free = device.free;
    this.read = device.read;
    storage.count++;
  }

  get alive(): boolean {
    return !this.disposed;
  }

  /** A second reference to the same storage, in no scope. */
  another(spec: Spec = this): Stored<C> {
    return new Stored(this.engine, spec, this.storage, { free: this.free, read: this.read });
  }

  data(): Promise<TypedArray> {
    if (this.disposed) return Promise.reject(new Error(gone(this)));
    return this.read(this);
  }

  dispose(): void {
    if (this.disposed) return;
    this.disposed = true;
    this.frame?.delete(this);
    this.frame = undefined;
    if (--this.storage.count === 0) this.free(this.storage.content);
  }
}

export const gone = (x: Spec): string =>
  `${show(x)} was disposed or given away and is used again; keep it with scope's result, or do not give() it`;

export const sizeOf = (shape: readonly number[]): number => shape.reduce((n, d) => n * d, 1);

/** "f32 [2, 3]", for messages. */
export const show = (x: Spec): string => `${x.dtype} [${x.shape.join(", ")}]${x.format ? ` (${x.format})` : ""}`;

export const isTensor = (x: unknown): x is Tensor => x instanceof Stored || isForeign(x);

// A second copy of core has a Stored class of its own; its tensors are still told apart from records.
const isForeign = (x: unknown): boolean =>
  typeof x === "object" && x !== null && "engine" in x && "dtype" in x && "shape" in x && "dispose" in x;

/** The same tree with every leaf replaced. Paths are joined by dots: "layers.0.experts.down". */
export function mapTree<T extends Tree>(tree: T, change: (leaf: Tensor, path: string) => Tensor): T;
export function mapTree(tree: Tree, change: (leaf: Tensor, path: string) => Tensor): Tree {
  const visit = (node: Tree, path: string): Tree => {
    if (isTensor(node)) return change(node, path);
    const below = (key: string | number) => (path === "" ? `${key}` : `${path}.${key}`);
    if (isList(node)) return node.map((child, i) => visit(child, below(i)));
    return Object.fromEntries(Object.entries(node).map(([key, child]) => [key, visit(child, below(key))]));
  };
  return visit(tree, "");
}

const isList = (tree: Tree): tree is readonly Tree[] => Array.isArray(tree);

/** All leaves with their paths, in a fixed order. */
export function leaves(tree: Tree): [path: string, leaf: Tensor][] {
  const found: [string, Tensor][] = [];
  mapTree(tree, (leaf, path) => {
    found.push([path, leaf]);
    return leaf;
  });
  return found;
}

/** Disposes every leaf. */
export function dispose(tree: Tree): void {
  for (const [, leaf] of leaves(tree)) leaf.dispose();
}
