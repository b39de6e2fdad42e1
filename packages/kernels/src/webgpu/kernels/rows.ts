// Rows by id: gather, add, combine. Sums are deterministic: instead of adding into shared places, each destination collects its own
// sources, found by a stable counting sort of the ids (./sort.ts) or, for combineRows, by the inverse permutation of the slots.
import type { Kernel } from "@switchyard/core";
import type { Bound, Gpu, Part, WebgpuHandle } from "../device.ts";
import { bytesPerElement, sizeOf } from "../formats.ts";
import { type Program, program } from "../program.ts";
import { bytesOf, type Input, lastOf, memo, only, perWord, rowsOf } from "./parts.ts";
import { recordLists } from "./sort.ts";
import { groupsOf, lanesOf, teamCode, teamFor } from "./teams.ts";

const LANES = 64;
const groupsFor = (n: number): number => Math.ceil(n / LANES);
const own = `let i = group * ${LANES}u + lane;`;

/** Rows of a view that lie in each part: a view may count rows otherwise than the tensor that was split. */
function rowParts(
  op: string,
  x: WebgpuHandle,
  rows: number,
  rowBytes: number,
): { part: Part; first: number; rows: number }[] {
  const [whole] = x.parts;
  if (whole && x.parts.length === 1) return [{ part: whole, first: 0, rows }];
  let first = 0;
  return x.parts.map((part) => {
    const n = part.bytes / rowBytes;
    if (!Number.isInteger(n)) {
      throw new RangeError(
        `webgpu: ${op}: a row of ${rowBytes} bytes lies in two buffers; take rows of the tensor's own shape`,
      );
    }
    const range = { part, first, rows: n };
    first += n;
    return range;
  });
}

// ---------------------------------------------------------------- gather
type Unit = "vec4" | "word" | "half" | "byte";
/**
 * Rows of `width` units by id: one invocation per four words, per word, or per word of packed elements. `part` 0 of a split table
 * writes zeros where the row is not its own, later parts write theirs over them. `last`: ids count within a stretch of `stride`
 * elements for each `k` of them.
 */
const take = memo((unit: Unit, later: boolean, last: boolean): Program => {
  const packed = unit === "half" || unit === "byte";
  const element = unit === "vec4" ? "vec4<u32>" : "u32";
  const perWord = unit === "byte" ? 4 : 2;
  const bits = 32 / perWord;
  const locate = `
// Where output row r, unit c lies in x; -1 where the row is not here.
fn source(r: u32, c: u32) -> i32 {
  let id = bitcast<u32>(ids[p.id_base + r]) - p.first;
  if (id >= p.rows) { return -1; }
  return i32(${last ? "r / p.k * p.stride + id" : "id * p.width + c"});
}`;
  return program({
    key: `take ${unit}${later ? " later" : ""}${last ? " last" : ""}`,
    reads: { x: element, ids: "i32" },
    writes: { y: element },
    params: { count: "u32", width: "u32", first: "u32", rows: "u32", id_base: "u32", k: "u32", stride: "u32" },
    lanes: LANES,
    code: () =>
      packed
        ? `${locate}
fn main(group: u32, lane: u32) {
  ${own}
  if (i * ${perWord}u >= p.count) { return; }
  var word = ${later ? "y[i]" : "0u"};
  for (var j = 0u; j < ${perWord}u; j++) {
    let e = i * ${perWord}u + j;
    if (e >= p.count) { break; }
    let at = source(e / p.width, e % p.width);
    if (at < 0) { continue; }
    let found = (x[u32(at) / ${perWord}u] >> (u32(at) % ${perWord}u * ${bits}u)) & ${2 ** bits - 1}u;
    word = insertBits(word, found, j * ${bits}u, ${bits}u);
  }
  y[i] = word;
}`
        : `${locate}
fn main(group: u32, lane: u32) {
  ${own}
  if (i >= p.count) { return; }
  let at = source(i / p.width, i % p.width);
  ${later ? "if (at >= 0) { y[i] = x[at]; }" : `if (at >= 0) { y[i] = x[at]; } else { y[i] = ${element}(); }`}
}`,
  });
});

/** The widest unit that divides rows of so many bytes. */
function unitOf(x: Input, rowBytes: number): { readonly unit: Unit; readonly perUnit: number } {
  const elements = perWord(x.dtype);
  if (rowBytes % 16 === 0) return { unit: "vec4", perUnit: 4 * elements };
  if (rowBytes % 4 === 0) return { unit: "word", perUnit: elements };
  return { unit: bytesPerElement(x.dtype) === 2 ? "half" : "byte", perUnit: 1 };
}

function recordTake(gpu: Gpu, x: Input, ids: Input, y: WebgpuHandle): void {
  const width = sizeOf(x.shape.slice(1));
  const rowBytes = width * bytesPerElement(x.dtype);
  const idCount = sizeOf(ids.shape);
  if (idCount * width === 0) return;
  const { unit, perUnit } = unitOf(x, rowBytes);
  const packed = unit === "half" || unit === "byte";
  const tables = rowParts("takeRows", x.handle, x.shape[0] ?? 0, rowBytes);
  for (const to of rowParts("takeRows", y, idCount, rowBytes)) {
    const count = to.rows * (width / perUnit);
    const groups = groupsFor(packed ? Math.ceil(count / perWord(x.dtype)) : count);
    tables.forEach(({ part, first, rows }, i) => {
      const params = { count, width: width / perUnit, first, rows, id_base: to.first, k: 1, stride: 0 };
      gpu.run(take(unit, i > 0, false), { x: part, ids: ids.handle }, { y: to.part }, params, groups);
    });
  }
}

// ---------------------------------------------------------------- add
/** Row r of y is the sum of the rows of x that its list names, in their order; `direct`: all ids are looked through instead. */
const addListed = memo((wide: boolean, direct: boolean): Program => {
  const element = wide ? "vec4<f32>" : "f32";
  const reads: Record<string, string> = { x: element, ...(direct ? { ids: "i32" } : { order: "i32", starts: "i32" }) };
  return program({
    key: `add rows ${element}${direct ? " direct" : ""}`,
    reads,
    writes: { y: element },
    params: { count: "u32", width: "u32", first: "u32", m: "u32" },
    lanes: LANES,
    code: () => `
fn main(group: u32, lane: u32) {
  ${own}
  if (i >= p.count) { return; }
  let row = p.first + i / p.width;
  let column = i % p.width;
  var sum = ${element}();
  ${
    direct
      ? "for (var j = 0u; j < p.m; j++) { if (ids[j] == i32(row)) { sum += x[j * p.width + column]; } }"
      : `let end = starts[row + 1u];
  for (var j = starts[row]; j < end; j++) { sum += x[u32(order[j]) * p.width + column]; }`
  }
  y[i] = sum;
}`,
  });
});

/** Below so many comparisons of ids a sort does not pay. */
const FEW_COMPARISONS = 2 ** 20;
/** y [rows, width] from x [m, width] and ids [m]. */
function recordAdd(
  gpu: Gpu,
  x: Bound,
  ids: Bound,
  y: WebgpuHandle,
  { m, width, rows }: { readonly m: number; readonly width: number; readonly rows: number },
): void {
  if (rows * width === 0) return;
  const wide = width % 4 === 0;
  const units = wide ? width / 4 : width;
  const direct = m <= 64 && m * rows * units <= FEW_COMPARISONS;
  const lists = direct ? undefined : recordLists(gpu, ids, m, rows);
  for (const { part, first, rows: n } of rowParts("addRows", y, rows, 4 * width)) {
    const params = { count: n * units, width: units, first, m };
    const { order = ids, starts = ids } = lists ?? {};
    gpu.run(addListed(wide, direct), { x, ids, order, starts }, { y: part }, params, groupsFor(n * units));
  }
  if (lists) {
    gpu.free(lists.order);
    gpu.free(lists.starts);
  }
}

/** A short list per row: each element of the result looks through it. */
const scatterFew = program({
  key: "scatter last few",
  reads: { x: "f32", ids: "i32" },
  writes: { y: "f32" },
  params: { count: "u32", size: "u32", k: "u32" },
  lanes: LANES,
  code: () => `
fn main(group: u32, lane: u32) {
  ${own}
  if (i >= p.count) { return; }
  let first = i / p.size * p.k;
  let id = i32(i % p.size);
  var sum = 0.0;
  for (var j = first; j < first + p.k; j++) { if (ids[j] == id) { sum += x[j]; } }
  y[i] = sum;
}`,
});
const flatIds = program({
  key: "flat ids",
  reads: { ids: "i32" },
  writes: { y: "i32" },
  params: { count: "u32", size: "u32", k: "u32" },
  lanes: LANES,
  code: () => `
fn main(group: u32, lane: u32) {
  ${own}
  if (i >= p.count) { return; }
  let id = ids[i];
  y[i] = select(-1, i32(i / p.k * p.size) + id, id >= 0 && id < i32(p.size));
}`,
});
const FEW_PER_ROW = 32;

// ---------------------------------------------------------------- combine
const zeros = program({
  key: "zeros",
  reads: {},
  writes: { y: "u32" },
  params: { count: "u32" },
  lanes: LANES,
  code: () => `
fn main(group: u32, lane: u32) {
  ${own}
  if (i < p.count) { y[i] = 0u; }
}`,
});
/** inverse[slot] = 1 + the row that holds it; 0 where none does. */
const invert = program({
  key: "invert slots",
  reads: { slots: "i32" },
  writes: { inverse: "u32" },
  params: { bound: "u32", count: "u32" },
  lanes: LANES,
  code: () => `
fn main(group: u32, lane: u32) {
  ${own}
  if (i >= p.bound) { return; }
  let slot = bitcast<u32>(slots[i]);
  if (slot < p.count) { inverse[slot] = i + 1u; }
}`,
});
const combine = memo((wide: boolean) => {
  const element = wide ? "vec4<f32>" : "f32";
  return program({
    key: `combine rows ${element}`,
    reads: { x: element, weights: "f32", inverse: "u32" },
    writes: { y: element },
    params: { count: "u32", width: "u32", k: "u32" },
    lanes: LANES,
    code: () => `
fn main(group: u32, lane: u32) {
  ${own}
  if (i >= p.count) { return; }
  let first = i / p.width * p.k;
  let column = i % p.width;
  var sum = ${element}();
  for (var slot = first; slot < first + p.k; slot++) {
    let row = inverse[slot];
    if (row > 0u) { sum += weights[slot] * x[(row - 1u) * p.width + column]; }
  }
  y[i] = sum;
}`,
  });
});
/** A team of lanes per row: its gradient, and the product that is the gradient of its weight. */
const combineGrad = memo((wide: boolean, team: number) => {
  const element = wide ? "vec4<f32>" : "f32";
  return program({
    key: `combine rows gradient ${element} ${team}`,
    reads: { x: element, weights: "f32", slots: "i32", dy: element },
    writes: { dx: element, dweights: "f32" },
    params: { bound: "u32", width: "u32", k: "u32", count: "u32" },
    lanes: lanesOf(team),
    code: () => `${teamCode(team)}
fn main(group: u32, lane: u32) {
  let row = group * ROWS + lane / TEAM;
  let member = lane % TEAM;
  var sum = 0.0;
  var slot = p.count;
  if (row < p.bound) {
    slot = bitcast<u32>(slots[row]);
    let taken = slot < p.count;
    var weight = 0.0;
    if (taken) { weight = weights[slot]; }
    for (var c = member; c < p.width; c += TEAM) {
      let at = row * p.width + c;
      var slope = ${element}();
      if (taken) {
        let g = dy[slot / p.k * p.width + c];
        slope = weight * g;
        sum += ${wide ? "dot(x[at], g)" : "x[at] * g"};
      }
      dx[at] = slope;
    }
  }
  let all = total(lane, sum);
  if (member == 0u && slot < p.count) { dweights[slot] = all; }
}`,
  });
});

/** Records y [tokens, width] = sum over each token's slots of weight * row: x [bound, width], weights [tokens, k], slots [bound]. */
export function recordCombine(
  gpu: Gpu,
  x: Bound,
  weights: Bound,
  slots: Bound,
  y: Bound,
  {
    bound,
    tokens,
    k,
    width,
  }: { readonly bound: number; readonly tokens: number; readonly k: number; readonly width: number },
): void {
  const count = tokens * k;
  if (tokens * width === 0) return;
  const inverse = gpu.scratch(Math.max(1, count));
  gpu.run(zeros, {}, { y: inverse }, { count }, groupsFor(count));
  gpu.run(invert, { slots }, { inverse }, { bound, count }, groupsFor(bound));
  const wide = width % 4 === 0;
  const units = wide ? width / 4 : width;
  const params = { count: tokens * units, width: units, k };
  gpu.run(combine(wide), { x, weights, inverse }, { y }, params, groupsFor(tokens * units));
  gpu.free(inverse);
}

type Family = "takeRows" | "addRows" | "gatherLast" | "scatterLast" | "combineRows" | "combineRowsGrad";

export function rowKernels(gpu: Gpu): { readonly [P in Family]: Kernel<WebgpuHandle> } {
  const takeRows: Kernel<WebgpuHandle> = ([x, ids], [spec]) => {
    if (!x || !ids || !spec) return [];
    const y = gpu.alloc(spec); // [...m, ...r]
    recordTake(gpu, x, ids, y);
    return [y];
  };

  const gatherLast: Kernel<WebgpuHandle> = ([x, ids], [spec]) => {
    if (!x || !ids || !spec) return [];
    const y = gpu.alloc(spec); // [..., k]
    const count = sizeOf(spec.shape);
    if (count === 0) return [y];
    const size = bytesPerElement(x.dtype);
    const unit = size === 4 ? "word" : size === 2 ? "half" : "byte";
    const n = lastOf(x);
    const params = { count, width: 1, first: 0, rows: n, id_base: 0, k: lastOf(ids), stride: n };
    gpu.run(
      take(unit, false, true),
      { x: x.handle, ids: ids.handle },
      { y },
      params,
      groupsFor(Math.ceil(bytesOf(spec) / 4)),
    );
    return [y];
  };

  return {
    takeRows: Object.assign(takeRows, { unsupported: only("?i") }),
    gatherLast: Object.assign(gatherLast, { unsupported: only("?i") }),

    addRows([x, ids], [spec]) {
      if (!x || !ids || !spec) return [];
      const y = gpu.alloc(spec); // [rows, ...r]
      const sizes = { m: sizeOf(ids.shape), width: sizeOf(spec.shape.slice(1)), rows: spec.shape[0] ?? 0 };
      recordAdd(gpu, x.handle, ids.handle, y, sizes);
      return [y];
    },

    scatterLast([x, ids], [spec], { size }: { size: number }) {
      if (!x || !ids || !spec) return [];
      const y = gpu.alloc(spec); // [..., size]
      const [k, rows] = [lastOf(ids), rowsOf(ids)];
      const count = rows * size;
      if (k <= FEW_PER_ROW) {
        gpu.run(scatterFew, { x: x.handle, ids: ids.handle }, { y }, { count, size, k }, groupsFor(count));
        return [y];
      }
      const flat = gpu.scratch(rows * k);
      gpu.run(flatIds, { ids: ids.handle }, { y: flat }, { count: rows * k, size, k }, groupsFor(rows * k));
      recordAdd(gpu, x.handle, flat, y, { m: rows * k, width: 1, rows: count });
      gpu.free(flat);
      return [y];
    },

    combineRows([x, weights, slots], [spec]) {
      if (!x || !weights || !slots || !spec) return [];
      const y = gpu.alloc(spec); // [tokens, width]
      const sizes = { bound: sizeOf(slots.shape), tokens: rowsOf(weights), k: lastOf(weights), width: lastOf(x) };
      recordCombine(gpu, x.handle, weights.handle, slots.handle, y, sizes);
      return [y];
    },

    combineRowsGrad([x, weights, slots, dy], [xSpec, weightSpec]) {
      if (!x || !weights || !slots || !dy || !xSpec || !weightSpec) return [];
      const [dx, dweights] = [gpu.alloc(xSpec), gpu.alloc(weightSpec)]; // [bound, width], [tokens, k]
      const [bound, width, count] = [sizeOf(slots.shape), lastOf(x), sizeOf(weights.shape)];
      gpu.run(zeros, {}, { y: dweights }, { count }, groupsFor(count));
      const wide = width % 4 === 0;
      const units = wide ? width / 4 : width;
      const team = teamFor(gpu, units);
      const reads = { x: x.handle, weights: weights.handle, slots: slots.handle, dy: dy.handle };
      const params = { bound, width: units, k: lastOf(weights), count };
      gpu.run(combineGrad(wide, team), reads, { dx, dweights }, params, groupsOf(team, bound));
      return [dx, dweights];
    },
  };
}
