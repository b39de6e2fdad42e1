// Softmax and its relatives, cross entropy, norms, the router's softmax with top-k, rotary positions; with gradients.
// A team of lanes takes a row (see teams.ts).
import type { Kernel, Spec } from "@switchyard/core";
import type { Gpu, WebgpuHandle } from "../device.ts";
import { sizeOf } from "../formats.ts";
import { type Program, program } from "../program.ts";
import { expText, logText } from "./math.ts";
import { at, type Input, lastOf, memo, rowsOf } from "./parts.ts";
import { sumMiddle } from "./reduce.ts";
import { groupsOf, laneSum, lanesOf, teamCode, teamFor } from "./teams.ts";

/** WGSL: the row of this team; teams beyond the last row read it again, and must write nothing (row >= p.rows). */
const thisRow = `
  let member = lane % TEAM;
  let row = group * ROWS + lane / TEAM;
  let begin = min(row, p.rows - 1u) * p.n;
  let end = begin + p.n;`;
const rowParams = { rows: "u32", n: "u32" } as const;

// ---------------------------------------------------------------- softmax
/**
 * WGSL: `row_stats(lane, begin, end, member)` gives the largest of x[begin ... end - 1] and the sum of the exponentials
 * of all after subtracting it, in one pass; `wide`: of row `row`, from what softmaxStats found in its pieces.
 */
const softmaxCode = (wide = false): string => `
${expText}
${logText}
// What is subtracted before exponentials: of a row of -inf only 0, so that its exponentials are 0 and not NaN.
fn base_of(top: f32) -> f32 { return select(top, 0.0, top < -3e38); }
// The softmax of a row with NaN or infinity is NaN.
fn is_spoiled(top: f32) -> bool { return is_nan(top) || bitcast<u32>(top) == 0x7f800000u; }
fn team_stats(lane: u32, top: f32, sum: f32) -> vec2f {
  let all = topmost(lane, top);
  return vec2f(all, total(lane, sum * exp_term(top - base_of(all))));
}
fn log_sum_exp(stats: vec2f) -> f32 {
  if (is_spoiled(stats.x)) { return not_a_number(); }
  return base_of(stats.x) + log_of(stats.y);
}
${
  wide
    ? `
fn row_stats(lane: u32, row: u32, member: u32) -> vec2f {
  var top = -infinity();
  var sum = 0.0;
  for (var i = member; i < p.pieces; i += TEAM) {
    let piece = pieces[row * p.pieces + i];
    let now = larger(top, piece.x);
    let base = base_of(now);
    sum = sum * exp_term(top - base) + piece.y * exp_term(piece.x - base);
    top = now;
  }
  return team_stats(lane, top, sum);
}`
    : `
fn entry_or_lowest(i: u32, end: u32) -> f32 { return select(-infinity(), x[min(i, end - 1u)], i < end); }
fn row_stats(lane: u32, begin: u32, end: u32, member: u32) -> vec2f {
  var top = -infinity();
  var sum = 0.0;
  for (var i = begin + member; i < end; i += 4u * TEAM) {
    let a = x[i];
    let b = entry_or_lowest(i + TEAM, end);
    let c = entry_or_lowest(i + 2u * TEAM, end);
    let d = entry_or_lowest(i + 3u * TEAM, end);
    let now = larger(top, larger(larger(a, b), larger(c, d)));
    let base = base_of(now);
    let terms = (exp_term(a - base) + exp_term(b - base)) + (exp_term(c - base) + exp_term(d - base));
    sum = sum * exp_term(top - base) + terms;
    top = now;
  }
  return team_stats(lane, top, sum);
}`
}
`;

/** Few rows of many elements (logits of one token) would leave a GPU idle: pieces of this size get a team each. */
const PIECE = 4096;
const piecesOf = (gpu: Gpu, rows: number, n: number): number =>
  gpu.software || n < 4 * PIECE || rows >= 64 ? 1 : Math.ceil(n / PIECE);

const softmaxStats = program({
  key: "softmaxStats",
  reads: { x: "f32" },
  writes: { pieces: "vec2<f32>" },
  params: { n: "u32", pieces: "u32" },
  lanes: lanesOf(256),
  code: () => `
${teamCode(256)}
${softmaxCode()}
fn main(group: u32, lane: u32) {
  let first = (group % p.pieces) * ${PIECE}u;
  let begin = (group / p.pieces) * p.n;
  let stats = row_stats(lane, begin + first, begin + min(first + ${PIECE}u, p.n), lane);
  if (lane == 0u) { pieces[group] = stats; }
}`,
});

const softmaxParams = { rows: "u32", n: "u32", pieces: "u32" } as const;
const softmaxReads = (wide: boolean): Record<string, string> =>
  wide ? { x: "f32", pieces: "vec2<f32>" } : { x: "f32" };
const statsHere = (wide: boolean): string =>
  wide ? "row_stats(lane, row, member)" : "row_stats(lane, begin, end, member)";
/** WGSL: the row of this team, or (wide) the piece of a row. */
const thisPiece = (wide: boolean): string =>
  wide
    ? `
  let member = lane;
  let row = group / p.pieces;
  let begin = row * p.n + (group % p.pieces) * ${PIECE}u;
  let end = min(begin + ${PIECE}u, (row + 1u) * p.n);`
    : thisRow;

const softmax = memo((team: number, wide: boolean) =>
  program({
    key: `softmax ${team}${wide ? " wide" : ""}`,
    reads: softmaxReads(wide),
    writes: { y: "f32" },
    params: softmaxParams,
    lanes: lanesOf(team),
    code: () => `
${teamCode(team)}
${softmaxCode(wide)}
fn main(group: u32, lane: u32) {
  ${thisPiece(wide)}
  let stats = ${statsHere(wide)};
  if (row >= p.rows) { return; }
  let base = base_of(stats.x);
  let scale = select(1.0 / max(stats.y, 1e-30), not_a_number(), is_spoiled(stats.x));
  for (var i = begin + member; i < end; i += TEAM) { y[i] = exp_term(x[i] - base) * scale; }
}`,
  }),
);

const logSoftmax = memo((team: number, wide: boolean) =>
  program({
    key: `logSoftmax ${team}${wide ? " wide" : ""}`,
    reads: softmaxReads(wide),
    writes: { y: "f32" },
    params: softmaxParams,
    lanes: lanesOf(team),
    code: () => `
${teamCode(team)}
${softmaxCode(wide)}
fn main(group: u32, lane: u32) {
  ${thisPiece(wide)}
  let stats = ${statsHere(wide)};
  if (row >= p.rows) { return; }
  // Without an entry above -inf there is no logarithm: NaN.
  let none = is_spoiled(stats.x) || stats.y == 0.0;
  let base = base_of(stats.x);
  let rest = log_of(stats.y);
  for (var i = begin + member; i < end; i += TEAM) { y[i] = select((x[i] - base) - rest, not_a_number(), none); }
}`,
  }),
);

const logSumExp = memo((team: number, wide: boolean) =>
  program({
    key: `logSumExp ${team}${wide ? " wide" : ""}`,
    reads: softmaxReads(wide),
    writes: { y: "f32" },
    params: softmaxParams,
    lanes: lanesOf(team),
    code: () => `
${teamCode(team)}
${softmaxCode(wide)}
fn main(group: u32, lane: u32) {
  ${thisRow}
  let stats = ${statsHere(wide)};
  if (member == 0u && row < p.rows) { y[row] = log_sum_exp(stats); }
}`,
  }),
);

/** dx = y (dy - sum(y dy)). */
const softmaxGrad = memo((team: number) =>
  program({
    key: `softmaxGrad ${team}`,
    reads: { y: "f32", dy: "f32" },
    writes: { dx: "f32" },
    params: rowParams,
    lanes: lanesOf(team),
    code: () => `
${teamCode(team)}
${laneSum("share", "f32", "y[i] * dy[i]")}
fn main(group: u32, lane: u32) {
  ${thisRow}
  let sum = total(lane, share(begin, end, member, 0.0));
  if (row >= p.rows) { return; }
  for (var i = begin + member; i < end; i += TEAM) { dx[i] = y[i] * (dy[i] - sum); }
}`,
  }),
);

/** dx = dy - exp(y) sum(dy). */
const logSoftmaxGrad = memo((team: number) =>
  program({
    key: `logSoftmaxGrad ${team}`,
    reads: { y: "f32", dy: "f32" },
    writes: { dx: "f32" },
    params: rowParams,
    lanes: lanesOf(team),
    code: () => `
${teamCode(team)}
${expText}
${laneSum("share", "f32", "dy[i]")}
fn main(group: u32, lane: u32) {
  ${thisRow}
  let sum = total(lane, share(begin, end, member, 0.0));
  if (row >= p.rows) { return; }
  for (var i = begin + member; i < end; i += TEAM) { dx[i] = dy[i] - exp_of(y[i]) * sum; }
}`,
  }),
);

// ---------------------------------------------------------------- cross entropy
const crossEntropy = memo((team: number, wide: boolean) =>
  program({
    key: `crossEntropy ${team}${wide ? " wide" : ""}`,
    reads: { ...softmaxReads(wide), labels: "i32" },
    writes: { losses: "f32", lse: "f32" },
    params: softmaxParams,
    lanes: lanesOf(team),
    code: () => `
${teamCode(team)}
${softmaxCode(wide)}
fn main(group: u32, lane: u32) {
  ${thisRow}
  let stats = ${statsHere(wide)};
  if (member != 0u || row >= p.rows) { return; }
  lse[row] = log_sum_exp(stats);
  let label = labels[row];
  var loss = 0.0;
  if (label >= 0 && u32(label) < p.n) {
    // In this order a loss near 0 keeps its digits.
    loss = select((base_of(stats.x) - x[begin + u32(label)]) + log_of(stats.y), not_a_number(), is_spoiled(stats.x));
  }
  losses[row] = loss;
}`,
  }),
);

/** dlogits = (exp(logits - lse) - onehot) dloss, four at a time; 0 in a row whose label is outside. */
const QUAD_LANES = 64;
const crossEntropyGrad = program({
  key: "crossEntropyGrad",
  reads: { x: "vec4<f32>", labels: "i32", lse: "f32", dlosses: "f32" },
  writes: { dx: "vec4<f32>" },
  params: { rows: "u32", n: "u32", quads: "u32" },
  lanes: QUAD_LANES,
  code: () => `
${expText}
fn main(group: u32, lane: u32) {
  let q = group * ${QUAD_LANES}u + lane;
  if (q >= p.quads) { return; }
  var row = 4u * q / p.n;
  var column = 4u * q % p.n;
  let given = x[q];
  var slopes: vec4f;
  for (var j = 0u; j < 4u && row < p.rows; j++) {
    let label = labels[row];
    if (label >= 0 && u32(label) < p.n) {
      slopes[j] = (exp_of(given[j] - lse[row]) - select(0.0, 1.0, u32(label) == column)) * dlosses[row];
    }
    column++;
    if (column == p.n) {
      column = 0u;
      row++;
    }
  }
  dx[q] = slopes;
}`,
});

// ---------------------------------------------------------------- norms
const normParams = { rows: "u32", n: "u32", eps: "f32" } as const;

const rmsNorm = memo((team: number) =>
  program({
    key: `rmsNorm ${team}`,
    reads: { x: "f32", w: "f32" },
    writes: { y: "f32" },
    params: normParams,
    lanes: lanesOf(team),
    code: () => `
${teamCode(team)}
${laneSum("squares", "f32", "x[i] * x[i]")}
fn main(group: u32, lane: u32) {
  ${thisRow}
  let scale = 1.0 / sqrt(total(lane, squares(begin, end, member, 0.0)) / f32(p.n) + p.eps);
  if (row >= p.rows) { return; }
  for (var i = begin + member; i < end; i += TEAM) { y[i] = x[i] * scale * w[i - begin]; }
}`,
  }),
);

/** With g = dy w and unit = x scale: dx = (g - unit mean(g unit)) scale. Leaves scales for the weight's gradient. */
const rmsNormGrad = memo((team: number) =>
  program({
    key: `rmsNormGrad ${team}`,
    reads: { x: "f32", w: "f32", dy: "f32" },
    writes: { dx: "f32", scales: "f32" },
    params: normParams,
    lanes: lanesOf(team),
    code: () => `
${teamCode(team)}
${laneSum("sums", "vec2f", "vec2f(x[i], dy[i] * w[i - begin]) * x[i]")}
fn main(group: u32, lane: u32) {
  ${thisRow}
  let own = sums(begin, end, member, 0.0);
  let scale = 1.0 / sqrt(total(lane, own.x) / f32(p.n) + p.eps);
  let along = total(lane, own.y) * scale / f32(p.n);
  if (row >= p.rows) { return; }
  if (member == 0u) { scales[row] = scale; }
  for (var i = begin + member; i < end; i += TEAM) {
    dx[i] = (dy[i] * w[i - begin] - x[i] * scale * along) * scale;
  }
}`,
  }),
);

/** The variance comes from centred values, in a second pass: no cancellation. */
const layerNorm = memo((team: number) =>
  program({
    key: `layerNorm ${team}`,
    reads: { x: "f32", w: "f32", b: "f32" },
    writes: { y: "f32" },
    params: normParams,
    lanes: lanesOf(team),
    code: () => `
${teamCode(team)}
${laneSum("values", "f32", "x[i]")}
${laneSum("squares", "f32", "(x[i] - centre) * (x[i] - centre)")}
fn main(group: u32, lane: u32) {
  ${thisRow}
  let mean = total(lane, values(begin, end, member, 0.0)) / f32(p.n);
  let scale = 1.0 / sqrt(total(lane, squares(begin, end, member, mean)) / f32(p.n) + p.eps);
  if (row >= p.rows) { return; }
  for (var i = begin + member; i < end; i += TEAM) {
    let c = i - begin;
    y[i] = (x[i] - mean) * scale * w[c] + b[c];
  }
}`,
  }),
);

/** With g = dy w, unit = (x - mean) scale: dx = (g - mean(g) - unit mean(g unit)) scale. Leaves each mean and scale. */
const layerNormGrad = memo((team: number) =>
  program({
    key: `layerNormGrad ${team}`,
    reads: { x: "f32", w: "f32", dy: "f32" },
    writes: { dx: "f32", stats: "vec2<f32>" },
    params: normParams,
    lanes: lanesOf(team),
    code: () => `
${teamCode(team)}
${laneSum("values", "f32", "x[i]")}
fn sums_of(off: f32, g: f32) -> vec3f { return vec3f(off * off, g, g * off); }
${laneSum("sums", "vec3f", "sums_of(x[i] - centre, dy[i] * w[i - begin])")}
fn main(group: u32, lane: u32) {
  ${thisRow}
  let n = f32(p.n);
  let mean = total(lane, values(begin, end, member, 0.0)) / n;
  let own = sums(begin, end, member, mean);
  let scale = 1.0 / sqrt(total(lane, own.x) / n + p.eps);
  let level = total(lane, own.y) / n;
  let along = total(lane, own.z) * scale / n;
  if (row >= p.rows) { return; }
  if (member == 0u) { stats[row] = vec2f(mean, scale); }
  for (var i = begin + member; i < end; i += TEAM) {
    dx[i] = (dy[i] * w[i - begin] - level - (x[i] - mean) * scale * along) * scale;
  }
}`,
  }),
);

// ---------------------------------------------------------------- softmax and top-k over experts
type Order = "softmax-topk-renormalise" | "softmax-topk" | "topk-softmax";
/** Ranks are found by comparing all experts of a row with each other, in workgroup memory. */
const MOST_EXPERTS = 1024;
const topkParams = { rows: "u32", n: "u32", k: "u32" } as const;
const topkWrites = { weights: "f32", ids: "i32", probabilities: "f32" } as const;

/** WGSL that both ways share; NaN comes last, ties keep the lower id first. */
const topkCode = (order: Order): string => `
fn key_of(x: f32) -> u32 { return select(order_of(x), 0u, is_nan(x)); }
// Exponential of a chosen logit, when the largest chosen one is \`head\`.
fn chosen_term(x: f32, head: f32) -> f32 { return select(exp_term(x - base_of(head)), not_a_number(), is_spoiled(x)); }
fn probability_of(x: f32, stats: vec2f) -> f32 {
  return select(exp_term(x - base_of(stats.x)) / max(stats.y, 1e-30), not_a_number(), is_spoiled(stats.x));
}
// The weight of a chosen expert, from the sum of the chosen ones' terms.
fn weight_of(x: f32, head: f32, sum: f32, stats: vec2f) -> f32 {
  ${
    {
      "softmax-topk": "return probability_of(x, stats);",
      // Chosen from a row of -inf only: their sum is 0.
      "softmax-topk-renormalise":
        "return select(chosen_term(x, head) / sum, not_a_number(), is_spoiled(stats.x) || sum == 0.0);",
      "topk-softmax": "return select(chosen_term(x, head) / max(sum, 1e-30), not_a_number(), is_nan(sum));",
    }[order]
  }
}`;

/** A team per row: the rank of each expert is the number of those before it. */
const softmaxTopk = memo((order: Order, team: number, most: number) =>
  program({
    key: `softmaxTopk ${order} ${team}`,
    reads: { x: "f32" },
    writes: topkWrites,
    params: topkParams,
    lanes: lanesOf(team),
    code: () => `
${teamCode(team)}
${softmaxCode()}
${topkCode(order)}
const MOST = ${most}u;
var<workgroup> keys: array<u32, ROWS * MOST>;
var<workgroup> ranks: array<u32, ROWS * MOST>;
var<workgroup> heads: array<f32, ROWS>;
fn main(group: u32, lane: u32) {
  ${thisRow}
  let stats = row_stats(lane, begin, end, member);
  let mine = lane / TEAM;
  let desk_of_row = mine * MOST;
  for (var e = member; e < p.n; e += TEAM) { keys[desk_of_row + e] = key_of(x[begin + e]); }
  workgroupBarrier();
  for (var e = member; e < p.n; e += TEAM) {
    let key = keys[desk_of_row + e];
    var rank = 0u;
    for (var other = 0u; other < p.n; other++) {
      let its = keys[desk_of_row + other];
      rank += select(0u, 1u, its > key || (its == key && other < e));
    }
    ranks[desk_of_row + e] = rank;
    if (rank == 0u) { heads[mine] = x[begin + e]; }
  }
  workgroupBarrier();
  let head = heads[mine];
  var own = 0.0;
  for (var e = member; e < p.n; e += TEAM) {
    if (ranks[desk_of_row + e] < p.k) { own += chosen_term(x[begin + e], head); }
  }
  let sum = total(lane, own);
  if (row >= p.rows) { return; }
  for (var e = member; e < p.n; e += TEAM) {
    let logit = x[begin + e];
    probabilities[begin + e] = probability_of(logit, stats);
    let rank = ranks[desk_of_row + e];
    if (rank < p.k) {
      ids[row * p.k + rank] = i32(e);
      weights[row * p.k + rank] = weight_of(logit, head, sum, stats);
    }
  }
}`,
  }),
);

/** An invocation per row, which looks k times for the best of those that come after the last one found. */
const softmaxTopkAlone = memo((order: Order) =>
  program({
    key: `softmaxTopk ${order} alone`,
    reads: { x: "f32" },
    writes: topkWrites,
    params: topkParams,
    lanes: lanesOf(1),
    code: () => `
${teamCode(1)}
${softmaxCode()}
${topkCode(order)}
fn main(group: u32, lane: u32) {
  ${thisRow}
  let stats = row_stats(lane, begin, end, member);
  if (row >= p.rows) { return; }
  for (var i = begin; i < end; i++) { probabilities[i] = probability_of(x[i], stats); }
  var head = 0.0;
  var sum = 0.0;
  var last_key = 0xffffffffu; // above every key
  var last_id = 0u;
  for (var j = 0u; j < p.k; j++) {
    var best_key = 0u;
    var best_id = p.n;
    for (var e = 0u; e < p.n; e++) {
      let key = key_of(x[begin + e]);
      let after = key < last_key || (key == last_key && e > last_id);
      if (after && (best_id == p.n || key > best_key)) {
        best_key = key;
        best_id = e;
      }
    }
    let logit = x[begin + best_id];
    if (j == 0u) { head = logit; }
    sum += chosen_term(logit, head);
    ids[row * p.k + j] = i32(best_id);
    last_key = best_key;
    last_id = best_id;
  }
  for (var j = 0u; j < p.k; j++) {
    weights[row * p.k + j] = weight_of(x[begin + u32(ids[row * p.k + j])], head, sum, stats);
  }
}`,
  }),
);

// ---------------------------------------------------------------- rotary positions
const ROPE_LANES = 64;
/** An invocation per pair that turns, and per element that does not. */
const rope = memo((interleaved: boolean) =>
  program({
    key: `rope${interleaved ? " interleaved" : ""}`,
    reads: { x: "f32", cosines: "f32", sines: "f32" },
    writes: { y: "f32" },
    params: { units: "u32", half: "u32", d: "u32", heads: "u32", positions: "u32", count: "u32", sign: "f32" },
    lanes: ROPE_LANES,
    code: () => `
fn main(group: u32, lane: u32) {
  let q = group * ${ROPE_LANES}u + lane;
  if (q >= p.count) { return; }
  let head = q / p.units; // of [batch, sequence, heads]
  let unit = q % p.units;
  let begin = head * p.d;
  if (unit >= p.half) {
    let at = begin + p.half + unit;
    y[at] = x[at];
    return;
  }
  let angle = (head / p.heads % p.positions) * p.half + unit;
  let first = begin + ${interleaved ? "2u * unit" : "unit"};
  let second = first + ${interleaved ? "1u" : "p.half"};
  let c = cosines[angle];
  let s = sines[angle] * p.sign;
  let a = x[first];
  let b = x[second];
  y[first] = a * c - b * s;
  y[second] = b * c + a * s;
}`,
  }),
);

// ---------------------------------------------------------------- kernels
type Family =
  | "softmax"
  | "softmaxGrad"
  | "logSoftmax"
  | "logSoftmaxGrad"
  | "logSumExp"
  | "crossEntropy"
  | "crossEntropyGrad"
  | "rmsNorm"
  | "rmsNormGrad"
  | "layerNorm"
  | "layerNormGrad"
  | "softmaxTopk"
  | "rope";

export function normaliseKernels(gpu: Gpu): { readonly [P in Family]: Kernel<WebgpuHandle> } {
  /** Runs a program of the softmax family over the rows of x; `split`: piece by piece where rows are few and wide. */
  function overRows(
    programOf: (team: number, wide: boolean) => Program,
    x: Input,
    reads: Readonly<Record<string, WebgpuHandle>>,
    writes: Readonly<Record<string, WebgpuHandle>>,
    split: boolean,
  ): void {
    const [rows, n] = [rowsOf(x), lastOf(x)];
    const pieces = piecesOf(gpu, rows, n);
    if (pieces === 1) {
      const team = teamFor(gpu, n);
      gpu.run(programOf(team, false), reads, writes, { rows, n, pieces }, groupsOf(team, rows));
      return;
    }
    const found = gpu.scratch(2 * rows * pieces);
    gpu.run(softmaxStats, { x: x.handle }, { pieces: found }, { n, pieces }, rows * pieces);
    const groups = split ? rows * pieces : rows;
    gpu.run(programOf(256, true), { ...reads, pieces: found }, writes, { rows, n, pieces }, groups);
    gpu.free(found);
  }
  const ofRows =
    (programOf: (team: number, wide: boolean) => Program, split: boolean): Kernel<WebgpuHandle> =>
    (inputs, results) => {
      const x = at(inputs, 0); // [..., n]
      const y = gpu.alloc(at(results, 0)); // [..., n] or [..., 1]
      if (x.handle.bytes > 0) overRows(programOf, x, { x: x.handle }, { y }, split);
      return [y];
    };
  const gradient =
    (programOf: (team: number) => ReturnType<typeof softmaxGrad>): Kernel<WebgpuHandle> =>
    (inputs, results) => {
      const [y, dy] = [at(inputs, 0), at(inputs, 1)]; // [..., n] both
      const dx = gpu.alloc(at(results, 0));
      if (dx.bytes === 0) return [dx];
      const [rows, n] = [rowsOf(y), lastOf(y)];
      const team = teamFor(gpu, n);
      gpu.run(programOf(team), { y: y.handle, dy: dy.handle }, { dx }, { rows, n }, groupsOf(team, rows));
      return [dx];
    };

  return {
    softmax: ofRows(softmax, true),
    logSoftmax: ofRows(logSoftmax, true),
    logSumExp: ofRows(logSumExp, false),
    softmaxGrad: gradient(softmaxGrad),
    logSoftmaxGrad: gradient(logSoftmaxGrad),

    crossEntropy(inputs, results) {
      const [x, labels] = [at(inputs, 0), at(inputs, 1)]; // [rows, n], [rows]
      const [losses, lse] = [gpu.alloc(at(results, 0)), gpu.alloc(at(results, 1))];
      overRows(crossEntropy, x, { x: x.handle, labels: labels.handle }, { losses, lse }, false);
      return [losses, lse];
    },
    crossEntropyGrad(inputs, results) {
      const [x, labels, lse, dlosses] = [at(inputs, 0), at(inputs, 1), at(inputs, 2), at(inputs, 3)];
      const dx = gpu.alloc(at(results, 0));
      const [rows, n] = [rowsOf(x), lastOf(x)];
      const quads = Math.ceil((rows * n) / 4);
      const reads = { x: x.handle, labels: labels.handle, lse: lse.handle, dlosses: dlosses.handle };
      gpu.run(crossEntropyGrad, reads, { dx }, { rows, n, quads }, Math.ceil(quads / QUAD_LANES));
      return [dx];
    },

    rmsNorm(inputs, results, { eps }: { eps: number }) {
      const [x, w] = [at(inputs, 0), at(inputs, 1)]; // [..., n], [n]
      const y = gpu.alloc(at(results, 0));
      if (y.bytes === 0) return [y];
      const [rows, n] = [rowsOf(x), lastOf(x)];
      const team = teamFor(gpu, n);
      gpu.run(rmsNorm(team), { x: x.handle, w: w.handle }, { y }, { rows, n, eps }, groupsOf(team, rows));
      return [y];
    },
    rmsNormGrad(inputs, results, { eps }: { eps: number }) {
      const [x, w, dy] = [at(inputs, 0), at(inputs, 1), at(inputs, 2)];
      const [dx, dw] = [gpu.alloc(at(results, 0)), gpu.alloc(at(results, 1))];
      if (x.handle.bytes === 0) {
        gpu.clear(dw);
        return [dx, dw];
      }
      const [rows, n] = [rowsOf(x), lastOf(x)];
      const team = teamFor(gpu, n);
      const scales = gpu.scratch(rows);
      const reads = { x: x.handle, w: w.handle, dy: dy.handle };
      gpu.run(rmsNormGrad(team), reads, { dx, scales }, { rows, n, eps }, groupsOf(team, rows));
      sumMiddle(gpu, "rms", { x: x.handle, dy: dy.handle, scales }, [dw], { outer: 1, n: rows, inner: n });
      gpu.free(scales);
      return [dx, dw];
    },
    layerNorm(inputs, results, { eps }: { eps: number }) {
      const [x, w, b] = [at(inputs, 0), at(inputs, 1), at(inputs, 2)]; // [..., n], [n], [n]
      const y = gpu.alloc(at(results, 0));
      if (y.bytes === 0) return [y];
      const [rows, n] = [rowsOf(x), lastOf(x)];
      const team = teamFor(gpu, n);
      const reads = { x: x.handle, w: w.handle, b: b.handle };
      gpu.run(layerNorm(team), reads, { y }, { rows, n, eps }, groupsOf(team, rows));
      return [y];
    },
    layerNormGrad(inputs, results, { eps }: { eps: number }) {
      const [x, w, dy] = [at(inputs, 0), at(inputs, 1), at(inputs, 2)];
      const [dx, dw, db] = [gpu.alloc(at(results, 0)), gpu.alloc(at(results, 1)), gpu.alloc(at(results, 2))];
      if (x.handle.bytes === 0) {
        gpu.clear(dw);
        gpu.clear(db);
        return [dx, dw, db];
      }
      const [rows, n] = [rowsOf(x), lastOf(x)];
      const team = teamFor(gpu, n);
      const stats = gpu.scratch(2 * rows);
      const reads = { x: x.handle, w: w.handle, dy: dy.handle };
      gpu.run(layerNormGrad(team), reads, { dx, stats }, { rows, n, eps }, groupsOf(team, rows));
      sumMiddle(gpu, "layer", { x: x.handle, dy: dy.handle, stats }, [dw, db], { outer: 1, n: rows, inner: n });
      gpu.free(stats);
      return [dx, dw, db];
    },

    softmaxTopk: Object.assign(
      ((inputs, results, { k, order }: { k: number; order: Order }) => {
        const x = at(inputs, 0); // [rows, n]
        const [weights, ids, probabilities] = [
          gpu.alloc(at(results, 0)),
          gpu.alloc(at(results, 1)),
          gpu.alloc(at(results, 2)),
        ];
        const [rows, n] = [rowsOf(x), lastOf(x)];
        const [team, most] = gpu.software ? [1, 0] : n <= 8 ? [8, 8] : n <= 128 ? [32, 128] : [128, MOST_EXPERTS];
        const one = team === 1 ? softmaxTopkAlone(order) : softmaxTopk(order, team, most);
        gpu.run(one, { x: x.handle }, { weights, ids, probabilities }, { rows, n, k }, groupsOf(team, rows));
        return [weights, ids, probabilities];
      }) satisfies Kernel<WebgpuHandle>,
      {
        unsupported: ([x]: readonly Spec[]) =>
          x && lastOf(x) > MOST_EXPERTS ? `${lastOf(x)} experts, more than ${MOST_EXPERTS}` : undefined,
      },
    ),

    rope(inputs, results, { interleaved = false, inverse = false }: { interleaved?: boolean; inverse?: boolean }) {
      const [x, cosines, sines] = [at(inputs, 0), at(inputs, 1), at(inputs, 2)];
      const y = gpu.alloc(at(results, 0)); // [batch, sequence, heads, d]
      const [heads, d] = [at(x.shape, 2), at(x.shape, 3)];
      const half = lastOf(cosines);
      const units = d - half; // pairs, and what is left of d
      const count = sizeOf(x.shape.slice(0, 3)) * units;
      const positions = rowsOf(cosines); // [(batch,) sequence]
      const params = { units, half, d, heads, positions, count, sign: inverse ? -1 : 1 };
      const reads = { x: x.handle, cosines: cosines.handle, sines: sines.handle };
      gpu.run(rope(interleaved), reads, { y }, params, Math.ceil(count / ROPE_LANES));
      return [y];
    },
  };
}
