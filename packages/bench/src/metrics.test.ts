// Oracles are written from the definitions, over arrays of sets, with sizes that do not divide and tokens without experts.
import { describe, expect, test } from "vitest";
import { hostRandom } from "./corpus.ts";
import {
  type Choices,
  chosenProbabilities,
  deadExperts,
  expertLoad,
  expertsPerToken,
  interval,
  knownWords,
  loadByLabel,
  loadImbalance,
  routingEntropy,
  routingFluctuation,
  specialisation,
  words,
} from "./metrics.ts";

function someChoices(seed: number, tokens: number, k: number, experts: number): Choices {
  const random = hostRandom(seed);
  const ids = new Int32Array(tokens * k);
  for (let token = 0; token < tokens; token++) {
    const free = Array.from({ length: experts + 1 }, (_, e) => e); // `experts` is a null expert
    for (let j = 0; j < k; j++) {
      const [id] = free.splice(Math.floor(random() ** 2 * free.length), 1);
      ids[token * k + j] = random() < 0.2 ? -1 : (id ?? -1);
    }
  }
  return { experts, k, ids, weights: Float32Array.from(ids, () => random()) };
}

const labelsOf = (seed: number, tokens: number, count: number): Uint8Array => {
  const random = hostRandom(seed);
  return Uint8Array.from({ length: tokens }, () => Math.floor(random() * count));
};

/** Experts of each token, as the definitions speak of them. */
const setsOf = ({ experts, k, ids }: Choices): number[][] =>
  Array.from({ length: ids.length / k }, (_, token) =>
    [...ids.subarray(token * k, (token + 1) * k)].filter((id) => id >= 0 && id < experts).sort((a, b) => a - b),
  );

const sizes = [
  [1, 1, 1],
  [7, 1, 3],
  [53, 2, 5],
  [101, 3, 3],
  [31, 4, 11],
] as const;

describe.each(sizes)("%i tokens, %i slots, %i experts", (tokens, k, experts) => {
  const choices = someChoices(tokens, tokens, k, experts);
  const sets = setsOf(choices);
  const labels = labelsOf(k, tokens, 3);

  test("loads are shares of the assignments, by label and in all", () => {
    const byLabel = loadByLabel(choices, labels, 3);
    for (let label = 0; label < 3; label++) {
      const chosen = sets.filter((_, token) => labels[token] === label).flat();
      for (let e = 0; e < experts; e++) {
        const share = chosen.length === 0 ? 0 : chosen.filter((id) => id === e).length / chosen.length;
        expect(byLabel[label * experts + e]).toBeCloseTo(share, 12);
      }
    }
    const all = sets.flat();
    const load = expertLoad(choices);
    for (let e = 0; e < experts; e++) {
      expect(load[e]).toBeCloseTo(all.filter((id) => id === e).length / Math.max(1, all.length), 12);
    }
    expect(deadExperts(load)).toBe(experts - new Set(all).size);
    expect(expertsPerToken(choices)).toBeCloseTo(all.length / tokens, 12);
  });

  test("specialisation is the normalised mutual information of two variables", () => {
    // Every label weighs the same: joint probabilities are label share times share within the label.
    const perLabel = [0, 1, 2].map((label) => sets.filter((_, token) => labels[token] === label).flat());
    const present = perLabel.filter((chosen) => chosen.length > 0);
    const joint = present.map((chosen) =>
      Array.from(
        { length: experts },
        (_, e) => chosen.filter((id) => id === e).length / chosen.length / present.length,
      ),
    );
    const h = (ps: number[]): number => ps.reduce((sum, p) => (p > 0 ? sum - p * Math.log(p) : sum), 0);
    const marginal = Array.from({ length: experts }, (_, e) => joint.reduce((sum, row) => sum + (row[e] ?? 0), 0));
    const [he, hl, hel] = [h(marginal), h(joint.map((row) => row.reduce((a, b) => a + b, 0))), h(joint.flat())];
    const expected = he > 1e-12 && hl > 1e-12 ? (2 * (he + hl - hel)) / (he + hl) : 0;
    expect(specialisation(choices, labels, 3)).toBeCloseTo(expected, 10);
  });

  test("fluctuation counts tokens whose set changed", () => {
    const after = someChoices(tokens + 1, tokens, k, experts);
    const changed = setsOf(after).filter((set, token) => String(set) !== String(sets[token])).length;
    expect(routingFluctuation(choices, after)).toBeCloseTo(changed / tokens, 12);
    expect(routingFluctuation(choices, choices)).toBe(0);
  });

  test("entropy of the chosen weights, per token over all experts", () => {
    const dense = chosenProbabilities(choices);
    let sum = 0;
    for (let token = 0; token < tokens; token++) {
      const row = Array.from({ length: experts }, (_, e) => {
        const at = choices.ids.subarray(token * k, (token + 1) * k).indexOf(e);
        return at < 0 ? 0 : (choices.weights[token * k + at] ?? 0);
      });
      expect([...dense.subarray(token * experts, (token + 1) * experts)]).toEqual(row);
      const total = row.reduce((a, b) => a + b, 0);
      if (total > 0) for (const x of row) if (x > 0) sum -= (x / total) * Math.log(x / total);
    }
    const expected = experts < 2 ? 0 : sum / tokens / Math.log(experts);
    expect(routingEntropy(dense, experts)).toBeCloseTo(expected, 6);
  });
});

test("the extremes: even and collapsed loads, certain and undecided tokens, labels told by experts", () => {
  expect(loadImbalance(Float64Array.of(0.25, 0.25, 0.25, 0.25))).toBe(1);
  expect(loadImbalance(Float64Array.of(0, 1, 0, 0))).toBe(4);
  expect(loadImbalance(new Float64Array(4))).toBe(0);
  expect(routingEntropy(Float32Array.of(0.25, 0.25, 0.25, 0.25, 0, 1, 0, 0), 4)).toBeCloseTo(0.5, 6);
  const sorted: Choices = { experts: 3, k: 1, ids: Int32Array.of(0, 0, 1, 2), weights: new Float32Array(4) };
  expect(specialisation(sorted, Uint8Array.of(0, 0, 1, 2), 3)).toBeCloseTo(1, 12);
  expect(specialisation(sorted, Uint8Array.of(1, 1, 1, 1), 3)).toBe(0);
});

test("no tokens at all", () => {
  const none: Choices = { experts: 4, k: 2, ids: new Int32Array(0), weights: new Float32Array(0) };
  expect([...expertLoad(none)]).toEqual([0, 0, 0, 0]);
  expect(routingFluctuation(none, none)).toBe(0);
  expect(routingEntropy(chosenProbabilities(none), 4)).toBe(0);
  expect(specialisation(none, new Uint8Array(0), 2)).toBe(0);
  expect(expertsPerToken(none)).toBe(0);
});

test("a set in another order or width is the same set; other tokens are an error", () => {
  const before: Choices = { experts: 4, k: 2, ids: Int32Array.of(1, 3, 2, -1), weights: new Float32Array(4) };
  const after: Choices = { experts: 4, k: 3, ids: Int32Array.of(3, -1, 1, 2, 0, -1), weights: new Float32Array(6) };
  expect(routingFluctuation(before, after)).toBe(0.5);
  expect(() => routingFluctuation(before, { ...after, ids: new Int32Array(3) })).toThrow("compare the same tokens");
});

describe("interval", () => {
  test("Student's t over the runs", () => {
    expect(interval([2, 4])).toEqual({ mean: 3, halfWidth: 12.706 });
    const { mean, halfWidth } = interval([1, 2, 3, 4, 5]);
    expect(mean).toBe(3);
    expect(halfWidth).toBeCloseTo(2.776 * Math.sqrt(2.5 / 5), 12);
  });
  test("one run has no interval, none is an error", () => {
    expect(interval([7])).toEqual({ mean: 7 });
    expect(() => interval([])).toThrow("no values");
  });
});

test("words are runs of letters; known ones occur in the training text as written", () => {
  expect(words("Don't say: “naïve”, x1 or 42!")).toEqual(["Don't", "say", "naïve", "x", "or"]);
  expect(knownWords("the whale the qzx", new Set(["the", "whale"]))).toBe(0.75);
  expect(knownWords("12 !", new Set(["the"]))).toBe(0);
});
