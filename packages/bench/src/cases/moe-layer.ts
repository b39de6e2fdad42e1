// The sparse layer from router logits to combined output: choose k experts per token, sort, SwiGLU experts, combine.
import {
  combineRows,
  dispatch,
  type Engine,
  moeExperts,
  scatterLast,
  softmaxTopk,
  type Tensor,
  takeRows,
} from "@switchyard/core";
import type { Benchmark, Workload } from "../harness.ts";
import { noise } from "./data.ts";

export interface LayerSize {
  readonly experts: number;
  readonly width: number;
  /** Inner width of one expert. */
  readonly hidden: number;
  readonly k: number;
}
export interface LayerCase extends LayerSize {
  readonly layer: string;
  readonly tokens: number;
}

/** Few wide experts (Mixtral's shape, scaled down) and many narrow ones (OLMoE's). */
export const layers: { readonly A: LayerSize; readonly B: LayerSize } = {
  A: { experts: 8, width: 1024, hidden: 2048, k: 2 },
  B: { experts: 64, width: 1024, hidden: 512, k: 8 },
};
const cases = (tokens: readonly number[]): readonly LayerCase[] =>
  Object.entries(layers).flatMap(([layer, size]) => tokens.map((n) => ({ layer, ...size, tokens: n })));

/** hidden [tokens, width], logits [tokens, experts], gateUp [experts, 2 hidden, width], down [experts, width, hidden]. */
export const layerData = ({
  experts,
  width,
  hidden,
  tokens,
}: LayerCase): { x: Float32Array; logits: Float32Array; gateUp: Float32Array; down: Float32Array } => ({
  x: noise(tokens * width, 1),
  logits: noise(tokens * experts, 2, 2),
  gateUp: noise(experts * 2 * hidden * width, 3, Math.sqrt(3 / width)),
  down: noise(experts * width * hidden, 4, Math.sqrt(3 / hidden)),
});

/** Floating-point operations of the routed experts: three matrices per token and chosen expert. */
export const layerFlops = ({ width, hidden, k, tokens }: LayerCase): number => 2 * 3 * width * hidden * k * tokens;

interface LayerTensors {
  readonly x: Tensor;
  readonly logits: Tensor;
  readonly gateUp: Tensor;
  readonly down: Tensor;
}

const workload = (engine: Engine, one: LayerCase, share: number, run: (on: LayerTensors) => Tensor): Workload => {
  const { experts, width, hidden, k, tokens } = one;
  const data = layerData(one);
  const on: LayerTensors = {
    x: engine.tensor(data.x, [tokens, width]),
    logits: engine.tensor(data.logits, [tokens, experts]),
    gateUp: engine.tensor(data.gateUp, [experts, 2 * hidden, width]),
    down: engine.tensor(data.down, [experts, width, hidden]),
  };
  return {
    run: () => engine.scope(() => run(on)),
    flops: share * layerFlops(one),
    bytes: 4 * (Math.min(experts, share * tokens * k) * 3 * width * hidden + 2 * tokens * width),
    dispose() {
      for (const x of Object.values(on)) x.dispose();
    },
  };
};

const choose = (logits: Tensor, k: number) => softmaxTopk(logits, { k, order: "softmax-topk-renormalise" });

export const moeLayer: Benchmark<LayerCase> = {
  name: "moe",
  cases: cases([1, 16, 256, 1024]),
  setup: (engine, one) =>
    workload(engine, one, 1, ({ x, logits, gateUp, down }) => moeExperts(x, { gateUp, down }, choose(logits, one.k))),
};

/** The same function computed without sparsity: every expert on every token, weights 0 where not chosen. */
export const denseLayer: Benchmark<LayerCase> = {
  name: "moe-dense",
  cases: cases([256]).filter(({ layer }) => layer === "A"),
  setup(engine, one) {
    const { experts, tokens } = one;
    const everyone = Int32Array.from({ length: tokens * experts }, (_, i) => i % experts);
    const all = engine.tensor(everyone, [tokens, experts]);
    const layer = workload(engine, one, experts / one.k, ({ x, logits, gateUp, down }) => {
      const { weights, ids } = choose(logits, one.k);
      return moeExperts(x, { gateUp, down }, { ids: all, weights: scatterLast(weights, ids, experts) });
    });
    return {
      ...layer,
      dispose() {
        layer.dispose();
        all.dispose();
      },
    };
  },
};

/** Only what sparsity adds: choose, sort, gather, scatter, without the experts' products between. */
export const layerDispatch: Benchmark<LayerCase> = {
  name: "moe-dispatch",
  cases: cases([256, 1024]),
  setup: (engine, one) => ({
    ...workload(engine, one, 1, ({ x, logits }) => {
      const { weights, ids } = choose(logits, one.k);
      const { rows, slots } = dispatch(ids, { count: one.experts, bound: ids.size });
      return combineRows(takeRows(x, rows), weights, slots);
    }),
    flops: 0,
    bytes: 4 * one.tokens * one.width * (2 + 2 * one.k),
  }),
};
