// What a router costs: scores, choice, sorting, gathering and combining of a layer whose experts give back what they get.
import { type Engine, leaves, mul, random, softmax, type Tensor } from "@switchyard/core";
import {
  type Experts,
  layerInput,
  layerParams,
  type MoELayer,
  moe,
  moeLayer,
  type RouterInput,
  type RouterPlugin,
} from "@switchyard/core/moe";
import type { Workload } from "../harness.ts";
import { noise, noiseIds } from "./data.ts";
import type { LayerSize } from "./moe-layer.ts";

export interface RoutingCase extends Pick<LayerSize, "experts" | "width"> {
  /** One sequence. */
  readonly tokens: number;
  readonly router: RouterPlugin;
  /** Default false: as in inference, without noise, losses and draws. */
  readonly training?: boolean;
}

/** Experts without parameters that give every row back, whatever the plan. */
export function identityExperts(count: number): Experts {
  return {
    count,
    params: {},
    apply: (_, rows) => ({ output: rows }),
    // A tensor of its own: the caller disposes what it gets.
    mixed: (_, hidden) => mul(hidden, 1),
  };
}

const heads = 8;
const vocabulary = 4096;
const modalities = 2;

/** Everything that routers may ask for; what is lazy is made beforehand, because it is not the router's cost. */
function inputOf(engine: Engine, layer: MoELayer, { tokens, width, training = false }: RoutingCase): RouterInput {
  const causal = Float32Array.from({ length: tokens * tokens }, (_, i) => (i % tokens > i / tokens ? -1e9 : 0));
  const scores = noise(heads * tokens * tokens, 7, 2).map((x, i) => x + (causal[i % (tokens * tokens)] ?? 0));
  const attention = engine.scope(() => softmax(engine.tensor(scores, [1, heads, tokens, tokens])));
  const hidden = engine.tensor(noise(tokens * width, 1), [tokens, width]);
  return layerInput(layer, hidden, {
    training,
    totalSteps: 1000,
    step: 100,
    tokenIds: engine.tensor(noiseIds(tokens, 5, vocabulary), [tokens]),
    modalityIds: engine.tensor(noiseIds(tokens, 6, modalities), [tokens]),
    attention: () => attention,
  });
}

/** The layer with experts that compute nothing. `flops` is 0: what it takes is what sparsity costs. */
export function routing(engine: Engine, one: RoutingCase): Workload {
  const { router, experts, width, tokens } = one;
  const context = { engine, width, heads, vocabulary, tokenCounts: new Float64Array(vocabulary).fill(1) };
  const { sharedExperts = 0 } = router;
  const layer = moeLayer(
    router,
    { ...context, random: random(engine, 3) },
    {
      experts: identityExperts(experts),
      ...(sharedExperts > 0 ? { shared: [{ experts: identityExperts(sharedExperts) }] } : {}),
    },
  );
  const params = layerParams(layer);
  const input = inputOf(engine, layer, one);
  return {
    run: () => engine.scope((): Tensor => moe(layer, params, input, { metrics: false }).output),
    flops: 0,
    bytes: 4 * 2 * tokens * width,
    dispose() {
      const made = [...leaves(params), ...leaves(layer.router.buffers)].map(([, x]) => x);
      const given = [input.hidden, input.tokenIds, input.modalityIds, input.attention?.()];
      for (const x of new Set([...made, ...given])) x?.dispose();
    },
  };
}
