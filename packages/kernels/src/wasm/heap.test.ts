import { describe, expect, it } from "vitest";
import { type Block, createHeap, type Heap } from "./heap.ts";

const heapOf = (pages: number, limit = pages): Heap =>
  createHeap(new WebAssembly.Memory({ initial: pages, maximum: 65_536 }), 65_536, limit * 65_536);
const what = (): string => "a tensor [3, 4] f32";

describe("heap", () => {
  it("gives blocks of whole grains that do not overlap, and takes them back", () => {
    const heap = heapOf(4, 64);
    const live: Block[] = [];
    let state = 1;
    const random = (n: number): number => {
      state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
      return state % n;
    };
    let expected = 0;
    for (let i = 0; i < 3_000; i++) {
      if (live.length > 0 && random(5) < 2) {
        const [block] = live.splice(random(live.length), 1);
        if (!block) throw new Error("no block");
        expected -= block.bytes;
        heap.free(block);
      } else if (live.length < 60) {
        const wanted = random(10) === 0 ? random(60_000) : random(700);
        const block = heap.alloc(wanted, what);
        expect(block.bytes).toBeGreaterThanOrEqual(Math.max(1, wanted));
        expect([block.ptr % 64, block.bytes % 64]).toEqual([0, 0]);
        expect(block.ptr).toBeGreaterThanOrEqual(65_536);
        expect(block.ptr + block.bytes).toBeLessThanOrEqual(heap.held());
        for (const other of live) {
          expect(block.ptr + block.bytes <= other.ptr || other.ptr + other.bytes <= block.ptr).toBe(true);
        }
        live.push(block);
        expected += block.bytes;
      }
      expect(heap.used()).toBe(expected);
    }
    for (const block of live) heap.free(block);
    expect(heap.used()).toBe(0);
    // Everything merged again: one block of nearly all the memory fits without growing.
    const held = heap.held();
    heap.free(heap.alloc(held - 65_536 - 4_096, what));
    expect(heap.held()).toBe(held);
  });

  it("gives a freed block again to the next request of its size", () => {
    const heap = heapOf(4);
    const [a, b, c] = [heap.alloc(1_000, what), heap.alloc(5_000, what), heap.alloc(1_000, what)];
    heap.free(b);
    expect(heap.alloc(5_000, what).ptr).toBe(b.ptr);
    expect(a.ptr).not.toBe(c.ptr);
  });

  it("grows, and gives fresh views then", () => {
    const heap = heapOf(2, 4_096);
    const block = heap.alloc(100, what);
    const before = heap.f32();
    before[block.ptr / 4] = 42;
    const large = heap.alloc(20_000_000, what);
    expect(heap.f32()).not.toBe(before);
    expect(heap.f32()[block.ptr / 4]).toBe(42);
    heap.f32()[(large.ptr + large.bytes) / 4 - 1] = 7;
    expect(heap.u8().length).toBe(heap.held());
  });

  it("says which tensor did not fit, what it needs and what is held", () => {
    const heap = heapOf(16, 32);
    heap.alloc(500_000, what);
    const big = (): Block => heap.alloc(3_000_000, () => "a tensor [1000, 750] f32");
    expect(big).toThrow(/out of memory: a tensor \[1000, 750\] f32 needs 3\.00 MB; 0\.50 MB are in use/);
    expect(big).toThrow(/held of at most 2\.10 MB/);
    // The heap is whole after the refusal.
    heap.free(heap.alloc(1_400_000, what));
    expect(heap.used()).toBe(500_032);
  });

  it("uses the last bytes up to the limit", () => {
    const heap = heapOf(2, 64);
    const block = heap.alloc(64 * 65_536 - 65_536 - 4_096, what);
    expect(block.ptr + block.bytes).toBe(64 * 65_536 - 4_096);
  });

  it("refuses to free twice", () => {
    const heap = heapOf(2);
    const block = heap.alloc(10, what);
    heap.free(block);
    expect(() => heap.free(block)).toThrow("freed twice");
  });
});
