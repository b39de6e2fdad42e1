// The shared suite on every build and both ways of running; then what is special to this backend.
import { adamwOp, engine } from "@switchyard/core";
import { testBackend } from "@switchyard/testing";
import { describe, expect, it } from "vitest";
import { create, wasm } from "./backend.ts";

testBackend({ name: "wasm relaxed, 1 thread", backend: () => wasm({ threads: 1, variant: "relaxed" }) });
testBackend({ name: "wasm plain, 1 thread", backend: () => wasm({ threads: 1, variant: "plain" }) });
// Every job is shared, however small.
testBackend({ name: "wasm relaxed, 3 threads", backend: () => create({ threads: 3, variant: "relaxed" }, 0) });
testBackend({ name: "wasm plain, 2 threads", backend: () => create({ threads: 2, variant: "plain" }, 0) });

describe("kernels", () => {
  // Core falls back to smaller ops silently: what is lost by a misspelt name shows only as time.
  const fused = [
    ["sub", "div", "affine", "relu", "sigmoid", "silu", "softplus", "gelu", "reluGrad", "siluGrad", "geluGrad"],
    ["swiglu", "swigluGrad", "linear", "softmax", "softmaxGrad", "logSoftmax", "logSoftmaxGrad", "logSumExp"],
    ["rmsNorm", "rmsNormGrad", "layerNorm", "layerNormGrad", "rope", "crossEntropy", "crossEntropyGrad"],
    ["attention", "attentionGrad", "gatherLast", "scatterLast", "softmaxTopk", "dispatch", "groupedMatmul"],
    ["groupedOuter", "combineRows", "combineRowsGrad", "moeExperts", "sumSquares", "adamw", "sgd"],
    ["dequantize", "quantizedLinear", "quantizedGroupedMatmul"],
  ].flat();
  it("serve every fused op of core", async () => {
    const backend = await wasm({ threads: 1 });
    expect(fused.filter((name) => backend.kernels[name] === undefined)).toEqual([]);
    backend.dispose();
  });

  it("take over storage that was given away, without new memory", async () => {
    const backend = await wasm({ threads: 1 });
    const on = engine(backend);
    const zeros = () => on.tensor(new Float32Array(1_000), [1_000]);
    const [p, g, m, v, scale] = [zeros(), zeros(), zeros(), zeros(), on.tensor(Float32Array.of(1), [])];
    const used = backend.memory().used;
    const attrs = { lr: 1, beta1: 0.5, beta2: 0.5, eps: 1, weightDecay: 0, correction1: 0.5, correction2: 0.5 };
    const results = on.run(adamwOp, [on.give(p), g, on.give(m), on.give(v), scale], attrs);
    expect(backend.memory().used).toBe(used);
    for (const x of [...results, g, scale]) x.dispose();
    expect([on.live(), backend.memory().used]).toEqual([0, used - 4 * 4_032 - 64]);
    backend.dispose();
  });
});
