// A device that is lost while a model trains: the running call ends with the reason, and on a new device the training goes on from its
// last snapshot as if nothing had happened.
import {
  add,
  crossEntropy,
  DeviceError,
  type Engine,
  engine,
  linear,
  mean,
  random,
  softmaxTopk,
  type Tensor,
  type Tree,
  takeRows,
} from "@switchyard/core";
import { glu, layerInput, layerParams, moe, moeLayer, type RouterPlugin, switchBalance } from "@switchyard/core/moe";
import { adamw, type Task, type Trainer, type TrainerSnapshot, trainer } from "@switchyard/core/train";
import { afterEach, describe, expect, it } from "vitest";
import { findGpu } from "../../test/gpu.ts";
import { type WebgpuBackend, webgpu } from "./backend.ts";
import { requestDevice } from "./request.ts";

const source = await findGpu();
const [vocabulary, width, experts, length] = [13, 8, 4, 16];

const topTwo: RouterPlugin = {
  name: "topTwo",
  causal: { training: true, evaluation: true },
  needs: [],
  plans: ["sparse"],
  init: ({ width, experts, random }) => ({
    params: { weight: random.at("weight").normal([experts, width]) },
    buffers: {},
    route(params, { hidden }) {
      const { weight } = params as { weight: Tensor };
      const { weights, ids, probabilities } = softmaxTopk(linear(hidden, weight), { k: 2, order: "softmax-topk" });
      const balance = switchBalance({ probabilities, experts: ids });
      return { plan: { kind: "sparse", experts: ids, weights }, losses: { balance: { value: balance, weight: 0.01 } } };
    },
  }),
};

type Params = { readonly table: Tensor; readonly layer: Tree };

/** Predicts the next of a fixed sequence of tokens through one MoE layer. */
function makeTask(on: Engine): Task<number> {
  const draws = random(on, 3);
  const own = glu({ engine: on, random: draws.at("experts"), count: experts, width, hidden: 8 });
  const layer = moeLayer(topTwo, { engine: on, width, random: draws.at("router") }, { experts: own });
  return {
    params: { table: draws.at("table").normal([vocabulary, width]), layer: layerParams(layer) },
    routers: [layer.router],
    batch: (index) => index,
    forward(params, buffers, index, info) {
      const ids = Int32Array.from({ length: length + 1 }, (_, i) => (index + i * i) % vocabulary);
      const { table, layer: own } = params as Params;
      const x = takeRows(table, on.tensor(ids.slice(0, -1), [length])); // [length, width]
      const { globalLoad: _, observe: __, ...rest } = info;
      const { output, routed } = moe(layer, own, { ...layerInput(layer, x), ...rest, buffers: buffers[0] ?? {} });
      const logits = linear(add(x, output), table); // [length, vocabulary]
      const { losses } = crossEntropy(logits, on.tensor(ids.slice(1), [length]));
      return { loss: mean(losses), logits, layers: [routed] };
    },
  };
}
const make = (on: Engine): Trainer<number> =>
  trainer(on, makeTask(on), { optimiser: adamw({ learningRate: 0.02 }), totalSteps: 8, clip: 1, seed: 7 });

describe.skipIf(source === undefined)("a lost WebGPU device", () => {
  const fresh = (): Promise<GPUDevice> => requestDevice(source ? { gpu: source } : {});
  const open: WebgpuBackend[] = [];
  const start = async (): Promise<WebgpuBackend> => {
    const backend = await webgpu({ device: fresh });
    open.push(backend);
    return backend;
  };
  afterEach(() => {
    for (const backend of open.splice(0)) backend.dispose();
  });

  it("ends the running call, and recover() goes on from the last snapshot with the same losses", async () => {
    const whole = make(engine(await start()));
    await whole.run();
    const losses = whole.history.map(({ loss }) => loss);
    expect(losses).toHaveLength(8);
    expect(losses.at(-1)).toBeLessThan(losses[0] ?? 0);

    const backend = await start();
    let kept: TrainerSnapshot | undefined;
    const first = make(engine(backend));
    const running = first.run({
      checkpointEvery: 3,
      onCheckpoint: (snapshot) => {
        kept = snapshot;
      },
      onStep: ({ step }) => {
        if (step === 4) backend.device.destroy();
      },
    });
    await expect(running).rejects.toThrow(DeviceError);
    await expect(running).rejects.toThrow(/device was lost.*recover\(\)/);
    await expect(first.step()).rejects.toThrow(DeviceError);
    expect(kept).toBeDefined();

    const next = await backend.recover();
    open.push(next);
    const second = make(engine(next));
    if (kept) await second.restore(kept);
    expect(second.history).toHaveLength(3);
    await second.run();
    expect(second.history.map(({ loss }) => loss)).toEqual(losses);
  });

  it("in the middle of a step: no call hangs, none gives numbers", async () => {
    const backend = await start();
    const model = make(engine(backend));
    await model.step();
    const running = model.run();
    backend.device.destroy();
    await expect(running).rejects.toThrow(DeviceError);
    await expect(model.snapshot()).rejects.toThrow(DeviceError);
    // Freeing what is left is no error.
    model.dispose();
  });

  it("recover() of a backend that was handed its device wants another", async () => {
    const device = await fresh();
    const backend = await webgpu({ device });
    device.destroy();
    await expect(backend.recover()).rejects.toThrow(/pass one, recover\(device\)/);
    const next = await backend.recover(await fresh());
    const on = engine(next);
    expect([...(await on.tensor(Float32Array.of(1, 2), [2]).data())]).toEqual([1, 2]);
    next.device.destroy();
  });
});
