// Sums, maxima and running sums. Long sums go in stages of fixed shape: deterministic, parallel, as accurate as a tree.
import type { Kernel } from "@switchyard/core";
import type { Bound, Gpu, WebgpuHandle } from "../device.ts";
import { sizeOf } from "../formats.ts";
import { type Program, program } from "../program.ts";
import { at, lastOf, memo, rowsOf } from "./parts.ts";
import { groupsOf, laneSum, lanesOf, RUN, teamCode, teamFor } from "./teams.ts";

// ---------------------------------------------------------------- sums over the middle of [outer, n, inner]
interface Middle {
  readonly outer: number;
  readonly n: number;
  readonly inner: number;
}
/** What is added up at element `at` of row `row` among the n that are summed. The halves of a pair go to `y` and `z`. */
interface Term {
  readonly reads: Readonly<Record<string, string>>;
  readonly type: "f32" | "vec2f";
  readonly term: string;
}
const terms = {
  plain: { reads: { x: "f32" }, type: "f32", term: "x[at]" },
  squares: { reads: { x: "f32" }, type: "f32", term: "x[at] * x[at]" },
  /** The weight's gradient of rmsNorm, with scales [n]. */
  rms: { reads: { x: "f32", dy: "f32", scales: "f32" }, type: "f32", term: "dy[at] * (x[at] * scales[row])" },
  /** The gradients of layerNorm's weight and bias, with the rows' mean and scale [n, 2]. */
  layer: {
    reads: { x: "f32", dy: "f32", stats: "vec2<f32>" },
    type: "vec2f",
    term: "vec2f(dy[at] * ((x[at] - stats[row].x) * stats[row].y), dy[at])",
  },
} as const satisfies Record<string, Term>;
type TermName = keyof typeof terms;

const writesOf = (type: Term["type"]): Record<string, string> =>
  type === "f32" ? { y: "f32" } : { y: "f32", z: "f32" };
const store = (type: Term["type"], at: string, value: string): string =>
  type === "f32" ? `y[${at}] = ${value};` : `y[${at}] = ${value}.x; z[${at}] = ${value}.y;`;

/** A result is the sum of a chunk of the n rows; `to` is where the results begin. */
const stageParams = {
  n: "u32",
  inner: "u32",
  chunk: "u32",
  chunks: "u32",
  sums: "u32",
  bands: "u32",
  to: "u32",
} as const;

/** WGSL: the sum over rows first, first + step, ... below end of block o, in column c. */
const sumOfRows = ({ type, term }: Term): string => `
fn sum_of_rows(o: u32, c: u32, first: u32, end: u32, step: u32) -> ${type} {
  var sum = ${type}();
  for (var run = first; run < end; run += ${RUN}u * step) {
    let stop = min(run + ${RUN}u * step, end);
    var part = ${type}();
    for (var row = run; row < stop; row += step) {
      let at = (o * p.n + row) * p.inner + c;
      part += ${term};
    }
    sum += part;
  }
  return sum;
}
`;

/** One invocation per sum: where there are many, or they are short, or it is a processor. */
const thin = memo((name: TermName, lanes: number): Program => {
  const { reads, type }: Term = terms[name];
  return program({
    key: `sum ${name}, thin ${lanes}`,
    reads,
    writes: writesOf(type),
    params: stageParams,
    lanes,
    code: () => `
${sumOfRows(terms[name])}
fn main(group: u32, lane: u32) {
  let q = group * ${lanes}u + lane; // of [outer, chunks, inner]
  if (q >= p.sums) { return; }
  let rest = q / p.inner;
  let first = (rest % p.chunks) * p.chunk;
  let sum = sum_of_rows(rest / p.chunks, q % p.inner, first, min(first + p.chunk, p.n), 1u);
  ${store(type, "p.to + q", "sum")}
}`,
  });
});

/** A workgroup per chunk of rows and band of columns: neighbouring lanes read neighbouring columns. */
const COLUMN_LANES = 256;
const columns = memo((name: TermName, band: number): Program => {
  const { reads, type }: Term = terms[name];
  return program({
    key: `sum ${name}, columns ${band}`,
    reads,
    writes: writesOf(type),
    params: stageParams,
    lanes: COLUMN_LANES,
    code: () => `
const BAND = ${band}u;
const STEP = ${COLUMN_LANES / band}u;
var<workgroup> desk: array<${type}, ${COLUMN_LANES}>;
${sumOfRows(terms[name])}
fn main(group: u32, lane: u32) {
  let c = (group % p.bands) * BAND + lane % BAND;
  let rest = group / p.bands; // of [outer, chunks]
  let row = lane / BAND;
  let first = (rest % p.chunks) * p.chunk;
  var sum = ${type}();
  if (c < p.inner) { sum = sum_of_rows(rest / p.chunks, c, first + row, min(first + p.chunk, p.n), STEP); }
  desk[lane] = sum;
  workgroupBarrier();
  for (var half = STEP / 2u; half > 0u; half /= 2u) {
    if (row < half) { desk[lane] += desk[lane + half * BAND]; }
    workgroupBarrier();
  }
  if (row == 0u && c < p.inner) {
    let at = p.to + rest * p.inner + c;
    ${store(type, "at", "desk[lane]")}
  }
}`,
  });
});

/** A team per chunk of a row of [outer, n]. */
const rows = memo(
  (name: "plain" | "squares", team: number): Program =>
    program({
      key: `sum ${name}, rows ${team}`,
      reads: { x: "f32" },
      writes: { y: "f32" },
      params: stageParams,
      lanes: lanesOf(team),
      code: () => `
${teamCode(team)}
${laneSum("share", "f32", name === "plain" ? "x[i]" : "x[i] * x[i]")}
fn main(group: u32, lane: u32) {
  let q = group * ROWS + lane / TEAM; // of [outer, chunks]
  let one = min(q, p.sums - 1u);
  let first = (one % p.chunks) * p.chunk;
  let at = (one / p.chunks) * p.n;
  let sum = total(lane, share(at + first, at + min(first + p.chunk, p.n), lane % TEAM, 0.0));
  if (lane % TEAM == 0u && q < p.sums) { y[p.to + q] = sum; }
}`,
    }),
);

/** How one stage goes: which kernel, and how many of the n rows one sum takes. */
interface Stage {
  readonly kernel: "thin" | "columns" | "rows";
  readonly chunk: number;
}

const bandOf = (inner: number): number => (inner > 16 ? 64 : inner > 4 ? 16 : 4);

function planOf(gpu: Gpu, name: TermName, { outer, n, inner }: Middle): Stage {
  if (gpu.software) return { kernel: "thin", chunk: n <= 2048 ? n : 1024 };
  if (inner === 1 && (name === "plain" || name === "squares")) {
    if (n <= 4) return { kernel: "thin", chunk: n };
    if (n <= 8192 || outer >= 256) return { kernel: "rows", chunk: n };
    return { kernel: "rows", chunk: Math.max(4096, Math.ceil(n / 1024)) };
  }
  if (n <= 32 || (inner >= 32 && outer * inner >= 32_768 && n <= 4096)) return { kernel: "thin", chunk: n };
  const band = bandOf(inner);
  const step = COLUMN_LANES / band;
  if (n <= 32 * step) return { kernel: "columns", chunk: n };
  // Workgroups for a large GPU, but at least 16 rows per lane, and so few chunks that one more stage sums them.
  const wanted = Math.max(1, Math.ceil(512 / (outer * Math.ceil(inner / band))));
  const chunks = Math.min(Math.ceil(n / (16 * step)), wanted, 32 * step);
  return { kernel: "columns", chunk: Math.ceil(n / chunks) };
}

function runStage(
  gpu: Gpu,
  name: TermName,
  { kernel, chunk }: Stage,
  reads: Readonly<Record<string, Bound>>,
  [y, z]: readonly Bound[],
  { outer, n, inner }: Middle,
  to = 0,
): void {
  if (!y) return;
  const chunks = Math.ceil(n / chunk);
  const count = outer * chunks * inner;
  const params = { n, inner, chunk, chunks, sums: count, bands: 0, to };
  const writes = z ? { y, z } : { y };
  if (kernel === "rows" && (name === "plain" || name === "squares")) {
    const team = teamFor(gpu, chunk);
    gpu.run(rows(name, team), reads, writes, params, groupsOf(team, count));
  } else if (kernel === "columns") {
    const band = bandOf(inner);
    params.bands = Math.ceil(inner / band);
    gpu.run(columns(name, band), reads, writes, params, outer * chunks * params.bands);
  } else {
    const lanes = gpu.software ? 16 : 64;
    gpu.run(thin(name, lanes), reads, writes, params, Math.ceil(count / lanes));
  }
}

/**
 * Each of `to` [outer, inner] = sums of a term over the middle of [outer, n, inner], in as many stages as it takes. No
 * size is 0.
 * "rms" and "layer" sum columns: outer is 1.
 */
export function sumMiddle(
  gpu: Gpu,
  name: TermName,
  reads: Readonly<Record<string, Bound>>,
  to: readonly Bound[],
  middle: Middle,
): void {
  const stage = planOf(gpu, name, middle);
  const chunks = Math.ceil(middle.n / stage.chunk);
  if (chunks === 1) {
    runStage(gpu, name, stage, reads, to, middle);
    return;
  }
  const partial = to.map(() => gpu.scratch(middle.outer * chunks * middle.inner));
  runStage(gpu, name, stage, reads, partial, middle);
  partial.forEach((x, i) => {
    const y = to[i];
    if (y) sumMiddle(gpu, "plain", { x }, [y], { ...middle, n: chunks });
    gpu.free(x);
  });
}

/** y [] = the sum of all squares of x, part by part where it lies in several buffers. */
function sumSquares(gpu: Gpu, x: WebgpuHandle, y: WebgpuHandle): void {
  const [only, ...more] = x.parts;
  if (only && more.length === 0) {
    sumMiddle(gpu, "squares", { x: only }, [y], { outer: 1, n: only.bytes / 4, inner: 1 });
    return;
  }
  const pieces = x.parts.map((part) => {
    const middle = { outer: 1, n: part.bytes / 4, inner: 1 };
    const stage = planOf(gpu, "squares", middle);
    return { part, middle, stage, chunks: Math.ceil(middle.n / stage.chunk) };
  });
  const count = pieces.reduce((sum, { chunks }) => sum + chunks, 0);
  const partial = gpu.scratch(count);
  let to = 0;
  for (const { part, middle, stage, chunks } of pieces) {
    runStage(gpu, "squares", stage, { x: part }, [partial], middle, to);
    to += chunks;
  }
  sumMiddle(gpu, "plain", { x: partial }, [y], { outer: 1, n: count, inner: 1 });
  gpu.free(partial);
}

/** Sums x of `shape` down to `target`, one run of neighbouring axes after the other; the same size: x itself. */
function sumTo(gpu: Gpu, x: WebgpuHandle, shape: readonly number[], target: readonly number[]): WebgpuHandle {
  const runs: { size: number; readonly summed: boolean }[] = [];
  shape.forEach((size, axis) => {
    if (size === 1) return;
    const summed = (target[axis - shape.length + target.length] ?? 1) !== size;
    const before = runs.at(-1);
    if (before?.summed === summed) before.size *= size;
    else runs.push({ size, summed });
  });
  const last = runs.findIndex(({ summed }) => summed);
  if (last < 0) return x;
  const y = gpu.alloc({ shape: target, dtype: "f32" });
  if (sizeOf(target) === 0) return y;
  if (sizeOf(shape) === 0) {
    gpu.clear(y);
    return y;
  }
  let from = x;
  // From the last run to the first; what was summed has size 1 afterwards.
  for (let i = runs.length - 1; i >= 0; i--) {
    const run = runs[i];
    if (!run?.summed) continue;
    const product = (some: typeof runs): number => some.reduce((n, { size }) => n * size, 1);
    const [outer, inner] = [product(runs.slice(0, i)), product(runs.slice(i + 1))];
    const to = i === last ? y : gpu.scratch(outer * inner);
    sumMiddle(gpu, "plain", { x: from }, [to], { outer, n: run.size, inner });
    if (from !== x) gpu.free(from);
    run.size = 1;
    from = to;
  }
  return y;
}

// ---------------------------------------------------------------- maxima
/** A team per chunk of a row of [rows, n]: y [rows, chunks]. */
const maxLast = memo((team: number) =>
  program({
    key: `maxLast ${team}`,
    reads: { x: "f32" },
    writes: { y: "f32" },
    params: { n: "u32", chunk: "u32", chunks: "u32", count: "u32" },
    lanes: lanesOf(team),
    code: () => `
${teamCode(team)}
fn main(group: u32, lane: u32) {
  let q = group * ROWS + lane / TEAM;
  let one = min(q, p.count - 1u);
  let first = (one % p.chunks) * p.chunk;
  let row = (one / p.chunks) * p.n;
  var top = -infinity();
  for (var i = row + first + lane % TEAM; i < row + min(first + p.chunk, p.n); i += TEAM) { top = larger(top, x[i]); }
  top = topmost(lane, top);
  if (lane % TEAM == 0u && q < p.count) { y[q] = top; }
}`,
  }),
);
/** Few rows of many elements get several teams each. */
const MAX_CHUNK = 4096;

function maxima(gpu: Gpu, x: Bound, y: Bound, rows: number, n: number): void {
  const chunk = gpu.software || rows >= 64 || n < 4 * MAX_CHUNK ? n : MAX_CHUNK;
  const chunks = Math.ceil(n / chunk);
  const count = rows * chunks;
  const team = teamFor(gpu, chunk);
  const run = (to: Bound): void =>
    gpu.run(maxLast(team), { x }, { y: to }, { n, chunk, chunks, count }, groupsOf(team, count));
  if (chunks === 1) {
    run(y);
    return;
  }
  const partial = gpu.scratch(count);
  run(partial);
  maxima(gpu, partial, y, rows, chunks);
  gpu.free(partial);
}

// ---------------------------------------------------------------- running sums over the middle of [outer, n, inner]
type Numbers = "f32" | "i32";
/** "sums": only the sum of each chunk of a line. "scan": running sums. "scan on": beginning with a number per chunk. */
type ScanMode = "sums" | "scan" | "scan on";
const scanParams = {
  n: "u32",
  inner: "u32",
  chunk: "u32",
  chunks: "u32",
  lines: "u32",
  exclusive: "u32",
  reverse: "u32",
} as const;
const scanReads = (mode: ScanMode, type: Numbers): Record<string, string> =>
  mode === "scan on" ? { x: type, starts: type } : { x: type };
/** WGSL: chunk q of [outer, chunks, inner], and the element that comes i-th in the order of summation. */
const scanPlaces = `
struct Chunk { base: u32, first: u32, end: u32 }
fn chunk_of(q: u32) -> Chunk {
  let rest = q / p.inner;
  let first = (rest % p.chunks) * p.chunk;
  return Chunk((rest / p.chunks) * p.n * p.inner + q % p.inner, first, min(first + p.chunk, p.n));
}
fn place(one: Chunk, i: u32) -> u32 { return one.base + select(i, p.n - 1u - i, p.reverse == 1u) * p.inner; }
`;

/** One invocation per chunk. */
const thinScan = memo(
  (mode: ScanMode, type: Numbers, lanes: number): Program =>
    program({
      key: `cumsum ${mode} ${type}, thin ${lanes}`,
      reads: scanReads(mode, type),
      writes: { y: type },
      params: scanParams,
      lanes,
      code: () => `
${scanPlaces}
fn main(group: u32, lane: u32) {
  let q = group * ${lanes}u + lane;
  if (q >= p.lines) { return; }
  let one = chunk_of(q);
  var sum = ${mode === "scan on" ? "starts[q]" : `${type}()`};
  for (var i = one.first; i < one.end; i++) {
    let at = place(one, i);
    let next = sum + x[at];
    ${mode === "sums" ? "" : "y[at] = select(next, sum, p.exclusive == 1u);"}
    sum = next;
  }
  ${mode === "sums" ? "y[q] = sum;" : ""}
}`,
    }),
);

/** A workgroup per chunk of SCAN_TILE elements. */
const SCAN_LANES = 256;
const SCAN_TILE = 1024;
const tileScan = memo(
  (mode: ScanMode, type: Numbers): Program =>
    program({
      key: `cumsum ${mode} ${type}, tile`,
      reads: scanReads(mode, type),
      writes: { y: type },
      params: scanParams,
      lanes: SCAN_LANES,
      code: () => `
const SIDE = 16u; // SIDE * SIDE lanes
var<workgroup> desk: array<${type}, ${SCAN_LANES}>;
var<workgroup> blocks: array<${type}, SIDE>;
${scanPlaces}
fn main(group: u32, lane: u32) {
  let one = chunk_of(group);
  let first = one.first + 4u * lane;
  var own: array<${type}, 4>;
  var sum = ${type}();
  for (var j = 0u; j < 4u; j++) {
    own[j] = ${type}();
    if (first + j < one.end) { own[j] = x[place(one, first + j)]; }
    sum += own[j];
  }
  desk[lane] = sum;
  workgroupBarrier();
  if (lane < SIDE) {
    var before = ${type}(); // becomes the sum of this block of SIDE lanes
    for (var j = 0u; j < SIDE; j++) {
      let next = before + desk[lane * SIDE + j];
      desk[lane * SIDE + j] = before;
      before = next;
    }
    blocks[lane] = before;
  }
  workgroupBarrier();
  ${
    mode === "sums"
      ? `
  if (lane == 0u) {
    var all = blocks[0];
    for (var j = 1u; j < SIDE; j++) { all += blocks[j]; }
    y[group] = all;
  }`
      : `
  var before = ${mode === "scan on" ? "starts[group]" : `${type}()`};
  for (var j = 0u; j < lane / SIDE; j++) { before += blocks[j]; }
  before += desk[lane];
  for (var j = 0u; j < 4u; j++) {
    if (first + j >= one.end) { break; }
    let next = before + own[j];
    y[place(one, first + j)] = select(next, before, p.exclusive == 1u);
    before = next;
  }`
  }
}`,
    }),
);

interface Scan extends Middle {
  readonly exclusive: boolean;
  readonly reverse: boolean;
}
function scan(gpu: Gpu, type: Numbers, x: Bound, y: Bound, { outer, n, inner, exclusive, reverse }: Scan): void {
  const lanes = gpu.software ? 4 : 64;
  const long = n > (gpu.software ? 4096 : 64) && (gpu.software || outer * inner < 8192);
  const tile = long && !gpu.software && inner < 8;
  const chunk = tile ? SCAN_TILE : !long ? n : gpu.software ? 1024 : Math.max(32, Math.ceil(Math.sqrt(n)));
  const chunks = Math.ceil(n / chunk);
  const lines = outer * chunks * inner;
  const params = { n, inner, chunk, chunks, lines, exclusive: exclusive ? 1 : 0, reverse: reverse ? 1 : 0 };
  const run = (mode: ScanMode, reads: Readonly<Record<string, Bound>>, to: Bound): void =>
    tile
      ? gpu.run(tileScan(mode, type), reads, { y: to }, params, lines)
      : gpu.run(thinScan(mode, type, lanes), reads, { y: to }, params, Math.ceil(lines / lanes));
  if (chunks === 1) {
    run("scan", { x }, y);
    return;
  }
  // Chunks lie in the order of summation: `reverse` has done its work when their sums are added up.
  const [sums, starts] = [gpu.scratch(lines), gpu.scratch(lines)];
  run("sums", { x }, sums);
  scan(gpu, type, sums, starts, { outer, n: chunks, inner, exclusive: true, reverse: false });
  run("scan on", { x, starts }, y);
  gpu.free(sums);
  gpu.free(starts);
}

// ---------------------------------------------------------------- kernels
type Family = "sumTo" | "maxLast" | "cumsum" | "sumSquares";

export function reduceKernels(gpu: Gpu): { readonly [P in Family]: Kernel<WebgpuHandle> } {
  return {
    sumTo(inputs, results) {
      const x = at(inputs, 0);
      return [sumTo(gpu, x.handle, x.shape, at(results, 0).shape)];
    },
    sumSquares(inputs, results) {
      const { handle } = at(inputs, 0);
      const y = gpu.alloc(at(results, 0));
      if (handle.bytes === 0) gpu.clear(y);
      else sumSquares(gpu, handle, y);
      return [y];
    },
    maxLast(inputs, results) {
      const x = at(inputs, 0); // [..., n]
      const y = gpu.alloc(at(results, 0)); // [..., 1]
      maxima(gpu, x.handle, y, rowsOf(x), lastOf(x));
      return [y];
    },
    cumsum(inputs, results, attrs: { axis: number; exclusive?: boolean; reverse?: boolean }) {
      const { axis, exclusive = false, reverse = false } = attrs;
      const x = at(inputs, 0);
      const y = gpu.alloc(at(results, 0));
      if (x.handle.bytes === 0) return [y];
      const outer = sizeOf(x.shape.slice(0, axis));
      const inner = sizeOf(x.shape.slice(axis + 1));
      const type = x.dtype === "i32" ? "i32" : "f32";
      scan(gpu, type, x.handle, y, { outer, n: at(x.shape, axis), inner, exclusive, reverse });
      return [y];
    },
  };
}
