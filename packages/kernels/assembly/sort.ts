// Stable orders: top-k, argsort (radix), counting of ids, and the dispatch of routed slots to experts.
import { floatKey, selectTop } from "./row-parts";

@unmanaged
class TopK {
  x: usize; // [rows, n]
  y: usize; // [rows, k]
  n: i32;
  k: i32;
}

export function topkIndices(job: TopK, from: i32, to: i32, scratch: usize): void {
  for (let r = <usize>from; r < <usize>to; r++) {
    selectTop(job.x + ((r * <usize>job.n) << 2), job.n, job.k, job.y + ((r * <usize>job.k) << 2));
  }
}

@unmanaged
class Argsort {
  x: usize; // [rows, n]
  y: usize; // [rows, k]: the first k of each order
  n: i32;
  k: i32;
  descending: i32;
  whole: i32; // i32 elements
  work: usize; // [units, 4 n + 256] words
}

/** Stable radix sort of each row, eight bits a pass; a pass in which all keys agree is left out. */
export function argsort(job: Argsort, from: i32, to: i32, scratch: usize): void {
  const n = job.n;
  const bytes = <usize>n << 2;
  for (let r = from; r < to; r++) {
    const x = job.x + <usize>r * bytes;
    const work = job.work + <usize>r * (4 * bytes + 1024);
    let keys = work, ids = work + bytes, keysTo = ids + bytes, idsTo = keysTo + bytes;
    const counts = idsTo + bytes;
    let differ: u32 = 0;
    for (let i: usize = 0; i < bytes; i += 4) {
      let key: u32;
      if (job.whole) {
        key = load<u32>(x + i) ^ 0x80000000;
        if (job.descending) key = ~key;
      } else key = floatKey(load<f32>(x + i), job.descending != 0);
      store<u32>(keys + i, key);
      store<i32>(ids + i, <i32>(i >> 2));
      differ |= key ^ load<u32>(keys);
    }
    for (let shift: u32 = 0; shift < 32; shift += 8) {
      if (((differ >> shift) & 255) == 0) continue;
      memory.fill(counts, 0, 1024);
      for (let i: usize = 0; i < bytes; i += 4) {
        const c = counts + <usize>(((load<u32>(keys + i) >> shift) & 255) << 2);
        store<i32>(c, load<i32>(c) + 4);
      }
      let sum = 0;
      for (let c = counts; c < counts + 1024; c += 4) {
        const count = load<i32>(c);
        store<i32>(c, sum);
        sum += count;
      }
      for (let i: usize = 0; i < bytes; i += 4) {
        const key = load<u32>(keys + i);
        const c = counts + <usize>(((key >> shift) & 255) << 2);
        const at = <usize>load<i32>(c);
        store<i32>(c, <i32>at + 4);
        store<u32>(keysTo + at, key);
        store<i32>(idsTo + at, load<i32>(ids + i));
      }
      let swap = keys;
      keys = keysTo;
      keysTo = swap;
      swap = ids;
      ids = idsTo;
      idsTo = swap;
    }
    memory.copy(job.y + ((<usize>r * <usize>job.k) << 2), ids, <usize>job.k << 2);
  }
}

// ---------------------------------------------------------------- experts

@unmanaged
class Dispatch {
  ids: usize; // [slots]: expert of each slot
  ends: usize; // [count]
  rows: usize; // [bound]: token of each position
  slots: usize; // [bound]: slot of each position
  m: i32;
  count: i32;
  bound: i32;
  k: i32; // slots per token
}

/** ends[e]: how many ids are in 0..e. One unit. */
export function blockEnds(job: Dispatch, from: i32, to: i32, scratch: usize): void {
  memory.fill(job.ends, 0, <usize>job.count << 2);
  for (let i: usize = 0; i < <usize>job.m << 2; i += 4) {
    const id = load<i32>(job.ids + i);
    if (<u32>id >= <u32>job.count) continue;
    const at = job.ends + (<usize>id << 2);
    store<i32>(at, load<i32>(at) + 1);
  }
  let sum = 0;
  for (let at = job.ends; at < job.ends + (<usize>job.count << 2); at += 4) {
    sum += load<i32>(at);
    store<i32>(at, sum);
  }
}

/** Stable counting sort of the slots by expert. One unit. Positions past the last block hold -1. */
export function dispatch(job: Dispatch, from: i32, to: i32, scratch: usize): void {
  const bound = job.bound;
  const shift = job.ends + 4;
  blockEnds(job, 0, 1, scratch);
  // While slots are placed, ends[e] runs from the start of e's block to its end: start from the ends of the blocks before.
  if (job.count > 0) {
    memory.copy(shift, job.ends, <usize>(job.count - 1) << 2);
    store<i32>(job.ends, 0);
  }
  memory.fill(job.rows, 0xff, <usize>bound << 2);
  memory.fill(job.slots, 0xff, <usize>bound << 2);
  for (let i = 0; i < job.m; i++) {
    const id = load<i32>(job.ids + (<usize>i << 2));
    if (<u32>id >= <u32>job.count) continue;
    const end = job.ends + (<usize>id << 2);
    const position = load<i32>(end);
    store<i32>(end, position + 1);
    if (position >= bound) continue;
    store<i32>(job.rows + (<usize>position << 2), i / job.k);
    store<i32>(job.slots + (<usize>position << 2), i);
  }
  for (let end = job.ends; end < job.ends + (<usize>job.count << 2); end += 4) store<i32>(end, min(load<i32>(end), bound));
}
