// What routing did, as numbers: pure functions over the expert choices of one layer. [tokens, k] lists are flat and row-major.

/** The choices of one MoE layer for a list of tokens. -1 is an empty slot; ids from `experts` upward are null experts. */
export interface Choices {
  readonly experts: number;
  readonly k: number;
  readonly ids: Int32Array; // [tokens, k]
  readonly weights: Float32Array; // [tokens, k]
}

const real = (id: number, experts: number): boolean => id >= 0 && id < experts;

/** Share of the assignments that go to each expert, by label: [labels, experts]; each row sums to 1 (to 0 without assignments). */
export function loadByLabel({ experts, k, ids }: Choices, labels: Uint8Array, count: number): Float64Array {
  const load = new Float64Array(count * experts);
  const totals = new Float64Array(count);
  for (let i = 0; i < ids.length; i++) {
    const id = ids[i] ?? -1;
    const label = labels[Math.floor(i / k)] ?? count;
    if (!real(id, experts) || label >= count) continue;
    load[label * experts + id] = (load[label * experts + id] ?? 0) + 1;
    totals[label] = (totals[label] ?? 0) + 1;
  }
  return load.map((hits, i) => hits / Math.max(1, totals[Math.floor(i / experts)] ?? 0));
}

/** Share of all assignments that go to each expert: [experts]. */
export function expertLoad(choices: Choices): Float64Array {
  return loadByLabel(choices, new Uint8Array(choices.ids.length / Math.max(1, choices.k)), 1);
}

/** Load of the busiest expert over the mean load: 1 is perfect balance, the number of experts is collapse; 0 without load. */
export function loadImbalance(load: Float64Array): number {
  const total = load.reduce((sum, x) => sum + x, 0);
  return total === 0 ? 0 : (load.reduce((most, x) => Math.max(most, x), 0) * load.length) / total;
}

/** Experts that no token chose. */
export function deadExperts(load: Float64Array): number {
  return load.reduce((dead, x) => dead + (x === 0 ? 1 : 0), 0);
}

/**
 * Entropy of each token's distribution over the experts, divided by ln(experts), mean over the tokens: 0 is certain,
 * 1 is undecided. Rows [tokens, experts] need not sum to 1; a row without positive entries counts as 0.
 */
export function routingEntropy(probabilities: Float32Array, experts: number): number {
  const tokens = probabilities.length / Math.max(1, experts);
  if (tokens === 0 || experts < 2) return 0;
  let sum = 0;
  for (let row = 0; row < probabilities.length; row += experts) {
    let total = 0;
    let weighted = 0;
    for (let i = row; i < row + experts; i++) {
      const p = probabilities[i] ?? 0;
      if (p <= 0) continue;
      total += p;
      weighted += p * Math.log(p);
    }
    if (total > 0) sum += Math.log(total) - weighted / total;
  }
  return sum / tokens / Math.log(experts);
}

/** The weights of the choices as a distribution per token, for routers that report no probabilities: [tokens, experts]. */
export function chosenProbabilities({ experts, k, ids, weights }: Choices): Float32Array {
  const dense = new Float32Array((ids.length / Math.max(1, k)) * experts);
  for (let i = 0; i < ids.length; i++) {
    const id = ids[i] ?? -1;
    if (!real(id, experts)) continue;
    const at = Math.floor(i / k) * experts + id;
    dense[at] = (dense[at] ?? 0) + Math.max(0, weights[i] ?? 0);
  }
  return dense;
}

/** Share of the tokens whose set of experts differs between two checkpoints of one run; order within a set does not count. */
export function routingFluctuation(before: Choices, after: Choices): number {
  const tokens = after.ids.length / Math.max(1, after.k);
  if (before.experts !== after.experts || before.ids.length / Math.max(1, before.k) !== tokens) {
    throw new RangeError(
      `routingFluctuation: ${before.ids.length}/${before.k} tokens and ${before.experts} experts before, ` +
        `${after.ids.length}/${after.k} and ${after.experts} after; compare the same tokens`,
    );
  }
  if (tokens === 0) return 0;
  const member = new Uint8Array(after.experts);
  let changed = 0;
  for (let token = 0; token < tokens; token++) {
    member.fill(0);
    for (let i = token * before.k; i < (token + 1) * before.k; i++) {
      const id = before.ids[i] ?? -1;
      if (real(id, before.experts)) member[id] = 1;
    }
    for (let i = token * after.k; i < (token + 1) * after.k; i++) {
      const id = after.ids[i] ?? -1;
      if (real(id, after.experts)) member[id] = (member[id] ?? 0) | 2;
    }
    if (member.some((sides) => sides === 1 || sides === 2)) changed++;
  }
  return changed / tokens;
}

/**
 * Normalised mutual information of expert and label over the assignments: 2 I(E; L) / (H(E) + H(L)), from 0 (independent)
 * to 1 (each tells the other); 0 where either never varies. Every label weighs the same, however many tokens it has.
 */
export function specialisation(choices: Choices, labels: Uint8Array, count: number): number {
  return specialisationOfLoad(loadByLabel(choices, labels, count), choices.experts);
}

/** The same from the load, as `loadByLabel` gives it: [labels, experts], each row a sum of 1, or of 0 without assignments. */
export function specialisationOfLoad(load: Float64Array, experts: number): number {
  const count = load.length / Math.max(1, experts);
  const present: number[] = [];
  for (let label = 0; label < count; label++) {
    if (load.subarray(label * experts, (label + 1) * experts).some((x) => x > 0)) present.push(label);
  }
  if (present.length < 2) return 0;
  const share = 1 / present.length;
  let information = 0;
  let expertEntropy = 0;
  for (let e = 0; e < experts; e++) {
    const p = present.reduce((sum, label) => sum + share * (load[label * experts + e] ?? 0), 0);
    if (p === 0) continue;
    expertEntropy -= p * Math.log(p);
    for (const label of present) {
      const conditional = load[label * experts + e] ?? 0;
      if (conditional > 0) information += share * conditional * Math.log(conditional / p);
    }
  }
  return expertEntropy === 0 ? 0 : (2 * information) / (expertEntropy + Math.log(present.length));
}

/** Filled slots per token, null experts not counted. */
export function expertsPerToken({ experts, k, ids }: Choices): number {
  const tokens = ids.length / Math.max(1, k);
  return tokens === 0 ? 0 : ids.reduce((sum, id) => sum + (real(id, experts) ? 1 : 0), 0) / tokens;
}

/** The same by label: [labels]; 0 for a label without tokens. */
export function expertsByLabel({ experts, k, ids }: Choices, labels: Uint8Array, count: number): Float64Array {
  const slots = new Float64Array(count);
  const tokens = new Float64Array(count);
  for (const [token, label] of labels.entries()) {
    if (label >= count) continue;
    tokens[label] = (tokens[label] ?? 0) + 1;
    for (let i = token * k; i < (token + 1) * k; i++) {
      if (real(ids[i] ?? -1, experts)) slots[label] = (slots[label] ?? 0) + 1;
    }
  }
  return slots.map((sum, label) => sum / Math.max(1, tokens[label] ?? 0));
}

export interface Interval {
  readonly mean: number;
  /** Half the width of the 95 % interval (Student's t over the runs); absent for a single run. */
  readonly halfWidth?: number;
}

// 97.5 % quantiles of Student's t with 1 ... 30 degrees of freedom; beyond, the normal one.
const student = [
  12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.16, 2.145, 2.131, 2.12, 2.11,
  2.101, 2.093, 2.086, 2.08, 2.074, 2.069, 2.064, 2.06, 2.056, 2.052, 2.048, 2.045, 2.042,
];

/** Mean and 95 % interval of a few runs that differ by their seed only. */
export function interval(values: readonly number[]): Interval {
  if (values.length === 0) throw new RangeError("interval: no values");
  const mean = values.reduce((sum, x) => sum + x, 0) / values.length;
  if (values.length === 1) return { mean };
  const variance = values.reduce((sum, x) => sum + (x - mean) ** 2, 0) / (values.length - 1);
  return { mean, halfWidth: (student[values.length - 2] ?? 1.96) * Math.sqrt(variance / values.length) };
}

const wordPattern = /[\p{L}][\p{L}\p{M}'’]*/gu;

/** The words of a text: runs of letters, apostrophes inside them included, as written. */
export function words(text: string): readonly string[] {
  return [...text.matchAll(wordPattern)].map(([word]) => word);
}

/** Share of the sample's words that occur in the training text; 0 for a sample without words. */
export function knownWords(sample: string, vocabulary: ReadonlySet<string>): number {
  const all = words(sample);
  return all.length === 0 ? 0 : all.filter((word) => vocabulary.has(word)).length / all.length;
}
