// What gpu.js cannot do, or not exactly: integers beyond 2^24, sorting, counting, other storage types. The kernels of
// the reference backend run here, on arrays that are read from the device where they were there.
import type { Spec, TypedArray } from "@switchyard/core";
import { at, type Body, type Input } from "./calls.ts";
import { contentOf, reference } from "./storage.ts";

/** A kernel of the reference backend as a body. */
export function onHost(name: string): Body {
  return async (inputs, results, attrs, work) => {
    const kernel = reference.kernels[name];
    if (!kernel) throw new Error(`gpujs: the reference backend has no kernel "${name}"`);
    const operands = [];
    for (const x of inputs) operands.push({ ...specOf(x), handle: { data: await work.host(x.value) } });
    const handles = kernel(operands, results, attrs);
    return handles.map((handle, i) => work.value(at(results, i).dtype, contentOf(handle)));
  };
}

/** f32 on the device, everything else on the host. `input` is the one whose dtype decides. */
export const floatsElse = (name: string, body: Body, input = 0): Body => {
  const host = onHost(name);
  return (inputs, results, attrs, work) =>
    (at(inputs, input).dtype === "f32" ? body : host)(inputs, results, attrs, work);
};

/** Stable counting sort of the slots of ids [tokens, k] by expert: rows [bound], slots [bound], ends [count]. */
export const dispatch: Body = async (inputs, _, { count, bound }: { count: number; bound: number }, work) => {
  const x = at(inputs, 0);
  const ids = await work.host(x.value);
  const k = x.shape[1] ?? 1;
  const next = new Int32Array(count + 1);
  const isExpert = (id: number): boolean => id >= 0 && id < count;
  for (const id of ids) if (isExpert(id)) next[id + 1] = (next[id + 1] ?? 0) + 1;
  for (let e = 1; e <= count; e++) next[e] = (next[e] ?? 0) + (next[e - 1] ?? 0);
  const ends = next.slice(1).map((end) => Math.min(end, bound));
  const [rows, slots] = [new Int32Array(bound).fill(-1), new Int32Array(bound).fill(-1)];
  ids.forEach((id, slot) => {
    if (!isExpert(id)) return;
    const position = next[id] ?? 0;
    next[id] = position + 1;
    // Past the bound an array of fixed length ignores the write.
    rows[position] = Math.floor(slot / k);
    slots[position] = slot;
  });
  return [work.value("i32", rows), work.value("i32", slots), work.value("i32", ends)];
};

/**
 * Which elements of `ids` stand at each of `count` places, as floats: where the list of each place starts (count + 1
 * numbers), then the positions in `ids`, place by place and in their order. Sums over ids are gathers through it.
 */
export function placesOf(ids: TypedArray, count: number, placeOf: (id: number) => number): Float32Array {
  const starts = new Int32Array(count + 2);
  const places = Int32Array.from(ids, (id) => {
    const place = placeOf(id);
    return place >= 0 && place < count ? place : -1;
  });
  for (const place of places) if (place >= 0) starts[place + 2] = (starts[place + 2] ?? 0) + 1;
  for (let i = 1; i < starts.length; i++) starts[i] = (starts[i] ?? 0) + (starts[i - 1] ?? 0);
  const total = starts[count + 1] ?? 0;
  const lists = new Float32Array(count + 1 + total);
  places.forEach((place, i) => {
    if (place < 0) return;
    const to = starts[place + 1] ?? 0;
    starts[place + 1] = to + 1;
    lists[count + 1 + to] = i;
  });
  // Filled up, the list of a place ends where the next one starts.
  for (let place = 0; place <= count; place++) lists[place] = starts[place] ?? 0;
  return lists;
}

const specOf = ({ shape, dtype }: Input): Spec => ({ shape, dtype });
