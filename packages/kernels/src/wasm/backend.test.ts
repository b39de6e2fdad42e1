// The shared suite on every build and both ways of running; then what is special to this backend.
import { open, readFile } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import { adamwOp, engine } from "@switchyard/core";
import { testBackend } from "@switchyard/testing";
import { describe, expect, it } from "vitest";
import { create, wasm } from "./backend.ts";

testBackend({ name: "wasm relaxed, 1 thread", backend: () => wasm({ threads: 1, variant: "relaxed" }) });
testBackend({ name: "wasm plain, 1 thread", backend: () => wasm({ threads: 1, variant: "plain" }) });
// Every job is shared, however small.
testBackend({ name: "wasm relaxed, 3 threads", backend: () => create({ threads: 3, variant: "relaxed" }, 0) });
testBackend({ name: "wasm plain, 2 threads", backend: () => create({ threads: 2, variant: "plain" }, 0) });

/** What a backend of so many threads has in use for itself. */
async function fresh(threads: number): Promise<{ readonly used: number }> {
  const backend = await wasm({ threads });
  const { used } = backend.memory();
  backend.dispose();
  return { used };
}

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

  for (const threads of [1, 2]) {
    it(`are written by the host in parts, while a read is under way and the memory grows, ${threads} thread(s)`, async () => {
      const backend = await wasm({ threads });
      const on = engine(backend);
      const file = fileURLToPath(import.meta.url);
      const expected = new Uint8Array(await readFile(file)).subarray(0, 1_000);
      const handle = await open(file);
      const room = on.room?.([10, 101], "u8");
      if (!room) return expect.fail("no room");
      expect(room.stays).toBe(true);
      expect(room.bytes().length).toBe(1_010);
      const reading = handle.read(room.bytes().subarray(10), 0, 1_000, 0);
      const held = backend.memory().held;
      const large = on.tensor(new Float32Array(held / 4), [held / 4]);
      expect(backend.memory().held).toBeGreaterThan(held);
      await reading;
      await handle.close();
      room.bytes().set(Array.from({ length: 10 }, (_, i) => i));
      expect([...(await room.tensor.data())]).toEqual([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...expected]);
      for (const x of [large, room.tensor]) x.dispose();
      expect([on.live(), backend.memory().used]).toEqual([0, (await fresh(threads)).used]);
      expect(() => room.bytes()).toThrow(/disposed/);
      backend.dispose();
    });
  }

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
