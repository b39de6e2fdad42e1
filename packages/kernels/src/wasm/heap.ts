// The allocator of the wasm memory, kept on the JavaScript side: blocks are plain objects, so the memory holds nothing but tensors.
// Two-level segregated fit: free blocks hang in lists by size class (eight per power of two), neighbours merge when freed.
import { UnsupportedError } from "@switchyard/core";

/** A piece of the heap: address and usable bytes (a multiple of 64; kernels may write up to the end). */
export interface Block {
  readonly ptr: number;
  readonly bytes: number;
}

export interface Heap {
  readonly memory: WebAssembly.Memory;
  /** At least `bytes`; `what` names the tensor in the error when memory ends. */
  alloc(bytes: number, what: () => string): Block;
  free(block: Block): void;
  /** Bytes in blocks handed out, and bytes of the whole memory. */
  used(): number;
  held(): number;
  /** Views of the whole memory, taken anew after it has grown. */
  f32(): Float32Array;
  i32(): Int32Array;
  u16(): Uint16Array;
  u8(): Uint8Array;
}

const GRAIN = 64;
const PAGE = 65_536;
/** Never handed out: vector loads may reach past the last block. */
const GUARD = 4_096;
/** How many blocks of the own size class are looked at before a larger one is cut. */
const PATIENCE = 8;

interface Node {
  ptr: number;
  bytes: number;
  state: "used" | "free" | "gone";
  /** Neighbours in memory. */
  before: Node | undefined;
  after: Node | undefined;
  /** Neighbours in the list of the size class. */
  previous: Node | undefined;
  next: Node | undefined;
}

/** Index of the lowest set bit. */
const lowest = (bits: number): number => 31 - Math.clz32(bits & -bits);

export const megabytes = (bytes: number): string => `${(bytes / 1e6).toFixed(bytes < 1e8 ? 2 : 0)} MB`;

/** A heap over `memory` from address `start`; it grows the memory up to `limit` bytes. */
export function createHeap(memory: WebAssembly.Memory, start: number, limit: number): Heap {
  const lists: (Node | undefined)[] = [];
  /** Bit s of classes[p]: the list of power p, class s is not empty. */
  const classes = new Uint8Array(32);
  let powers = 0;
  let last: Node | undefined;
  let used = 0;

  const listOf = (bytes: number): number => {
    const units = bytes / GRAIN;
    const power = 31 - Math.clz32(units);
    return power < 3 ? 8 * power + (units - (1 << power)) * (8 >> power) : 8 * power + ((units >>> (power - 3)) & 7);
  };
  const insert = (node: Node): void => {
    node.state = "free";
    const i = listOf(node.bytes);
    const head = lists[i];
    node.previous = undefined;
    node.next = head;
    if (head) head.previous = node;
    lists[i] = node;
    classes[i >> 3] = (classes[i >> 3] ?? 0) | (1 << (i & 7));
    powers |= 1 << (i >> 3);
  };
  const remove = (node: Node): void => {
    const i = listOf(node.bytes);
    if (node.next) node.next.previous = node.previous;
    if (node.previous) node.previous.next = node.next;
    else {
      lists[i] = node.next;
      if (!node.next) {
        const left = (classes[i >> 3] ?? 0) & ~(1 << (i & 7));
        classes[i >> 3] = left;
        if (left === 0) powers &= ~(1 << (i >> 3));
      }
    }
  };
  /** A block of the same class that fits (a freed tensor of this very size), else the first of the next class that has any. */
  const find = (bytes: number, patience: number): Node | undefined => {
    const i = listOf(bytes);
    let near = lists[i];
    for (let n = 0; near && n < patience; n++, near = near.next) if (near.bytes >= bytes) return near;
    const beside = (classes[i >> 3] ?? 0) & (~1 << (i & 7));
    if (beside !== 0) return lists[(i & ~7) + lowest(beside)];
    const above = i >> 3 >= 31 ? 0 : powers & (~1 << (i >> 3));
    return above === 0 ? undefined : lists[8 * lowest(above) + lowest(classes[lowest(above)] ?? 0)];
  };

  const end = (): number => (last ? last.ptr + last.bytes : start);
  /** Joins the memory between the last block and `to` to the heap. */
  const extend = (to: number): void => {
    const ptr = end();
    if (to <= ptr) return;
    if (last?.state === "free") {
      remove(last);
      last.bytes = to - last.ptr;
      insert(last);
      return;
    }
    const node: Node = {
      ptr,
      bytes: to - ptr,
      state: "free",
      before: last,
      after: undefined,
      previous: undefined,
      next: undefined,
    };
    if (last) last.after = node;
    last = node;
    insert(node);
  };
  const grow = (bytes: number): void => {
    const held = memory.buffer.byteLength;
    const tail = last?.state === "free" ? last.bytes : 0;
    const least = Math.max(0, bytes - tail);
    // A quarter more than now, so that growing stays rare; exactly what is needed when that does not fit.
    for (const ask of [Math.max(least, Math.min(held / 4, 2 ** 28), 2 ** 22), least]) {
      const pages = Math.ceil(ask / PAGE);
      if (held + pages * PAGE > limit) continue;
      try {
        memory.grow(pages);
      } catch (error) {
        // The engine refuses to grow: smaller, then out of memory, which the caller reports.
        if (error instanceof RangeError) continue;
        throw error;
      }
      extend(Math.min(memory.buffer.byteLength, limit) - GUARD);
      return;
    }
  };
  extend(memory.buffer.byteLength - GUARD);

  let views: { f32: Float32Array; i32: Int32Array; u16: Uint16Array; u8: Uint8Array } | undefined;
  let viewed: ArrayBufferLike | undefined;
  const fresh = (): NonNullable<typeof views> => {
    const buffer = memory.buffer;
    if (!views || viewed !== buffer) {
      viewed = buffer;
      views = {
        f32: new Float32Array(buffer),
        i32: new Int32Array(buffer),
        u16: new Uint16Array(buffer),
        u8: new Uint8Array(buffer),
      };
    }
    return views;
  };

  return {
    memory,
    alloc(wanted, what) {
      const bytes = Math.max(GRAIN, Math.ceil(wanted / GRAIN) * GRAIN);
      let node = bytes < limit ? find(bytes, PATIENCE) : undefined;
      if (!node && bytes < limit) {
        grow(bytes);
        node = find(bytes, Number.POSITIVE_INFINITY);
      }
      if (!node) {
        const held = memory.buffer.byteLength;
        throw new UnsupportedError(
          `wasm: out of memory: ${what()} needs ${megabytes(bytes)}; ${megabytes(used)} are in use, ` +
            `${megabytes(held)} held of at most ${megabytes(limit)}. Dispose of tensors or use scope(), ` +
            "make the batch smaller, or hold weights in bf16",
        );
      }
      remove(node);
      if (node.bytes > bytes) {
        const rest: Node = {
          ptr: node.ptr + bytes,
          bytes: node.bytes - bytes,
          state: "free",
          before: node,
          after: node.after,
          previous: undefined,
          next: undefined,
        };
        if (node.after) node.after.before = rest;
        else last = rest;
        node.after = rest;
        node.bytes = bytes;
        insert(rest);
      }
      node.state = "used";
      used += node.bytes;
      return node;
    },
    free(block) {
      const node = block as Node;
      if (node.state !== "used") throw new Error(`wasm: the block at ${block.ptr} was freed twice`);
      used -= node.bytes;
      let whole = node;
      const { before, after } = node;
      if (after?.state === "free") {
        remove(after);
        join(node, after);
      }
      if (before?.state === "free") {
        remove(before);
        join(before, node);
        whole = before;
      }
      insert(whole);
    },
    used: () => used,
    held: () => memory.buffer.byteLength,
    f32: () => fresh().f32,
    i32: () => fresh().i32,
    u16: () => fresh().u16,
    u8: () => fresh().u8,
  };

  /** `a` takes over `b`, its neighbour above. */
  function join(a: Node, b: Node): void {
    a.bytes += b.bytes;
    a.after = b.after;
    if (b.after) b.after.before = a;
    else last = a;
    b.state = "gone";
  }
}
