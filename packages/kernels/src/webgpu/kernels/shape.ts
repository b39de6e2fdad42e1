// Kernels that only move elements, of any storage type: transpose, slice, concat, pad, broadcastTo. Data moves in the largest units that
// begin on their own size: 16 bytes, words, or elements of a packed word.
import type { Kernel } from "@switchyard/core";
import type { Bound, Gpu, WebgpuHandle } from "../device.ts";
import { bytesPerElement, sizeOf } from "../formats.ts";
import { type ParamType, type Program, program } from "../program.ts";
import {
  at,
  broadcastDims,
  bytesOf,
  type Dim,
  FLAT_LANES,
  flatGroups,
  flatSteps,
  flatText,
  type Input,
  memo,
  mergeDims,
  only,
  produce,
  type Result,
  stridesOf,
} from "./parts.ts";

/** What one invocation moves: a vec4 of words, a word, or a word put together from elements of 2 bytes or 1. */
type Unit = 16 | 4 | 2 | 1;
const typeOf = (unit: Unit): string => (unit === 16 ? "vec4<u32>" : "u32");
/** The largest unit that divides all of these numbers of elements; for packed types the element where not even a word does. */
function unitOf(element: number, counts: readonly number[]): Unit {
  if (counts.every((n) => (n * element) % 16 === 0)) return 16;
  return counts.every((n) => (n * element) % 4 === 0) ? 4 : (element as 2 | 1);
}
/** Elements per unit, and units per word where a unit is an element of a packed word. */
const elementsIn = (unit: Unit, element: number): number => Math.max(1, unit / element);
const perWordOf = (unit: Unit): number => (unit < 4 ? 4 / unit : 1);

/**
 * `main` that writes unit i of y from x[source(i)], or zero where `source` answers NOWHERE. For packed elements one invocation makes a
 * word, `source` is asked for each of its elements, and p.elements tells where they end.
 */
const moveText = (unit: Unit, steps: number): string => {
  const per = perWordOf(unit);
  const nowhere = "const NOWHERE = 0xffffffffu;";
  if (per === 1) {
    return `${nowhere}
${flatText(
  steps,
  `let place = source(i);
  if (place == NOWHERE) { y[i] = ${typeOf(unit)}(0u); } else { y[i] = x[place]; }`,
)}`;
  }
  return `${nowhere}
${flatText(
  steps,
  `var word = 0u;
  for (var k = 0u; k < ${per}u; k++) {
    let e = i * ${per}u + k;
    if (e >= p.elements) { break; }
    let place = source(e);
    if (place != NOWHERE) { word = insertBits(word, x[place / ${per}u] >> (place % ${per}u * ${unit * 8}u), k * ${unit * 8}u, ${unit * 8}u); }
  }
  y[i] = word;`,
)}`;
};
/** The numbers of such a program: invocations and elements. */
const counts = (elements: number, unit: Unit): { readonly n: number; readonly elements: number } => ({
  n: Math.ceil(elements / perWordOf(unit)),
  elements,
});

// ---------------------------------------------------------------- strided reads
/** y is walked row-major over dimensions of its own, x with a stride in each: slice, transpose, broadcastTo. */
const gatherProgram = memo((unit: Unit, rank: number, steps: number): Program => {
  const params: Record<string, ParamType> = { n: "u32", elements: "u32", first: "u32" };
  for (let d = 0; d < rank; d++) {
    if (d > 0) params[`size${d}`] = "u32";
    params[`stride${d}`] = "u32";
  }
  const inward = Array.from({ length: rank - 1 }, (_, k) => rank - 1 - k);
  return program({
    key: `gather ${unit} bytes, ${rank} dimensions, ${steps} steps`,
    reads: { x: typeOf(unit) },
    writes: { y: typeOf(unit) },
    params,
    lanes: FLAT_LANES,
    code: () => `fn source(i: u32) -> u32 {
  var rest = i;
  var place = p.first;
  ${inward.map((d) => `place += rest % p.size${d} * p.stride${d}; rest /= p.size${d};`).join("\n  ")}
  return place + rest * p.stride0;
}
${moveText(unit, steps)}`,
  });
});

function gather(gpu: Gpu, op: string, x: Input, y: WebgpuHandle, dims: readonly Dim[], first: number): void {
  const element = bytesPerElement(x.dtype);
  const inner = at(dims, dims.length - 1);
  const strides = dims.map((d) => at(d.strides, 0));
  const contiguous = strides.at(-1) === 1;
  const unit = contiguous ? unitOf(element, [inner.size, first, ...strides.slice(0, -1)]) : (element as Unit);
  const each = elementsIn(unit, element);
  const units = counts(dims.reduce((product, d) => product * d.size, 1) / each, unit);
  const params: Record<string, number> = { ...units, first: first / each };
  dims.forEach(({ size }, d) => {
    const last = d === dims.length - 1;
    if (d > 0) params[`size${d}`] = last ? size / each : size;
    params[`stride${d}`] = last ? at(strides, d) : at(strides, d) / each;
  });
  const bound = { x: gpu.whole(op, x.handle) };
  const steps = flatSteps(gpu);
  const one = gatherProgram(unit, dims.length, steps);
  gpu.run(one, bound, { y: gpu.whole(op, y) }, params, flatGroups(units.n, steps));
}

// ---------------------------------------------------------------- transpose
const TILE = 32;
const TILE_LANES = 256;
/**
 * Tiles of 32 x 32 elements through workgroup memory, so that reads and writes both run along rows. The axis a lies in one row of x, the
 * axis b in one row of y; `rank` further dimensions count tiles' planes. Sizes and strides in elements; packed rows are whole words.
 */
const flipProgram = memo((per: number, rank: number): Program => {
  const params: Record<string, ParamType> = { a: "u32", b: "u32", xStep: "u32", yStep: "u32" };
  for (let d = 0; d < rank; d++) {
    for (const name of ["size", "x", "y"]) params[`${name}${d}`] = "u32";
  }
  const bits = 32 / per;
  const rowWords = TILE / per;
  return program({
    key: `flip ${per} per word, ${rank} outside`,
    reads: { x: "u32" },
    writes: { y: "u32" },
    params,
    lanes: TILE_LANES,
    // A row of the tile has one element more than a power of two: columns lie in different banks.
    code: () => `var<workgroup> tile: array<u32, ${TILE * (TILE + 1)}>;
fn main(group: u32, lane: u32) {
  let across = (p.a + ${TILE - 1}u) / ${TILE}u;
  let down = (p.b + ${TILE - 1}u) / ${TILE}u;
  let a0 = group % across * ${TILE}u;
  let b0 = group / across % down * ${TILE}u;
  var rest = group / across / down;
  var xBase = b0 * p.xStep + a0;
  var yBase = a0 * p.yStep + b0;
  ${Array.from({ length: rank }, (_, k) => rank - 1 - k)
    .map((d) => `{ let j = rest % p.size${d}; rest /= p.size${d}; xBase += j * p.x${d}; yBase += j * p.y${d}; }`)
    .join("\n  ")}
  for (var k = lane; k < ${TILE * rowWords}u; k += ${TILE_LANES}u) {
    let row = k / ${rowWords}u;
    let column = k % ${rowWords}u;
    if (b0 + row < p.b && a0 + column * ${per}u < p.a) {
      let word = x[(xBase + row * p.xStep) / ${per}u + column];
      ${Array.from({ length: per }, (_, e) => `tile[row * ${TILE + 1}u + column * ${per}u + ${e}u] = ${per === 1 ? "word" : `extractBits(word, ${e * bits}u, ${bits}u)`};`).join("\n      ")}
    }
  }
  workgroupBarrier();
  for (var k = lane; k < ${TILE * rowWords}u; k += ${TILE_LANES}u) {
    let row = k / ${rowWords}u;
    let column = k % ${rowWords}u;
    if (a0 + row < p.a && b0 + column * ${per}u < p.b) {
      y[(yBase + row * p.yStep) / ${per}u + column] = ${Array.from({ length: per }, (_, e) => `(tile[(column * ${per}u + ${e}u) * ${TILE + 1}u + row] << ${e * bits}u)`).join(" | ")};
    }
  }
}`,
  });
});

function transpose(gpu: Gpu, x: Input, result: Result, perm: readonly number[]): WebgpuHandle {
  const total = sizeOf(x.shape);
  if (total === 0) return gpu.alloc(result);
  const steps = stridesOf(x.shape);
  const dims = mergeDims(perm.map((axis) => ({ size: at(x.shape, axis), strides: [at(steps, axis)] })));
  // Only axes of size 1 changed places.
  if (dims.length === 1) return x.handle;
  return produce(gpu, result, (y) => {
    const strides = dims.map((d) => at(d.strides, 0));
    const last = dims.length - 1;
    const along = strides.indexOf(1);
    const per = 4 / bytesPerElement(x.dtype);
    const [a, b] = [at(dims, along).size, at(dims, last).size];
    // Element by element is as fast where workgroup memory is ordinary memory.
    const words = strides.every((s, d) => d === along || s % per === 0) && a % per === 0 && b % per === 0;
    if (along === last || !words || gpu.software) {
      gather(gpu, "transpose", x, y, dims, 0);
      return;
    }
    const ySteps = stridesOf(dims.map((d) => d.size));
    const outer = dims.map((_, d) => d).filter((d) => d !== along && d !== last);
    const params: Record<string, number> = { a, b, xStep: at(strides, last), yStep: at(ySteps, along) };
    outer.forEach((d, i) => {
      params[`size${i}`] = at(dims, d).size;
      params[`x${i}`] = at(strides, d);
      params[`y${i}`] = at(ySteps, d);
    });
    const tiles = (Math.ceil(a / TILE) * Math.ceil(b / TILE) * total) / (a * b);
    const bound = { x: gpu.whole("transpose", x.handle) };
    gpu.run(flipProgram(per, outer.length), bound, { y: gpu.whole("transpose", y) }, params, tiles);
  });
}

// ---------------------------------------------------------------- runs of rows
/** y[yAt + row * line + j] = x[row * length + j]: lays rows of one length into longer rows. In units of 16 or 4 bytes. */
const layProgram = memo((unit: Unit, steps: number) =>
  program({
    key: `lay ${unit} bytes, ${steps} steps`,
    reads: { x: typeOf(unit) },
    writes: { y: typeOf(unit) },
    params: { n: "u32", length: "u32", line: "u32", yAt: "u32" },
    lanes: FLAT_LANES,
    code: () => flatText(steps, "y[p.yAt + i / p.length * p.line + i % p.length] = x[i];"),
  }),
);
/** The same for bytes, from byte xAt of x on; one word of y per invocation, whose other bytes stay. `n` bytes of y are spanned. */
const layBytesProgram = program({
  key: "lay bytes",
  reads: { x: "u32" },
  writes: { y: "u32" },
  params: { n: "u32", length: "u32", line: "u32", xAt: "u32", yAt: "u32", word: "u32", words: "u32" },
  lanes: FLAT_LANES,
  code: () => `fn main(group: u32, lane: u32) {
  let i = group * ${FLAT_LANES}u + lane;
  if (i >= p.words) { return; }
  let w = i + p.word;
  var value = y[w];
  for (var k = 0u; k < 4u; k++) {
    let q = w * 4u + k - p.yAt; // wraps round before the first byte
    let column = q % p.line;
    if (q >= p.n || column >= p.length) { continue; }
    let place = p.xAt + q / p.line * p.length + column;
    value = insertBits(value, x[place / 4u] >> (place % 4u * 8u), k * 8u, 8u);
  }
  y[w] = value;
}`,
});
interface Lay {
  readonly rows: number;
  /** In bytes: of a row in x, from row to row in y, and where x and y begin. */
  readonly length: number;
  readonly line: number;
  readonly xAt: number;
  readonly yAt: number;
}
function layBytes(gpu: Gpu, x: Bound, y: Bound, { rows, length, line, xAt, yAt }: Lay): void {
  const n = (rows - 1) * line + length;
  const word = Math.floor(yAt / 4);
  const words = Math.ceil((yAt + n) / 4) - word;
  gpu.run(layBytesProgram, { x }, { y }, { n, length, line, xAt, yAt, word, words }, flatGroups(words, 1));
}

/** Copies consecutive bytes; either tensor may be split. Successive copies must go upwards: a last word may be filled beyond the range. */
function copyRun(gpu: Gpu, x: WebgpuHandle, xFrom: number, y: WebgpuHandle, yFrom: number, bytes: number): void {
  let xBase = 0;
  for (const source of x.parts) {
    let yBase = 0;
    for (const target of y.parts) {
      // In bytes of the run
      const from = Math.max(0, xBase - xFrom, yBase - yFrom);
      const to = Math.min(bytes, xBase + source.bytes - xFrom, yBase + target.bytes - yFrom);
      if (to > from) {
        const [xAt, yAt, length] = [xFrom + from - xBase, yFrom + from - yBase, to - from];
        if (xAt % 4 === 0 && yAt % 4 === 0) gpu.copy(source, xAt, target, yAt, length);
        else layBytes(gpu, source, target, { rows: 1, length, line: length, xAt, yAt });
      }
      yBase += target.bytes;
    }
    xBase += source.bytes;
  }
}

function slice(gpu: Gpu, x: Input, result: Result, start: readonly number[]): WebgpuHandle {
  if (sizeOf(result.shape) === 0) return gpu.alloc(result);
  const strides = stridesOf(x.shape);
  const first = start.reduce((sum, from, axis) => sum + from * at(strides, axis), 0);
  const dims = mergeDims(result.shape.map((size, axis) => ({ size, strides: [at(strides, axis)] })));
  return produce(gpu, result, (y) => {
    if (dims.length === 1 && at(dims, 0).strides[0] === 1) {
      copyRun(gpu, x.handle, first * bytesPerElement(x.dtype), y, 0, y.bytes);
    } else gather(gpu, "slice", x, y, dims, first);
  });
}

function concat(gpu: Gpu, inputs: readonly Input[], result: Result, axis: number): WebgpuHandle {
  const steps = flatSteps(gpu);
  return produce(gpu, result, (y) => {
    if (y.bytes === 0) return;
    const rows = sizeOf(result.shape.slice(0, axis));
    const line = y.bytes / rows;
    let yAt = 0;
    for (const x of inputs) {
      const bytes = bytesOf(x);
      const length = bytes / rows;
      if (bytes === 0) continue;
      if (rows === 1) copyRun(gpu, x.handle, 0, y, yAt, bytes);
      else {
        const [from, to] = [gpu.whole("concat", x.handle), gpu.whole("concat", y)];
        const unit = unitOf(1, [length, line, yAt]);
        if (unit < 4) layBytes(gpu, from, to, { rows, length, line, xAt: 0, yAt });
        else {
          const n = bytes / unit;
          const params = { n, length: length / unit, line: line / unit, yAt: yAt / unit };
          gpu.run(layProgram(unit, steps), { x: from }, { y: to }, params, flatGroups(n, steps));
        }
      }
      yAt += length;
    }
  });
}

// ---------------------------------------------------------------- pad
const padProgram = memo((unit: Unit, rank: number, steps: number): Program => {
  const params: Record<string, ParamType> = { n: "u32", elements: "u32" };
  for (let d = 0; d < rank; d++)
    for (const name of ["size", "before", "inside", "stride"]) params[`${name}${d}`] = "u32";
  return program({
    key: `pad ${unit} bytes, ${rank} dimensions, ${steps} steps`,
    reads: { x: typeOf(unit) },
    writes: { y: typeOf(unit) },
    params,
    lanes: FLAT_LANES,
    code: () => `fn source(i: u32) -> u32 {
  var rest = i;
  var place = 0u;
  ${Array.from({ length: rank }, (_, k) => rank - 1 - k)
    .map(
      (d) => `{
    let j = rest % p.size${d} - p.before${d}; // wraps round before x
    if (j >= p.inside${d}) { return NOWHERE; }
    place += j * p.stride${d};
    rest /= p.size${d};
  }`,
    )
    .join("\n  ")}
  return place;
}
${moveText(unit, steps)}`,
  });
});

function pad(gpu: Gpu, x: Input, result: Result, before: readonly number[]): WebgpuHandle {
  return produce(gpu, result, (y) => {
    if (y.bytes === 0) return;
    // An axis without padding is part of the one outside it.
    const dims: { size: number; before: number; inside: number }[] = [];
    result.shape.forEach((size, axis) => {
      const inside = at(x.shape, axis);
      const outer = dims.at(-1);
      if (outer && inside === size) {
        outer.size *= size;
        outer.before *= size;
        outer.inside *= size;
      } else dims.push({ size, before: at(before, axis), inside });
    });
    if (dims.length === 0) dims.push({ size: 1, before: 0, inside: 1 });
    const inner = at(dims, dims.length - 1);
    const element = bytesPerElement(x.dtype);
    const unit = unitOf(element, [inner.size, inner.before, inner.inside]);
    const each = elementsIn(unit, element);
    inner.size /= each;
    inner.before /= each;
    inner.inside /= each;
    const strides = stridesOf(dims.map((d) => d.inside));
    const units = counts(
      dims.reduce((product, d) => product * d.size, 1),
      unit,
    );
    const params: Record<string, number> = { ...units };
    dims.forEach((dim, d) => {
      params[`size${d}`] = dim.size;
      params[`before${d}`] = dim.before;
      params[`inside${d}`] = dim.inside;
      params[`stride${d}`] = at(strides, d);
    });
    const bound = { x: gpu.whole("pad", x.handle) };
    const steps = flatSteps(gpu);
    const one = padProgram(unit, dims.length, steps);
    gpu.run(one, bound, { y: gpu.whole("pad", y) }, params, flatGroups(units.n, steps));
  });
}

function broadcastTo(gpu: Gpu, x: Input, result: Result): WebgpuHandle {
  const total = sizeOf(result.shape);
  if (total === 0) return gpu.alloc(result);
  if (total === sizeOf(x.shape)) return x.handle;
  return produce(gpu, result, (y) => gather(gpu, "broadcastTo", x, y, broadcastDims(result.shape, [x.shape]), 0));
}

// ---------------------------------------------------------------- the table
type Primitive = "reshape" | "transpose" | "slice" | "concat";

export function shapeKernels(
  gpu: Gpu,
): Readonly<Record<string, Kernel<WebgpuHandle>>> & { readonly [P in Primitive]: Kernel<WebgpuHandle> } {
  const kernel = (body: Kernel<WebgpuHandle>): Kernel<WebgpuHandle> => Object.assign(body, { unsupported: only("?") });
  return {
    reshape: kernel(([x]) => (x ? [x.handle] : [])),
    transpose: kernel(([x], [result], { perm }) => (x && result ? [transpose(gpu, x, result, perm)] : [])),
    slice: kernel(([x], [result], { start }) => (x && result ? [slice(gpu, x, result, start)] : [])),
    concat: kernel((inputs, [result], { axis }) => (result ? [concat(gpu, inputs, result, axis)] : [])),
    pad: kernel(([x], [result], { before }) => (x && result ? [pad(gpu, x, result, before)] : [])),
    broadcastTo: kernel(([x], [result]) => (x && result ? [broadcastTo(gpu, x, result)] : [])),
  };
}
