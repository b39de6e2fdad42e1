// The sparse layer forward and backward: its output, then the gradients of the hidden rows, the router's logits and all experts.
import { moeExperts, mul, softmaxTopk, sum, type Tensor, valueAndGrad } from "@switchyard/core";
import type { Benchmark } from "../harness.ts";
import { noise } from "./data.ts";
import { type LayerCase, layerData, layerFlops, moeLayer } from "./moe-layer.ts";

export interface LayerGradientsData extends ReturnType<typeof layerData> {
  /** Gradient of the layer's output, [tokens, width]. */
  readonly dy: Float32Array;
}
export const layerGradientsData = (one: LayerCase): LayerGradientsData => ({
  ...layerData(one),
  dy: noise(one.tokens * one.width, 5),
});

/** Each of the experts' products is done once forward and twice backward. */
export const layerGradientFlops = (one: LayerCase): number => 3 * layerFlops(one);

/** `run` gives the gradient of the hidden rows, the last that is computed; `outputs` all: x, logits, gateUp, down. */
export const moeLayerGradients: Benchmark<LayerCase> = {
  name: "moe-gradients",
  cases: moeLayer.cases,
  setup(engine, one) {
    const { experts, width, hidden, k, tokens } = one;
    const data = layerGradientsData(one);
    const params = {
      x: engine.tensor(data.x, [tokens, width]),
      logits: engine.tensor(data.logits, [tokens, experts]),
      gateUp: engine.tensor(data.gateUp, [experts, 2 * hidden, width]),
      down: engine.tensor(data.down, [experts, width, hidden]),
    };
    const dy = engine.tensor(data.dy, [tokens, width]);
    const gradients = (): typeof params =>
      valueAndGrad(({ x, logits, gateUp, down }) => {
        const { ids, weights } = softmaxTopk(logits, { k, order: "softmax-topk-renormalise" });
        return [sum(mul(moeExperts(x, { gateUp, down }, { ids, weights }), dy)), []];
      }, params).grads;
    const weights = experts * 3 * width * hidden;
    return {
      run: (): Tensor => engine.scope(() => gradients().x),
      outputs: () =>
        engine.scope(() => {
          const { x, logits, gateUp, down } = gradients();
          return [x, logits, gateUp, down];
        }),
      flops: layerGradientFlops(one),
      bytes: 4 * (3 * weights + 4 * tokens * width),
      dispose() {
        for (const x of [...Object.values(params), dy]) x.dispose();
      },
    };
  },
};
