// Attention and its gradient without a [sequence, total] intermediate (online softmax: 1805.02867, 2205.14135). Three forms: tiles of
// 32 queries by 32 keys in workgroup memory; for few queries of many keys a workgroup per stretch of keys and a second pass
// that joins them; and one invocation per row for drivers whose barriers are slow. Sums have a fixed order in each.
import type { Kernel, Spec } from "@switchyard/core";
import type { Bound, Gpu, WebgpuHandle } from "../device.ts";
import { type Program, program } from "../program.ts";
import { logText } from "./math.ts";
import { at, type Input, memo, only } from "./parts.ts";
import { groupsOf, lanesOf, teamCode, teamFor } from "./teams.ts";

interface Attrs {
  readonly causal: boolean;
  readonly scale: number;
  readonly window?: number;
  readonly probabilities?: boolean;
  readonly mask?: boolean;
}
type Sizes = Readonly<Record<"batch" | "sequence" | "heads" | "d" | "total" | "kvHeads" | "dv", number>>;
function sizesOf([q, k, v]: readonly Spec[]): Sizes {
  const [batch = 0, sequence = 0, heads = 0, d = 0] = q?.shape ?? [];
  const [, total = 0, kvHeads = 0] = k?.shape ?? [];
  return { batch, sequence, heads, d, total, kvHeads, dv: v?.shape[3] ?? 0 };
}

/** Rows that may be read four channels at a time. */
const readsFours = ({ d, dv }: Sizes): boolean => d % 4 === 0 && dv % 4 === 0 && d * dv > 0;

/** Wider heads would not fit the registers of a lane. */
const WIDEST = 256;

// ---------------------------------------------------------------- what all forms share
const params = {
  batches: "u32",
  s: "u32",
  t: "u32",
  heads: "u32",
  kv_heads: "u32",
  d: "u32",
  dv: "u32",
  scale: "f32",
  causal: "u32",
  /** At most t: a window that large hides nothing. */
  window: "i32",
  masked: "u32",
  /** Tiles of rows per key/value head. */
  tiles: "u32",
  /** Stretches of keys, and the first key that any query sees. */
  splits: "u32",
  first_key: "u32",
} as const;
type Numbers = Readonly<Record<keyof typeof params, number>>;

function numbersOf({ batch, sequence, heads, d, total, kvHeads, dv }: Sizes, attrs: Attrs, masked: boolean): Numbers {
  const window = Math.min(attrs.window ?? total, total);
  return {
    batches: batch,
    s: sequence,
    t: total,
    heads,
    kv_heads: kvHeads,
    d,
    dv,
    scale: attrs.scale,
    causal: attrs.causal ? 1 : 0,
    window,
    masked: masked ? 1 : 0,
    tiles: 0,
    splits: 1,
    first_key: Math.max(0, total - sequence + 1 - window),
  };
}

/** Four channels of a row of x from channel 4c on, zeros behind its end (`inside`: c never is); rows of whole vec4s are read as such. */
const loader = (x: string, width: "d" | "dv", wide: boolean, inside = false): string =>
  wide
    ? `
fn ${x}_at(row: u32, c: u32) -> vec4f {
  ${inside ? "" : `if (4u * c >= p.${width}) { return vec4f(); }`}
  return ${x}[row * (p.${width} / 4u) + c];
}`
    : `
fn ${x}_at(row: u32, c: u32) -> vec4f {
  var four = vec4f();
  for (var j = 0u; j < 4u; j++) { if (4u * c + j < p.${width}) { four[j] = ${x}[row * p.${width} + 4u * c + j]; } }
  return four;
}`;
const storer = (x: string, width: "d" | "dv", wide: boolean): string =>
  wide
    ? `
fn put_${x}(row: u32, c: u32, four: vec4f) {
  if (4u * c < p.${width}) { ${x}[row * (p.${width} / 4u) + c] = four; }
}`
    : `
fn put_${x}(row: u32, c: u32, four: vec4f) {
  for (var j = 0u; j < 4u; j++) { if (4u * c + j < p.${width}) { ${x}[row * p.${width} + 4u * c + j] = four[j]; } }
}`;

/**
 * Rows: those of q lie as [batch, sequence, heads], those of k and v as [batch, total, kvHeads]. Of one key/value head, query rows are
 * counted r = i * group + g, so that neighbours share their keys. A score that is hidden is HIDDEN; below LIMIT it counts as such.
 */
const limits = `
const HIDDEN = -3.4e38;
const LIMIT = -3.3e38;
`;
const common = `${limits}
var<private> batch: u32;
var<private> kv: u32;
fn query_row(r: u32) -> u32 {
  let g = p.heads / p.kv_heads;
  return (batch * p.s + r / g) * p.heads + kv * g + r % g;
}
fn key_row(j: u32) -> u32 { return (batch * p.t + j) * p.kv_heads + kv; }
// Index of query row r in lse [batch, heads, sequence].
fn lse_index(r: u32) -> u32 {
  let g = p.heads / p.kv_heads;
  return (batch * p.heads + kv * g + r % g) * p.s + r / g;
}
// e^(score - top), 0 for a hidden score. NaN goes through by itself: exp, comparisons and maxima may lose it.
fn chance_of(score: f32, top: f32) -> f32 {
  return select(select(exp(score - top), 0.0, score < LIMIT), score, is_nan(score));
}
fn chances_of(score: vec4f, top: vec4f) -> vec4f {
  let spoiled = (bitcast<vec4u>(score) & vec4u(0x7fffffffu)) > vec4u(0x7f800000u);
  return select(select(exp(score - top), vec4f(), score < vec4f(LIMIT)), score, spoiled);
}
fn kept(j: u32) -> bool {
  if (p.masked == 0u) { return true; }
  return mask[batch * p.t + j] != 0.0;
}
fn sees(position: u32, j: u32) -> bool {
  return (p.causal == 0u || j <= position) && i32(position) - i32(j) < p.window && kept(j);
}
// Keys that a query at \`position\` may see: from x, before y.
fn key_range(first: u32, last: u32) -> vec2u {
  return vec2u(u32(max(0, i32(first) - p.window + 1)), select(p.t, last + 1u, p.causal != 0u));
}
// Positions in the sequence that may see one of the keys first ... last: from x, before y.
fn query_range(first: u32, last: u32) -> vec2u {
  let past = i32(p.t - p.s);
  let begin = select(0, max(0, i32(first) - past), p.causal != 0u);
  let end = clamp(i32(last) + p.window - past, 0, i32(p.s));
  return vec2u(u32(begin), u32(end));
}
`;
/** The element types of the buffers with rows of d or dv channels. */
const rowElement = (wide: boolean): string => (wide ? "vec4<f32>" : "f32");

// ---------------------------------------------------------------- tiles
const TILE = 32;
const LANES = 128;
/** vec4s per row of a tile in workgroup memory: one more than it holds, against bank conflicts. */
const PITCH = 9;
/** Columns of a sum that one round adds to: 16 lanes times a vec4. */
const COLUMNS = 64;
const columnRounds = (width: number): number => Math.max(1, Math.ceil(width / COLUMNS));

/**
 * Lane (rg, kg) of 8 x 16 owns rows 4 rg ... 4 rg + 3 of the tile's own side and rows kg, kg + 16 of the other side; of sums, the own
 * rows and columns 4 kg ... of each round.
 */
const tileMemory = `
var<workgroup> stage: array<vec4f, ${2 * TILE * PITCH}>;
var<workgroup> weights: array<vec4f, ${TILE * PITCH}>;
`;
/** fn name: a row of the own side times one of the other, for the lane's four by two. */
const product = (name: string, own: string, other: string, width: "d" | "dv"): string => `
fn ${name}(lane: u32, own0: u32, own_end: u32, other0: u32, other_end: u32) -> mat2x4f {
  let rg = lane / 16u;
  let kg = lane % 16u;
  var s = mat2x4f();
  for (var chunk = 0u; chunk * 32u < p.${width}; chunk++) {
    for (var e = lane; e < ${TILE * 8}u; e += ${LANES}u) {
      let row = e / 8u;
      let c = chunk * 8u + e % 8u;
      var a = vec4f();
      var b = vec4f();
      if (own0 + row < own_end) { a = ${own}(own0 + row), c); }
      if (other0 + row < other_end) { b = ${other}(other0 + row), c); }
      stage[row * ${PITCH}u + e % 8u] = a;
      stage[${TILE * PITCH}u + row * ${PITCH}u + e % 8u] = b;
    }
    workgroupBarrier();
    for (var c = 0u; c < 8u; c++) {
      let a0 = stage[(4u * rg) * ${PITCH}u + c];
      let a1 = stage[(4u * rg + 1u) * ${PITCH}u + c];
      let a2 = stage[(4u * rg + 2u) * ${PITCH}u + c];
      let a3 = stage[(4u * rg + 3u) * ${PITCH}u + c];
      let b0 = stage[${TILE * PITCH}u + kg * ${PITCH}u + c];
      let b1 = stage[${TILE * PITCH}u + (kg + 16u) * ${PITCH}u + c];
      s[0] += vec4f(dot(a0, b0), dot(a1, b0), dot(a2, b0), dot(a3, b0));
      s[1] += vec4f(dot(a0, b1), dot(a1, b1), dot(a2, b1), dot(a3, b1));
    }
    workgroupBarrier();
  }
  return s;
}`;
const each = (n: number, text: (i: number) => string): string =>
  Array.from({ length: n }, (_, i) => text(i)).join("\n");
/** Rows of the other side, weighted, into the sums: in rounds of 64 columns. */
const accumulate = (sum: string, rounds: number, other: string): string =>
  each(
    rounds,
    (n) => `
    for (var e = lane; e < ${TILE * 16}u; e += ${LANES}u) {
      var b = vec4f();
      if (other0 + e / 16u < other_end) { b = ${other}(other0 + e / 16u), ${16 * n}u + e % 16u); }
      stage[e] = b;
    }
    workgroupBarrier();
    for (var j = 0u; j < ${TILE}u; j++) {
      let w = weights[j * ${PITCH}u + rg];
      let b = stage[j * 16u + kg];
      ${sum}${n}[0] += w.x * b;
      ${sum}${n}[1] += w.y * b;
      ${sum}${n}[2] += w.z * b;
      ${sum}${n}[3] += w.w * b;
    }
    workgroupBarrier();`,
  );
const declare = (sum: string, rounds: number): string => each(rounds, (n) => `  var ${sum}${n} = mat4x4f();`);
const store = (x: string, sum: string, rounds: number, row: string): string => `
  for (var r = 0u; r < 4u; r++) {
    let own = own0 + 4u * rg + r;
    if (own < own_end) {
${each(rounds, (n) => `      put_${x}(${row}(own), ${16 * n}u + kg, ${sum}${n}[r]);`)}
    }
  }`;
/** Where a workgroup stands; heavy tiles (those that see most under causality) begin first. */
const place = (heavy: "last" | "first"): string => `
  let tile = ${heavy === "last" ? "p.tiles - 1u - " : ""}group % p.tiles;
  batch = group / p.tiles / p.kv_heads;
  kv = group / p.tiles % p.kv_heads;
  let g = p.heads / p.kv_heads;
  let past = p.t - p.s;
  let rg = lane / 16u;
  let kg = lane % 16u;
  let own0 = tile * ${TILE}u;`;
const ownPositions = `
  let own_end = p.s * g;
  let mine = vec4u(own0 + 4u * rg) + vec4u(0u, 1u, 2u, 3u);
  let positions = vec4u(past) + mine / vec4u(g);
  let keys = key_range(past + own0 / g, past + min(own0 + ${TILE - 1}u, own_end - 1u) / g);
  let other_end = min(keys.y, p.t);`;
const seen = `
// Of four queries, which see key j.
fn seen(positions: vec4u, j: u32) -> vec4<bool> {
  if (j >= p.t || !kept(j)) { return vec4<bool>(); }
  let causal = vec4<bool>(p.causal == 0u) | (vec4u(j) <= positions);
  return causal & (vec4i(positions) - vec4i(i32(j)) < vec4i(p.window));
}`;

const forwardTiles = memo((wide: boolean, rounds: number): Program => {
  const row = rowElement(wide);
  return program({
    key: `attention ${row} ${rounds}`,
    reads: { q: row, k: row, v: row, mask: "f32" },
    writes: { out: row, lse: "f32" },
    params,
    lanes: LANES,
    code: () => `${common}${logText}${seen}
${loader("q", "d", wide)}${loader("k", "d", wide)}${loader("v", "dv", wide)}${storer("out", "dv", wide)}
${tileMemory}
var<workgroup> board: array<vec4f, ${LANES}>;
${product("scores", "q_at(query_row", "k_at(key_row", "d")}
fn main(group: u32, lane: u32) {
${place("last")}
${ownPositions}
  var top = vec4f(HIDDEN);
  var sum = vec4f();
${declare("out", rounds)}
  for (var other0 = keys.x; other0 < other_end; other0 += ${TILE}u) {
    let raw = scores(lane, own0, own_end, other0, other_end);
    let s0 = select(vec4f(HIDDEN), raw[0] * p.scale, seen(positions, other0 + kg));
    let s1 = select(vec4f(HIDDEN), raw[1] * p.scale, seen(positions, other0 + kg + 16u));
    board[lane] = max(s0, s1);
    workgroupBarrier();
    var now = top;
    for (var x = 0u; x < 16u; x++) { now = max(now, board[rg * 16u + x]); }
    let shrink = chances_of(top, now);
    let p0 = chances_of(s0, now);
    let p1 = chances_of(s1, now);
    // Each lane sums its own keys; the lanes of a row meet at the end.
    sum = sum * shrink + p0 + p1;
    top = now;
    weights[kg * ${PITCH}u + rg] = p0;
    weights[(kg + 16u) * ${PITCH}u + rg] = p1;
${each(rounds, (n) => `    out${n} = mat4x4f(shrink.x * out${n}[0], shrink.y * out${n}[1], shrink.z * out${n}[2], shrink.w * out${n}[3]);`)}
${accumulate("out", rounds, "v_at(key_row")}
  }
  workgroupBarrier();
  board[lane] = sum;
  workgroupBarrier();
  var all = vec4f();
  for (var x = 0u; x < 16u; x++) { all += board[rg * 16u + x]; }
  let nothing = all == vec4f();
  let scaled = select(1.0 / all, vec4f(), nothing);
${each(rounds, (n) => `  out${n} = mat4x4f(scaled.x * out${n}[0], scaled.y * out${n}[1], scaled.z * out${n}[2], scaled.w * out${n}[3]);`)}
${store("out", "out", rounds, "query_row")}
  if (kg == 0u) {
    for (var r = 0u; r < 4u; r++) {
      if (mine[r] < own_end) { lse[lse_index(mine[r])] = select(top[r] + log_of(all[r]), -infinity(), nothing[r]); }
    }
  }
}`,
  });
});

/** Probability and slope of the scaled score for one stats pair. lse = -inf: a query that sees nothing. */
const slopes = `
fn probability(score: f32, lse: f32, visible: bool) -> f32 {
  if (!visible || lse < LIMIT) { return 0.0; }
  let power = score - lse;
  return select(exp(power), power, is_nan(power));
}
fn slope(probability: f32, dp: f32, delta: f32) -> f32 {
  return select(probability * (dp - delta) * p.scale, 0.0, probability == 0.0);
}`;

const probabilityTiles = memo((wide: boolean): Program => {
  const row = rowElement(wide);
  return program({
    key: `attention probabilities ${row}`,
    reads: { q: row, k: row, mask: "f32", lse: "f32" },
    writes: { y: "f32" },
    params,
    lanes: LANES,
    code: () => `${common}${slopes}${seen}
${loader("q", "d", wide)}${loader("k", "d", wide)}
${tileMemory}
${product("scores", "q_at(query_row", "k_at(key_row", "d")}
fn main(group_and_split: u32, lane: u32) {
  let group = group_and_split / p.splits;
  let other0 = group_and_split % p.splits * ${TILE}u;
${place("first")}
  let own_end = p.s * g;
  let mine = vec4u(own0 + 4u * rg) + vec4u(0u, 1u, 2u, 3u);
  let positions = vec4u(past) + mine / vec4u(g);
  let raw = scores(lane, own0, own_end, other0, p.t);
  for (var x = 0u; x < 2u; x++) {
    let j = other0 + kg + 16u * x;
    let visible = seen(positions, j);
    for (var r = 0u; r < 4u; r++) {
      if (mine[r] >= own_end || j >= p.t) { continue; }
      let index = lse_index(mine[r]);
      y[index * p.t + j] = probability(raw[x][r] * p.scale, lse[index], visible[r]);
    }
  }
}`,
  });
});

/** stats[row] = (lse, sum of dout * out) of each query row. */
const rowStats = memo((wide: boolean, team: number): Program => {
  const row = rowElement(wide);
  return program({
    key: `attention stats ${row} ${team}`,
    reads: { out: row, dout: row, lse: "f32" },
    writes: { stats: "vec2<f32>" },
    params: { rows: "u32", width: "u32", s: "u32", heads: "u32" },
    lanes: lanesOf(team),
    code: () => `${teamCode(team)}
fn main(group: u32, lane: u32) {
  let row = group * ROWS + lane / TEAM;
  var sum = 0.0;
  if (row < p.rows) {
    for (var c = lane % TEAM; c < p.width; c += TEAM) {
      sum += ${wide ? "dot(out[row * p.width + c], dout[row * p.width + c])" : "out[row * p.width + c] * dout[row * p.width + c]"};
    }
  }
  let all = total(lane, sum);
  if (row < p.rows && lane % TEAM == 0u) {
    let query = row / p.heads;
    stats[row] = vec2f(lse[(query / p.s * p.heads + row % p.heads) * p.s + query % p.s], all);
  }
}`,
  });
});

const queryGradTiles = memo((wide: boolean, rounds: number): Program => {
  const row = rowElement(wide);
  return program({
    key: `attention dq ${row} ${rounds}`,
    reads: { q: row, k: row, v: row, mask: "f32", stats: "vec2<f32>", dout: row },
    writes: { dq: row },
    params,
    lanes: LANES,
    code: () => `${common}${slopes}${seen}
${loader("q", "d", wide)}${loader("k", "d", wide)}${loader("v", "dv", wide)}${loader("dout", "dv", wide)}${storer("dq", "d", wide)}
${tileMemory}
${product("scores", "q_at(query_row", "k_at(key_row", "d")}
${product("shares", "dout_at(query_row", "v_at(key_row", "dv")}
fn main(group: u32, lane: u32) {
${place("last")}
${ownPositions}
  var own_stats = array<vec2f, 4>();
  for (var r = 0u; r < 4u; r++) { if (mine[r] < own_end) { own_stats[r] = stats[query_row(mine[r])]; } }
${declare("sum", rounds)}
  for (var other0 = keys.x; other0 < other_end; other0 += ${TILE}u) {
    let s = scores(lane, own0, own_end, other0, other_end);
    let dp = shares(lane, own0, own_end, other0, other_end);
    for (var x = 0u; x < 2u; x++) {
      let visible = seen(positions, other0 + kg + 16u * x);
      var ds = vec4f();
      for (var r = 0u; r < 4u; r++) {
        let chance = probability(s[x][r] * p.scale, own_stats[r].x, visible[r]);
        ds[r] = slope(chance, dp[x][r], own_stats[r].y);
      }
      weights[(kg + 16u * x) * ${PITCH}u + rg] = ds;
    }
${accumulate("sum", rounds, "k_at(key_row")}
  }
${store("dq", "sum", rounds, "query_row")}
}`,
  });
});

/** dk, dv or both: wide heads take two passes, to have room for their sums. */
const keyGradTiles = memo((wide: boolean, keyRounds: number, valueRounds: number): Program => {
  const row = rowElement(wide);
  const [dk, dv] = [keyRounds > 0, valueRounds > 0];
  const reads: Record<string, string> = {
    q: row,
    k: row,
    ...(dk ? { v: row } : {}),
    mask: "f32",
    stats: "vec2<f32>",
    dout: row,
  };
  const writes: Record<string, string> = { ...(dk ? { dk: row } : {}), ...(dv ? { dv: row } : {}) };
  return program({
    key: `attention dk dv ${row} ${keyRounds} ${valueRounds}`,
    reads,
    writes,
    params,
    lanes: LANES,
    code: () => `${common}${slopes}
${loader("q", "d", wide)}${loader("k", "d", wide)}${loader("dout", "dv", wide)}
${dk ? loader("v", "dv", wide) + storer("dk", "d", wide) : ""}${dv ? storer("dv", "dv", wide) : ""}
${tileMemory}
${product("scores", "k_at(key_row", "q_at(query_row", "d")}
${dk ? product("shares", "v_at(key_row", "dout_at(query_row", "dv") : ""}
fn main(group: u32, lane: u32) {
${place("first")}
  let own_end = p.t;
  let range = query_range(own0, min(own0 + ${TILE - 1}u, p.t - 1u));
  let other_end = range.y * g;
${declare("dk", keyRounds)}
${declare("dv", valueRounds)}
  for (var other0 = range.x * g; other0 < other_end; other0 += ${TILE}u) {
    let s = scores(lane, own0, own_end, other0, other_end);
    ${dk ? "let dp = shares(lane, own0, own_end, other0, other_end);" : ""}
    var chances = mat2x4f();
    var ds = mat2x4f();
    for (var x = 0u; x < 2u; x++) {
      let r = other0 + kg + 16u * x;
      if (r >= other_end) { continue; }
      let query = stats[query_row(r)];
      for (var y = 0u; y < 4u; y++) {
        let j = own0 + 4u * rg + y;
        let visible = j < p.t && sees(past + r / g, j);
        chances[x][y] = probability(s[x][y] * p.scale, query.x, visible);
        ${dk ? "ds[x][y] = slope(chances[x][y], dp[x][y], query.y);" : ""}
      }
    }
    ${
      dk
        ? `weights[kg * ${PITCH}u + rg] = ds[0];
    weights[(kg + 16u) * ${PITCH}u + rg] = ds[1];
${accumulate("dk", keyRounds, "q_at(query_row")}`
        : ""
    }
    ${
      dv
        ? `weights[kg * ${PITCH}u + rg] = chances[0];
    weights[(kg + 16u) * ${PITCH}u + rg] = chances[1];
${accumulate("dv", valueRounds, "dout_at(query_row")}`
        : ""
    }
  }
${dk ? store("dk", "dk", keyRounds, "key_row") : ""}
${dv ? store("dv", "dv", valueRounds, "key_row") : ""}
}`,
  });
});

// ---------------------------------------------------------------- few queries, many keys
/** Keys of a stretch: one per lane. */
const STRETCH = LANES;
const MOST_ROWS = 8;

/**
 * A workgroup takes `rows` query rows of one key/value head and a stretch of keys: scores with a key per lane, then sums with a column
 * per lane. One stretch: the result; several: sums relative to the stretch's own maximum, for `joinStretches`.
 */
const stretches = memo((wide: boolean, rows: number, d: number, dv: number, several: boolean): Program => {
  const row = rowElement(wide);
  const [channels, columns] = [Math.max(1, Math.ceil(d / 4)), Math.max(1, Math.ceil(dv / 4))];
  const across = 2 ** Math.ceil(Math.log2(columns));
  const team = LANES / rows;
  const writes: Record<string, string> = several ? { sums: "vec4<f32>", tops: "vec2<f32>" } : { out: row, lse: "f32" };
  return program({
    key: `attention stretch ${row} ${rows} ${d} ${dv}${several ? " several" : ""}`,
    reads: { q: row, k: row, v: row, mask: "f32" },
    writes,
    params,
    lanes: LANES,
    code: () => `${common}${logText}
${loader("q", "d", wide, true)}${loader("k", "d", wide, true)}${loader("v", "dv", wide, true)}${several ? "" : storer("out", "dv", wide)}
var<workgroup> queries: array<vec4f, ${rows * channels}>;
var<workgroup> chances: array<f32, ${rows * STRETCH}>;
var<workgroup> desk: array<f32, ${LANES}>;
var<workgroup> board: array<vec4f, ${LANES}>;
fn row_top(lane: u32, x: f32) -> f32 {
  desk[lane] = x;
  for (var step = ${team / 2}u; step > 0u; step /= 2u) {
    workgroupBarrier();
    if (lane % ${team}u < step) { desk[lane] = max(desk[lane], desk[lane + step]); }
  }
  workgroupBarrier();
  let top = desk[lane / ${team}u * ${team}u];
  workgroupBarrier();
  return top;
}
fn row_sum(lane: u32, x: f32) -> f32 {
  desk[lane] = x;
  for (var step = ${team / 2}u; step > 0u; step /= 2u) {
    workgroupBarrier();
    if (lane % ${team}u < step) { desk[lane] += desk[lane + step]; }
  }
  workgroupBarrier();
  let sum = desk[lane / ${team}u * ${team}u];
  workgroupBarrier();
  return sum;
}
fn main(group: u32, lane: u32) {
  let split = group % p.splits;
  let tile = group / p.splits % p.tiles;
  batch = group / p.splits / p.tiles / p.kv_heads;
  kv = group / p.splits / p.tiles % p.kv_heads;
  let g = p.heads / p.kv_heads;
  let own0 = tile * ${rows}u;
  let own_end = p.s * g;
  let first = p.first_key + split * ${STRETCH}u;
  let count = min(${STRETCH}u, p.t - first);
  for (var e = lane; e < ${rows * channels}u; e += ${LANES}u) {
    if (own0 + e / ${channels}u < own_end) { queries[e] = q_at(query_row(own0 + e / ${channels}u), e % ${channels}u); }
  }
  workgroupBarrier();
${each(rows, (r) => `  var s${r} = vec4f();`)}
  let j = first + lane;
  if (lane < count) {
    let row = key_row(j);
    for (var c = 0u; c < ${channels}u; c++) {
      let key = k_at(row, c);
${each(rows, (r) => `      s${r} += queries[${r * channels}u + c] * key;`)}
    }
  }
${each(
  rows,
  (r) => `  chances[${r * STRETCH}u + lane] =
    select(HIDDEN, dot(s${r}, vec4f(1.0)) * p.scale, lane < count && sees(p.t - p.s + (own0 + ${r}u) / g, j));`,
)}
  workgroupBarrier();
  // From here to the sums a team of lanes has a row.
  let mine = lane / ${team}u * ${STRETCH}u + lane % ${team}u;
  var highest = HIDDEN;
  for (var x = 0u; x < ${STRETCH}u; x += ${team}u) { highest = max(highest, chances[mine + x]); }
  let top = row_top(lane, highest);
  var part = 0.0;
  for (var x = 0u; x < ${STRETCH}u; x += ${team}u) {
    let score = chances[mine + x];
    let chance = chance_of(score, top);
    chances[mine + x] = chance;
    part += chance;
  }
  let all = row_sum(lane, part);
  let own = own0 + lane / ${team}u;
  if (lane % ${team}u == 0u && own < own_end) {
    ${
      several
        ? "tops[query_row(own) * p.splits + split] = vec2f(top, all);"
        : "lse[lse_index(own)] = select(top + log_of(all), -infinity(), all == 0.0);"
    }
  }
  desk[lane] = all;
  workgroupBarrier();
  // Lanes side by side take columns; those of the same columns share the keys.
  let column = lane % ${across}u;
${each(rows, (r) => `  var y${r} = vec4f();`)}
  if (column < ${columns}u) {
    for (var x = lane / ${across}u; x < count; x += ${LANES / across}u) {
      let value = v_at(key_row(first + x), column);
${each(rows, (r) => `      y${r} += chances[${r * STRETCH}u + x] * value;`)}
    }
  }
${each(
  rows,
  (r) => `  board[lane] = y${r};
  workgroupBarrier();
  if (lane < ${columns}u && own0 + ${r}u < own_end) {
    var sum = board[lane];
    for (var x = lane + ${across}u; x < ${LANES}u; x += ${across}u) { sum += board[x]; }
    let row = query_row(own0 + ${r}u);
    ${
      several
        ? `sums[(row * p.splits + split) * ${columns}u + lane] = sum;`
        : `let whole = desk[${r * team}u];
    put_out(row, lane, select(sum / whole, vec4f(), whole == 0.0));`
    }
  }
  workgroupBarrier();`,
)}
}`,
  });
});

/** The stretches of each query row into one: an invocation per four columns. */
const joinStretches = memo((wide: boolean): Program => {
  const row = rowElement(wide);
  return program({
    key: `attention join ${row}`,
    reads: { sums: "vec4<f32>", tops: "vec2<f32>" },
    writes: { out: row, lse: "f32" },
    params,
    lanes: 64,
    code: () => `${limits}${logText}${storer("out", "dv", wide)}
fn main(group: u32, lane: u32) {
  let columns = max(1u, (p.dv + 3u) / 4u);
  let i = group * 64u + lane;
  let row = i / columns;
  let column = i % columns;
  if (row >= p.batches * p.s * p.heads) { return; }
  var top = HIDDEN;
  for (var x = 0u; x < p.splits; x++) { top = max(top, tops[row * p.splits + x].x); }
  var whole = 0.0;
  var sum = vec4f();
  for (var x = 0u; x < p.splits; x++) {
    let one = tops[row * p.splits + x];
    let weight = select(exp(one.x - top), 0.0, one.x < LIMIT);
    whole += weight * one.y;
    sum += weight * sums[(row * p.splits + x) * columns + column];
  }
  put_out(row, column, select(sum / whole, vec4f(), whole == 0.0));
  if (column == 0u) {
    let query = row / p.heads;
    let index = (query / p.s * p.heads + row % p.heads) * p.s + query % p.s;
    lse[index] = select(top + log_of(whole), -infinity(), whole == 0.0);
  }
}`,
  });
});

// ---------------------------------------------------------------- a row per invocation
const SERIAL_LANES = 16;
/** main finds its query row: batch, kv, i. */
const serialQuery = `
  let row = group * ${SERIAL_LANES}u + lane;
  if (row >= p.batches * p.s * p.heads) { return; }
  let i = row / p.heads % p.s;
  let g = p.heads / p.kv_heads;
  batch = row / p.heads / p.s;
  kv = row % p.heads / g;
  let position = p.t - p.s + i;`;
/** Programs know their numbers of vec4s per row, d and dv: not the widths, so that there are few. */
const fours = (width: number): number => Math.max(1, Math.ceil(width / 4));
/** For each vec4 of a row: written out where they are few. In a loop their arrays lie in memory; many take long to compile. */
const channels = (n: number, text: (c: string) => string): string =>
  n <= 8 ? each(n, (c) => text(`${c}u`)) : `for (var c = 0u; c < ${n}u; c++) { ${text("c")} }`;

const forwardSerial = memo((wide: boolean, d: number, dv: number): Program => {
  const row = rowElement(wide);
  return program({
    key: `attention serial ${row} ${d} ${dv}`,
    reads: { q: row, k: row, v: row, mask: "f32" },
    writes: { out: row, lse: "f32" },
    params,
    lanes: SERIAL_LANES,
    code: () => `${common}${logText}
${loader("q", "d", wide, true)}${loader("k", "d", wide, true)}${loader("v", "dv", wide, true)}${storer("out", "dv", wide)}
fn main(group: u32, lane: u32) {
${serialQuery}
  var query = array<vec4f, ${d}>();
  ${channels(d, (c) => `query[${c}] = q_at(row, ${c});`)}
  var sum = array<vec4f, ${dv}>();
  var top = HIDDEN;
  var whole = 0.0;
  let keys = key_range(position, position);
  for (var j = keys.x; j < keys.y; j++) {
    if (!sees(position, j)) { continue; }
    let key = key_row(j);
    var products = vec4f();
    ${channels(d, (c) => `products += query[${c}] * k_at(key, ${c});`)}
    let score = dot(products, vec4f(1.0)) * p.scale;
    if (score > top) {
      let shrink = chance_of(top, score);
      whole *= shrink;
      ${channels(dv, (c) => `sum[${c}] *= shrink;`)}
      top = score;
    }
    let chance = chance_of(score, top);
    whole += chance;
    ${channels(dv, (c) => `sum[${c}] += chance * v_at(key, ${c});`)}
  }
  ${channels(dv, (c) => `put_out(row, ${c}, select(sum[${c}] / whole, vec4f(), whole == 0.0));`)}
  lse[(batch * p.heads + row % p.heads) * p.s + i] = select(top + log_of(whole), -infinity(), whole == 0.0);
}`,
  });
});

const probabilitiesSerial = memo((wide: boolean): Program => {
  const row = rowElement(wide);
  return program({
    key: `attention probabilities serial ${row}`,
    reads: { q: row, k: row, mask: "f32", lse: "f32" },
    writes: { y: "f32" },
    params,
    lanes: SERIAL_LANES,
    code: () => `${common}${slopes}
${loader("q", "d", wide, true)}${loader("k", "d", wide, true)}
fn main(group: u32, lane: u32) {
  let e = group * ${SERIAL_LANES}u + lane;
  if (e >= p.batches * p.heads * p.s * p.t) { return; }
  let index = e / p.t;
  let j = e % p.t;
  let i = index % p.s;
  let head = index / p.s % p.heads;
  batch = index / p.s / p.heads;
  kv = head / (p.heads / p.kv_heads);
  var chance = 0.0;
  if (sees(p.t - p.s + i, j)) {
    let query = (batch * p.s + i) * p.heads + head;
    var products = vec4f();
    for (var c = 0u; 4u * c < p.d; c++) { products += q_at(query, c) * k_at(key_row(j), c); }
    chance = probability(dot(products, vec4f(1.0)) * p.scale, lse[index], true);
  }
  y[e] = chance;
}`,
  });
});

const queryGradSerial = memo((wide: boolean, d: number, dv: number): Program => {
  const row = rowElement(wide);
  return program({
    key: `attention dq serial ${row} ${d} ${dv}`,
    reads: { q: row, k: row, v: row, mask: "f32", stats: "vec2<f32>", dout: row },
    writes: { dq: row },
    params,
    lanes: SERIAL_LANES,
    code: () => `${common}${slopes}
${loader("q", "d", wide, true)}${loader("k", "d", wide, true)}${loader("v", "dv", wide, true)}${loader("dout", "dv", wide, true)}${storer("dq", "d", wide)}
fn main(group: u32, lane: u32) {
${serialQuery}
  var query = array<vec4f, ${d}>();
  ${channels(d, (c) => `query[${c}] = q_at(row, ${c});`)}
  var slopes = array<vec4f, ${dv}>();
  ${channels(dv, (c) => `slopes[${c}] = dout_at(row, ${c});`)}
  var sum = array<vec4f, ${d}>();
  let own = stats[row];
  let keys = key_range(position, position);
  for (var j = keys.x; j < keys.y; j++) {
    if (!sees(position, j)) { continue; }
    let key = key_row(j);
    var products = vec4f();
    ${channels(d, (c) => `products += query[${c}] * k_at(key, ${c});`)}
    var shares = vec4f();
    ${channels(dv, (c) => `shares += slopes[${c}] * v_at(key, ${c});`)}
    let chance = probability(dot(products, vec4f(1.0)) * p.scale, own.x, true);
    let ds = slope(chance, dot(shares, vec4f(1.0)), own.y);
    ${channels(d, (c) => `sum[${c}] += ds * k_at(key, ${c});`)}
  }
  ${channels(d, (c) => `put_dq(row, ${c}, sum[${c}]);`)}
}`,
  });
});

const keyGradSerial = memo((wide: boolean, d: number, dv: number): Program => {
  const row = rowElement(wide);
  return program({
    key: `attention dk dv serial ${row} ${d} ${dv}`,
    reads: { q: row, k: row, v: row, mask: "f32", stats: "vec2<f32>", dout: row },
    writes: { dk: row, dv: row },
    params,
    lanes: SERIAL_LANES,
    code: () => `${common}${slopes}
${loader("q", "d", wide, true)}${loader("k", "d", wide, true)}${loader("v", "dv", wide, true)}${loader("dout", "dv", wide, true)}
${storer("dk", "d", wide)}${storer("dv", "dv", wide)}
fn main(group: u32, lane: u32) {
  let row = group * ${SERIAL_LANES}u + lane;
  if (row >= p.batches * p.t * p.kv_heads) { return; }
  let j = row / p.kv_heads % p.t;
  let g = p.heads / p.kv_heads;
  batch = row / p.kv_heads / p.t;
  kv = row % p.kv_heads;
  var key = array<vec4f, ${d}>();
  ${channels(d, (c) => `key[${c}] = k_at(row, ${c});`)}
  var value = array<vec4f, ${dv}>();
  ${channels(dv, (c) => `value[${c}] = v_at(row, ${c});`)}
  var key_sum = array<vec4f, ${d}>();
  var value_sum = array<vec4f, ${dv}>();
  let range = query_range(j, j);
  for (var r = range.x * g; r < range.y * g; r++) {
    if (!sees(p.t - p.s + r / g, j)) { continue; }
    let query = query_row(r);
    var products = vec4f();
    ${channels(d, (c) => `products += key[${c}] * q_at(query, ${c});`)}
    var shares = vec4f();
    ${channels(dv, (c) => `shares += value[${c}] * dout_at(query, ${c});`)}
    let own = stats[query];
    let chance = probability(dot(products, vec4f(1.0)) * p.scale, own.x, true);
    let ds = slope(chance, dot(shares, vec4f(1.0)), own.y);
    ${channels(d, (c) => `key_sum[${c}] += ds * q_at(query, ${c});`)}
    ${channels(dv, (c) => `value_sum[${c}] += chance * dout_at(query, ${c});`)}
  }
  ${channels(d, (c) => `put_dk(row, ${c}, key_sum[${c}]);`)}
  ${channels(dv, (c) => `put_dv(row, ${c}, value_sum[${c}]);`)}
}`,
  });
});

// ---------------------------------------------------------------- the kernels
type Family = "attention" | "attentionGrad";

export function attentionKernels(gpu: Gpu): { readonly [P in Family]: Kernel<WebgpuHandle> } {
  const serialGroups = (n: number): number => Math.ceil(n / SERIAL_LANES);
  const unsupported = (inputs: readonly Spec[]): string | undefined => {
    const { d, dv } = sizesOf(inputs);
    const widest = Math.max(d, dv);
    return (
      only("f")(inputs, {}) ??
      (widest > WIDEST ? `heads of ${widest} channels are too wide, at most ${WIDEST}` : undefined)
    );
  };

  function forward(
    sizes: Sizes,
    numbers: Numbers,
    reads: Readonly<Record<"q" | "k" | "v" | "mask", Bound>>,
    to: Readonly<Record<"out" | "lse", Bound>>,
  ): void {
    const { batch, sequence, heads, d, total, kvHeads, dv } = sizes;
    const wide = readsFours(sizes);
    const rows = batch * sequence * heads;
    if (gpu.software) {
      gpu.run(forwardSerial(wide, fours(d), fours(dv)), reads, to, numbers, serialGroups(rows));
      return;
    }
    const perHead = (sequence * heads) / kvHeads;
    if (perHead > 2 * MOST_ROWS) {
      const tiles = Math.ceil(perHead / TILE);
      gpu.run(forwardTiles(wide, columnRounds(dv)), reads, to, { ...numbers, tiles }, batch * kvHeads * tiles);
      return;
    }
    const together = Math.min(MOST_ROWS, 2 ** Math.ceil(Math.log2(perHead)));
    const tiles = Math.ceil(perHead / together);
    const splits = Math.max(1, Math.ceil((total - numbers.first_key) / STRETCH));
    const few = { ...numbers, tiles, splits };
    const groups = batch * kvHeads * tiles * splits;
    if (splits === 1) {
      gpu.run(stretches(wide, together, d, dv, false), reads, to, few, groups);
      return;
    }
    const columns = fours(dv);
    const [sums, tops] = [gpu.scratch(rows * splits * columns * 4), gpu.scratch(rows * splits * 2)];
    gpu.run(stretches(wide, together, d, dv, true), reads, { sums, tops }, few, groups);
    gpu.run(joinStretches(wide), { sums, tops }, to, few, Math.ceil((rows * columns) / 64));
    gpu.free(sums);
    gpu.free(tops);
  }

  const attention: Kernel<WebgpuHandle> = (inputs: readonly Input[], specs, attrs: Attrs) => {
    const results = specs.map((spec) => gpu.alloc(spec)); // [b, s, h, dv], [b, h, s], [b, h, s, t]
    const [q, k, v, mask] = inputs;
    const sizes = sizesOf(inputs);
    const { batch, sequence, heads, total, kvHeads } = sizes;
    const rows = batch * sequence * heads;
    if (!q || !k || !v || rows === 0) return results;
    const numbers = numbersOf(sizes, attrs, mask !== undefined);
    const [out, lse, probabilities] = [at(results, 0), at(results, 1), results[2]];
    const reads = { q: q.handle, k: k.handle, v: v.handle, mask: (mask ?? q).handle };
    forward(sizes, numbers, reads, { out, lse });
    if (probabilities) {
      const wide = readsFours(sizes);
      const [to, from] = [{ y: probabilities }, { ...reads, lse }];
      if (gpu.software) gpu.run(probabilitiesSerial(wide), from, to, numbers, serialGroups(rows * total));
      else {
        const [tiles, splits] = [Math.ceil((sequence * heads) / kvHeads / TILE), Math.ceil(total / TILE)];
        gpu.run(probabilityTiles(wide), from, to, { ...numbers, tiles, splits }, batch * kvHeads * tiles * splits);
      }
    }
    return results;
  };

  const attentionGrad: Kernel<WebgpuHandle> = (inputs: readonly Input[], specs, attrs: Attrs) => {
    const results = specs.map((spec) => gpu.alloc(spec)); // as q, k and v
    const [q, k, v] = inputs;
    const mask = attrs.mask ? inputs[3] : undefined;
    const [out, lse, dout] = inputs.slice(-3);
    const sizes = sizesOf(inputs);
    const { batch, sequence, heads, d, total, kvHeads, dv } = sizes;
    if (!q || !k || !v || !out || !lse || !dout) return results;
    const numbers = numbersOf(sizes, attrs, mask !== undefined);
    const wide = readsFours(sizes);
    const rows = batch * sequence * heads;
    const [dq, dk, dvalue] = [at(results, 0), at(results, 1), at(results, 2)];

    const stats = gpu.scratch(Math.max(1, 2 * rows));
    const units = wide ? dv / 4 : dv;
    const team = teamFor(gpu, units);
    const own = { out: out.handle, dout: dout.handle, lse: lse.handle };
    gpu.run(rowStats(wide, team), own, { stats }, { rows, width: units, s: sequence, heads }, groupsOf(team, rows));

    const reads = { q: q.handle, k: k.handle, v: v.handle, mask: (mask ?? q).handle, stats, dout: dout.handle };
    const keyRows = batch * total * kvHeads;
    if (gpu.software) {
      gpu.run(queryGradSerial(wide, fours(d), fours(dv)), reads, { dq }, numbers, serialGroups(rows));
      gpu.run(keyGradSerial(wide, fours(d), fours(dv)), reads, { dk, dv: dvalue }, numbers, serialGroups(keyRows));
    } else {
      const tiles = Math.ceil((sequence * heads) / Math.max(1, kvHeads) / TILE);
      gpu.run(queryGradTiles(wide, columnRounds(d)), reads, { dq }, { ...numbers, tiles }, batch * kvHeads * tiles);
      const [keyRounds, valueRounds] = [columnRounds(d), columnRounds(dv)];
      const passes =
        keyRounds + valueRounds <= 4
          ? [[keyRounds, valueRounds] as const]
          : [[keyRounds, 0] as const, [0, valueRounds] as const];
      const keyTiles = Math.ceil(total / TILE);
      for (const [forKeys, forValues] of passes) {
        const to = { dk, dv: dvalue };
        gpu.run(
          keyGradTiles(wide, forKeys, forValues),
          reads,
          to,
          { ...numbers, tiles: keyTiles },
          batch * kvHeads * keyTiles,
        );
      }
    }
    gpu.free(stats);
    return results;
  };

  return {
    attention: Object.assign(attention, { unsupported }),
    attentionGrad: Object.assign(attentionGrad, { unsupported }),
  };
}
