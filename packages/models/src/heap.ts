// A binary heap: the entry that comes before all others is popped first.

/** A priority queue ordered by `before(x, y)`: whether x leaves earlier than y. */
export class Heap<T> {
  readonly #entries: T[] = [];
  readonly #before: (x: T, y: T) => boolean;

  constructor(before: (x: T, y: T) => boolean) {
    this.#before = before;
  }

  push(entry: T): void {
    const entries = this.#entries;
    let i = entries.length;
    entries.push(entry);
    while (i > 0) {
      const parent = (i - 1) >> 1;
      const above = entries[parent] as T;
      if (!this.#before(entry, above)) break;
      entries[i] = above;
      i = parent;
    }
    entries[i] = entry;
  }

  pop(): T | undefined {
    const entries = this.#entries;
    const top = entries[0];
    const last = entries.pop();
    if (entries.length === 0 || last === undefined) return top;
    let i = 0;
    for (;;) {
      let child = 2 * i + 1;
      if (child >= entries.length) break;
      if (child + 1 < entries.length && this.#before(entries[child + 1] as T, entries[child] as T)) child++;
      if (!this.#before(entries[child] as T, last)) break;
      entries[i] = entries[child] as T;
      i = child;
    }
    entries[i] = last;
    return top;
  }
}
