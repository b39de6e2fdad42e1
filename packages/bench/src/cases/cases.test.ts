// Every case computes what it says, on the reference backend at small sizes, and leaves nothing alive.
import { type Engine, engine } from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import type { Plan, RouterInput, RouterPlugin } from "@switchyard/core/moe";
import { wasm } from "@switchyard/kernels/wasm";
import { describe, expect, it } from "vitest";
import { type Benchmark, compare, contender, relativeError, type Workload } from "../harness.ts";
import { noise, noiseIds } from "./data.ts";
import {
  decodeCase,
  decodeData,
  decodeLayer,
  decodeLayerData,
  decodeProduct,
  decodeRow,
  weightFormats,
} from "./decode.ts";
import { denseProduct, productData } from "./dense-product.ts";
import { groupedData, groupedProduct, loadSizes } from "./grouped-product.ts";
import { layerGradientsData, moeLayerGradients } from "./moe-gradients.ts";
import { denseLayer, type LayerCase, layerData, layerDispatch, moeLayer } from "./moe-layer.ts";
import { identityExperts, routing } from "./routing.ts";
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
const naiveLayer = (one: LayerCase, { x, logits, gateUp, down } = layerData(one)): number[] => {
  const { experts, width, hidden, k, tokens } = one;
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

describe("moe gradients", () => {
  const one: LayerCase = { layer: "tiny", experts: 5, width: 6, hidden: 3, k: 2, tokens: 7 };
  const names = ["x", "logits", "gateUp", "down"] as const;

  it("are what differences of the layer's function say", async () => {
    const host = engine(cpu({ precision: 64 }));
    const workload = moeLayerGradients.setup(host, one);
    const start = host.live();
    const gradients = workload.outputs?.() ?? [];
    expect(gradients.map(({ shape }) => shape)).toEqual([
      [7, 6],
      [7, 5],
      [5, 6, 6],
      [5, 6, 3],
    ]);
    const data = layerGradientsData(one);
    const loss = (name: (typeof names)[number], at: number, by: number): number => {
      const moved = { ...data, [name]: Float64Array.from(data[name], (value, i) => (i === at ? value + by : value)) };
      return naiveLayer(one, moved).reduce((total, y, i) => total + y * (data.dy[i] as number), 0);
    };
    for (const [i, name] of names.entries()) {
      const found = await gradients[i]?.data();
      const size = found?.length ?? 0;
      for (let at = 0; at < size; at += Math.ceil(size / 11)) {
        const expected = (loss(name, at, 1e-5) - loss(name, at, -1e-5)) / 2e-5;
        expect(found?.[at], `${name}[${at}]`).toBeCloseTo(expected, 7);
      }
    }
    for (const gradient of gradients) gradient.dispose();
    expect(host.live()).toBe(start);
    workload.run().dispose();
    expect(host.live()).toBe(start);
    workload.dispose();
    expect(host.live()).toBe(0);
    expect(workload.flops).toBe(3 * moeLayer.setup(engine(cpu()), one).flops);
  });
});

describe("grouped products", () => {
  it("loads: all alike, or falling with one expert empty, and no row lost", () => {
    expect(loadSizes(12, 4, "balanced")).toEqual([3, 3, 3, 3]);
    expect(loadSizes(7, 3, "balanced").reduce((a, b) => a + b, 0)).toBe(7);
    const skewed = loadSizes(2048, 8, "skewed");
    expect(skewed.reduce((a, b) => a + b, 0)).toBe(2048);
    expect(skewed.toSorted((a, b) => b - a)).toEqual([790, 395, 263, 198, 158, 131, 113, 0]);
    expect(loadSizes(5, 1, "skewed")).toEqual([5]);
    expect(loadSizes(0, 3, "skewed")).toEqual([0, 0, 0]);
  });

  it.each(["balanced", "skewed"] as const)("%s: each row meets its own expert", async (load) => {
    const one = { experts: 4, rows: 11, inner: 5, outer: 3, load };
    const host = engine(cpu({ precision: 64 }));
    const workload = groupedProduct.setup(host, one);
    const { rows, w, ends } = groupedData(one);
    const expected = Array.from({ length: 33 }, (_, at) => {
      const row = Math.floor(at / 3);
      const e = ends.findIndex((end) => row < end);
      let sum = 0;
      for (let p = 0; p < 5; p++) sum += (rows[row * 5 + p] as number) * (w[(e * 3 + (at % 3)) * 5 + p] as number);
      return sum;
    });
    expect(relativeError(await read(workload), expected)).toBeLessThan(1e-14);
    expect(workload.flops).toBe(2 * 11 * 5 * 3);
    workload.dispose();
    expect(host.live()).toBe(0);
  });
});

describe("decode", () => {
  it("sizes cases by their bytes", () => {
    expect(decodeCase("f32", 128, 5120)).toEqual({ weights: "f32", inner: 128, outer: 10 });
    expect(decodeCase("int4", 128, 680)).toEqual({ weights: "int4", inner: 128, outer: 10 });
    expect(decodeCase("mxfp4", 128, 680).outer).toBe(10);
    expect(decodeCase("f32", 4096, 1).outer).toBe(1);
  });

  it.each(weightFormats)("%s products are those of the weights that its bits stand for", async (weights) => {
    const host = engine(cpu({ precision: 64 }));
    const one = { weights, inner: 256, outer: 5 };
    const workload = decodeProduct.setup(host, one);
    const data = decodeData(one);
    const expected = Array.from({ length: 5 }, (_, row) => decodeRow(one, data, row));
    expect(Math.max(...expected.map(Math.abs))).toBeGreaterThan(0.01);
    expect(relativeError(await read(workload), expected)).toBeLessThan(1e-6);
    expect(workload.bytes).toBe(data.stored.byteLength + (data.scales?.byteLength ?? 0));
    workload.dispose();
    expect(host.live()).toBe(0);
  });

  it("the layer's tokens use every expert once and give what they give together", async () => {
    const one: LayerCase = { layer: "tiny", experts: 6, width: 4, hidden: 3, k: 2, tokens: 3 };
    const host = engine(cpu({ precision: 64 }));
    const workload = decodeLayer.setup(host, one);
    const data = decodeLayerData(one);
    const best = (token: number): number[] => {
      const row = [...data.logits.subarray(6 * token, 6 * token + 6)];
      return row.flatMap((logit, e) => (logit > 5 ? [e] : []));
    };
    expect([0, 1, 2].map(best)).toEqual([
      [0, 1],
      [2, 3],
      [4, 5],
    ]);
    expect(relativeError(await read(workload), naiveLayer(one, data))).toBeLessThan(1e-6);
    workload.dispose();
    expect(host.live()).toBe(0);
  });
});

describe("on the WebAssembly backend", () => {
  it.each([
    ["gradients", moeLayerGradients, { layer: "A", experts: 5, width: 16, hidden: 8, k: 2, tokens: 9 }],
    ["grouped", groupedProduct, { experts: 4, rows: 33, inner: 16, outer: 12, load: "skewed" }],
    ["decode layer", decodeLayer, { layer: "A", experts: 6, width: 16, hidden: 8, k: 2, tokens: 3 }],
    ...weightFormats.map((weights) => [weights, decodeProduct, { weights, inner: 256, outer: 33 }] as const),
  ] as const)("%s computes the same as the reference", async (_, benchmark, one) => {
    const setup = (on: Engine): Workload => (benchmark as Benchmark<typeof one>).setup(on, one);
    const backend = await wasm({ threads: 1 });
    const { entries } = await compare(
      [{ name: "reference", open: () => contender("reference", setup(engine(cpu()))) }],
      [{ name: "wasm", open: () => contender("wasm", setup(engine(backend))) }],
      { tolerance: 1e-5, repetitions: 1, minimumSeconds: 0, pauseSeconds: 0 },
    );
    backend.dispose();
    expect(entries.map(({ failed }) => failed)).toEqual([undefined, undefined]);
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

describe("routing", () => {
  const plugin = (plan: (input: RouterInput) => Plan): RouterPlugin => ({
    name: "halves",
    causal: { training: true, evaluation: true },
    needs: ["tokenIds", "attention", "modalityIds"],
    plans: ["sparse", "expert-choice", "merge"],
    init: () => ({ params: {}, buffers: {}, route: (_, input) => ({ plan: plan(input), losses: {} }) }),
  });
  const size = { experts: 3, width: 4, tokens: 5 };
  const x = noise(20, 1);

  it("gives every token back, weighted as the plan says, whatever its kind", async () => {
    const host = engine(cpu({ precision: 64 }));
    const ids = Int32Array.of(0, 1, 2, 2, 0, 1, 1, -1, -1, -1);
    const plans: readonly ((input: RouterInput) => Plan)[] = [
      ({ hidden: { engine: on } }) => ({
        kind: "sparse",
        experts: on.tensor(ids, [5, 2]),
        weights: on.tensor(new Float64Array(10).fill(0.5), [5, 2]),
      }),
      ({ hidden: { engine: on } }) => ({
        kind: "merge",
        groups: on.tensor(new Int32Array(5), [5]),
        coefficients: [on.tensor(Float64Array.of(1, 0, 0), [1, 3])],
      }),
    ];
    const shares = [
      [1, 1, 1, 0.5, 0],
      [1, 1, 1, 1, 1],
    ];
    for (const [i, plan] of plans.entries()) {
      const workload = routing(host, { ...size, router: plugin(plan) });
      const expected = Array.from(x, (value, at) => value * (shares[i]?.[Math.floor(at / 4)] ?? 0));
      for (let run = 0; run < 2; run++) expect(relativeError(await read(workload), expected)).toBeLessThan(1e-12);
      workload.dispose();
      expect(host.live()).toBe(0);
    }
    expect(identityExperts(3).count).toBe(3);
  });

  it("hands the router token ids, modalities and a causal attention whose rows sum to 1", async () => {
    const host = engine(cpu({ precision: 64 }));
    const seen: { tokenIds: number; modalityIds: number; attention: number[] }[] = [];
    const workload = routing(host, {
      ...size,
      router: plugin((input) => {
        const rows = input.attention?.();
        seen.push({
          tokenIds: input.tokenIds?.size ?? 0,
          modalityIds: input.modalityIds?.size ?? 0,
          attention: [...(rows?.shape ?? [])],
        });
        const { engine: on } = input.hidden;
        return { kind: "dense", weights: on.tensor(new Float64Array(15).fill(1 / 3), [5, 3]) };
      }),
    });
    expect(relativeError(await read(workload), x)).toBeLessThan(1e-12);
    expect(seen).toEqual([{ tokenIds: 5, modalityIds: 5, attention: [1, 8, 5, 5] }]);
    workload.dispose();
    expect(host.live()).toBe(0);
  });
});
