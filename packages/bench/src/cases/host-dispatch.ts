// What every library without a ragged product needs of the host: rows sorted by expert, and matrices turned over.

/** Rows of each expert: slot ids sorted by expert. */
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
