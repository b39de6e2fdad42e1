// One training step of a small MoE language model: forward, backward and AdamW, in core's ops alone, so that other libraries can
// do exactly the same arithmetic. Pre-norm decoder, rope, causal attention, SwiGLU experts, untied head, mean cross-entropy.
import {
  add,
  attention,
  crossEntropy,
  embedding,
  linear,
  mean,
  moeExperts,
  reshape,
  rmsNorm,
  rope,
  softmaxTopk,
  type Tensor,
  valueAndGrad,
} from "@switchyard/core";
import { adamw } from "@switchyard/core/train";
import type { Benchmark } from "../harness.ts";
import { noise, noiseIds } from "./data.ts";

export interface LanguageModelCase {
  readonly layers: number;
  readonly width: number;
  readonly heads: number;
  readonly experts: number;
  readonly hidden: number;
  readonly k: number;
  readonly vocabulary: number;
  readonly batch: number;
  readonly sequence: number;
}

/** AdamW of all contenders; decay on every parameter. */
export const adamwOptions = { lr: 1e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, weightDecay: 0.1 } as const;
export const normEps = 1e-6;

export interface LanguageModelData {
  readonly params: Readonly<
    Record<string, { readonly shape: readonly number[]; readonly data: Float32Array<ArrayBuffer> }>
  >;
  /** [batch * sequence] */
  readonly ids: Int32Array<ArrayBuffer>;
  readonly labels: Int32Array<ArrayBuffer>;
  /** Rotary tables [sequence, width / heads / 2]. */
  readonly cos: Float32Array<ArrayBuffer>;
  readonly sin: Float32Array<ArrayBuffer>;
}

export function languageModelData(one: LanguageModelCase): LanguageModelData {
  const { layers, width, heads, experts, hidden, vocabulary, batch, sequence } = one;
  const params: Record<string, { shape: readonly number[]; data: Float32Array<ArrayBuffer> }> = {};
  let seed = 10;
  const matrix = (name: string, ...shape: number[]) => {
    const n = shape.reduce((product, size) => product * size, 1);
    params[name] = { shape, data: noise(n, seed++, 0.05) };
  };
  const ones = (name: string) => {
    params[name] = { shape: [width], data: new Float32Array(width).fill(1) };
  };
  matrix("embedding", vocabulary, width);
  for (let layer = 0; layer < layers; layer++) {
    ones(`${layer}.attentionNorm`);
    for (const name of ["q", "k", "v", "o"]) matrix(`${layer}.${name}`, width, width);
    ones(`${layer}.moeNorm`);
    matrix(`${layer}.router`, experts, width);
    matrix(`${layer}.gateUp`, experts, 2 * hidden, width);
    matrix(`${layer}.down`, experts, width, hidden);
  }
  ones("norm");
  matrix("head", vocabulary, width);
  const half = width / heads / 2;
  const angles = Float64Array.from(
    { length: sequence * half },
    (_, i) => Math.floor(i / half) * 10000 ** (-(i % half) / half),
  );
  return {
    params,
    ids: noiseIds(batch * sequence, 1, vocabulary),
    labels: noiseIds(batch * sequence, 2, vocabulary),
    cos: Float32Array.from(angles, Math.cos),
    sin: Float32Array.from(angles, Math.sin),
  };
}

/** Six per active matrix weight and token (forward 2, backward 4), and the causal half of attention's two products. */
export function trainingFlops(one: LanguageModelCase): number {
  const { layers, width, experts, hidden, k, vocabulary, batch, sequence } = one;
  const perLayer = 4 * width * width + experts * width + 3 * k * width * hidden + sequence * width;
  return 6 * batch * sequence * (layers * perLayer + vocabulary * width);
}

type Params = Readonly<Record<string, Tensor>>;

export const trainingStep: Benchmark<LanguageModelCase> = {
  name: "training",
  cases: [
    { layers: 4, width: 128, heads: 4, experts: 8, hidden: 128, k: 2, vocabulary: 2048, batch: 16, sequence: 128 },
  ],
  setup(engine, one) {
    const { layers, width, heads, k, batch, sequence } = one;
    const data = languageModelData(one);
    const names = Object.keys(data.params);
    const each = (make: (name: string) => Tensor): Params =>
      Object.fromEntries(names.map((name) => [name, make(name)]));
    const entry = (name: string) => data.params[name] as LanguageModelData["params"][string];
    const zeros = () => each((name) => engine.tensor(new Float32Array(entry(name).data.length), entry(name).shape));
    let state: { params: Params; m: Params; v: Params } = {
      params: each((name) => engine.tensor(entry(name).data, entry(name).shape)),
      m: zeros(),
      v: zeros(),
    };
    const d = width / heads;
    const fixed = {
      ids: engine.tensor(data.ids, [batch * sequence]),
      labels: engine.tensor(data.labels, [batch * sequence]),
      cos: engine.tensor(data.cos, [sequence, d / 2]),
      sin: engine.tensor(data.sin, [sequence, d / 2]),
      scale: engine.tensor(Float32Array.of(1), []),
    };

    const loss = (params: Params): Tensor => {
      const p = (name: string): Tensor => params[name] as Tensor;
      let x = embedding(p("embedding"), fixed.ids); // [tokens, width]
      for (let layer = 0; layer < layers; layer++) {
        const normed = rmsNorm(x, p(`${layer}.attentionNorm`), { eps: normEps });
        const head = (name: string): Tensor =>
          reshape(linear(normed, p(`${layer}.${name}`)), [batch, sequence, heads, d]);
        const turn = (t: Tensor): Tensor => rope(t, fixed.cos, fixed.sin);
        const { output } = attention(turn(head("q")), turn(head("k")), head("v"), { causal: true, scale: d ** -0.5 });
        x = add(x, linear(reshape(output, [batch * sequence, width]), p(`${layer}.o`)));
        const rows = rmsNorm(x, p(`${layer}.moeNorm`), { eps: normEps });
        const routing = softmaxTopk(linear(rows, p(`${layer}.router`)), { k, order: "softmax-topk-renormalise" });
        x = add(x, moeExperts(rows, { gateUp: p(`${layer}.gateUp`), down: p(`${layer}.down`) }, routing));
      }
      const logits = linear(rmsNorm(x, p("norm"), { eps: normEps }), p("head")); // [tokens, vocabulary]
      return mean(crossEntropy(logits, fixed.labels).losses);
    };

    const { lr, ...rest } = adamwOptions;
    const optimiser = adamw({ learningRate: lr, ...rest });
    let step = 0;
    return {
      run() {
        step++;
        const { value, ...next } = engine.scope(() => {
          const { value, grads } = valueAndGrad((params) => [loss(params), []], state.params);
          const info = { scale: fixed.scale, learningRate: adamwOptions.lr, decay: true, update: step };
          const updated = names.map((name) => {
            const own = (tree: Params): Tensor => engine.give(tree[name] as Tensor);
            return optimiser.update(own(state.params), grads[name] as Tensor, [own(state.m), own(state.v)], info);
          });
          const column = (at: number): Params =>
            Object.fromEntries(names.map((name, i) => [name, updated[i]?.[at] as Tensor]));
          return { value, params: column(0), m: column(1), v: column(2) };
        });
        state = next;
        return value;
      },
      flops: trainingFlops(one),
      bytes: 0,
      dispose() {
        for (const tree of [fixed, state.params, state.m, state.v]) for (const x of Object.values(tree)) x.dispose();
      },
    };
  },
};
