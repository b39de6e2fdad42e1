// Attention over several blocks of keys, groups of heads, windows, padding and odd widths, forward and backward. Oracle: the formula in float64.
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { type WasmBackend, wasm } from "../backend.ts";
import { call, f32, floats, type Host, uniform, worst } from "../call.test-util.ts";

interface Case {
  readonly batch: number;
  readonly sequence: number;
  readonly total: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly d: number;
  readonly dv: number;
  readonly causal: boolean;
  readonly window?: number;
  /** How many keys at the front are padding, per batch row. */
  readonly padding?: readonly number[];
}

const cases: readonly Case[] = [
  { batch: 2, sequence: 19, total: 19, heads: 4, kvHeads: 2, d: 5, dv: 7, causal: true },
  { batch: 1, sequence: 3, total: 1_100, heads: 6, kvHeads: 2, d: 16, dv: 16, causal: true },
  { batch: 1, sequence: 37, total: 530, heads: 1, kvHeads: 1, d: 9, dv: 3, causal: true, window: 11 },
  { batch: 2, sequence: 40, total: 150, heads: 2, kvHeads: 2, d: 8, dv: 8, causal: false, padding: [0, 131] },
  { batch: 2, sequence: 1, total: 6, heads: 3, kvHeads: 1, d: 1, dv: 1, causal: true, padding: [6, 2] },
  { batch: 1, sequence: 300, total: 300, heads: 1, kvHeads: 1, d: 4, dv: 12, causal: false, window: 40 },
];
const label = (c: Case): string => JSON.stringify(c).replaceAll('"', "");

function inputs(c: Case): { q: Host; k: Host; v: Host; mask?: Host; dout: Host } {
  const { batch, sequence, total, heads, kvHeads, d, dv, padding } = c;
  const mask =
    padding &&
    floats(
      padding.flatMap((n) => Array.from({ length: total }, (_, j) => (j < n ? 0 : 1))),
      batch,
      total,
    );
  return {
    q: uniform(1, batch, sequence, heads, d),
    k: uniform(2, batch, total, kvHeads, d),
    v: uniform(3, batch, total, kvHeads, dv),
    dout: uniform(4, batch, sequence, heads, dv),
    ...(mask ? { mask } : {}),
  };
}

const scale = 0.7;

/** Everything from the definition; gradients by the chain rule through the softmax, row by row. */
function oracle(c: Case): Record<"out" | "lse" | "p" | "dq" | "dk" | "dv", Float64Array> {
  const { batch, sequence, total, heads, kvHeads, d, causal, window } = c;
  const { q, k, v, mask, dout } = inputs(c);
  const width = c.dv;
  const out = new Float64Array(batch * sequence * heads * width);
  const lse = new Float64Array(batch * heads * sequence);
  const all = new Float64Array(lse.length * total);
  const [dq, dk, dv] = [q, k, v].map((x) => new Float64Array(x.data.length)) as [
    Float64Array,
    Float64Array,
    Float64Array,
  ];
  const add = (to: Float64Array, i: number, x: number): void => {
    to[i] = (to[i] ?? 0) + x;
  };
  const n = (x: Host, i: number): number => Number(x.data[i]);
  for (let b = 0; b < batch; b++) {
    for (let h = 0; h < heads; h++) {
      const kv = Math.floor(h / (heads / kvHeads));
      for (let i = 0; i < sequence; i++) {
        const position = total - sequence + i;
        const qi = ((b * sequence + i) * heads + h) * d;
        const oi = ((b * sequence + i) * heads + h) * width;
        const row = (b * heads + h) * sequence + i;
        const key = (j: number): number => (b * total + j) * kvHeads + kv;
        const s = Array.from({ length: total }, (_, j) => {
          if ((causal && j > position) || (window && position - j >= window) || (mask && n(mask, b * total + j) === 0))
            return Number.NEGATIVE_INFINITY;
          let dot = 0;
          for (let e = 0; e < d; e++) dot += n(q, qi + e) * n(k, key(j) * d + e);
          return dot * scale;
        });
        const top = Math.max(...s);
        const sum = top === Number.NEGATIVE_INFINITY ? 0 : s.reduce((t, x) => t + Math.exp(x - top), 0);
        lse[row] = sum === 0 ? Number.NEGATIVE_INFINITY : top + Math.log(sum);
        const p = s.map((x) => (sum === 0 ? 0 : Math.exp(x - top) / sum));
        const dp = p.map((x, j) => {
          all[row * total + j] = x;
          let dot = 0;
          for (let e = 0; e < width; e++) {
            add(out, oi + e, x * n(v, key(j) * width + e));
            add(dv, key(j) * width + e, x * n(dout, oi + e));
            dot += n(dout, oi + e) * n(v, key(j) * width + e);
          }
          return dot;
        });
        const mean = p.reduce((t, x, j) => t + x * (dp[j] ?? 0), 0);
        p.forEach((x, j) => {
          const ds = x * ((dp[j] ?? 0) - mean) * scale;
          for (let e = 0; e < d; e++) {
            add(dq, qi + e, ds * n(k, key(j) * d + e));
            add(dk, key(j) * d + e, ds * n(q, qi + e));
          }
        });
      }
    }
  }
  return { out, lse, p: all, dq, dk, dv };
}

describe.each(["relaxed", "plain"] as const)("attention, %s", (variant) => {
  let backend: WasmBackend;
  beforeAll(async () => {
    backend = await wasm({ threads: 1, variant });
  });
  afterAll(() => backend.dispose());

  it.each(cases.map((c) => [label(c), c] as const))("%s", (_, c) => {
    const { batch, sequence, total, heads, causal, window, dv: width } = c;
    const { q, k, v, mask, dout } = inputs(c);
    const attrs = { causal, scale, ...(window ? { window } : {}) };
    const expected = oracle(c);
    const specs = [f32(batch, sequence, heads, width), f32(batch, heads, sequence), f32(batch, heads, sequence, total)];
    const given = mask ? [q, k, v, mask] : [q, k, v];
    const [out, lse, p] = call(backend, "attention", given, specs, { ...attrs, probabilities: true });
    expect(worst(out ?? [], expected.out)).toBeLessThan(3e-6);
    expect(worst(lse ?? [], expected.lse)).toBeLessThan(3e-6);
    expect(worst(p ?? [], expected.p)).toBeLessThan(3e-6);
    const forward = [out, lse].map((data, i) => ({ ...(specs[i] ?? f32()), data: data ?? new Float32Array() }));
    const grads = call(backend, "attentionGrad", [...given, ...forward, dout], [q, k, v], {
      ...attrs,
      mask: mask !== undefined,
    });
    for (const [i, name] of (["dq", "dk", "dv"] as const).entries()) {
      expect(worst(grads[i] ?? [], expected[name]), name).toBeLessThan(1e-5);
    }
  });

  it("brings out NaN instead of hiding it", () => {
    const q = uniform(1, 1, 2, 1, 4);
    q.data[0] = Number.NaN;
    const [out, lse] = call(
      backend,
      "attention",
      [q, uniform(2, 1, 2, 1, 4), uniform(3, 1, 2, 1, 4)],
      [f32(1, 2, 1, 4), f32(1, 1, 2)],
      { causal: false, scale },
    );
    expect(Array.from(out ?? []).map(Number.isNaN)).toEqual([true, true, true, true, false, false, false, false]);
    expect(Array.from(lse ?? []).map(Number.isNaN)).toEqual([true, false]);
  });

  it("refuses heads that do not fit its working memory", () => {
    const wide = [f32(1, 1, 1, 4_096), f32(1, 1, 1, 4_096), f32(1, 1, 1, 4_096)];
    expect(backend.kernels.attentionGrad?.unsupported?.(wide, { causal: true, scale })).toBe(
      "heads of 4096 channels are too wide",
    );
    expect(
      backend.kernels.attention?.unsupported?.([f32(1, 1, 1, 128), f32(1, 1, 1, 128), f32(1, 1, 1, 128)], {}),
    ).toBeUndefined();
  });
});
