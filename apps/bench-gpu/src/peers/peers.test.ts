// The peers compute what we compute, in every way that they may be measured in, on whatever device there is.
import {
  type Contender,
  contender,
  type LayerCase,
  layerData,
  moeLayer,
  moeLayerGradients,
  relativeError,
} from "@switchyard/bench/kernels";
import { engine } from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import { beforeAll, describe, expect, it, type TestContext } from "vitest";
import { findTestDevice } from "../device.test-util.ts";
import { chooseOnHost, gpujs } from "./gpujs.ts";
import { fastest } from "./peer.ts";
import { startTfjs, waysFor, waysToGradients, waysToLayer } from "./tfjs.ts";

let found = false;
beforeAll(async () => {
  found = (await findTestDevice()) !== undefined;
});
const needsDevice = ({ skip }: TestContext): void => {
  if (!found) skip("no WebGPU device");
};

/** An expert that nobody chooses is likely with these: 5 tokens choose 2 of 7. */
const few: LayerCase = { layer: "tiny", experts: 7, width: 12, hidden: 5, k: 2, tokens: 5 };
const one: LayerCase = { ...few, tokens: 1 };

type Arrays = readonly ArrayLike<number>[];
const outputs = async (of: Contender): Promise<Arrays> => {
  const found = (await of.output?.()) ?? [];
  return (typeof found[0] === "object" ? found : [found]) as Arrays;
};

async function expectSame(theirs: Contender, ours: Contender): Promise<void> {
  const [found, expected] = [await outputs(theirs), await outputs(ours)];
  expect(found).toHaveLength(expected.length);
  for (const [i, part] of expected.entries())
    expect(relativeError(found[i] ?? [], part), `part ${i}`).toBeLessThan(2e-5);
}

const host = engine(cpu());
const ourLayer = (size: LayerCase): Contender => contender("cpu", moeLayer.setup(host, size));
const ourGradients = (size: LayerCase): Contender => contender("cpu", moeLayerGradients.setup(host, size));

describe("tfjs", () => {
  const all = { dense: true, sorted: true, gathered: false };

  it("forward, in every way, and frees what it makes", async (test) => {
    needsDevice(test);
    const tf = await startTfjs();
    const start = tf.memory().numTensors;
    const open = [...waysToLayer(tf, few, all), ...waysToLayer(tf, one, { ...all, gathered: true })];
    expect(open).toHaveLength(5);
    for (const [i, way] of open.entries()) {
      const theirs = await way();
      await expectSame(theirs, ourLayer(i < 2 ? few : one));
      const held = tf.memory().numTensors;
      await theirs.many?.(2);
      await theirs.run();
      expect(tf.memory().numTensors).toBe(held);
      await theirs.dispose?.();
      expect(tf.memory().numTensors, theirs.note).toBe(start);
    }
  });

  it("backward, in every way, with gradients of 0 for an expert without tokens", async (test) => {
    needsDevice(test);
    const tf = await startTfjs();
    const ids = chooseOnHost(layerData(few).logits, few.experts, few.k).ids;
    expect(new Set(ids).size).toBeLessThan(few.experts);
    const start = tf.memory().numTensors;
    for (const way of waysToGradients(tf, few, all)) {
      const theirs = await way();
      await expectSame(theirs, ourGradients(few));
      await theirs.dispose?.();
      expect(tf.memory().numTensors, theirs.note).toBe(start);
    }
  });

  it("tries what can win: not much dense work on a processor, nor hundreds of dispatches", () => {
    const b = { layer: "B", experts: 64, width: 64, hidden: 32, k: 8, tokens: 1 };
    expect(waysFor(b, true)).toEqual({ dense: true, sorted: false, gathered: true });
    expect(waysFor({ ...b, tokens: 1024 }, true)).toEqual({ dense: false, sorted: true, gathered: false });
    expect(waysFor(b, false)).toEqual({ dense: true, sorted: true, gathered: true });
    expect(waysFor({ ...b, tokens: 1024 }, false)).toEqual({ dense: false, sorted: true, gathered: false });
  });
});

describe("gpu.js", () => {
  it.for([few, one])("forward of $tokens tokens", async (size, test) => {
    needsDevice(test);
    const theirs = await (await gpujs.open({ software: true })).layer(size);
    await expectSame(theirs, ourLayer(size));
    await theirs.many?.(2);
    await theirs.run();
    await theirs.dispose?.();
  });

  it("chooses the k largest, lower expert first, with the softmax over them", () => {
    const { ids, shares } = chooseOnHost(Float32Array.of(1, 3, 3, 2, 0, 0, 0, 0), 4, 2);
    expect([...ids]).toEqual([1, 2, 0, 1]);
    expect([...shares]).toEqual([0.5, 0.5, 0.5, 0.5]);
    const uneven = chooseOnHost(Float32Array.of(0, Math.log(3)), 2, 2);
    expect([...uneven.ids]).toEqual([1, 0]);
    expect(uneven.shares[0]).toBeCloseTo(0.75, 6);
  });
});

describe("fastest", () => {
  const sleeper = (name: string, milliseconds: number, log: string[]) => async (): Promise<Contender> => ({
    name,
    run: () => new Promise((done) => setTimeout(done, milliseconds)),
    dispose: () => void log.push(name),
  });
  const broken = async (): Promise<Contender> => ({ name: "broken", run: () => Promise.reject(new Error("no")) });

  it("keeps the fastest way and frees the others", async () => {
    const log: string[] = [];
    const ways = [sleeper("slow", 60, log), broken, sleeper("fast", 1, log), sleeper("middle", 30, log)];
    expect((await fastest(ways)).name).toBe("fast");
    expect(log).toEqual(["slow", "middle"]);
  });

  it("throws what went wrong where none works", async () => {
    await expect(fastest([broken, broken])).rejects.toThrow("no");
  });
});
