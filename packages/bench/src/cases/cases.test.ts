// Every case computes what it says, on the reference backend at small sizes, and leaves nothing alive.
import { engine } from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import { describe, expect, it } from "vitest";
import { relativeError, type Workload } from "../harness.ts";
import { noise, noiseIds } from "./data.ts";
import { denseProduct, productData } from "./dense-product.ts";
import { denseLayer, type LayerCase, layerData, layerDispatch, moeLayer } from "./moe-layer.ts";
import { languageModelData, trainingStep } from "./training-step.ts";

const read = async (workload: Workload): Promise<ArrayLike<number>> => {
  const y = workload.run();
  const data = await y.data();
  y.dispose();
  return data;
};

describe("data", () => {
  it("is the same every time, spread over its range, and differs by seed", () => {
    expect(noise(5, 1)).toEqual(noise(5, 1));
    expect(noise(5, 1)).not.toEqual(noise(5, 2));
    const x = noise(10_000, 3, 2);
    const mean = x.reduce((a, b) => a + b, 0) / x.length;
    expect(Math.abs(mean)).toBeLessThan(0.05);
    expect(Math.max(...x)).toBeGreaterThan(1.9);
    const ids = noiseIds(1000, 1, 7);
    expect(new Set(ids)).toEqual(new Set([0, 1, 2, 3, 4, 5, 6]));
  });
});

describe("matmul", () => {
  it("is x wᵀ", async () => {
    const host = engine(cpu({ precision: 64 }));
    const one = { tokens: 3, inner: 5, outer: 7 };
    const workload = denseProduct.setup(host, one);
    const { x, w } = productData(one);
    const expected = Array.from({ length: 21 }, (_, at) => {
      let sum = 0;
      for (let p = 0; p < 5; p++) sum += (x[Math.floor(at / 7) * 5 + p] as number) * (w[(at % 7) * 5 + p] as number);
      return sum;
    });
    expect(relativeError(await read(workload), expected)).toBeLessThan(1e-14);
    expect(workload).toMatchObject({ flops: 210, bytes: 4 * (15 + 35 + 21) });
    workload.dispose();
    expect(host.live()).toBe(0);
  });
});

/** Softmax over all experts, the k largest renormalised, SwiGLU experts: one token and one expert at a time. */
const naiveLayer = (one: LayerCase): number[] => {
  const { experts, width, hidden, k, tokens } = one;
  const { x, logits, gateUp, down } = layerData(one);
  const y = new Array<number>(tokens * width).fill(0);
  for (let t = 0; t < tokens; t++) {
    const row = Array.from(logits.subarray(t * experts, (t + 1) * experts));
    const chosen = row.map((_, e) => e).sort((a, b) => (row[b] as number) - (row[a] as number));
    const weights = chosen.slice(0, k).map((e) => Math.exp(row[e] as number));
    const total = weights.reduce((a, b) => a + b, 0);
    for (const [j, e] of chosen.slice(0, k).entries()) {
      const dot = (at: number): number => {
        let sum = 0;
        for (let i = 0; i < width; i++)
          sum += (gateUp[(e * 2 * hidden + at) * width + i] as number) * (x[t * width + i] as number);
        return sum;
      };
      const inner = Array.from({ length: hidden }, (_, h) => {
        const gate = dot(h);
        return (gate / (1 + Math.exp(-gate))) * dot(hidden + h);
      });
      for (let i = 0; i < width; i++) {
        let sum = 0;
        for (let h = 0; h < hidden; h++) sum += (down[(e * width + i) * hidden + h] as number) * (inner[h] as number);
        y[t * width + i] = (y[t * width + i] as number) + ((weights[j] as number) / total) * sum;
      }
    }
  }
  return y;
};

describe("moe", () => {
  const one: LayerCase = { layer: "tiny", experts: 5, width: 6, hidden: 3, k: 2, tokens: 7 };

  it.each([
    ["sparse", moeLayer],
    ["dense", denseLayer],
  ])("%s evaluation is the layer's function", async (_, benchmark) => {
    const host = engine(cpu({ precision: 64 }));
    const workload = benchmark.setup(host, one);
    expect(relativeError(await read(workload), naiveLayer(one))).toBeLessThan(1e-12);
    workload.dispose();
    expect(host.live()).toBe(0);
  });

  it("counts the operations of the experts each one runs", () => {
    const host = engine(cpu());
    expect(moeLayer.setup(host, one).flops).toBe(2 * 3 * 6 * 3 * 2 * 7);
    expect(denseLayer.setup(host, one).flops).toBe(2 * 3 * 6 * 3 * 5 * 7);
  });

  it("dispatch alone puts every row back where it came from", async () => {
    const host = engine(cpu({ precision: 64 }));
    const workload = layerDispatch.setup(host, one);
    expect(relativeError(await read(workload), layerData(one).x)).toBeLessThan(1e-12);
    workload.dispose();
    expect(host.live()).toBe(0);
  });
});

describe("training", () => {
  const one = { layers: 2, width: 8, heads: 2, experts: 3, hidden: 4, k: 2, vocabulary: 11, batch: 2, sequence: 5 };

  it("learns its batch, and every step frees what it made", async () => {
    const host = engine(cpu());
    const workload = trainingStep.setup(host, one);
    const start = host.live();
    const losses: number[] = [];
    for (let step = 0; step < 20; step++) {
      losses.push((await read(workload))[0] as number);
      expect(host.live()).toBe(start);
    }
    expect(losses[0]).toBeCloseTo(Math.log(11), 1); // nothing is known yet
    expect(losses.at(-1)).toBeLessThan((losses[0] as number) - 0.05);
    workload.dispose();
    expect(host.live()).toBe(0);
  });

  it("has the model's parameters, and tokens of its vocabulary", () => {
    const { params, ids, labels } = languageModelData(one);
    expect(Object.keys(params)).toHaveLength(1 + 2 * 9 + 2);
    expect(params["1.gateUp"]?.shape).toEqual([3, 8, 8]);
    for (const id of [...ids, ...labels]) expect(id >= 0 && id < 11).toBe(true);
  });
});
