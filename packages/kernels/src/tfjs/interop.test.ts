// Tensors in and out of TensorFlow.js: values, sharing, who frees what, and refusals.
import * as tf from "@tensorflow/tfjs-core";
import "@tensorflow/tfjs-backend-cpu";
import "@tensorflow/tfjs-backend-wasm";
import {
  add,
  autodiff,
  cast,
  engine,
  grad,
  lower,
  mul,
  reshape,
  slice,
  sum,
  UnsupportedError,
  watch,
} from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import { describe, expect, it } from "vitest";
import { tfjs } from "./backend.ts";
import { fromTfjs, toTfjs } from "./interop.ts";

describe.each(["cpu", "wasm"])("interop on %s", (backend) => {
  const start = async () => engine(await tfjs({ tf, backend }));
  const buffers = (): number => tf.memory().numDataBuffers;

  it("takes a tensor over without a copy, and outlives its source", async () => {
    const on = await start();
    const before = [tf.memory().numTensors, buffers()];
    const theirs = tf.tensor2d([1, 2, 3, 4, 5, 6], [2, 3]);
    const ours = fromTfjs(on, theirs);
    expect(buffers()).toBe((before[1] ?? 0) + 1);
    expect([ours.dtype, ours.shape]).toEqual(["f32", [2, 3]]);
    theirs.dispose();
    const doubled = on.scope(() => add(ours, ours));
    expect(Array.from(await doubled.data())).toEqual([2, 4, 6, 8, 10, 12]);
    ours.dispose();
    doubled.dispose();
    expect([tf.memory().numTensors, buffers()]).toEqual(before);
  });

  it("gives a tensor away without a copy, and outlives its source", async () => {
    const on = await start();
    const before = [tf.memory().numTensors, buffers()];
    const ours = on.tensor(Float32Array.of(1, 2, 3, 4), [4]);
    const view = reshape(ours, [2, 2]);
    const theirs: tf.Tensor = toTfjs(view);
    expect(buffers()).toBe((before[1] ?? 0) + 1);
    ours.dispose();
    view.dispose();
    expect(theirs.arraySync()).toEqual([
      [1, 2],
      [3, 4],
    ]);
    expect(on.live()).toBe(0);
    theirs.dispose();
    expect([tf.memory().numTensors, buffers()]).toEqual(before);
  });

  it("leaves what it gave to the caller's tidy", async () => {
    const on = await start();
    const before = tf.memory().numTensors;
    const ours = on.tensor(Int32Array.of(7, 8), [2]);
    const total = tf.tidy(() => tf.sum(toTfjs<tf.Tensor>(ours)).dataSync()[0] ?? 0);
    expect(total).toBe(15);
    expect(tf.memory().numTensors).toBe(before + 1);
    ours.dispose();
  });

  it("keeps variables apart from what was read of them", async () => {
    const on = await start();
    const variable = tf.variable(tf.tensor1d([1, 2]));
    const ours = fromTfjs(on, variable);
    const next = tf.tensor1d([5, 6]);
    variable.assign(next);
    expect(Array.from(await ours.data())).toEqual([1, 2]);
    ours.dispose();
    tf.dispose([variable, next]);
  });

  it.each([
    ["int32", "i32", [1, -2, 0]],
    ["float32", "f32", [0.5, -2, 0]],
    ["bool", "f32", [1, 0, 1]],
  ] as const)("%s becomes %s", async (dtype, expected, values) => {
    const on = await start();
    const theirs = tf.tensor1d([...values], dtype);
    const ours = fromTfjs(on, theirs);
    expect([ours.dtype, Array.from(await ours.data())]).toEqual([expected, values]);
    ours.dispose();
    theirs.dispose();
  });

  it.each([
    ["f32", "float32"],
    ["i32", "int32"],
    ["u8", "int32"],
    ["f16", "float32"],
    ["bf16", "float32"],
  ] as const)("%s becomes %s", async (dtype, expected) => {
    const on = await start();
    const ours = on.scope(() => cast(on.tensor(Float32Array.of(1, 2, 250), [3]), dtype));
    const theirs: tf.Tensor = toTfjs(ours);
    expect([theirs.dtype, Array.from(theirs.dataSync())]).toEqual([expected, [1, 2, 250]]);
    theirs.dispose();
    ours.dispose();
  });

  it("passes tensors without elements", async () => {
    const on = await start();
    const theirs = tf.zeros([0, 3]);
    const ours = fromTfjs(on, theirs);
    const back: tf.Tensor = toTfjs(ours);
    expect([ours.shape, back.shape]).toEqual([
      [0, 3],
      [0, 3],
    ]);
    ours.dispose();
    tf.dispose([theirs, back]);
  });

  it("works on autodiff engines: a constant in, a value out", async () => {
    const on = await start();
    const before = tf.memory().numTensors;
    const theirs = tf.tensor1d([1, 2, 3]);
    const slopes = on.scope(() => {
      const outer = autodiff(autodiff(on));
      const constant = fromTfjs(outer, theirs);
      expect(constant.engine).toBe(on);
      const leaf = watch(autodiff(on), constant);
      const loss = sum(mul(mul(leaf, leaf), constant));
      const value: tf.Tensor = toTfjs(loss);
      expect(value.dataSync()[0]).toBe(1 + 8 + 27);
      value.dispose();
      expect(lower(loss).engine).toBe(on);
      return grad(loss, [leaf]);
    });
    expect(Array.from((await slopes[0]?.data()) ?? [])).toEqual([2, 8, 18]);
    slopes[0]?.dispose();
    theirs.dispose();
    expect(tf.memory().numTensors).toBe(before);
  });

  it("refuses other engines and other dtypes, and says what to do", async () => {
    const on = await start();
    const other = engine(cpu());
    const theirs = tf.tensor1d([1, 2]);
    expect(() => fromTfjs(other, theirs)).toThrow(UnsupportedError);
    expect(() => fromTfjs(other, theirs)).toThrow(
      "the engine cpu does not run on TensorFlow.js; use engine.tensor(await tensor.data(), tensor.shape)",
    );
    const foreign = other.tensor(Float32Array.of(1), [1]);
    expect(() => toTfjs(foreign)).toThrow(
      "the tensor lives on cpu, which is not TensorFlow.js; use tf.tensor(await x.data(), x.shape)",
    );
    foreign.dispose();
    const words = tf.tensor1d(["a", "b"]);
    expect(() => fromTfjs(on, words)).toThrow("a tensor of dtype string; take float32, int32 or bool");
    words.dispose();
    theirs.dispose();
    expect(() => fromTfjs(on, theirs)).toThrow("was disposed of; tf.keep() it");
    expect([on.live(), other.live()]).toEqual([0, 0]);
  });

  it("is not copied into by later ops of either side", async () => {
    const on = await start();
    const ours = on.tensor(Float32Array.of(1, 2, 3, 4), [4]);
    const theirs: tf.Tensor = toTfjs(ours);
    const [changed, part] = [tf.add(theirs, 1), slice(ours, [1], [2])];
    expect(Array.from(await ours.data())).toEqual([1, 2, 3, 4]);
    expect(Array.from(await part.data())).toEqual([2, 3]);
    tf.dispose([theirs, changed]);
    ours.dispose();
    part.dispose();
  });
});
