// What a peer must be able to do: the same work as our cases, handed back as contenders for the harness.
import type { Contender, LanguageModelCase, LayerCase, ProductCase } from "@switchyard/bench/kernels";

export interface Peer {
  readonly name: string;
  readonly version: string;
  /** Threads it really uses, which may be fewer than asked for. */
  readonly threads: number;
  /** Missing: the peer has no such operation. */
  product?(one: ProductCase): Promise<Contender>;
  layer?(one: LayerCase): Promise<Contender>;
  /** A model that passes `one.tokens` tokens through `depth` such layers, without a result to compare. */
  stack?(one: LayerCase, depth: number): Promise<Contender>;
  training?(one: LanguageModelCase): Promise<Contender>;
  close?(): void | Promise<void>;
}

export interface PeerOptions {
  readonly threads: number;
  /** Imports an installed package, or one file of it. */
  load(specifier: string): Promise<unknown>;
  /** The installed version of a package. */
  version(name: string): string;
}

export interface PeerSource {
  readonly name: string;
  /** npm packages with the range to install; none for a peer that is not JavaScript. */
  readonly packages: Readonly<Record<string, string>>;
  open(options: PeerOptions): Promise<Peer>;
}

/** Rows of each expert, found on the host as every library without a ragged product must: slot ids sorted by expert. */
export interface HostDispatch {
  /** Token of each sorted row. */
  readonly tokens: Int32Array<ArrayBuffer>;
  /** Sorted row of each slot (token * k + j). */
  readonly places: Int32Array<ArrayBuffer>;
  /** Rows per expert. */
  readonly sizes: readonly number[];
}

export function hostDispatch(ids: ArrayLike<number>, experts: number, k: number): HostDispatch {
  const sizes = new Array<number>(experts).fill(0);
  for (let slot = 0; slot < ids.length; slot++) sizes[ids[slot] as number] = (sizes[ids[slot] as number] as number) + 1;
  const next: number[] = [];
  let start = 0;
  for (const size of sizes) {
    next.push(start);
    start += size;
  }
  const tokens = new Int32Array(ids.length);
  const places = new Int32Array(ids.length);
  for (let slot = 0; slot < ids.length; slot++) {
    const e = ids[slot] as number;
    const place = next[e] as number;
    next[e] = place + 1;
    tokens[place] = Math.floor(slot / k);
    places[slot] = place;
  }
  return { tokens, places, sizes };
}

/** w [rows, columns] as [columns, rows]. */
export function transposed(w: Float32Array, rows: number, columns: number): Float32Array<ArrayBuffer> {
  const y = new Float32Array(w.length);
  for (let i = 0; i < rows; i++) for (let j = 0; j < columns; j++) y[j * rows + i] = w[i * columns + j] as number;
  return y;
}
