// Orders on the device: top-k, argsort, block ends and the dispatch of tokens to experts. Everything is stable; no number reaches
// the host. Short rows are ranked by counting in workgroup memory, long ones go through a radix sort of counting passes: a
// histogram per tile, one scan over all of them, and each tile places its entries.
import type { Kernel } from "@switchyard/core";
import type { Bound, Gpu, WebgpuHandle } from "../device.ts";
import { sizeOf } from "../formats.ts";
import { type Program, program } from "../program.ts";
import { lastOf, memo } from "./parts.ts";

/** Variants differ in their buffers, so only the names are left to check at run time. */
type AnyProgram = Program;

const LANES = 128;
/** Lanes of programs without barriers for software drivers: few, so that the processor's cores share the work. */
const SERIAL_LANES = 16;
/** Bins that fit workgroup memory as counters: 8 KB. */
const MOST_BINS = 2048;

// ---------------------------------------------------------------- scan
const PER_LANE = 8;
const SCAN_BLOCK = LANES * PER_LANE;
/** One workgroup goes through this many blocks before blocks get workgroups of their own. */
const BLOCKS_IN_LOOP = 8;

/** Sum of `mine` over the lanes before this one, and over all: one call per set of barriers. */
const scanOfLanes = `
var<workgroup> lane_sums: array<u32, ${LANES}>;
fn scan_of_lanes(lane: u32, mine: u32) -> vec2u {
  var sum = mine;
  lane_sums[lane] = sum;
  for (var step = 1u; step < ${LANES}u; step *= 2u) {
    workgroupBarrier();
    var before = 0u;
    if (lane >= step) { before = lane_sums[lane - step]; }
    workgroupBarrier();
    sum += before;
    lane_sums[lane] = sum;
  }
  workgroupBarrier();
  let total = lane_sums[${LANES - 1}u];
  workgroupBarrier();
  return vec2u(sum - mine, total);
}`;

const scanBlocks = memo((carried: boolean): AnyProgram => {
  const reads: Record<string, string> = carried ? { carry: "u32" } : {};
  return program({
    key: `scan${carried ? " carried" : ""}`,
    reads,
    writes: { x: "u32" },
    params: { n: "u32", inclusive: "u32" },
    lanes: LANES,
    code: () => `${scanOfLanes}
fn main(group: u32, lane: u32) {
  let first = ${carried ? `group * ${SCAN_BLOCK}u` : "0u"};
  let last = ${carried ? `min(p.n, first + ${SCAN_BLOCK}u)` : "p.n"};
  var sum = ${carried ? "carry[group]" : "0u"};
  for (var block = first; block < last; block += ${SCAN_BLOCK}u) {
    let begin = block + lane * ${PER_LANE}u;
    var own = array<u32, ${PER_LANE}>();
    var mine = 0u;
    for (var j = 0u; j < ${PER_LANE}u; j++) {
      if (begin + j < last) { own[j] = x[begin + j]; }
      mine += own[j];
    }
    let scanned = scan_of_lanes(lane, mine);
    var running = sum + scanned.x;
    for (var j = 0u; j < ${PER_LANE}u; j++) {
      if (begin + j < last) { x[begin + j] = running + own[j] * p.inclusive; }
      running += own[j];
    }
    sum += scanned.y;
  }
}`,
  });
});

const blockSums = program({
  key: "scan sums",
  reads: { x: "u32" },
  writes: { sums: "u32" },
  params: { n: "u32" },
  lanes: LANES,
  code: () => `${scanOfLanes}
fn main(group: u32, lane: u32) {
  let first = group * ${SCAN_BLOCK}u;
  let last = min(p.n, first + ${SCAN_BLOCK}u);
  var mine = 0u;
  for (var i = first + lane; i < last; i += ${LANES}u) { mine += x[i]; }
  let scanned = scan_of_lanes(lane, mine);
  if (lane == 0u) { sums[group] = scanned.y; }
}`,
});

/** The same without barriers: a block per invocation. */
const SERIAL_BLOCK = 256;
const serialSums = program({
  key: "scan sums serial",
  reads: { x: "u32" },
  writes: { sums: "u32" },
  params: { n: "u32" },
  lanes: SERIAL_LANES,
  code: () => `
fn main(group: u32, lane: u32) {
  let first = (group * ${SERIAL_LANES}u + lane) * ${SERIAL_BLOCK}u;
  if (first >= p.n) { return; }
  var sum = 0u;
  for (var i = first; i < min(p.n, first + ${SERIAL_BLOCK}u); i++) { sum += x[i]; }
  sums[first / ${SERIAL_BLOCK}u] = sum;
}`,
});
const serialScan = memo((carried: boolean): AnyProgram => {
  const reads: Record<string, string> = carried ? { carry: "u32" } : {};
  return program({
    key: `scan serial${carried ? " carried" : ""}`,
    reads,
    writes: { x: "u32" },
    params: { n: "u32", inclusive: "u32" },
    lanes: SERIAL_LANES,
    code: () => `
fn main(group: u32, lane: u32) {
  let block = group * ${SERIAL_LANES}u + lane;
  let first = block * ${SERIAL_BLOCK}u;
  if (first >= p.n) { return; }
  var sum = ${carried ? "carry[block]" : "0u"};
  for (var i = first; i < min(p.n, first + ${SERIAL_BLOCK}u); i++) {
    let own = x[i];
    x[i] = sum + own * p.inclusive;
    sum += own;
  }
}`,
  });
});

/** Prefix sums of n counts in place: of those before each, or with it (`inclusive`). */
function recordScan(gpu: Gpu, x: Bound, n: number, inclusive: boolean): void {
  const serial = gpu.software;
  const blocks = Math.ceil(n / (serial ? SERIAL_BLOCK : SCAN_BLOCK));
  const groups = serial ? Math.ceil(blocks / SERIAL_LANES) : blocks;
  const params = { n, inclusive: inclusive ? 1 : 0 };
  if (blocks <= (serial ? 1 : BLOCKS_IN_LOOP)) {
    gpu.run(serial ? serialScan(false) : scanBlocks(false), {}, { x }, params, n === 0 ? 0 : 1);
    return;
  }
  const sums = gpu.scratch(blocks);
  gpu.run(serial ? serialSums : blockSums, { x }, { sums }, { n }, groups);
  recordScan(gpu, sums, blocks, false);
  gpu.run(serial ? serialScan(true) : scanBlocks(true), { carry: sums }, { x }, params, groups);
  gpu.free(sums);
}

// ---------------------------------------------------------------- keys
/**
 * How a value becomes the u32 that is sorted, ascending: its own order, its order backwards (NaN last both ways), an integer in
 * 0..p.bound ("list": ids, where everything outside becomes p.bound), or a key made before.
 */
const keys = {
  f32: { element: "f32", key: "order_of(value)" },
  "f32 descending": { element: "f32", key: "select(~order_of(value), 0xffffffffu, is_nan(value))" },
  "f32 bounded": { element: "f32", key: "min(u32(max(value, 0.0)), p.bound)" },
  "f32 bounded descending": { element: "f32", key: "p.bound - min(u32(max(value, 0.0)), p.bound)" },
  i32: { element: "i32", key: "(bitcast<u32>(value) ^ 0x80000000u)" },
  "i32 descending": { element: "i32", key: "~(bitcast<u32>(value) ^ 0x80000000u)" },
  "i32 bounded": { element: "i32", key: "min(bitcast<u32>(value), p.bound)" },
  "i32 bounded descending": { element: "i32", key: "p.bound - min(bitcast<u32>(value), p.bound)" },
  list: { element: "i32", key: "min(bitcast<u32>(value), p.bound)" },
  key: { element: "u32", key: "value" },
} as const;
type Order = keyof typeof keys;
const keyFunction = (order: Order): string =>
  `fn key_of(value: ${keys[order].element}) -> u32 { return ${keys[order].key}; }`;

// ---------------------------------------------------------------- counting passes
/**
 * A pass sorts each of `rows` rows of n by one digit of the keys. Its counts lie as [rows][bins][tiles]: their prefix sums say where
 * the entries of each tile and digit go. Parallel: a workgroup per tile, counters in workgroup memory, the rank within LANES
 * entries by comparing. Serial: an invocation per tile, counters in the table itself, for drivers whose barriers are slow.
 */
const passParams = {
  rows: "u32",
  n: "u32",
  tiles: "u32",
  length: "u32",
  bins: "u32",
  shift: "u32",
  mask: "u32",
  bound: "u32",
  limit: "u32",
  k: "u32",
} as const;
type Target = "pairs" | "order" | "dispatch";
/** In place of the room for counters. */
const SERIAL = 0;

const digitFunction = (order: Order): string => `${keyFunction(order)}
fn digit_of(key: u32) -> u32 { return min((key >> p.shift) & p.mask, p.bins - 1u); }`;

const histogram = memo((order: Order, room: number): AnyProgram => {
  const serial = room === SERIAL;
  return program({
    key: `histogram ${order} ${room}`,
    reads: { x: keys[order].element },
    writes: { counts: "u32" },
    params: passParams,
    lanes: serial ? SERIAL_LANES : LANES,
    code: () =>
      serial
        ? `${digitFunction(order)}
fn main(group: u32, lane: u32) {
  let own = group * ${SERIAL_LANES}u + lane;
  if (own >= p.rows * p.tiles) { return; }
  let row = own / p.tiles;
  let tile = own % p.tiles;
  for (var b = 0u; b < p.bins; b++) { counts[(row * p.bins + b) * p.tiles + tile] = 0u; }
  let first = tile * p.length;
  for (var i = first; i < min(p.n, first + p.length); i++) {
    counts[(row * p.bins + digit_of(key_of(x[row * p.n + i]))) * p.tiles + tile] += 1u;
  }
}`
        : `${digitFunction(order)}
var<workgroup> counters: array<atomic<u32>, ${room}>;
fn main(group: u32, lane: u32) {
  let row = group / p.tiles;
  let tile = group % p.tiles;
  for (var b = lane; b < p.bins; b += ${LANES}u) { atomicStore(&counters[b], 0u); }
  workgroupBarrier();
  let first = tile * p.length;
  let last = min(p.n, first + p.length);
  for (var i = first + lane; i < last; i += ${LANES}u) {
    atomicAdd(&counters[digit_of(key_of(x[row * p.n + i]))], 1u);
  }
  workgroupBarrier();
  for (var b = lane; b < p.bins; b += ${LANES}u) {
    counts[(row * p.bins + b) * p.tiles + tile] = atomicLoad(&counters[b]);
  }
}`,
  });
});

/** Where an entry goes, given `i`, `row`, `key` and `position`. */
const place = (target: Target, named: boolean): string => {
  const index = named ? "order[row * p.n + i]" : "i32(i)";
  switch (target) {
    case "pairs":
      return `sorted[position] = ${index}; sorted_keys[position] = key;`;
    case "order":
      return `sorted[position] = ${index};`;
    case "dispatch":
      return `if (position < p.limit) {
      slots[position] = select(i32(i), -1, key == p.bound);
      rows[position] = select(i32(i / p.k), -1, key == p.bound);
    }`;
    default:
      return target satisfies never;
  }
};
const targets = {
  pairs: { sorted: "i32", sorted_keys: "u32" },
  order: { sorted: "i32" },
  dispatch: { rows: "i32", slots: "i32" },
} as const;

/** The rounds of a tile: `counters` hold where the next entry of each digit goes. */
const placeTile = (target: Target, named: boolean): string => `
  for (var at = first; at < last; at += ${LANES}u) {
    let i = at + lane;
    let inside = i < last;
    var key = 0u;
    var digit = 0xffffffffu;
    if (inside) {
      key = key_of(x[row * p.n + i]);
      digit = digit_of(key);
    }
    digits[lane] = digit;
    workgroupBarrier();
    var position = 0u;
    if (inside) {
      position = atomicLoad(&counters[digit]);
      for (var j = 0u; j < lane; j++) { position += u32(digits[j] == digit); }
    }
    workgroupBarrier();
    if (inside) {
      atomicAdd(&counters[digit], 1u);
      ${place(target, named)}
    }
  }`;

const scatter = memo((order: Order, target: Target, room: number, named: boolean): AnyProgram => {
  const serial = room === SERIAL;
  const reads: Record<string, string> = {
    x: keys[order].element,
    ...(named ? { order: "i32" } : {}),
    ...(serial ? {} : { offsets: "u32" }),
  };
  const writes: Record<string, string> = { ...targets[target], ...(serial ? { offsets: "u32" } : {}) };
  return program({
    key: `scatter ${order} ${target} ${room}${named ? " named" : ""}`,
    reads,
    writes,
    params: passParams,
    lanes: serial ? SERIAL_LANES : LANES,
    code: () =>
      serial
        ? `${digitFunction(order)}
fn main(group: u32, lane: u32) {
  let own = group * ${SERIAL_LANES}u + lane;
  if (own >= p.rows * p.tiles) { return; }
  let row = own / p.tiles;
  let tile = own % p.tiles;
  let first = tile * p.length;
  for (var i = first; i < min(p.n, first + p.length); i++) {
    let key = key_of(x[row * p.n + i]);
    let at = (row * p.bins + digit_of(key)) * p.tiles + tile;
    let position = offsets[at];
    offsets[at] = position + 1u;
    ${place(target, named)}
  }
}`
        : `${digitFunction(order)}
var<workgroup> counters: array<atomic<u32>, ${room}>;
var<workgroup> digits: array<u32, ${LANES}>;
fn main(group: u32, lane: u32) {
  let row = group / p.tiles;
  let tile = group % p.tiles;
  for (var b = lane; b < p.bins; b += ${LANES}u) {
    atomicStore(&counters[b], offsets[(row * p.bins + b) * p.tiles + tile]);
  }
  let first = tile * p.length;
  let last = min(p.n, first + p.length);
  ${placeTile(target, named)}
}`,
  });
});

/** Powers of two from 16: few variants of workgroup arrays. */
const roomFor = (bins: number): number => 2 ** Math.max(4, Math.ceil(Math.log2(bins)));

type Pass = {
  readonly rows: number;
  readonly n: number;
  readonly tiles: number;
  readonly length: number;
  readonly bins: number;
  readonly shift: number;
  readonly mask: number;
  readonly bound: number;
  readonly limit: number;
  readonly k: number;
};
/** Tiles long enough that their histograms are no larger than the entries themselves, short enough to fill the device. */
function tiling(gpu: Gpu, rows: number, n: number, bins: number): { readonly length: number; readonly tiles: number } {
  const length = gpu.software
    ? Math.max(64, rows * n > 2 ** 16 ? 4 * bins : bins)
    : LANES * Math.min(16, Math.max(1, Math.ceil(bins / LANES), Math.ceil((rows * n) / (LANES * 1024))));
  return { length, tiles: Math.max(1, Math.ceil(n / length)) };
}
function recordPass(
  gpu: Gpu,
  order: Order,
  target: Target,
  x: Bound,
  named: Bound | undefined,
  to: Readonly<Record<string, Bound>>,
  pass: Pass,
  beforePlacing?: (offsets: WebgpuHandle) => void,
): void {
  const { rows, tiles, bins } = pass;
  const cells = rows * tiles * bins;
  const offsets = gpu.scratch(cells);
  const room = gpu.software ? SERIAL : roomFor(bins);
  const groups = gpu.software ? Math.ceil((rows * tiles) / SERIAL_LANES) : rows * tiles;
  gpu.run(histogram(order, room), { x }, { counts: offsets }, pass, groups);
  recordScan(gpu, offsets, cells, false);
  beforePlacing?.(offsets);
  const one = scatter(order, target, room, named !== undefined);
  gpu.run(one, { x, offsets, order: named ?? x }, { ...to, offsets }, pass, groups);
  gpu.free(offsets);
}

// ---------------------------------------------------------------- radix sort
const bitsFor = (bound: number): number => Math.max(1, Math.ceil(Math.log2(bound + 1)));

interface Sorting {
  readonly rows: number;
  readonly n: number;
  readonly order: Order;
  /** Largest key of a bounded order. */
  readonly bound?: number;
}
/** Records a stable sort of each row into `result` (ids within the row); with `sortedKeys` also the keys in their new order. */
function recordSort(gpu: Gpu, x: Bound, { rows, n, order, bound }: Sorting, result: Bound, sortedKeys?: Bound): void {
  if (rows * n === 0) return;
  const bits = bound === undefined ? 32 : bitsFor(bound);
  const passes = Math.ceil(bits / 8);
  const width = Math.ceil(bits / passes);
  const bins = 2 ** width;
  const { length, tiles } = tiling(gpu, rows, n, bins);
  const pair = () => ({ sorted: gpu.scratch(rows * n), sorted_keys: gpu.scratch(rows * n) });
  const between = [...(passes > 1 ? [pair()] : []), ...(passes > 2 ? [pair()] : [])];
  for (let i = 0; i < passes; i++) {
    const from = i === 0 ? undefined : between[(i - 1) % 2];
    const next = i === passes - 1 ? undefined : between[i % 2];
    const pass = { rows, n, tiles, length, bins, shift: i * width, mask: bins - 1, bound: bound ?? 0, limit: 0, k: 0 };
    const keep = next?.sorted_keys ?? sortedKeys;
    const to = { sorted: next?.sorted ?? result, ...(keep ? { sorted_keys: keep } : {}) };
    const target = keep ? "pairs" : "order";
    if (from) recordPass(gpu, "key", target, from.sorted_keys, from.sorted, to, pass);
    else recordPass(gpu, order, target, x, undefined, to, pass);
  }
  for (const { sorted, sorted_keys } of between) {
    gpu.free(sorted);
    gpu.free(sorted_keys);
  }
}

// ---------------------------------------------------------------- lists of ids
const lowerBounds = program({
  key: "lower bounds",
  reads: { keys: "u32" },
  writes: { y: "i32" },
  params: { n: "u32", count: "u32", base: "u32", limit: "u32" },
  lanes: 64,
  code: () => `
// y[e] = how many of the sorted keys are below base + e, at most limit
fn main(group: u32, lane: u32) {
  let e = group * 64u + lane;
  if (e >= p.count) { return; }
  var low = 0u;
  var high = p.n;
  while (low < high) {
    let middle = (low + high) / 2u;
    if (keys[middle] < p.base + e) { low = middle + 1u; } else { high = middle; }
  }
  y[e] = i32(min(low, p.limit));
}`,
});

/** Positions of a list of n ids by destination 0..count-1, those of one destination in their order in the list. */
export interface Lists {
  /** i32 [n]: ids outside stand behind all others. */
  readonly order: WebgpuHandle;
  /** i32 [count + 1]: the list of e is order[starts[e] .. starts[e + 1]]. */
  readonly starts: WebgpuHandle;
}
/** Records the lists of a list of ids; the caller frees both handles. Cost grows with n log count, not with n count. */
export function recordLists(gpu: Gpu, ids: Bound, n: number, count: number): Lists {
  const order = gpu.scratch(Math.max(1, n));
  const starts = gpu.scratch(count + 1);
  const sorted = gpu.scratch(Math.max(1, n));
  recordSort(gpu, ids, { rows: 1, n, order: "list", bound: count }, order, sorted);
  const params = { n, count: count + 1, base: 0, limit: n };
  gpu.run(lowerBounds, { keys: sorted }, { y: starts }, params, Math.ceil((count + 1) / 64));
  gpu.free(sorted);
  return { order, starts };
}

// ---------------------------------------------------------------- dispatch
export interface DispatchSizes {
  /** Number of ids: tokens * k. */
  readonly slots: number;
  readonly k: number;
  /** Number of experts. */
  readonly count: number;
  /** Length of `rows` and `slots`. */
  readonly bound: number;
}
export interface Dispatched {
  /** i32 [bound]: the token of each filled slot, by expert; -1 behind the last block. */
  readonly rows: WebgpuHandle;
  /** i32 [bound]: the flat slot, token * k + j. */
  readonly slots: WebgpuHandle;
  /** i32 [count]: where the block of each expert ends. */
  readonly ends: WebgpuHandle;
}

/** Few slots: one workgroup does it all. */
const FEW_SLOTS = 2048;
const smallDispatch = memo(
  (room: number): AnyProgram =>
    program({
      key: `dispatch small ${room}`,
      reads: { x: "i32" },
      writes: { rows: "i32", slots: "i32", ends: "i32" },
      params: passParams,
      lanes: LANES,
      code: () => `${digitFunction("list")}
${scanOfLanes}
var<workgroup> counters: array<atomic<u32>, ${room}>;
var<workgroup> digits: array<u32, ${LANES}>;
fn main(group: u32, lane: u32) {
  let row = group;
  let first = 0u;
  let last = p.n;
  for (var b = lane; b < p.bins; b += ${LANES}u) { atomicStore(&counters[b], 0u); }
  workgroupBarrier();
  for (var i = lane; i < p.n; i += ${LANES}u) { atomicAdd(&counters[key_of(x[i])], 1u); }
  workgroupBarrier();
  let per = (p.bins + ${LANES - 1}u) / ${LANES}u;
  let begin = min(lane * per, p.bins);
  let end = min(begin + per, p.bins);
  var mine = 0u;
  for (var b = begin; b < end; b++) { mine += atomicLoad(&counters[b]); }
  var at = scan_of_lanes(lane, mine).x;
  for (var b = begin; b < end; b++) {
    // Where a bin begins the one before it ends; the last bin holds the ids outside.
    if (b > 0u) { ends[b - 1u] = i32(min(at, p.limit)); }
    let size = atomicLoad(&counters[b]);
    atomicStore(&counters[b], at);
    at += size;
  }
  workgroupBarrier();
  ${placeTile("dispatch", false)}
}`,
    }),
);
/** The same by one invocation; `ends` counts, then holds where the next slot of each expert goes, and so ends up right. */
const serialDispatch: AnyProgram = program({
  key: "dispatch serial",
  reads: { x: "i32" },
  writes: { rows: "i32", slots: "i32", ends: "i32" },
  params: passParams,
  lanes: 1,
  code: () => `${keyFunction("list")}
fn main(group: u32, lane: u32) {
  for (var e = 0u; e < p.bound; e++) { ends[e] = 0; }
  for (var i = 0u; i < p.n; i++) {
    let e = key_of(x[i]);
    if (e < p.bound) { ends[e] += 1; }
  }
  var total = 0;
  for (var e = 0u; e < p.bound; e++) {
    let size = ends[e];
    ends[e] = total;
    total += size;
  }
  for (var i = 0u; i < p.n; i++) {
    let e = key_of(x[i]);
    if (e >= p.bound) { continue; }
    let position = u32(ends[e]);
    ends[e] += 1;
    if (position < p.limit) {
      slots[position] = i32(i);
      rows[position] = i32(i / p.k);
    }
  }
  for (var position = u32(total); position < p.limit; position++) {
    slots[position] = -1;
    rows[position] = -1;
  }
  for (var e = 0u; e < p.bound; e++) { ends[e] = min(ends[e], i32(p.limit)); }
}`,
});
/** ends of the offsets of a pass over all experts at once: where a bin begins the one before it ends. */
const endsOfOffsets = program({
  key: "ends of offsets",
  reads: { offsets: "u32" },
  writes: { ends: "i32" },
  params: { count: "u32", tiles: "u32", limit: "u32" },
  lanes: 64,
  code: () => `
fn main(group: u32, lane: u32) {
  let e = group * 64u + lane;
  if (e < p.count) { ends[e] = i32(min(offsets[(e + 1u) * p.tiles], p.limit)); }
}`,
});
const slotsOfOrder = program({
  key: "slots of order",
  reads: { order: "i32", keys: "u32" },
  writes: { rows: "i32", slots: "i32" },
  params: { count: "u32", limit: "u32", k: "u32" },
  lanes: 64,
  code: () => `
fn main(group: u32, lane: u32) {
  let position = group * 64u + lane;
  if (position >= p.limit) { return; }
  let outside = keys[position] >= p.count;
  let slot = order[position];
  slots[position] = select(slot, -1, outside);
  rows[position] = select(slot / i32(p.k), -1, outside);
}`,
});

const listOf = (gpu: Gpu, n: number): WebgpuHandle => gpu.alloc({ shape: [n], dtype: "i32" });

/**
 * Records the stable counting sort of flat ids [slots] by expert; ids outside 0..count-1 are left out. The caller frees the three
 * handles. At most `bound` slots are kept, the first ones; `ends` are cut there too.
 */
export function recordDispatch(gpu: Gpu, ids: WebgpuHandle, { slots: n, k, count, bound }: DispatchSizes): Dispatched {
  const to = { rows: listOf(gpu, bound), slots: listOf(gpu, bound), ends: listOf(gpu, count) };
  const bins = count + 1;
  const limit = bound;
  const whole = { rows: 1, n, tiles: 1, length: n, bins, shift: 0, mask: 0xffffffff, bound: count, limit, k };
  if (n <= FEW_SLOTS && bins <= MOST_BINS) {
    gpu.run(gpu.software ? serialDispatch : smallDispatch(roomFor(bins)), { x: ids }, to, whole, 1);
  } else if (bins <= MOST_BINS) {
    const { length, tiles } = tiling(gpu, 1, n, bins);
    recordPass(gpu, "list", "dispatch", ids, undefined, to, { ...whole, length, tiles }, (offsets) =>
      gpu.run(endsOfOffsets, { offsets }, { ends: to.ends }, { count, tiles, limit }, Math.ceil(count / 64)),
    );
  } else {
    const [order, sorted] = [gpu.scratch(Math.max(1, n)), gpu.scratch(Math.max(1, n))];
    recordSort(gpu, ids, { rows: 1, n, order: "list", bound: count }, order, sorted);
    gpu.run(lowerBounds, { keys: sorted }, { y: to.ends }, { n, count, base: 1, limit }, Math.ceil(count / 64));
    gpu.run(slotsOfOrder, { order, keys: sorted }, to, { count, limit, k }, Math.ceil(limit / 64));
    gpu.free(order);
    gpu.free(sorted);
  }
  return to;
}

// ---------------------------------------------------------------- block ends
const smallEnds = memo(
  (room: number): AnyProgram =>
    program({
      key: `block ends small ${room}`,
      reads: { x: "i32" },
      writes: { ends: "i32" },
      params: { n: "u32", bound: "u32" },
      lanes: LANES,
      code: () => `${keyFunction("list")}
${scanOfLanes}
var<workgroup> counters: array<atomic<u32>, ${room}>;
fn main(group: u32, lane: u32) {
  for (var b = lane; b < p.bound; b += ${LANES}u) { atomicStore(&counters[b], 0u); }
  workgroupBarrier();
  for (var i = lane; i < p.n; i += ${LANES}u) {
    let e = key_of(x[i]);
    if (e < p.bound) { atomicAdd(&counters[e], 1u); }
  }
  workgroupBarrier();
  let per = (p.bound + ${LANES - 1}u) / ${LANES}u;
  let begin = min(lane * per, p.bound);
  let end = min(begin + per, p.bound);
  var mine = 0u;
  for (var b = begin; b < end; b++) { mine += atomicLoad(&counters[b]); }
  var at = scan_of_lanes(lane, mine).x;
  for (var b = begin; b < end; b++) {
    at += atomicLoad(&counters[b]);
    ends[b] = i32(at);
  }
}`,
    }),
);
const serialEnds: AnyProgram = program({
  key: "block ends serial",
  reads: { x: "i32" },
  writes: { ends: "i32" },
  params: { n: "u32", bound: "u32" },
  lanes: 1,
  code: () => `${keyFunction("list")}
fn main(group: u32, lane: u32) {
  for (var e = 0u; e < p.bound; e++) { ends[e] = 0; }
  for (var i = 0u; i < p.n; i++) {
    let e = key_of(x[i]);
    if (e < p.bound) { ends[e] += 1; }
  }
  for (var e = 1u; e < p.bound; e++) { ends[e] += ends[e - 1u]; }
}`,
});
/** Ids per workgroup where many count into one table. */
const COUNTED = 4096;
const zeroCounts = program({
  key: "zero counts",
  reads: {},
  writes: { counts: "u32" },
  params: { count: "u32" },
  lanes: 64,
  code: () => `
fn main(group: u32, lane: u32) {
  let e = group * 64u + lane;
  if (e < p.count) { counts[e] = 0u; }
}`,
});
/** Adds into counts, by way of workgroup memory where they fit there: few experts would make all atomics meet. */
const countIds = memo((room: number | "direct"): AnyProgram => {
  const local = room !== "direct";
  return program({
    key: `count ids ${room}`,
    reads: { x: "i32" },
    writes: { counts: "atomic<u32>" },
    params: { n: "u32", bound: "u32" },
    lanes: LANES,
    code: () => `${keyFunction("list")}
${local ? `var<workgroup> counters: array<atomic<u32>, ${room}>;` : ""}
fn main(group: u32, lane: u32) {
  ${local ? `for (var b = lane; b < p.bound; b += ${LANES}u) { atomicStore(&counters[b], 0u); } workgroupBarrier();` : ""}
  let first = group * ${COUNTED}u;
  for (var i = first + lane; i < min(p.n, first + ${COUNTED}u); i += ${LANES}u) {
    let e = key_of(x[i]);
    if (e < p.bound) { atomicAdd(&${local ? "counters" : "counts"}[e], 1u); }
  }
  ${
    local
      ? `workgroupBarrier();
  for (var b = lane; b < p.bound; b += ${LANES}u) {
    let mine = atomicLoad(&counters[b]);
    if (mine > 0u) { atomicAdd(&counts[b], mine); }
  }`
      : ""
  }
}`,
  });
});

/** Few ids: one workgroup; on a software driver one invocation. */
const FEW_IDS = 8192;
function recordEnds(gpu: Gpu, ids: Bound, n: number, count: number, ends: WebgpuHandle): void {
  if (count === 0) return;
  const params = { n, bound: count };
  if (n <= FEW_IDS && gpu.software && count <= 2 * FEW_IDS) {
    gpu.run(serialEnds, { x: ids }, { ends }, params, 1);
  } else if (n <= FEW_IDS && count <= MOST_BINS) {
    gpu.run(smallEnds(roomFor(count)), { x: ids }, { ends }, params, 1);
  } else {
    gpu.run(zeroCounts, {}, { counts: ends }, { count }, Math.ceil(count / 64));
    const one = countIds(count <= MOST_BINS ? roomFor(count) : "direct");
    gpu.run(one, { x: ids }, { counts: ends }, params, Math.ceil(n / COUNTED));
    recordScan(gpu, ends, count, true);
  }
}

// ---------------------------------------------------------------- ranks: short rows and small k
/** Keys of a row, or of a tile of one, in workgroup memory: 8 KB. */
const MOST_RANKED = 2048;
/** A candidate that stands for nothing: it comes last. */
const NONE = "0xffffffffu";
const rankParams = {
  rows: "u32",
  /** Length of a row of x. */
  n: "u32",
  /** Entries of a row that are ranked (n, or that many candidates), in tiles of `length`. */
  count: "u32",
  tiles: "u32",
  length: "u32",
  k: "u32",
  /** vec4s of keys per tile. */
  quads: "u32",
  /** Lanes per tile, tiles (of different rows) per workgroup, and workgroups per tile. */
  width: "u32",
  packed: "u32",
  segments: "u32",
  bound: "u32",
} as const;

/** `id_at(row, j)`: the id of candidate j of a row, `key_at` its key. */
const candidates = (order: Order, chosen: boolean): string => `${keyFunction(order)}
fn id_at(row: u32, j: u32) -> u32 { return ${chosen ? "candidates[row * p.count + j]" : "j"}; }
fn key_at(row: u32, j: u32, last: u32) -> u32 {
  if (row >= p.rows || j >= last) { return ${NONE}; }
  let id = id_at(row, j);
  ${chosen ? `if (id == ${NONE}) { return ${NONE}; }` : ""}
  return key_of(x[row * p.n + id]);
}`;
const rankReads = (order: Order, chosen: boolean): Record<string, string> => ({
  x: keys[order].element,
  ...(chosen ? { candidates: "u32" } : {}),
});

/** The first k of each tile in order, by counting what comes before each entry. */
const rank = memo(
  (order: Order, room: number, chosen: boolean): AnyProgram =>
    program({
      key: `rank ${order} ${room}${chosen ? " chosen" : ""}`,
      reads: rankReads(order, chosen),
      writes: { y: "u32" },
      params: rankParams,
      lanes: LANES,
      code: () => `${candidates(order, chosen)}
var<workgroup> tile_keys: array<vec4u, ${room}>;
fn main(group: u32, lane: u32) {
  let segment = group % p.segments;
  let tile = (group / p.segments) % p.tiles;
  let row0 = group / p.segments / p.tiles * p.packed;
  let first = tile * p.length;
  let last = min(p.count, first + p.length);
  for (var q = lane; q < p.packed * p.quads; q += ${LANES}u) {
    let row = row0 + q / p.quads;
    let j = first + q % p.quads * 4u;
    var four = vec4u();
    for (var c = 0u; c < 4u; c++) { four[c] = key_at(row, j + c, last); }
    tile_keys[q] = four;
  }
  workgroupBarrier();
  let slot = lane / p.width;
  let row = row0 + slot;
  let at = segment * p.width + lane % p.width;
  if (slot >= p.packed || row >= p.rows) { return; }
  let size = last - first;
  if (at < size) {
    let mine = tile_keys[slot * p.quads + at / 4u][at % 4u];
    var before = vec4u();
    for (var q = 0u; q < p.quads; q++) {
      let other = tile_keys[slot * p.quads + q];
      let earlier = vec4u(4u * q, 4u * q + 1u, 4u * q + 2u, 4u * q + 3u) < vec4u(at);
      before += select(vec4u(), vec4u(1u), (other < vec4u(mine)) | ((other == vec4u(mine)) & earlier));
    }
    let place = before.x + before.y + before.z + before.w;
    if (place < p.k) { y[(row * p.tiles + tile) * p.k + place] = id_at(row, first + at); }
  }
  // A short last tile has fewer than k to give.
  if (at >= size && at < p.k) { y[(row * p.tiles + tile) * p.k + at] = ${NONE}; }
}`,
    }),
);

/** The same for a small k by one invocation per tile, which keeps a sorted list. */
const keepBest = memo((order: Order, room: number, chosen: boolean): AnyProgram => {
  return program({
    key: `keep best ${order} ${room}${chosen ? " chosen" : ""}`,
    reads: rankReads(order, chosen),
    writes: { y: "u32" },
    params: rankParams,
    lanes: SERIAL_LANES,
    code: () => `${candidates(order, chosen)}
fn main(group: u32, lane: u32) {
  let own = group * ${SERIAL_LANES}u + lane;
  let row = own / p.tiles;
  if (row >= p.rows) { return; }
  let first = own % p.tiles * p.length;
  let last = min(p.count, first + p.length);
  var best = array<u32, ${room}>();
  var ids = array<u32, ${room}>();
  var filled = 0u;
  for (var j = first; j < last; j++) {
    let key = key_at(row, j, last);
    if (filled == p.k && key >= best[p.k - 1u]) { continue; }
    filled = min(filled + 1u, p.k);
    var at = filled - 1u;
    while (at > 0u && best[at - 1u] > key) {
      best[at] = best[at - 1u];
      ids[at] = ids[at - 1u];
      at--;
    }
    best[at] = key;
    ids[at] = id_at(row, j);
  }
  for (var at = 0u; at < p.k; at++) { y[own * p.k + at] = select(${NONE}, ids[at], at < filled); }
}`,
  });
});

interface Ranking {
  readonly rows: number;
  readonly n: number;
  readonly k: number;
  readonly order: Order;
  readonly bound?: number;
}
/** Most of k for which tiles of candidates shrink fast; beyond it whole rows are sorted. */
const SMALL_K = 128;
/** A list in registers pays up to here. */
const LISTED_K = 64;

/** Records the first k of each row in order: in one dispatch where a row fits a tile, else tile by tile in rounds. */
function recordRanks(gpu: Gpu, x: Bound, { rows, n, k, order, bound = 0 }: Ranking, result: WebgpuHandle): void {
  const listed = gpu.software && k <= LISTED_K;
  const fits = listed ? 4096 : k <= SMALL_K ? MOST_RANKED / 2 : MOST_RANKED;
  const tile = listed ? fits : Math.max(256, 2 ** Math.ceil(Math.log2(8 * k)));
  let count = n;
  let chosen: WebgpuHandle | undefined;
  for (;;) {
    const length = count <= fits ? count : tile;
    const tiles = Math.ceil(count / length);
    const y: WebgpuHandle = tiles === 1 ? result : gpu.scratch(rows * tiles * k);
    const width = Math.min(length, LANES);
    const packed = tiles === 1 && length <= LANES / 2 ? Math.floor(LANES / length) : 1;
    const segments = Math.ceil(length / width);
    const quads = Math.ceil(length / 4);
    const params = { rows, n, count, tiles, length, k, quads, width, packed, segments, bound };
    const reads = { x, candidates: chosen ?? x };
    // Workgroup memory is zeroed at the start and, on software drivers, costs time to compile: no more than needed.
    const room = Math.max(32, 2 ** Math.ceil(Math.log2(packed * quads)));
    const later = chosen !== undefined;
    if (listed) {
      const list = Math.max(8, 2 ** Math.ceil(Math.log2(k)));
      gpu.run(keepBest(order, list, later), reads, { y }, params, Math.ceil((rows * tiles) / SERIAL_LANES));
    } else {
      gpu.run(rank(order, room, later), reads, { y }, params, Math.ceil(rows / packed) * tiles * segments);
    }
    if (chosen) gpu.free(chosen);
    if (tiles === 1) return;
    chosen = y;
    count = tiles * k;
  }
}

const firstOfRows = program({
  key: "first of rows",
  reads: { x: "i32" },
  writes: { y: "i32" },
  params: { rows: "u32", n: "u32", k: "u32" },
  lanes: 64,
  code: () => `
fn main(group: u32, lane: u32) {
  let i = group * 64u + lane;
  if (i < p.rows * p.k) { y[i] = x[i / p.k * p.n + i % p.k]; }
}`,
});

/** Whether comparing all with all is cheaper than the passes of a radix sort. */
function ranksPay(gpu: Gpu, rows: number, n: number): boolean {
  const [always, comparisons] = gpu.software ? [128, 2 ** 20] : [512, 2 ** 28];
  return n <= always || (n <= MOST_RANKED && rows * n * n <= comparisons);
}
function recordArgsort(gpu: Gpu, x: Bound, sorting: Sorting, result: WebgpuHandle): void {
  const { rows, n } = sorting;
  if (ranksPay(gpu, rows, n)) {
    recordRanks(gpu, x, { ...sorting, k: n }, result);
  } else recordSort(gpu, x, sorting, result);
}

type Family = "topkIndices" | "argsort" | "blockEnds" | "dispatch";

export function sortKernels(gpu: Gpu): { readonly [P in Family]: Kernel<WebgpuHandle> } {
  return {
    topkIndices([x], [spec], { k }: { k: number }) {
      if (!x || !spec) return [];
      const y = gpu.alloc(spec); // [..., k]
      const size = sizeOf(spec.shape);
      if (size === 0) return [y];
      const [n, rows] = [lastOf(x), size / k];
      const order = "f32 descending";
      if (k <= SMALL_K || ranksPay(gpu, rows, n)) {
        recordRanks(gpu, x.handle, { rows, n, k, order }, y);
        return [y];
      }
      const all = gpu.scratch(rows * n);
      recordArgsort(gpu, x.handle, { rows, n, order }, all);
      gpu.run(firstOfRows, { x: all }, { y }, { rows, n, k }, Math.ceil(size / 64));
      gpu.free(all);
      return [y];
    },

    argsort([x], [spec], { descending = false, bound }: { descending?: boolean; bound?: number }) {
      if (!x || !spec) return [];
      const y = gpu.alloc(spec); // [..., n]
      const size = sizeOf(spec.shape);
      if (size === 0) return [y];
      const n = lastOf(x);
      const dtype = x.dtype === "i32" ? "i32" : "f32";
      const order: Order = `${dtype}${bound === undefined ? "" : " bounded"}${descending ? " descending" : ""}`;
      const most = bound === undefined ? {} : { bound: Math.max(0, bound - 1) };
      recordArgsort(gpu, x.handle, { rows: size / n, n, order, ...most }, y);
      return [y];
    },

    blockEnds([ids], [spec], { count }: { count: number }) {
      if (!ids || !spec) return [];
      const ends = gpu.alloc(spec); // [count]
      recordEnds(gpu, ids.handle, sizeOf(ids.shape), count, ends);
      return [ends];
    },

    dispatch([ids], _, { count, bound }: { count: number; bound: number }) {
      if (!ids) return [];
      const { rows, slots, ends } = recordDispatch(gpu, ids.handle, {
        slots: sizeOf(ids.shape),
        k: lastOf(ids),
        count,
        bound,
      });
      return [rows, slots, ends];
    },
  };
}
