// From block ends on the device to work lists on the device: which workgroup multiplies which rows by which expert's
// weights, and the arguments of the indirect dispatches that run them. No number reaches the host.
//
// A block goes whole to one of two kernels, by its own number of rows alone: at most FEW_ROWS to the one for few rows,
// else to tiles. So what a row gets never depends on the other experts, on how many rows there are in all, or on which
// experts are in the call.
import type { Bound, Gpu, WebgpuHandle } from "../device.ts";
import { program } from "../program.ts";
import { memo } from "./parts.ts";

export interface PlanSizes {
  /** Rows in all; block ends are cut there. */
  readonly rows: number;
  /** Experts of this plan: [first, last) of `experts`. */
  readonly first: number;
  readonly last: number;
  readonly experts: number;
  /** Most rows of a block that the few-row kernel takes, and rows of one of its entries. */
  readonly few: number;
  readonly fewRows: number;
  /** Rows of a tile. */
  readonly tileRows: number;
  /** Whether rows behind the last block get entries too, so that they become zeros. */
  readonly tail: boolean;
  /** For each product that runs by this plan: workgroups per entry, in columns, of both kernels. At most two. */
  readonly columns: readonly { readonly few: number; readonly tiles: number }[];
}

/**
 * In 16-byte units: two headers per product (few, tiles) of three workgroup counts and the number of entries, then the
 * entries.
 */
export interface Plan {
  readonly handle: WebgpuHandle;
  readonly fewList: number;
  readonly tileList: number;
}
/** Byte offset of the indirect arguments of product `i`, and the place of their header in the plan. */
export const headerOf = (i: number, kernel: "few" | "tiles"): number => 2 * i + (kernel === "few" ? 0 : 1);

/** An expert per lane. On software drivers, where barriers are slow, one lane does it all. */
const LANES = 64;
const planProgram = memo((lanes: number) =>
  program({
    key: `plan of blocks, ${lanes} lanes`,
    reads: { ends: "i32" },
    writes: { plan: "vec4<u32>" },
    params: {
      rows: "u32",
      first: "u32",
      last: "u32",
      experts: "u32",
      few: "u32",
      few_rows: "u32",
      tile_rows: "u32",
      tail: "u32",
      few_list: "u32",
      tile_list: "u32",
      few_columns0: "u32",
      tile_columns0: "u32",
      few_columns1: "u32",
      tile_columns1: "u32",
      products: "u32",
      most: "u32",
    },
    lanes,
    code: () => `
var<workgroup> counts: array<vec2<u32>, ${lanes}>;
// Workgroups folded into three dimensions, and the number of entries.
fn header(entries: u32, columns: u32) -> vec4<u32> {
  let groups = entries * columns;
  if (groups <= p.most) { return vec4<u32>(groups, 1u, 1u, entries); }
  let rows = (groups + p.most - 1u) / p.most;
  if (rows <= p.most) { return vec4<u32>(p.most, rows, 1u, entries); }
  return vec4<u32>(p.most, p.most, (rows + p.most - 1u) / p.most, entries);
}
fn end_of(e: u32) -> u32 { return min(u32(max(ends[e], 0)), p.rows); }
fn main(group: u32, lane: u32) {
  var total = vec2<u32>();
  // One more than the experts: the rows behind the last block.
  for (var base = p.first; base <= p.last; base += ${lanes}u) {
    let e = base + lane;
    let behind = e == p.experts;
    var row = 0u;
    var rows = 0u;
    if (e < p.last || (behind && p.last == p.experts && p.tail != 0u)) {
      if (e > 0u) { row = end_of(e - 1u); }
      let end = select(end_of(min(e, p.experts - 1u)), p.rows, behind);
      rows = max(end, row) - row;
    }
    let is_few = rows <= p.few && !behind;
    let each = select(p.tile_rows, p.few_rows, is_few);
    let entries = (rows + each - 1u) / each;
    let own = select(vec2<u32>(0u, entries), vec2<u32>(entries, 0u), is_few);
    var sum = own;
    counts[lane] = sum;
    workgroupBarrier();
    for (var step = 1u; step < ${lanes}u; step *= 2u) {
      var before = vec2<u32>();
      if (lane >= step) { before = counts[lane - step]; }
      workgroupBarrier();
      sum += before;
      counts[lane] = sum;
      workgroupBarrier();
    }
    let start = total + sum - own;
    total += counts[${lanes - 1}];
    workgroupBarrier();
    let at = select(p.tile_list + start.y, p.few_list + start.x, is_few);
    for (var i = 0u; i < entries; i++) {
      plan[at + i] = vec4<u32>(select(e, 0xffffffffu, behind), row + i * each, min(each, rows - i * each), 0u);
    }
  }
  if (lane == 0u) {
    plan[0] = header(total.x, p.few_columns0);
    plan[1] = header(total.y, p.tile_columns0);
    if (p.products > 1u) {
      plan[2] = header(total.x, p.few_columns1);
      plan[3] = header(total.y, p.tile_columns1);
    }
  }
}`,
  }),
);

/** Records the plan of some experts; the caller frees its handle. */
export function recordPlan(gpu: Gpu, ends: Bound, sizes: PlanSizes): Plan {
  const { rows, first, last, experts, few, fewRows, tileRows, tail, columns } = sizes;
  const count = last - first;
  const fewEntries = Math.min(rows, count * Math.ceil(few / fewRows));
  // Every block, and the tail, begins at most one tile that it does not fill.
  const tileEntries = Math.floor(rows / tileRows) + Math.min(rows, count + 1);
  const fewList = 2 * columns.length;
  const tileList = fewList + fewEntries;
  const handle = gpu.scratch(4 * (tileList + tileEntries));
  const params = {
    rows,
    first,
    last,
    experts,
    few,
    few_rows: fewRows,
    tile_rows: tileRows,
    tail: tail ? 1 : 0,
    few_list: fewList,
    tile_list: tileList,
    few_columns0: columns[0]?.few ?? 0,
    tile_columns0: columns[0]?.tiles ?? 0,
    few_columns1: columns[1]?.few ?? 0,
    tile_columns1: columns[1]?.tiles ?? 0,
    products: columns.length,
    most: gpu.limits.maxComputeWorkgroupsPerDimension,
  };
  gpu.run(planProgram(gpu.software ? 1 : LANES), { ends }, { plan: handle }, params, 1);
  return { handle, fewList, tileList };
}
