// One linear layer, y = x wᵀ: the product every other figure is made of. One token shows memory, many show arithmetic.
import { cast, linear } from "@switchyard/core";
import type { Benchmark } from "../harness.ts";
import { noise } from "./data.ts";

export interface ProductCase {
  readonly tokens: number;
  readonly inner: number;
  readonly outer: number;
  /** Storage type of the weights; default f32. */
  readonly weights?: "f32" | "bf16";
}

/** x [tokens, inner] and w [outer, inner], row-major. */
export const productData = ({ tokens, inner, outer }: ProductCase): { x: Float32Array; w: Float32Array } => ({
  x: noise(tokens * inner, 1),
  w: noise(outer * inner, 2, Math.sqrt(3 / inner)),
});

export const denseProduct: Benchmark<ProductCase> = {
  name: "matmul",
  cases: [
    { tokens: 16, inner: 1024, outer: 4096 },
    { tokens: 256, inner: 1024, outer: 4096 },
    { tokens: 1024, inner: 1024, outer: 4096 },
    { tokens: 8, inner: 2048, outer: 768 },
  ],
  setup(engine, one) {
    const { tokens, inner, outer, weights = "f32" } = one;
    const data = productData(one);
    const x = engine.tensor(data.x, [tokens, inner]);
    const w = engine.scope(() => cast(engine.tensor(data.w, [outer, inner]), weights));
    return {
      run: () => linear(x, w), // [tokens, outer]
      flops: 2 * tokens * inner * outer,
      bytes: 4 * tokens * (inner + outer) + (weights === "bf16" ? 2 : 4) * inner * outer,
      dispose() {
        x.dispose();
        w.dispose();
      },
    };
  },
};

/** One-token products over weights far larger than any cache: the share of the memory's speed that reaches us. */
export const oneTokenProducts: readonly ProductCase[] = [
  { tokens: 1, inner: 4096, outer: 16384, weights: "f32" },
  { tokens: 1, inner: 4096, outer: 16384, weights: "bf16" },
];
