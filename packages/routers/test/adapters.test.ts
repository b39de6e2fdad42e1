// Adapters on a frozen linear map, trained for real: low-rank experts, mixtures of them, different kinds behind MoA's router,
// prompts, experts of few dimensions. The map should be another one for each of four kinds of tokens.
import { add, engine, linear, mean, random, square, stopGradient, sub, type Tensor, type Tree } from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import { adapter, heterogeneous, hydraLora, lora, lowDimensional, prompt } from "@switchyard/core/experts";
import { type Experts, layerParams, moe, moeLayer, type RouterPlugin } from "@switchyard/core/moe";
import { adamw, type Task, trainer } from "@switchyard/core/train";
import { generator, uniform } from "@switchyard/testing";
import { expect, it } from "vitest";
import { dynMoLE } from "../src/dyn-mole.ts";
import { moa } from "../src/moa.ts";
import { topK } from "../src/top-k.ts";

const [width, tokens] = [6, 24];
interface Batch {
  readonly x: Float64Array;
  readonly y: Float64Array;
}
/** y = (W + u_kind v_kindᵀ) x; the kind of a token stands in the signs of its first two numbers. */
const weight = uniform(generator("frozen map"), [width, width], -0.5, 0.5).data;
const directions = uniform(generator("directions"), [4, 2, width], -1, 1).data;
const batch = (index: number): Batch => {
  const x = Float64Array.from(uniform(generator(`batch ${index % 8}`), [tokens, width], -1, 1).data);
  const y = new Float64Array(tokens * width);
  for (let t = 0; t < tokens; t++) {
    const own = x.subarray(t * width, (t + 1) * width);
    const kind = (Number((own[0] ?? 0) > 0) + 2 * Number((own[1] ?? 0) > 0)) * 2 * width;
    const along = own.reduce((sum, v, i) => sum + v * (directions[kind + width + i] ?? 0), 0);
    for (let o = 0; o < width; o++)
      y[t * width + o] = own.reduce(
        (sum, v, i) => sum + v * (weight[o * width + i] ?? 0),
        along * (directions[kind + o] ?? 0),
      );
  }
  return { x, y };
};

type Make = (from: { engine: ReturnType<typeof engine>; random: ReturnType<typeof random> }) => Experts;
const base = { count: 4, width };
const learns: readonly [string, RouterPlugin, Make][] = [
  ["lora, dynMoLE", dynMoLE(), (from) => lora({ ...base, rank: 2, alpha: 4, ...from })],
  ["lora of different ranks, topK", topK({ k: 2 }), (from) => lora({ ...base, rank: [1, 2, 4, 6], ...from })],
  ["lora with one A, moa", moa(), (from) => lora({ ...base, rank: 4, sharedA: true, ...from })],
  [
    "hydraLora, moa soft",
    moa({ mode: "soft" }),
    (from) => hydraLora({ count: 2, width, rank: 4, heads: 4, alpha: 8, ...from }),
  ],
  ["adapter, topK", topK({ k: 1, order: "softmax-topk" }), (from) => adapter({ ...base, hidden: 8, gain: 1, ...from })],
  [
    "different kinds, moa",
    moa({ threshold: 0.5, logits: "linear" }),
    ({ engine: on, random: draws }) => {
      const from = (name: string) => ({ engine: on, random: draws.at(name) });
      return heterogeneous({
        low: lora({ count: 2, width, rank: 4, ...from("low") }),
        bottleneck: adapter({ count: 1, width, gain: 1, ...from("bottleneck") }),
        prompt: prompt({ count: 1, width, heads: 2, ...from("prompt") }),
      });
    },
  ],
  ["lowDimensional, topK", topK({ k: 2 }), (from) => lowDimensional({ ...base, low: 4, hidden: 12, ...from })],
];

it.each(learns)("%s learns", async (_, plugin, make) => {
  const on = engine(cpu());
  const experts = make({ engine: on, random: random(on, 1).at("experts") });
  const layer = moeLayer(plugin, { engine: on, width }, { experts });
  const frozen = on.tensor(weight, [width, width]);
  const run = trainer(
    on,
    {
      params: layerParams(layer),
      routers: [layer.router],
      batch,
      forward(params: Tree, [buffers = {}], { x, y }: Batch, { step, training, pass, random: draws }) {
        const hidden = on.tensor(x, [tokens, width]);
        const layout = { batch: 1, sequence: tokens, past: 0 };
        const place = { layer: 0, layers: 1, step, training, pass };
        const { output, routed } = moe(layer, params, { hidden, layout, buffers, random: draws, ...place });
        const found: Tensor = add(linear(hidden, stopGradient(frozen)), output);
        const loss = mean(square(sub(found, on.tensor(y, [tokens, width]))));
        return { loss, logits: found, layers: [routed] };
      },
    } satisfies Task<Batch>,
    { optimiser: adamw({ learningRate: 0.02 }) },
  );
  const { loss } = await run.step();
  const live = on.live();
  await run.run({ until: 60 });
  expect(on.live()).toBe(live);
  expect(run.history.at(-1)?.loss).toBeLessThan(0.6 * loss);
  run.dispose();
  frozen.dispose();
  expect(on.live()).toBe(0);
});
