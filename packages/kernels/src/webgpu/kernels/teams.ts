// Kernels that work row by row: how many lanes share a row (a team), and the WGSL with which a team finds sums and
// maxima.
import type { Gpu } from "../device.ts";

/** Lanes that share a row of n elements, a power of two. On a processor barriers cost more than a moderate row. */
export function teamFor(gpu: Gpu, n: number): number {
  if (gpu.software) return n <= 4096 ? 1 : 32;
  if (n <= 4) return 1;
  if (n <= 64) return 8;
  if (n <= 256) return 32;
  return n <= 4096 ? 128 : 256;
}
/** Lanes of a workgroup of teams. */
export const lanesOf = (team: number): number => (team === 1 ? 32 : Math.max(64, team));
/** Workgroups for `rows` rows. */
export const groupsOf = (team: number, rows: number): number => Math.ceil(rows / (lanesOf(team) / team));

/** A lane adds up this many elements in one variable, and those sums in another: long sums keep their digits. */
export const RUN = 64;

/**
 * WGSL for teams: TEAM, ROWS (per workgroup), `total(lane, x)` and `topmost(lane, x)`, which give every lane of a team
 * the sum and the maximum (NaN if there is one) of what its lanes brought. Every lane of the workgroup must call them.
 */
export function teamCode(team: number): string {
  const head = `
const TEAM = ${team}u;
const ROWS = ${lanesOf(team) / team}u;
`;
  const larger = `
fn larger(a: f32, b: f32) -> f32 { return select(select(max(a, b), b, is_nan(b)), a, is_nan(a)); }
`;
  if (team === 1) {
    return `${head}${larger}
fn total(lane: u32, x: f32) -> f32 { return x; }
fn topmost(lane: u32, x: f32) -> f32 { return x; }
`;
  }
  // Two levels of about sqrt(TEAM) steps with three barriers in all, instead of log2(TEAM) steps with one each.
  const stride = 2 ** Math.ceil(Math.log2(team) / 2);
  return `${head}${larger}
const STRIDE = ${stride}u;
var<workgroup> desk: array<f32, ${lanesOf(team)}>;
fn total(lane: u32, x: f32) -> f32 {
  let member = lane % TEAM;
  let first = lane - member;
  desk[lane] = x;
  workgroupBarrier();
  if (member < STRIDE) {
    var sum = x;
    for (var j = member + STRIDE; j < TEAM; j += STRIDE) { sum += desk[first + j]; }
    desk[lane] = sum;
  }
  workgroupBarrier();
  var sum = desk[first];
  for (var j = 1u; j < STRIDE; j++) { sum += desk[first + j]; }
  workgroupBarrier();
  return sum;
}
fn topmost(lane: u32, x: f32) -> f32 {
  let member = lane % TEAM;
  let first = lane - member;
  desk[lane] = x;
  workgroupBarrier();
  if (member < STRIDE) {
    var top = x;
    for (var j = member + STRIDE; j < TEAM; j += STRIDE) { top = larger(top, desk[first + j]); }
    desk[lane] = top;
  }
  workgroupBarrier();
  var top = desk[first];
  for (var j = 1u; j < STRIDE; j++) { top = larger(top, desk[first + j]); }
  workgroupBarrier();
  return top;
}
`;
}

/**
 * WGSL `fn name(begin, end, member, centre) -> type`: the sum of `term` over a lane's share of begin ... end - 1.
 * `term` may use `i`, the place of the element, and `centre`.
 */
export const laneSum = (name: string, type: "f32" | "vec2f" | "vec3f", term: string): string => `
fn ${name}(begin: u32, end: u32, member: u32, centre: f32) -> ${type} {
  var sum = ${type}();
  for (var run = begin + member; run < end; run += ${RUN}u * TEAM) {
    let stop = min(run + ${RUN}u * TEAM, end);
    var part = ${type}();
    for (var i = run; i < stop; i += TEAM) { part += ${term}; }
    sum += part;
  }
  return sum;
}
`;
