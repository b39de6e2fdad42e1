// Losses against the reference vectors, gradients included, and the rules they share: masks, counts without gradient, uniform values.
import { describe, expect, test } from "vitest";
import fixture from "../../test/fixtures/routers-losses.json" with { type: "json" };
import { autodiff, grad, watch } from "../autodiff.ts";
import type { Engine } from "../engine.ts";
import { ShapeError } from "../errors.ts";
import { sigmoid } from "../ops/elementwise.ts";
import { entropyLast, softmax } from "../ops/normalise.ts";
import { sum } from "../ops/reduce.ts";
import { topkIndices } from "../ops/rows.ts";
import type { Tensor } from "../tensor.ts";
import {
  entropyOfMean,
  gshardBalance,
  idCounts,
  mixtralBalance,
  sequenceBalance,
  sequenceBalances,
  squaredCV,
  switchBalance,
  tokenEntropy,
  zLoss,
} from "./losses.ts";
import { close, compare, float64, floats, ids, noise, numbers } from "./moe.test-util.ts";

const softmaxRows = (flat: readonly number[], n: number): number[] =>
  Array.from({ length: flat.length / n }, (_, t) => {
    const powers = flat.slice(t * n, (t + 1) * n).map(Math.exp);
    const total = powers.reduce((a, b) => a + b, 0);
    return powers.map((p) => p / total);
  }).flat();

describe.each(fixture.cases)("vectors: $id", ({ config, inputs, expected }) => {
  const e = float64();
  const { k, batch, seq } = config;
  const tokens = batch * seq;
  const experts = inputs.layer_logits[0]?.[0]?.length ?? 0;
  const layers = inputs.layer_logits.map((logits) => floats(e, logits.flat(), [tokens, experts]));
  const logits = layers[0] ?? floats(e, [], [0, 0]);
  const mask = floats(e, inputs.attention_mask.flat(), [tokens]);
  const probabilities = softmax(logits);
  const chosen = topkIndices(logits, k);
  const { layer0 } = expected;

  test("Hugging Face Mixtral over all layers, masked, and its gradient", async () => {
    close(await numbers(mixtralBalance(layers, { k })), [expected.hf_mixtral]);
    close(await numbers(mixtralBalance(layers, { k, mask })), [expected.hf_mixtral_masked]);
    const watched = watch(autodiff(e), layers);
    const grads = grad(mixtralBalance(watched, { k }), watched);
    close((await Promise.all(grads.map(numbers))).flat(), expected.hf_grad_wrt_concatenated_logits.flat());
  });

  test("Switch, summed over k and divided by k", async () => {
    expect(await numbers(idCounts(chosen, experts))).toEqual(layer0.tokens_per_expert);
    const options = { probabilities, experts: chosen };
    close(await numbers(switchBalance(options)), [layer0.switch_style_sum_over_k]);
    close(await numbers(switchBalance({ ...options, normalizeByK: true })), [layer0.switch_style_divided_by_k]);
    const load = floats(
      e,
      layer0.tokens_per_expert.map((n) => n / tokens),
      [experts],
    );
    close(await numbers(switchBalance({ ...options, experts: ids(e, new Array(tokens).fill(0), [tokens, 1]), load })), [
      layer0.switch_style_sum_over_k,
    ]);
  });

  test("z-loss and its gradient", async () => {
    const watched = watch(autodiff(e), logits);
    const loss = zLoss(watched);
    close(await numbers(loss), [layer0.z_loss]);
    close(await numbers(grad(loss, watched)), layer0.grad_z_loss.flat());
  });

  test("DeepSeek's sequence-wise balance, V3 and V2", async () => {
    const v3 = { scores: sigmoid(logits), experts: chosen, batch };
    close(await numbers(sequenceBalances(v3)), layer0.deepseek_v3_sequence);
    close(await numbers(sequenceBalance(v3)), [layer0.deepseek_v3_sequence_mean]);
    const v2 = { ...v3, scores: probabilities };
    close(await numbers(sequenceBalances(v2)), layer0.deepseek_v2_seq_aux);
    close(await numbers(sequenceBalance(v2)), [layer0.deepseek_v2_seq_aux_mean]);
  });

  test("entropies and the squared coefficient of variation of the importance", async () => {
    close(await numbers(entropyLast(probabilities)), layer0.token_entropy);
    close(await numbers(tokenEntropy(probabilities)), [layer0.mean_token_entropy]);
    close(await numbers(entropyOfMean(probabilities)), [layer0.entropy_of_mean]);
    close(await numbers(squaredCV(sum(probabilities, [0]))), [layer0.importance_cv2_population]);
  });
});

// ---------------------------------------------------------------- masks
const [batch, sequence, experts, k] = [2, 3, 4, 2];
const tokens = batch * sequence;
const real = [1, 1, 0, 1, 0, 0];
const chosen = [0, 3, 1, 0, 2, 2, 3, 1, 0, 1, 1, -1];
const onlyReal = <T>(rows: readonly T[], width: number): T[] =>
  rows.filter((_, i) => real[Math.floor(i / width)] === 1);

interface Masked {
  readonly name: string;
  value(e: Engine, logits: Tensor, chosen: Tensor, mask?: Tensor): Tensor;
}
const cases: Masked[] = [
  {
    name: "switchBalance",
    value: (_, x, experts, mask) => switchBalance({ probabilities: softmax(x), experts, ...(mask ? { mask } : {}) }),
  },
  {
    name: "gshardBalance",
    value: (_, x, experts, mask) => gshardBalance({ probabilities: softmax(x), experts, ...(mask ? { mask } : {}) }),
  },
  { name: "mixtralBalance", value: (_, x, __, mask) => mixtralBalance([x, x], { k, ...(mask ? { mask } : {}) }) },
  { name: "zLoss", value: (_, x, __, mask) => zLoss(x, mask) },
  { name: "tokenEntropy", value: (_, x, __, mask) => tokenEntropy(softmax(x), mask) },
  { name: "entropyOfMean", value: (_, x, __, mask) => entropyOfMean(softmax(x), mask) },
];

describe.each(cases)("$name and padding", ({ value }) => {
  test("equals the loss of the real tokens alone; padding gets no gradient", async () => {
    const e = float64();
    const flat = noise(tokens * experts, 5);
    const kept = onlyReal(flat, experts);
    const alone = value(e, floats(e, kept, [3, experts]), ids(e, onlyReal(chosen, k), [3, k]));
    const logits = watch(autodiff(e), floats(e, flat, [tokens, experts]));
    const masked = value(e, logits, ids(e, chosen, [tokens, k]), floats(e, real, [tokens]));
    expect(masked.shape).toEqual([]);
    close(await numbers(masked), await numbers(alone));
    const gradient = await numbers(grad(masked, logits));
    real.forEach((r, t) => {
      const moved = gradient.slice(t * experts, (t + 1) * experts).some((g) => g !== 0);
      expect(moved).toBe(r === 1);
    });
  });

  test("is 0, not NaN, where every token is padding or there is none", async () => {
    const e = float64();
    const logits = floats(e, noise(tokens * experts), [tokens, experts]);
    const none = value(e, logits, ids(e, chosen, [tokens, k]), floats(e, new Array(tokens).fill(0), [tokens]));
    expect((await numbers(none)).map(Math.abs)).toEqual([0]);
    const empty = value(e, floats(e, [], [0, experts]), ids(e, [], [0, k]));
    expect((await numbers(empty)).map(Math.abs)).toEqual([0]);
  });
});

describe("gradients against finite differences of plain loops", () => {
  const shapes = { logits: [tokens, experts] };

  test("switchBalance: the counts are constants", async () => {
    await compare({
      shapes,
      forward: ({ logits }, e) =>
        switchBalance({ probabilities: softmax(logits), experts: ids(e, chosen, [tokens, k]) }),
      oracle: ({ logits }) => {
        const p = softmaxRows(logits, experts);
        let total = 0;
        for (let i = 0; i < experts; i++) {
          const count = chosen.filter((id) => id === i).length;
          const mean = p.filter((_, j) => j % experts === i).reduce((a, b) => a + b, 0) / tokens;
          total += (count / tokens) * mean;
        }
        return [total * experts];
      },
    });
  });

  test("sequenceBalance with padding and one empty sequence", async () => {
    const mask = [1, 1, 0, 1, 0, 1, 0, 0, 0];
    const ids3 = [...chosen, 0, 1, 2, 3, 0, 1];
    await compare({
      shapes: { scores: [9, experts] },
      values: { scores: noise(9 * experts, 3).map((x) => x + 1.5) },
      forward: ({ scores }, e) =>
        sequenceBalance({ scores, experts: ids(e, ids3, [9, k]), batch: 3, mask: floats(e, mask, [9]) }),
      oracle: ({ scores }) => {
        let total = 0;
        for (let b = 0; b < 2; b++) {
          const own = [0, 1, 2].map((s) => b * 3 + s).filter((t) => mask[t] === 1);
          for (let i = 0; i < experts; i++) {
            const count = own.flatMap((t) => ids3.slice(t * k, (t + 1) * k)).filter((id) => id === i).length;
            const share = own.map((t) => {
              const row = scores.slice(t * experts, (t + 1) * experts);
              return (row[i] ?? 0) / row.reduce((a, c) => a + c, 0);
            });
            const mean = share.reduce((a, c) => a + c, 0) / own.length;
            total += ((experts / (k * own.length)) * count * mean) / 2;
          }
        }
        return [total];
      },
    });
  });

  test.each([false, true])("squaredCV, sample variance %s", async (sample) => {
    await compare({
      shapes: { x: [5] },
      values: { x: [1, 2, 0.5, 3, 1.5] },
      forward: ({ x }) => squaredCV(x, { sample }),
      oracle: ({ x }) => {
        const mean = x.reduce((a, b) => a + b, 0) / 5;
        const squares = x.reduce((a, b) => a + (b - mean) ** 2, 0);
        return [squares / (sample ? 4 : 5) / (mean * mean + 1e-10)];
      },
    });
  });

  test("tokenEntropy and entropyOfMean", async () => {
    const entropy = (p: readonly number[]) => p.reduce((total, x) => total - x * Math.log(x), 0);
    const rowsOf = (p: readonly number[]) =>
      Array.from({ length: tokens }, (_, t) => p.slice(t * experts, (t + 1) * experts));
    await compare({
      shapes,
      forward: ({ logits }) => tokenEntropy(softmax(logits)),
      oracle: ({ logits }) => [rowsOf(softmaxRows(logits, experts)).reduce((sum, r) => sum + entropy(r), 0) / tokens],
    });
    await compare({
      shapes,
      forward: ({ logits }) => entropyOfMean(softmax(logits)),
      oracle: ({ logits }) => {
        const rows = rowsOf(softmaxRows(logits, experts));
        return [entropy(Array.from({ length: experts }, (_, i) => rows.reduce((a, r) => a + (r[i] ?? 0), 0) / tokens))];
      },
    });
  });
});

test("values at uniform routing: 1 (Switch and GShard), k (Mixtral), ln E (entropies)", async () => {
  const e = float64();
  const logits = floats(e, new Array(16).fill(0), [4, 4]);
  const probabilities = softmax(logits);
  const even = ids(e, [0, 1, 2, 3], [4, 1]);
  close(await numbers(switchBalance({ probabilities, experts: even })), [1]);
  close(await numbers(gshardBalance({ probabilities, experts: even, scaled: true })), [1]);
  close(await numbers(gshardBalance({ probabilities, experts: even })), [1 / 16]);
  close(await numbers(mixtralBalance([logits, logits], { k: 3 })), [3]);
  close(await numbers(sequenceBalance({ scores: probabilities, experts: even, batch: 1 })), [1]);
  close(await numbers(tokenEntropy(probabilities)), [Math.log(4)]);
  close(await numbers(entropyOfMean(probabilities)), [Math.log(4)]);
});

test("a probability of exactly 0 has entropy 0 and a finite gradient", async () => {
  const e = float64();
  const p = watch(autodiff(e), floats(e, [1, 0, 0.5, 0.5], [2, 2]));
  const entropy = tokenEntropy(p);
  close(await numbers(entropy), [Math.log(2) / 2]);
  expect((await numbers(grad(entropy, p))).every(Number.isFinite)).toBe(true);
});

test("sizes that do not fit are refused", () => {
  const e = float64();
  const p = floats(e, noise(8), [4, 2]);
  expect(() => switchBalance({ probabilities: p, experts: ids(e, [0, 1], [2, 1]) })).toThrow(ShapeError);
  expect(() => zLoss(p, floats(e, [1, 1], [2]))).toThrow(/mask is f32 \[2\], expected \[4\]/);
  expect(() => mixtralBalance([], { k: 1 })).toThrow(/no layers/);
  expect(() => sequenceBalances({ scores: p, experts: ids(e, [0, 1, 0, 1], [4, 1]), batch: 3 })).toThrow(
    /4 tokens do not split into 3/,
  );
});
