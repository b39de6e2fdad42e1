// Whole experts: blocks of no, few and many rows in one call, storage types, a bound. Oracle: each token by itself, in float64.
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { type WasmBackend, wasm } from "../backend.ts";
import { call, converted, f32, type Host, ints, uniform, worst } from "../call.test-util.ts";

const silu = (x: number): number => x / (1 + Math.exp(-x));

function oracle(hidden: Host, gateUp: Host, down: Host, ids: Host, weights: Host): Float64Array {
  const [tokens, width] = hidden.shape as readonly [number, number];
  const [count, twice] = gateUp.shape as readonly [number, number];
  const k = ids.shape[1] ?? 0;
  const units = twice / 2;
  const y = new Float64Array(tokens * width);
  for (let slot = 0; slot < tokens * k; slot++) {
    const [t, e] = [Math.floor(slot / k), Number(ids.data[slot])];
    if (e < 0 || e >= count) continue;
    const row = (m: number): number => {
      let sum = 0;
      for (let c = 0; c < width; c++)
        sum += Number(hidden.data[t * width + c]) * Number(gateUp.data[(e * twice + m) * width + c]);
      return sum;
    };
    const inner = Array.from({ length: units }, (_, u) => silu(row(u)) * row(units + u));
    for (let c = 0; c < width; c++) {
      const sum = inner.reduce((s, x, u) => s + x * Number(down.data[(e * width + c) * units + u]), 0);
      y[t * width + c] = (y[t * width + c] ?? 0) + Number(weights.data[slot]) * sum;
    }
  }
  return y;
}

describe.each(["relaxed", "plain"] as const)("moeExperts, %s", (variant) => {
  let backend: WasmBackend;
  beforeAll(async () => {
    backend = await wasm({ threads: 1, variant });
  });
  afterAll(() => backend.dispose());

  // Expert 0: most tokens; 1: a few; 2: none; 3: one. Some slots are empty or name no expert.
  const tokens = 67;
  const ids = ints(
    Array.from({ length: tokens }, (_, t) => [t === 5 ? -1 : 0, t % 9 === 0 ? 1 : t === 31 ? 3 : 4]).flat(),
    tokens,
    2,
  );
  const weights = uniform(4, tokens, 2);

  it.each([
    [33, 71],
    [264, 130],
    [1, 1],
    [8, 4],
  ])("width %i, %i hidden units", (width, units) => {
    const [hidden, gateUp, down] = [
      uniform(1, tokens, width),
      uniform(2, 4, 2 * units, width),
      uniform(3, 4, width, units),
    ];
    const [y] = call(backend, "moeExperts", [hidden, gateUp, down, ids, weights], [f32(tokens, width)]);
    expect(worst(y ?? [], oracle(hidden, gateUp, down, ids, weights))).toBeLessThan(3e-6);
  });

  it("weights in bf16 give what their f32 copies give", () => {
    const [hidden, gateUp, down] = [uniform(1, tokens, 40), uniform(2, 4, 48, 40), uniform(3, 4, 40, 24)];
    const small = [gateUp, down].map((w) => converted(backend, w, "bf16"));
    const wide = small.map((w) => ({
      ...f32(...w.shape),
      data: call(backend, "cast", [w], [f32(...w.shape)], { dtype: "f32" })[0] as Float32Array,
    }));
    const run = ([g, d]: readonly Host[]) =>
      call(backend, "moeExperts", [hidden, g as Host, d as Host, ids, weights], [f32(tokens, 40)])[0];
    expect(run(small)).toEqual(run(wide));
  });

  it("no token at all", () => {
    const [y] = call(
      backend,
      "moeExperts",
      [uniform(1, 0, 8), uniform(2, 4, 6, 8), uniform(3, 4, 8, 3), ints([], 0, 2), uniform(4, 0, 2)],
      [f32(0, 8)],
    );
    expect(y?.length).toBe(0);
  });

  it("a block is computed alike whatever stands beside it", () => {
    const [hidden, gateUp, down] = [uniform(1, tokens, 40), uniform(2, 4, 48, 40), uniform(3, 4, 40, 24)];
    const one = weights.data.map((_, i) => (i % 2 ? 0 : 1));
    const first = { ...weights, data: one };
    const only = ints(
      ids.data.map((id, i) => (i % 2 ? -1 : id)),
      tokens,
      2,
    );
    const run = (which: Host) =>
      call(backend, "moeExperts", [hidden, gateUp, down, which, first], [f32(tokens, 40)])[0];
    expect(run(only)).toEqual(run(ids));
  });
});
