// Balanced assignment of tokens to experts on the host, for BASE (2103.16716, section 3.1): every expert gets floor(T / E)
// or ceil(T / E) of T tokens, and the sum of their scores is largest. Exact by shortest augmenting paths
// (Jonker-Volgenant, the places of one expert taken together); near it by the auction of Bertsekas with falling bids.

export interface Sizes {
  readonly tokens: number;
  readonly experts: number;
}

/** Groups of equal places. A row is a token, or a filler that takes a place which no token has to fill. */
interface Places {
  readonly rows: number;
  readonly groups: number;
  /** Places of each group. */
  readonly capacity: Int32Array;
  /** `[rows, groups]`; -Infinity where a filler may not go. */
  readonly scores: Float64Array;
}

/**
 * The places: floor(T / E) per expert; where T is not divisible, one more per expert in groups of their own, which as
 * many fillers as are needed share with the tokens.
 */
function placesOf(scores: ArrayLike<number>, { tokens, experts }: Sizes): Places {
  const [each, left] = [Math.floor(tokens / experts), tokens % experts];
  const must = each > 0 ? experts : 0;
  const groups = must + (left > 0 ? experts : 0);
  const rows = tokens + (left > 0 ? experts - left : 0);
  const lowest = Array.from(scores).reduce((low, x) => (Number.isFinite(x) && x < low ? x : low), 0);
  const all = new Float64Array(rows * groups);
  for (let row = 0; row < rows; row++)
    for (let group = 0; group < groups; group++) {
      const score = scores[row * experts + (group % experts)] ?? 0;
      const filler = group < must ? Number.NEGATIVE_INFINITY : 0;
      all[row * groups + group] = row >= tokens ? filler : Number.isFinite(score) ? score : lowest;
    }
  const capacity = Int32Array.from({ length: groups }, (_, group) => (group < must ? each : 1));
  return { rows, groups, capacity, scores: all };
}

const expertsOf = (groupOf: Int32Array, { tokens, experts }: Sizes): Int32Array =>
  groupOf.slice(0, tokens).map((group) => group % experts);

/**
 * The best assignment: an expert for each row of `scores [tokens, experts]`. A score that is not finite counts as 0 or the
 * lowest one, whichever is less. About tokens² experts steps at worst.
 */
export function exactAssignment(scores: ArrayLike<number>, sizes: Sizes): Int32Array {
  const { rows, groups, capacity, scores: all } = placesOf(scores, sizes);
  const at = (row: number, group: number): number => all[row * groups + group] ?? 0;
  const groupOf = new Int32Array(rows).fill(-1);
  const members = Array.from({ length: groups }, () => new Set<number>());
  // A row holds a group of largest score - price; the price is 0 while a group has room.
  const price = new Float64Array(groups);
  for (let row = 0; row < rows; row++) {
    // How much is lost, all in all, when a row enters the group and others move on; entering[group] is that row.
    const loss = new Float64Array(groups);
    const entering = new Int32Array(groups).fill(row);
    const done = new Uint8Array(groups);
    let best = Number.NEGATIVE_INFINITY;
    for (let g = 0; g < groups; g++) best = Math.max(best, at(row, g) - (price[g] ?? 0));
    for (let g = 0; g < groups; g++) loss[g] = best - (at(row, g) - (price[g] ?? 0));
    let end = -1;
    let least = 0;
    for (;;) {
      end = -1;
      for (let g = 0; g < groups; g++) {
        if (!done[g] && (end < 0 || (loss[g] ?? 0) < (loss[end] ?? 0))) end = g;
      }
      least = loss[end] ?? 0;
      if ((members[end]?.size ?? 0) < (capacity[end] ?? 0)) break;
      done[end] = 1;
      const paid = price[end] ?? 0;
      for (const other of members[end] ?? []) {
        const own = least + at(other, end) - paid;
        for (let g = 0; g < groups; g++) {
          const moved = own - (at(other, g) - (price[g] ?? 0));
          if (!done[g] && moved < (loss[g] ?? 0)) {
            loss[g] = moved;
            entering[g] = other;
          }
        }
      }
    }
    for (let g = 0; g < groups; g++) if (done[g]) price[g] = (price[g] ?? 0) + least - (loss[g] ?? 0);
    for (let to = end; to >= 0; ) {
      const mover: number = entering[to] ?? row;
      const from: number = groupOf[mover] ?? -1;
      members[from]?.delete(mover);
      members[to]?.add(mover);
      groupOf[mover] = to;
      to = from;
    }
  }
  return expertsOf(groupOf, sizes);
}

/** How far below the best sum the auction may end: `tokens + fillers` times this. */
export function auctionStep(scores: ArrayLike<number>, precision: number): number {
  let [low, high] = [Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY];
  for (const score of Array.from(scores)) {
    if (!Number.isFinite(score)) continue;
    low = Math.min(low, score);
    high = Math.max(high, score);
  }
  return precision * (high > low ? high - low : 1);
}

/**
 * A good assignment, of the form of `exactAssignment`: tokens bid for places, each at least `precision` times the range
 * of the scores more than it must, so that the sum ends less than `auctionStep` per row (tokens, and less than one filler
 * per expert) below the best. Steps fall from a quarter of the range, by five, and prices carry over.
 */
export function auctionAssignment(
  scores: ArrayLike<number>,
  sizes: Sizes & { readonly precision: number },
): Int32Array {
  const { rows, groups, capacity, scores: all } = placesOf(scores, sizes);
  if (groups === 1) return new Int32Array(sizes.tokens);
  const final = auctionStep(scores, sizes.precision);
  const price = new Float64Array(groups); // of the cheapest place
  const groupOf = new Int32Array(rows);
  const waiting = new Int32Array(rows);
  for (let step = Math.max(final / sizes.precision / 4, final); ; step = Math.max(step / 5, final)) {
    const places = Array.from(capacity, (size, g) => new Heap(size, price[g] ?? 0));
    for (let row = 0; row < rows; row++) waiting[row] = rows - 1 - row;
    for (let count = rows; count > 0; ) {
      const row = waiting[--count] ?? 0;
      let [first, second, choice] = [Number.NEGATIVE_INFINITY, Number.NEGATIVE_INFINITY, 0];
      for (let g = 0; g < groups; g++) {
        const value = (all[row * groups + g] ?? 0) - (price[g] ?? 0);
        if (value > first) {
          second = first;
          first = value;
          choice = g;
        } else if (value > second) second = value;
      }
      const heap = places[choice];
      const loser = heap?.replace((price[choice] ?? 0) + first - second + step, row) ?? -1;
      price[choice] = heap?.lowest ?? 0;
      groupOf[row] = choice;
      if (loser >= 0) waiting[count++] = loser;
    }
    if (step <= final) return expertsOf(groupOf, sizes);
  }
}

/** The places of a group by price, the cheapest on top. */
class Heap {
  private readonly prices: Float64Array;
  private readonly owners: Int32Array;

  constructor(size: number, price: number) {
    this.prices = new Float64Array(size).fill(price);
    this.owners = new Int32Array(size).fill(-1);
  }

  get lowest(): number {
    return this.prices[0] ?? 0;
  }

  /** Gives the cheapest place to another, at a higher price; returns who had it, -1 for nobody. */
  replace(price: number, owner: number): number {
    const { prices, owners } = this;
    const before = owners[0] ?? -1;
    let i = 0;
    for (;;) {
      let child = 2 * i + 1;
      if (child + 1 < prices.length && (prices[child + 1] ?? 0) < (prices[child] ?? 0)) child++;
      if (child >= prices.length || (prices[child] ?? 0) >= price) break;
      prices[i] = prices[child] ?? 0;
      owners[i] = owners[child] ?? -1;
      i = child;
    }
    prices[i] = price;
    owners[i] = owner;
    return before;
  }
}
