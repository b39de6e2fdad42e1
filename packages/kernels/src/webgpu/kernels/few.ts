// Products with few rows, where reading the weights is the work: lanes share k, each line of weights is read once, by
// neighbouring lanes, for all rows. Sums of lanes meet in a tree. What a row gets does not depend on how many rows
// there are beside it.
import type { Program } from "../program.ts";
import { keyOf, type Operand, operandParams, operandReads, operandText } from "./operands.ts";
import {
  type Epilogue,
  epilogueKey,
  epilogueParams,
  epilogueReads,
  epilogueText,
  type PlaceName,
  places,
  type Values,
  valuesOf,
} from "./tiles.ts";

/** Most rows of a product that is served here. */
export const FEW_ROWS = 8;
const LANES = { k: 128, r: 64 } as const;
/** Layout "k": lanes along k for one line of b, and lines of b per lane. */
const TEAM = 32;
const LINES = 2;
/** Layout "r": quads of columns side by side. */
const QUADS = 8;

export interface FewVariant {
  readonly a: Operand;
  readonly b: Operand;
  readonly place: Exclude<PlaceName, "outer">;
  readonly epilogue: Epilogue;
  /** Row counts that get code of their own, ascending; the last is the most there may be. */
  readonly counts: readonly number[];
}

/** Columns of y that a workgroup covers. */
export const fewColumns = (b: Operand): number => (b.layout === "k" ? (LANES.k / TEAM) * LINES : QUADS * 4);
/** The elements of k that one round of lanes takes: wider fetches than this would leave lanes without work. */
export const fewSpan = (step: number): number => TEAM * step;

const list = (n: number, text: (i: number) => string): string =>
  Array.from({ length: n }, (_, i) => text(i)).join("\n");

/** Four k of `rows` rows of a, from k = `k` on. */
function rowsOfA(a: Operand, rows: number, k: string, prefix: string): Values {
  return valuesOf(
    { x: a, per: rows },
    (i, j) =>
      a.layout === "k"
        ? `a_four(from${i}, ${k}, k1)`
        : `a_four(a_at + ${k} + ${j}u, row0 + ${4 * i}u, select(0u, row1, ${k} + ${j}u < k1))`,
    prefix,
  );
}
/** Lines of a, where they are rows: those behind the last repeat it and are not stored. */
const linesOfA = (a: Operand, rows: number): string =>
  a.layout === "k" ? list(rows, (r) => `let from${r} = a_line(a_at + min(row0 + ${r}u, row1 - 1u));`) : "";

const signature = "lane: u32, row0: u32, row1: u32, col0: u32, col1: u32, k0: u32, k1: u32, a_at: u32, b_at: u32";
const values = "lane, row0, row1, col0, col1, k0, k1, a_at, b_at";

/** b's lines run along k: a team of lanes shares a line. */
function alongK({ a, b, place, epilogue, counts }: FewVariant): string {
  const lanes = LANES.k;
  const lines = epilogue.swiglu ? 2 * LINES : LINES;
  const most = counts.at(-1) ?? 1;
  const columns = fewColumns(b);
  const step = Math.max(b.step, 4);
  const result = epilogue.swiglu ? `swiglu(sums[at], sums[at + ${LINES * lanes}u])` : "sums[at]";
  const line = (c: number): string =>
    `b_at + min(col0 + team * ${LINES}u + ${c % LINES}u, col1 - 1u)${c >= LINES ? " + p.units" : ""}`;
  const sums = (rows: number): string => `
fn sum${rows}(${signature}) {
  let mine = lane % ${TEAM}u;
  let team = lane / ${TEAM}u;
  ${list(lines, (c) => `let line${c} = ${line(c)};`)}
  ${linesOfA(a, rows)}
  ${list(rows * lines, (v) => `var s${v} = 0.0;`)}
  for (var k = k0 + mine * ${step}u; k < k1; k += ${TEAM * step}u) {
    ${
      b.step === 1
        ? list(lines, (c) => `let w${c}_0 = b_four(line${c}, k, k1);`)
        : `${list(lines, (c) => `let f${c} = b_fetch(line${c}, k);\nlet z${c} = b_scale(line${c}, k);`)}
    ${list(step / 4, (v) => list(lines, (c) => `let w${c}_${v} = b_widen${v}(f${c}, z${c});`))}`
    }
    ${list(step / 4, (v) => {
      const x = rowsOfA(a, rows, `(k + ${4 * v}u)`, `x${v}_`);
      const products = list(rows, (r) =>
        list(lines, (c) =>
          list(4, (j) => `s${r * lines + c} = fma(${x.value(r, j)}, w${c}_${v}.${"xyzw"[j]}, s${r * lines + c});`),
        ),
      );
      return `${x.text}\n${products}`;
    })}
  }
  ${list(rows * lines, (v) => `sums[${v * lanes}u + lane] = s${v};`)}
}`;
  return `
var<workgroup> sums: array<f32, ${most * lines * lanes}>;
${counts.map(sums).join("\n")}
fn main(group: u32, lane: u32) {
  ${places[place].text(most, columns)}
  let rows = min(row1 - row0, ${most}u);
  ${callsOf(counts)}
  workgroupBarrier();
  for (var s = ${TEAM / 2}u; s > 0u; s /= 2u) {
    if (lane % ${TEAM}u < s) {
      for (var v = 0u; v < rows * ${lines}u; v++) { sums[v * ${lanes}u + lane] += sums[v * ${lanes}u + lane + s]; }
    }
    workgroupBarrier();
  }
  for (var o = lane; o < rows * ${columns}u; o += ${lanes}u) {
    let r = o / ${columns}u;
    let c = o % ${columns}u;
    let at = (r * ${lines}u + c % ${LINES}u) * ${lanes}u + (c / ${LINES}u) * ${TEAM}u;
    if (col0 + c < col1) { store(y_at, row0 + r, col0 + c, ${result}); }
  }
}`;
}

/** b's lines run along the columns: a lane has four columns and every so many k. */
function alongColumns({ a, b, place, counts }: FewVariant): string {
  const lanes = LANES.r;
  const most = counts.at(-1) ?? 1;
  const columns = fewColumns(b);
  const shares = lanes / QUADS;
  const productsOf = (rows: number): string => {
    const x = rowsOfA(a, rows, "k", "x");
    const row = (r: number): string => list(4, (j) => `s${r} = fma(vec4<f32>(${x.value(r, j)}), w${j}, s${r});`);
    return `${x.text}\n${list(rows, row)}`;
  };
  const sums = (rows: number): string => `
fn sum${rows}(${signature}) {
  let col = col0 + (lane % ${QUADS}u) * 4u;
  ${linesOfA(a, rows)}
  ${list(rows, (r) => `var s${r} = vec4<f32>();`)}
  for (var k = k0 + (lane / ${QUADS}u) * 4u; k < k1; k += ${4 * shares}u) {
    ${list(4, (j) => `let w${j} = b_four(b_at + k + ${j}u, col, select(0u, col1, k + ${j}u < k1));`)}
    ${productsOf(rows)}
  }
  ${list(rows, (r) => `sums[${r * lanes}u + lane] = s${r};`)}
}`;
  return `
var<workgroup> sums: array<vec4<f32>, ${most * lanes}>;
${counts.map(sums).join("\n")}
fn main(group: u32, lane: u32) {
  ${places[place].text(most, columns)}
  let rows = min(row1 - row0, ${most}u);
  ${callsOf(counts)}
  workgroupBarrier();
  for (var s = ${shares / 2}u; s > 0u; s /= 2u) {
    if (lane / ${QUADS}u < s) {
      for (var r = 0u; r < rows; r++) { sums[r * ${lanes}u + lane] += sums[r * ${lanes}u + lane + s * ${QUADS}u]; }
    }
    workgroupBarrier();
  }
  for (var o = lane; o < rows * ${columns}u; o += ${lanes}u) {
    let r = o / ${columns}u;
    let c = o % ${columns}u;
    if (col0 + c < col1) { store(y_at, row0 + r, col0 + c, sums[r * ${lanes}u + c / 4u][c % 4u]); }
  }
}`;
}

/** The smallest code that has all rows; their number is the same for the whole workgroup. */
const callsOf = (counts: readonly number[]): string =>
  counts
    .map(
      (n, i) =>
        `${i === 0 ? "" : "else "}${i === counts.length - 1 ? "" : `if (rows <= ${n}u) `}{ sum${n}(${values}); }`,
    )
    .join("\n");

const programs = new Map<string, Program>();
/** The program of a variant, made once. */
export function fewProgram(variant: FewVariant): Program {
  const { a, b, place, epilogue, counts } = variant;
  const key = `${place} few ${counts} ${keyOf(a)} ${keyOf(b)}${epilogueKey(epilogue)}`;
  let made = programs.get(key);
  if (!made) {
    made = {
      key,
      reads: { ...operandReads(a), ...operandReads(b), ...places[place].reads, ...epilogueReads(epilogue) },
      writes: { y: "f32" },
      params: { ...operandParams(a), ...operandParams(b), ...places[place].params, ...epilogueParams(epilogue) },
      lanes: LANES[b.layout],
      f16: b.native,
      code: () => `${operandText(a)}
${operandText(b)}
${epilogueText(epilogue)}
${b.layout === "k" ? alongK(variant) : alongColumns(variant)}`,
    };
    programs.set(key, made);
  }
  return made;
}
