// Products by tiles: a workgroup computes a block of rows by columns, an invocation a smaller block in registers. One
// template serves dense products, ragged blocks of experts and their outer products, every storage format, with and
// without workgroup memory.
//
// The order of summation is the same in all of them: k ascends in steps of one fma; after every FOLD of them (counted
// from the first k) the sum so far is added to a second one, so that long sums stay accurate. It does not depend on the
// tile: tuning changes speed, never results.
import type { Gpu, Limits } from "../device.ts";
import type { ParamType, Program } from "../program.ts";
import { expText, sigmoidText } from "./math.ts";
import { type Format, keyOf, type Operand, operandParams, operandReads, operandText } from "./operands.ts";

export interface Tile {
  readonly name: string;
  /** Rows and columns of a workgroup. */
  readonly rows: number;
  readonly columns: number;
  /** Rows and columns of an invocation. Rows: 4 or 8, or fewer where `staged` is false; columns: 4 or 8. */
  readonly perRows: number;
  readonly perColumns: number;
  /** Both sides pass through workgroup memory, 16 of k at a time; else every invocation reads storage itself. */
  readonly staged: boolean;
}
const tile = (rows: number, columns: number, perRows: number, perColumns: number, staged: boolean): Tile => ({
  name: `${staged ? "" : "direct "}${rows}x${columns} by ${perRows}x${perColumns}`,
  rows,
  columns,
  perRows,
  perColumns,
  staged,
});

/** What the tuner may choose from. */
export const tiles: readonly Tile[] = [
  tile(64, 64, 8, 4, true),
  tile(128, 128, 8, 8, true),
  tile(64, 64, 8, 8, true),
  tile(32, 64, 4, 4, true),
  tile(32, 32, 4, 4, true),
  tile(16, 64, 4, 4, true),
  tile(32, 32, 4, 4, false),
  tile(32, 64, 4, 8, false),
];
const tileNamed = new Map(tiles.map((one) => [one.name, one]));
const named = (name: string): Tile => {
  const found = tileNamed.get(name);
  if (!found) throw new RangeError(`webgpu: there is no tile "${name}"`);
  return found;
};
// Real GPUs. 8x4 sums and as many folded ones stay far below the registers of every current GPU, and each quad read
// from workgroup memory feeds 10 fma. Blocks of 64 would leave most of the GPU idle where they are few, and waste most
// of their rows where rows are few.
const general = named("64x64 by 8x4");
const fewBlocks = named("32x32 by 4x4");
const fewRows = named("16x64 by 4x4");
const someRows = named("32x64 by 4x4");
// Software drivers: workgroup memory is ordinary memory there, and a barrier stops and starts every lane.
const software = named("direct 32x32 by 4x4");
/** One row: the few-row products of software drivers. */
export const singleRow: Tile = tile(1, 128, 1, 4, false);

const DEPTH = 16;
const quadsPerLine = DEPTH / 4;
/** Quads from line to line in workgroup memory: odd, so that neighbouring lines begin in different banks. */
const PITCH = quadsPerLine + 1;
/** Sums of this many products are folded into the result. f16 sums lose bits faster. */
const FOLD = { f32: 256, f16: 16 } as const;

const lanesOf = ({ rows, columns, perRows, perColumns }: Tile): number => (rows / perRows) * (columns / perColumns);
/** Whether a device can run a tile. */
export const fits = (one: Tile, limits: Limits): boolean =>
  lanesOf(one) <= limits.maxComputeInvocationsPerWorkgroup &&
  (!one.staged || (one.rows + one.columns) * PITCH * 16 <= limits.maxComputeWorkgroupStorageSize);

// ---------------------------------------------------------------- choice
/** What products have in common as far as the best tile goes. */
export interface ShapeClass {
  /** dense, or ragged blocks; outer: k runs over the rows of blocks. */
  readonly kind: "dense" | "blocks" | "outer";
  /** Layouts of both sides, "kk", "kr", "rr", "rk". */
  readonly layouts: string;
  readonly format: Format;
  /** Rows (of a block: on average), columns, inner size, and how many such products run at once. */
  readonly m: number;
  readonly n: number;
  readonly k: number;
  readonly count: number;
}
const bucket = (x: number): number => (x <= 16 ? 16 : x >= 4096 ? 4096 : 4 ** Math.ceil(Math.log2(x) / 2));
/** The key of a table of tiles: sizes rounded up to powers of four. */
export const classKey = ({ kind, layouts, format, m, n, k, count }: ShapeClass): string =>
  `${kind} ${layouts} ${format} ${bucket(m)}x${bucket(n)}x${bucket(k)} ${count > 1 ? "many" : "one"}`;

/** The tile where no table names one. */
export function defaultTile(gpu: Pick<Gpu, "software" | "limits">, { m, n, count, kind }: ShapeClass): Tile {
  if (gpu.software) return software;
  if (kind !== "outer" && m <= 16) return fewRows;
  if (kind !== "outer" && m <= 32) return someRows;
  const blocks = Math.ceil(m / general.rows) * Math.ceil(n / general.columns) * count;
  const chosen = blocks < 96 ? fewBlocks : general;
  return fits(chosen, gpu.limits) ? chosen : fewBlocks;
}

/** The tile for products of a class: the table's, else the default. */
export function tileFor(gpu: Gpu, shape: ShapeClass): Tile {
  if (gpu.tiles) {
    const chosen = tileNamed.get(gpu.tiles[classKey(shape)] ?? "");
    if (chosen && fits(chosen, gpu.limits)) return chosen;
  }
  return defaultTile(gpu, shape);
}

// ---------------------------------------------------------------- places
/** Where a workgroup works: reads and numbers it needs, and WGSL that says its rows, columns and stretch of k. */
export interface Place {
  readonly reads: Record<string, string>;
  readonly params: Record<string, ParamType>;
  /**
   * Declares row0 row1 col0 col1 k0 k1 (where the block begins, where the matrix ends) and a_at b_at y_at (first
   * lines).
   */
  readonly text: (rows: number, columns: number) => string;
}
export type PlaceName = "dense" | "blocks" | "outer";

export const places: { readonly [P in PlaceName]: Place } = {
  // Ranges of rows, columns and k, so that parts of split tensors and slices of k are products like any other. `batch`
  // has two dimensions, of which either side may repeat any.
  dense: {
    reads: {},
    params: {
      m0: "u32",
      m1: "u32",
      n0: "u32",
      n1: "u32",
      k0: "u32",
      k1: "u32",
      tiles_m: "u32",
      tiles_n: "u32",
      slices: "u32",
      slice: "u32",
      batch: "u32",
      a_outer: "u32",
      a_batch: "u32",
      b_outer: "u32",
      b_batch: "u32",
      a_first: "u32",
      b_first: "u32",
      y_first: "u32",
      y_lines: "u32",
    },
    text: (rows, columns) => `
  let col0 = p.n0 + (group % p.tiles_n) * ${columns}u;
  let col1 = p.n1;
  let above = group / p.tiles_n;
  let row0 = p.m0 + (above % p.tiles_m) * ${rows}u;
  let row1 = p.m1;
  let sliced = above / p.tiles_m;
  let matrix = sliced / p.slices;
  let k0 = p.k0 + (sliced % p.slices) * p.slice;
  let k1 = min(p.k1, k0 + p.slice);
  let a_at = p.a_first + (matrix / p.batch) * p.a_outer + (matrix % p.batch) * p.a_batch;
  let b_at = p.b_first + (matrix / p.batch) * p.b_outer + (matrix % p.batch) * p.b_batch;
  let y_at = p.y_first + sliced * p.y_lines;`,
  },
  // An entry of a plan (plan.ts): expert, first row, number of rows. Entries without expert give zeros.
  blocks: {
    reads: { plan: "vec4<u32>" },
    params: { header: "u32", list: "u32", tiles_n: "u32", n1: "u32", inner: "u32", b_lines: "u32", b_first: "u32" },
    text: (_, columns) => `
  let entry = group / p.tiles_n;
  if (entry >= plan[p.header].w) { return; }
  let block = plan[p.list + entry];
  let row0 = block.y;
  let row1 = block.y + block.z;
  let col0 = (group % p.tiles_n) * ${columns}u;
  let col1 = p.n1;
  let k0 = 0u;
  let k1 = select(p.inner, 0u, block.x == 0xffffffffu);
  let a_at = 0u;
  let b_at = block.x * p.b_lines + p.b_first;
  let y_at = 0u;`,
  },
  // k runs over the rows of one expert.
  outer: {
    reads: { ends: "i32" },
    params: { rows: "u32", expert: "u32", tiles_m: "u32", tiles_n: "u32", m1: "u32", n1: "u32" },
    text: (rows, columns) => `
  let each = p.tiles_m * p.tiles_n;
  let own = group / each;
  let e = own + p.expert;
  let row0 = ((group % each) / p.tiles_n) * ${rows}u;
  let row1 = p.m1;
  let col0 = (group % p.tiles_n) * ${columns}u;
  let col1 = p.n1;
  var k0 = 0u;
  if (e > 0u) { k0 = min(u32(max(ends[e - 1u], 0)), p.rows); }
  let k1 = clamp(u32(max(ends[e], 0)), k0, p.rows);
  let a_at = 0u;
  let b_at = 0u;
  let y_at = own * p.m1;`,
  },
};

// ---------------------------------------------------------------- results
export interface Epilogue {
  readonly bias: boolean;
  /** Lines [0, units) of b are gates, lines [units, 2 units) what they let through: y = silu(gate) * up. */
  readonly swiglu: boolean;
  /** y[column, row] instead of y[row, column]: the sides were swapped. */
  readonly across: boolean;
  /** The number `add` tells whether y is added to; else it is always overwritten. */
  readonly adding: boolean;
}
export const plainly: Epilogue = { bias: false, swiglu: false, across: false, adding: false };
export const epilogueKey = ({ bias, swiglu, across, adding }: Epilogue): string =>
  `${bias ? " bias" : ""}${swiglu ? " swiglu" : ""}${across ? " across" : ""}${adding ? " adding" : ""}`;
export const epilogueReads = ({ bias }: Epilogue): Record<string, string> => (bias ? { bias: "f32" } : {});
export const epilogueParams = ({ swiglu, adding }: Epilogue): Record<string, ParamType> => ({
  y_length: "u32",
  ...(swiglu ? { units: "u32" } : {}),
  ...(adding ? { add: "u32" } : {}),
});
export const epilogueText = ({ bias, swiglu, across, adding }: Epilogue): string => `
fn store(y_at: u32, row: u32, col: u32, x: f32) {
  let at = ${across ? "(y_at + col) * p.y_length + row" : "(y_at + row) * p.y_length + col"};
  var value = x;
  ${bias ? `value += bias[${across ? "row" : "col"}];` : ""}
  ${adding ? "if (p.add != 0u) { value += y[at]; }" : ""}
  y[at] = value;
}
${
  swiglu
    ? `${expText}${sigmoidText}
fn swiglu(gate: f32, up: f32) -> f32 { return gate * sigmoid_of(gate) * up; }`
    : ""
}`;

// ---------------------------------------------------------------- template
const axis = "xyzw";
export interface Side {
  readonly x: Operand;
  /** Rows or columns of an invocation. */
  readonly per: number;
}
/** WGSL that reads the values of four k, and how the value of row (column) i at the j-th of them is then called. */
export interface Values {
  readonly text: string;
  value(i: number, j: number): string;
}
/**
 * Four k for `per` rows. `quad` says where quads come from: of layout "k" one per row, along k; of layout "r" one per k
 * and four rows.
 */
export function valuesOf({ x, per }: Side, quad: (i: number, j: number) => string, prefix = ""): Values {
  const name = prefix + x.name;
  if (x.layout === "k") {
    const lines = Array.from({ length: per }, (_, i) => `let ${name}${i} = ${quad(i, 0)};`);
    return { text: lines.join("\n"), value: (i, j) => `${name}${i}.${axis[j]}` };
  }
  const lines = Array.from({ length: 4 * Math.ceil(per / 4) }, (_, i) => {
    const [j, g] = [i % 4, i >> 2];
    return `let ${name}${j}_${g} = ${quad(g, j)};`;
  });
  return { text: lines.join("\n"), value: (i, j) => `${name}${j}_${i >> 2}.${axis[i & 3]}` };
}

export interface TileVariant {
  readonly tile: Tile;
  readonly a: Operand;
  readonly b: Operand;
  readonly place: PlaceName;
  readonly epilogue: Epilogue;
  /** Products and short sums in f16. */
  readonly half: boolean;
}

interface TileSide extends Side {
  /** Which of the `count` invocations along this side, "ty" or "tx". */
  readonly mine: string;
  readonly count: number;
  /** Size of the workgroup's block; names of its first and the matrix' last row. */
  readonly block: number;
  readonly first: string;
  readonly limit: string;
}

const list = (n: number, text: (i: number) => string): string =>
  Array.from({ length: n }, (_, i) => text(i)).join("\n");

function tileText({ tile: one, a, b, place, epilogue, half }: TileVariant): string {
  const { rows, columns, perRows, perColumns, staged } = one;
  const type = half ? "f16" : "f32";
  const lanes = lanesOf(one);
  const [down, across] = [rows / perRows, columns / perColumns];
  const sideA: TileSide = { x: a, per: perRows, mine: "ty", count: down, block: rows, first: "row0", limit: "row1" };
  const sideB: TileSide = {
    x: b,
    per: perColumns,
    mine: "tx",
    count: across,
    block: columns,
    first: "col0",
    limit: "col1",
  };
  const groups = perColumns / 4;
  // With SwiGLU the first half of the block's columns are gates, the second their partners: an invocation has both of a
  // pair.
  const covered = epilogue.swiglu ? columns / 2 : columns;

  /**
   * Place in the block of an invocation's row (column) i. Lines along k are interleaved, so that neighbours read other
   * banks of workgroup memory; without that, rows stay together, so that invocations behind the last row have nothing
   * to do. Else they come in quads.
   */
  const local = ({ x, per, mine, count }: TileSide, i: number): string => {
    if ((x.layout === "k" && x.name === "a" && !staged) || (x.layout === "r" && per < 4))
      return `(${mine} * ${per}u + ${i}u)`;
    if (x.layout === "k") return `(${i * count}u + ${mine})`;
    return `(${(i >> 2) * 4 * count}u + ${mine} * 4u + ${i & 3}u)`;
  };
  /** The line that holds row (column) `c` of the block; those behind the last repeat it and are not stored. */
  const lineOf = ({ x, first, limit, block }: TileSide, c: string): string => {
    const whole = `${x.name}_line(${x.name}_at + min(${first} + ${c}, ${limit} - 1u))`;
    if (x.name === "a" || !epilogue.swiglu) return whole;
    return `b_at + min(col0 + ${c} % ${block / 2}u, col1 - 1u) + select(0u, p.units, ${c} >= ${block / 2}u)`;
  };
  const inside = ({ limit }: TileSide, k: string): string => `select(0u, ${limit}, ${k} < k1)`;

  // Storage to workgroup memory: quad s of the block belongs to lane s % lanes.
  const stage = (side: TileSide): { before: string; load: string } => {
    const { x, block, first } = side;
    const quads = block * quadsPerLine;
    const times = Math.ceil(quads / lanes);
    const along = x.layout === "k" ? quadsPerLine : block / 4;
    const name = x.name;
    const each = (u: number): { before: string; load: string } => {
      const at = `(lane + ${u * lanes}u)`;
      const [line, i] = [`${at} / ${along}u`, `${at} % ${along}u * 4u`];
      const guard = (u + 1) * lanes > quads ? `if (${at} < ${quads}u) ` : "";
      if (x.layout === "k") {
        return {
          before: `let ${name}_from${u} = ${lineOf(side, `(${line})`)};`,
          load: `${guard}{
        let to = (${line}) * ${PITCH}u + ${at} % ${along}u;
        s${name}[to] = vec4<${type}>(${name}_four(${name}_from${u}, k + ${i}, k1));
      }`,
        };
      }
      return {
        before: `let ${name}_from${u} = ${first} + ${i};`,
        load: `${guard}{
        let end = ${inside(side, `k + ${line}`)};
        s${name}[${at}] = vec4<${type}>(${name}_four(${name}_at + k + ${line}, ${name}_from${u}, end));
      }`,
      };
    };
    return { before: list(times, (u) => each(u).before), load: list(times, (u) => each(u).load) };
  };
  const fromStage = (side: TileSide): Values => {
    const { x, mine, count, block } = side;
    return valuesOf(side, (i, j) =>
      x.layout === "k"
        ? `s${x.name}[${local(side, i)} * ${PITCH}u + q]`
        : `s${x.name}[(q * 4u + ${j}u) * ${block / 4}u + ${i * count}u + ${mine}]`,
    );
  };
  const fromStorage = (side: TileSide): Values & { before: string } => {
    const { x, per, first } = side;
    const name = x.name;
    const before =
      x.layout === "k"
        ? list(per, (i) => `let ${name}_from${i} = ${lineOf(side, local(side, i))};`)
        : list(Math.ceil(per / 4), (g) => `let ${name}_from${g} = ${first} + ${local(side, 4 * g)};`);
    const values = valuesOf(side, (i, j) =>
      x.layout === "k"
        ? `vec4<${type}>(${name}_inside(${name}_from${i}, k, k1))`
        : `vec4<${type}>(${name}_four(${name}_at + k + ${j}u, ${name}_from${i}, ${inside(side, `k + ${j}u`)}))`,
    );
    return { ...values, before };
  };

  const multiply = (va: Values, vb: Values): string =>
    list(4, (j) =>
      [
        list(groups, (g) => {
          const four = [0, 1, 2, 3].map((c) => vb.value(4 * g + c, j));
          return `let v${j}_${g} = ${b.layout === "r" ? `b${j}_${g}` : `vec4<${type}>(${four.join(", ")})`};`;
        }),
        list(perRows, (i) =>
          list(groups, (g) => `c${i}_${g} = fma(vec4<${type}>(${va.value(i, j)}), v${j}_${g}, c${i}_${g});`),
        ),
      ].join("\n"),
    );

  let before: string;
  let body: string;
  if (staged) {
    const [stageA, stageB] = [stage(sideA), stage(sideB)];
    const [va, vb] = [fromStage(sideA), fromStage(sideB)];
    before = `${stageA.before}\n${stageB.before}`;
    body = `for (var k = start; k < stop; k += ${DEPTH}u) {
      ${stageA.load}
      ${stageB.load}
      workgroupBarrier();
      for (var q = 0u; q < ${quadsPerLine}u; q++) {
        ${va.text}
        ${vb.text}
        ${multiply(va, vb)}
      }
      workgroupBarrier();
    }`;
  } else {
    const [va, vb] = [fromStorage(sideA), fromStorage(sideB)];
    before = `if (row0 + ${local(sideA, 0)} >= row1 || col0 + ${local(sideB, 0)} >= col1) { return; }
${va.before}
${vb.before}`;
    body = `for (var k = start; k < stop; k += 4u) {
      ${va.text}
      ${vb.text}
      ${multiply(va, vb)}
    }`;
  }
  const sum = (i: number, c: number): string => `t${i}_${c >> 2}.${axis[c & 3]}`;
  const storeRow = (i: number): string => {
    const count = epilogue.swiglu ? perColumns / 2 : perColumns;
    const value = (c: number): string => (epilogue.swiglu ? `swiglu(${sum(i, c)}, ${sum(i, c + count)})` : sum(i, c));
    const column = (c: number): string => `col0 + ${local(sideB, c)}`;
    return `{
    let row = row0 + ${local(sideA, i)};
    if (row < row1) {
      ${list(count, (c) => `if (${column(c)} < col1) { store(y_at, row, ${column(c)}, ${value(c)}); }`)}
    }
  }`;
  };
  const memory = ({ x, block }: TileSide): string =>
    `var<workgroup> s${x.name}: array<vec4<${type}>, ${x.layout === "k" ? block * PITCH : block * quadsPerLine}>;`;

  return `${operandText(a)}
${operandText(b)}
${epilogueText(epilogue)}
${staged ? `${memory(sideA)}\n${memory(sideB)}` : ""}
fn main(group: u32, lane: u32) {
  let tx = lane % ${across}u;
  let ty = lane / ${across}u;
  ${places[place].text(rows, covered)}
  ${before}
  ${list(perRows, (i) => list(groups, (g) => `var t${i}_${g} = vec4<f32>();`))}
  for (var start = k0; start < k1; start += ${FOLD[type]}u) {
    let stop = min(k1, start + ${FOLD[type]}u);
    ${list(perRows, (i) => list(groups, (g) => `var c${i}_${g} = vec4<${type}>();`))}
    ${body}
    ${list(perRows, (i) => list(groups, (g) => `t${i}_${g} += vec4<f32>(c${i}_${g});`))}
  }
  ${list(perRows, storeRow)}
}`;
}

const programs = new Map<string, Program>();
/** The program of a variant, made once. */
export function tileProgram(variant: TileVariant): Program {
  const { tile: one, a, b, place, epilogue, half } = variant;
  const key = `${place} tile ${one.name} ${keyOf(a)} ${keyOf(b)}${epilogueKey(epilogue)}${half ? " half" : ""}`;
  let made = programs.get(key);
  if (!made) {
    made = {
      key,
      reads: { ...operandReads(a), ...operandReads(b), ...places[place].reads, ...epilogueReads(epilogue) },
      writes: { y: "f32" },
      params: { ...operandParams(a), ...operandParams(b), ...places[place].params, ...epilogueParams(epilogue) },
      lanes: lanesOf(one),
      f16: half || b.native,
      code: () => tileText(variant),
    };
    programs.set(key, made);
  }
  return made;
}

/** Columns of y that a workgroup covers. */
export const columnsOf = (one: Tile, epilogue: Epilogue): number => (epilogue.swiglu ? one.columns / 2 : one.columns);
