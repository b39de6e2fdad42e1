// Routing overrides (RoutingOverride): other ranks, another k, a threshold, random, masked or forced experts for single rows of the batch, as
// self-contrast decoding (2405.14507, section 3) routes a strong and a weak pass at once. A router says how its scores order and weigh
// experts; the plan follows from that on the device. What an override asks for is checked here, before anything runs.
import { ShapeError, UnsupportedError } from "../errors.ts";
import { exp, less, maximum, mul, sub, where } from "../ops/elementwise.ts";
import { softmax } from "../ops/normalise.ts";
import { cumsum } from "../ops/reduce.ts";
import { gatherLast, topkIndices } from "../ops/rows.ts";
import { broadcastTo, concat, full, hostConstant, reshape } from "../ops/shape.ts";
import { show, type Tensor } from "../tensor.ts";
import type { Router, RouterInput, RoutingOverride, SparsePlan } from "./plan.ts";

/** How a router orders and weighs experts, token by token: all that `overridePlan` has to know of it. */
export interface Ranking {
  /** `[tokens, experts (+ nulls)]`: experts are taken in falling order, ties at the lower id first; -Infinity: never. */
  readonly order: Tensor;
  /** `[tokens, experts (+ nulls)]`: natural logarithm of each expert's weight; logits will do where `normalised`. */
  readonly logWeights: Tensor;
  /** Whether the weights of the chosen are divided by their sum, so that one expert alone has weight 1. */
  readonly normalised: boolean;
  /** Factor on the weights; default 1. */
  readonly scale?: number;
  /** Experts of a token; absent where that varies, and an override has to tell. */
  readonly k?: number;
  /** Experts that a token may take at most, where groups or the like leave out some by -Infinity in `order`; default: all. */
  readonly reachable?: number;
}

type Rule = Omit<RoutingOverride, "layers" | "parts">;

/**
 * What applies to each row of the batch in the input's layer; undefined: nothing, to no row. Throws ShapeError for a list of another
 * length than the batch or layers that the model does not have, UnsupportedError in training.
 */
export function overridesOf({
  override,
  layer,
  layers,
  part = "feedForward",
  layout,
  training,
}: RouterInput): readonly (Rule | undefined)[] | undefined {
  if (override === undefined) return undefined;
  if (override.length !== layout.batch) {
    throw new ShapeError(
      `routing override: ${override.length} entries for a batch of ${layout.batch}; give one per row, undefined where nothing changes`,
    );
  }
  const rules = override.map((one, row): Rule | undefined => {
    if (one === undefined) return undefined;
    const { layers: only, parts = ["feedForward"], ...rule } = one;
    checkIds(row, "layers", only, layers);
    const odd = parts.find((name) => name !== "attention" && name !== "feedForward");
    if (odd !== undefined || parts.length === 0) {
      const found = JSON.stringify(odd ?? parts);
      throw new ShapeError(`routing override of row ${row}: parts are "attention" and "feedForward", found ${found}`);
    }
    if (!parts.includes(part) || (only && !only.includes(layer))) return undefined;
    return Object.values(rule).some((value) => value !== undefined) ? rule : undefined;
  });
  if (rules.every((rule) => rule === undefined)) return undefined;
  if (training) {
    throw new UnsupportedError(
      `routing override: layer ${layer} is in training, where losses and loads count what the router itself chose; leave it out`,
    );
  }
  return rules;
}

/**
 * For models that ask a router themselves, where `moe` does not. Throws UnsupportedError where an override applies to this call and the
 * router takes none: better refused than ignored, since a router that is not asked for its ranks would decode something else.
 */
export function requireOverrides(router: Router, input: RouterInput): void {
  if (router.overrides || !overridesOf(input)) return;
  const why =
    router.score && router.select
      ? "does not choose experts token by token in the order of its scores"
      : "does not choose experts by scores alone";
  throw new UnsupportedError(
    `moe: layer ${input.layer} got a routing override, and its router ${why}, or does not say so (Router.overrides); leave it out or use a router such as topK`,
  );
}

/**
 * `own`, what the router itself decided, with the rows that `input.override` names decided again from the ranking: for authors of routers,
 * who call it in `select` (or in `route`, where there is none) and set `Router.overrides`. Rows without an override keep theirs bit for bit. Without
 * any, `own` comes back and `ranking` is not asked for.
 *
 * Throws ShapeError for ranks, experts or numbers out of range, UnsupportedError for what contradicts itself.
 */
export function overridePlan(own: SparsePlan, input: RouterInput, ranking: () => Ranking): SparsePlan {
  const rules = overridesOf(input);
  if (rules === undefined) return own;
  const { order, logWeights, normalised, scale = 1, k, reachable } = ranking();
  const { batch, sequence } = input.layout;
  const [tokens = 0, count = 0] = order.shape;
  if (order.shape.length !== 2 || tokens !== batch * sequence || logWeights.shape.join() !== order.shape.join()) {
    throw new ShapeError(
      `routing override: order ${show(order)} and log weights ${show(logWeights)}, expected [batch * sequence, experts] = [${batch * sequence}, experts] twice`,
    );
  }
  const ownSlots = own.experts.shape[1] ?? 0;
  const limits = { count, reachable: Math.min(reachable ?? count, count), ...(k === undefined ? {} : { k }) };
  const rows = rules.map((rule, row) => rule && resolve(rule, row, limits));
  const slotsOf = rows.map((row) => row?.positions.length ?? ownSlots);
  const slots = Math.max(...slotsOf);
  const deepest = rows.reduce((most, row) => Math.max(most, ...(row?.positions ?? []).map((at) => at + 1)), 0);
  const some = (has: (row: Resolved) => boolean): boolean => rows.some((row) => row !== undefined && has(row));
  const bySequence = (x: Tensor): Tensor => reshape(x, [batch, sequence, x.shape[1] ?? 0]);
  /** `[batch, 1, n]`, the same for all tokens of a row. */
  const perRow = (n: number, value: (row: Resolved | undefined, i: number) => number): Tensor =>
    hostConstant(
      order,
      Float32Array.from({ length: batch * n }, (_, i) => value(rows[Math.floor(i / n)], i % n)),
      [batch, 1, n],
    );

  let ranked = bySequence(order); // [batch, sequence, experts]
  if (some((row) => row.random !== undefined)) {
    const drawing = mul(
      perRow(1, (row) => Number(row?.random !== undefined)),
      less(-3e38, ranked),
    );
    ranked = where(drawing, hostConstant(order, draws(input, rows, count), ranked.shape), ranked);
  }
  if (some((row) => row.masked.size > 0)) {
    const masked = perRow(count, (row, e) => Number(row?.masked.has(e) ?? false));
    ranked = where(masked, Number.NEGATIVE_INFINITY, ranked);
  }
  if (some((row) => row.forced.size > 0)) {
    const forced = perRow(count, (row, e) => Number(row?.forced.has(e) ?? false));
    ranked = where(forced, Number.POSITIVE_INFINITY, ranked);
  }
  const sorted = topkIndices(ranked, deepest); // [batch, sequence, deepest]
  const ids = atPositions(sorted, rows, slots); // [batch, sequence, slots]
  const there = perRow(slots, (row, j) => Number(j < (row?.positions.length ?? 0)));
  let kept = mul(less(-3e38, gatherLast(ranked, ids)), there); // -Infinity is nobody
  const raw = bySequence(logWeights);
  if (some((row) => row.threshold !== undefined)) {
    // A slot is kept while the sum before it has not exceeded the threshold; no sum exceeds 2.
    const before = cumsum(gatherLast(softmax(raw), ids), { axis: 2, exclusive: true });
    const open = sub(
      1,
      less(
        perRow(1, (row) => row?.threshold ?? 2),
        before,
      ),
    );
    const always = perRow(slots, (row, j) => Number(j < (row?.forced.size ?? 0)));
    kept = mul(kept, maximum(open, always));
  }
  const chosen = gatherLast(raw, ids);
  const shared = (row: Resolved): boolean => normalised || row.threshold !== undefined || row.random !== undefined;
  const shares = some(shared) ? softmax(where(kept, chosen, Number.NEGATIVE_INFINITY)) : undefined;
  const plain = some((row) => !shared(row)) ? where(kept, exp(chosen), 0) : undefined;
  const mixed =
    shares && plain
      ? where(
          perRow(1, (row) => Number(row !== undefined && shared(row))),
          shares,
          plain,
        )
      : (shares ?? plain ?? chosen);
  let weights = scale === 1 ? mixed : mul(mixed, scale);
  let experts = where(kept, ids, -1);
  if (rows.includes(undefined)) {
    const changed = perRow(1, (row) => Number(row !== undefined));
    const widened = (x: Tensor, value: number): Tensor =>
      slots === ownSlots
        ? bySequence(x)
        : concat([bySequence(x), full(x, [batch, sequence, slots - ownSlots], value)], 2);
    experts = where(changed, experts, widened(own.experts, -1));
    weights = where(changed, weights, widened(own.weights, 0));
  }
  const flat = [tokens, slots];
  const bound = sequence * slotsOf.reduce((total, n) => total + n, 0);
  return {
    kind: "sparse",
    experts: reshape(experts, flat),
    weights: reshape(weights, flat),
    ...(bound < tokens * slots ? { bound } : {}),
  };
}

/** Numbers `[batch, sequence, experts]` whose order is that of random experts, for the rows that ask for them. */
function draws(
  { random, layout: { sequence, past }, part = "feedForward" }: RouterInput,
  rows: readonly (Resolved | undefined)[],
  count: number,
): Float64Array {
  const drawn = new Float64Array(rows.length * sequence * count);
  for (const [row, { random: seed } = {}] of rows.entries())
    for (let i = 0; seed !== undefined && i < sequence; i++)
      drawn.set(random.at(part, seed, past + i).host("uniform", count), (row * sequence + i) * count);
  return drawn;
}

/** Ids at each row's positions of the falling order: `sorted [batch, sequence, deepest]` -> `[batch, sequence, slots]`, anything in unused slots. */
function atPositions(sorted: Tensor, rows: readonly (Resolved | undefined)[], slots: number): Tensor {
  const [batch = 0, sequence = 0, deepest = 0] = sorted.shape;
  const isPrefix = rows.every((row) => row?.positions.every((at, j) => at === j) ?? true);
  if (isPrefix && deepest === slots) return sorted;
  const positions = Int32Array.from(
    { length: batch * slots },
    (_, i) => rows[Math.floor(i / slots)]?.positions[i % slots] ?? -1,
  );
  return gatherLast(sorted, broadcastTo(hostConstant(sorted, positions, [batch, 1, slots]), [batch, sequence, slots]));
}

/** An override as places in the falling order: forced experts stand first, masked ones nowhere. */
interface Resolved {
  readonly positions: readonly number[];
  readonly threshold?: number;
  readonly random?: number;
  readonly masked: ReadonlySet<number>;
  readonly forced: ReadonlySet<number>;
}

interface Limits {
  /** Experts, null ones included. */
  readonly count: number;
  readonly reachable: number;
  readonly k?: number;
}

function resolve(rule: Rule, row: number, limits: Limits): Resolved {
  const { ranks, threshold, random, masked = [], forced = [] } = rule;
  const { count, reachable } = limits;
  const place = `routing override of row ${row}`;
  const refuse = (why: string): never => {
    throw new UnsupportedError(`${place}: ${why}`);
  };
  checkIds(row, "masked", masked, count);
  checkIds(row, "forced", forced, count);
  const both = forced.find((e) => masked.includes(e));
  if (both !== undefined) refuse(`expert ${both} is both forced and masked; choose one`);
  // Whatever groups a token keeps, so many of its experts are not masked.
  const left = reachable - masked.length;
  const found = `only ${left} of ${count} experts can be taken`;
  const sets = { masked: new Set(masked), forced: new Set(forced) };
  const first = (n: number): number[] => Array.from({ length: n }, (_, i) => i);

  if (ranks !== undefined) {
    for (const name of ["k", "threshold", "random", "forced"] as const) {
      if (rule[name] !== undefined)
        refuse(`ranks say which places are taken, and ${name} would say it again; leave one out`);
    }
    if (ranks.length === 0) refuse("ranks are empty; name at least one place, 0 for the best expert");
    checkIds(row, "ranks", ranks, count);
    const deepest = Math.max(...ranks);
    if (deepest >= left) throw new ShapeError(`${place}: rank ${deepest}, but ${found}; ranks count from 0`);
    return { positions: ranks, ...sets };
  }
  if (random !== undefined && !Number.isSafeInteger(random))
    throw new ShapeError(`${place}: random = ${random}; expected a whole number`);
  if (random !== undefined && threshold !== undefined)
    refuse("random and a threshold exclude each other; leave one out");
  const { k = random !== undefined ? Math.max(1, forced.length) : threshold === undefined ? limits.k : undefined } =
    rule;
  if (k !== undefined) {
    if (!Number.isInteger(k) || k < 1) throw new ShapeError(`${place}: k = ${k}; expected a whole number from 1`);
    if (forced.length > k) refuse(`${forced.length} experts are forced, and k = ${k}; raise k`);
    if (k > Math.max(left, forced.length)) throw new ShapeError(`${place}: k = ${k}, but ${found}; lower k`);
  }
  if (threshold !== undefined) {
    if (!(threshold >= 0 && threshold <= 1)) {
      throw new ShapeError(`${place}: threshold = ${threshold}; expected a sum of probabilities, 0 to 1`);
    }
    if (left < 1 && forced.length === 0)
      throw new ShapeError(`${place}: threshold ${threshold}, but ${found}; mask fewer`);
    const most = Math.min(reachable + forced.length, count - masked.length);
    return { positions: first(k ?? most), threshold, ...sets };
  }
  if (k === undefined) {
    return refuse("this router gives each token as many experts as it needs; say k, ranks or a threshold as well");
  }
  return { positions: first(k), ...(random === undefined ? {} : { random }), ...sets };
}

/** Throws ShapeError unless these are different whole numbers from 0 to count - 1. */
function checkIds(row: number, name: string, ids: readonly number[] | undefined, count: number): void {
  if (ids === undefined) return;
  const wrong = ids.find((id, i) => !Number.isInteger(id) || id < 0 || id >= count || ids.indexOf(id) !== i);
  if (wrong === undefined) return;
  const why = ids.indexOf(wrong) !== ids.lastIndexOf(wrong) ? "twice" : `of ${count}`;
  throw new ShapeError(
    `routing override of row ${row}: ${name} name ${wrong} ${why}; expected different whole numbers from 0 to ${count - 1}`,
  );
}
