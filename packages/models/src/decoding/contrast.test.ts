import { dispose, type Engine, ShapeError, type Tensor } from "@switchyard/core";
import type { RoutingOverride } from "@switchyard/core/moe";
import { topK } from "@switchyard/routers/top-k";
import { describe, expect, it } from "vitest";
import { loudModel, makeEngine, smallConfig } from "../models.test-util.ts";
import { contrast } from "./contrast.ts";

/** Numbers in [-3, 3) without structure. */
function noise(n: number, seed: number): number[] {
  let state = seed * 2654435761;
  return Array.from({ length: n }, () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return (state / 2 ** 32) * 6 - 3;
  });
}
const best = (logits: ArrayLike<number>): number =>
  Array.from(logits).reduce((top, z, i, all) => (z > (all[top] ?? 0) ? i : top), 0);
const softmax = (logits: Float64Array): number[] => {
  const top = Math.max(...logits);
  const total = logits.reduce((sum, z) => sum + Math.exp(z - top), 0);
  return Array.from(logits, (z) => Math.exp(z - top) / total);
};

describe("contrast", () => {
  const cases = Array.from({ length: 40 }, (_, i) => ({
    strong: noise(11, 2 * i + 1),
    weak: noise(11, 2 * i + 2),
    alpha: [0, 0.1, 0.5][i % 3] as number,
    beta: [0.1, 0.5, 0.9, 2][i % 4] as number,
  }));

  it("is the formula in plain loops, temperatures before the mask", () => {
    for (const { strong, weak, alpha, beta } of cases) {
      const temperatures = { strong: 0.7, weak: 1.9 };
      const { logits, cutoff } = contrast(strong, weak, { alpha, beta, temperatures });
      expect(cutoff).toBeCloseTo(Math.log(alpha) + Math.max(...strong) / 0.7, 12);
      for (let i = 0; i < strong.length; i++) {
        const [s, w] = [(strong[i] ?? 0) / 0.7, (weak[i] ?? 0) / 1.9];
        if (s >= cutoff) expect(logits[i]).toBeCloseTo((1 + beta) * s - beta * w, 12);
        else expect(logits[i]).toBe(Number.NEGATIVE_INFINITY);
      }
    }
  });

  it("takes what the strong pass takes where beta is 0, alpha is 1, or both passes agree", () => {
    for (const { strong, weak, alpha, beta } of cases) {
      const greedy = best(strong);
      expect(best(contrast(strong, weak, { alpha, beta: 0 }).logits)).toBe(greedy);
      expect(best(contrast(strong, weak, { alpha: 1, beta }).logits)).toBe(greedy);
      expect(contrast(strong, weak, { alpha: 1, beta }).logits.filter((z) => z > -1e300).length).toBe(1);
      expect(best(contrast(strong, strong, { alpha, beta }).logits)).toBe(greedy);
    }
    expect(cases.some(({ strong, weak }) => best(contrast(strong, weak).logits) !== best(strong))).toBe(true);
  });

  it("does not see a constant added to the weak logits, and never leaves what is plausible", () => {
    for (const { strong, weak, alpha, beta } of cases) {
      const { logits } = contrast(strong, weak, { alpha, beta });
      const shifted = contrast(
        strong,
        weak.map((z) => z + 17),
        { alpha, beta },
      ).logits;
      for (const [i, p] of softmax(logits).entries()) expect(softmax(shifted)[i]).toBeCloseTo(p, 12);
      const limit = alpha * Math.max(...softmax(Float64Array.from(strong)));
      expect(softmax(Float64Array.from(strong))[best(logits)]).toBeGreaterThanOrEqual(limit * (1 - 1e-12));
    }
  });

  it("leaves masked tokens out, one token alone in, and takes weak logits of those only that count", () => {
    const none = Number.NEGATIVE_INFINITY;
    expect([...contrast([none, 1, none], [5, 2, none], { alpha: 0 }).logits]).toEqual([none, 0.5, none]);
    expect([...contrast([3], [7], { beta: 1 }).logits]).toEqual([-1]);
  });

  it("refuses what is no number, no share, or another vocabulary", () => {
    const refuse = (...given: Parameters<typeof contrast>) => expect(() => contrast(...given));
    refuse([1, 2], [1]).toThrow(/2 and 1 logits/);
    refuse([1], [1], { alpha: 1.1 }).toThrow(/alpha is 1.1/);
    refuse([1], [1], { alpha: Number.NaN }).toThrow(ShapeError);
    refuse([1], [1], { beta: -0.1 }).toThrow(/beta is -0.1/);
    refuse([1], [1], { temperatures: { weak: 0 } }).toThrow(/the weak temperature is 0/);
    refuse([1], [1], { temperatures: { strong: Number.POSITIVE_INFINITY } }).toThrow(/the strong temperature/);
    refuse([Number.NaN, 1], [1, 1]).toThrow(/largest logit of 2 is NaN/);
    refuse([Number.NEGATIVE_INFINITY], [1]).toThrow(/largest logit of 1 is -Infinity/);
    refuse([], []).toThrow(ShapeError);
    refuse([1, 1], [1, Number.NEGATIVE_INFINITY]).toThrow(/weak logit of token 1 is -Infinity/);
  });
});

describe("a model's strong and weak row in one pass", () => {
  const ids = [3, 1, 4, 1, 5, 9];
  const model = (on: Engine, k = 2) => loudModel(on, { ...smallConfig, router: topK({ k }) });
  const rows = async (logits: Tensor, batch: number): Promise<number[][]> => {
    const data = Array.from(await logits.data());
    dispose(logits);
    return Array.from({ length: batch }, (_, i) =>
      data.slice((i * data.length) / batch, ((i + 1) * data.length) / batch),
    );
  };
  const forward = async (
    on: Engine,
    of: ReturnType<typeof model>,
    override: readonly (RoutingOverride | undefined)[],
  ) => {
    const batch = override.length;
    const logits = on.scope(() => {
      const tokens = on.tensor(
        Int32Array.from({ length: batch * ids.length }, (_, i) => ids[i % ids.length] ?? 0),
        [batch, ids.length],
      );
      return of.forward(of.params, tokens, { override }).logits;
    });
    return rows(logits, batch);
  };
  const near = (found: readonly number[] | undefined, expected: readonly number[] | undefined) => {
    expect(found?.length).toBe(expected?.length);
    for (const [i, x] of (found ?? []).entries()) expect(x).toBeCloseTo(expected?.[i] ?? Number.NaN, 10);
  };

  it("are what each is alone, over the whole sequence and token by token with one cache", async () => {
    const on = makeEngine(64);
    const own = model(on);
    const weak = { ranks: [1] };
    const [strong = [], second = []] = await forward(on, own, [undefined, weak]);
    near(strong, (await forward(on, own, [undefined]))[0]);
    near(second, (await forward(on, own, [weak]))[0]);
    expect(Math.max(...strong.map((z, i) => Math.abs(z - (second[i] ?? 0))))).toBeGreaterThan(0.01);

    const cache = own.newCache(2);
    const vocabulary = own.vocabulary;
    for (const [position, id] of ids.entries()) {
      const tokens = on.tensor(Int32Array.of(id, id), [2, 1]);
      const step = await rows(await own.step(tokens, { cache, override: [undefined, weak] }), 2);
      tokens.dispose();
      for (const [i, whole] of [strong, second].entries()) {
        near(step[i], whole.slice(position * vocabulary, (position + 1) * vocabulary));
      }
    }
    cache.dispose();
  });

  it("are one where the weak rank is all that the strong pass has", async () => {
    const on = makeEngine(64);
    const own = model(on, 1);
    const [strong, weak] = await forward(on, own, [undefined, { ranks: [0] }]);
    near(weak, strong);
  });

  it("differ only where the override names the layer", async () => {
    const on = makeEngine(64);
    const own = model(on);
    const [plain, first, both, list] = await forward(on, own, [
      undefined,
      { ranks: [1], layers: [0] },
      { ranks: [1] },
      { ranks: [1], layers: [0, 1] },
    ]);
    near(both, list);
    const apart = (a: readonly number[] = [], b: readonly number[] = []) =>
      Math.max(...a.map((z, i) => Math.abs(z - (b[i] ?? 0))));
    expect(apart(plain, first)).toBeGreaterThan(0.01);
    expect(apart(first, both)).toBeGreaterThan(0.01);
    await expect(forward(on, own, [{ k: 1, layers: [2] }])).rejects.toThrow(/layers name 2 of 2/);
  });
});
