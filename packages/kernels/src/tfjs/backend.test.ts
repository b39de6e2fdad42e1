// The shared suite on the TensorFlow.js backends that Node has everywhere; then what is special to this adapter. WebGPU is in
// test/tfjs, WebGL and WebGPU in a browser in test/browser.
import * as tf from "@tensorflow/tfjs-core";
import "@tensorflow/tfjs-backend-cpu";
import "@tensorflow/tfjs-backend-wasm";
import {
  add,
  argsort,
  attentionGradOp,
  autodiff,
  cast,
  combineRows,
  DeviceError,
  dispatch,
  dispose,
  engine,
  grad,
  groupedMatmul,
  mul,
  reshape,
  sum,
  sumLast,
  sumSquares,
  type Tensor,
  takeRows,
  topkIndices,
  UnsupportedError,
} from "@switchyard/core";
import { backendCases, testBackend, uncoveredKernels } from "@switchyard/testing";
import { afterAll, describe, expect, it } from "vitest";
import { tfjs } from "./backend.ts";

testBackend({ name: "tfjs cpu", backend: () => tfjs({ tf, backend: "cpu" }) });
testBackend({ name: "tfjs wasm", backend: () => tfjs({ tf, backend: "wasm" }) });

describe.each(["cpu", "wasm"])("tfjs on %s", (backend) => {
  it("leaves the library with as many tensors as before the whole suite", async () => {
    const subject = await tfjs({ tf, backend });
    const on = engine(subject);
    const start = tf.memory().numTensors;
    // Every tenth case: each case was run above, here the library's own count is compared.
    for (const [i, one] of backendCases().entries()) if (i % 10 === 0) await one.run(on);
    expect([on.live(), tf.memory().numTensors]).toEqual([0, start]);
    subject.dispose();
  });

  it.each([129, 4096, 98_305])("keeps the digits of sums over %d numbers", async (n) => {
    const on = engine(await tfjs({ tf, backend }));
    const data = Float32Array.from({ length: 2 * n }, (_, i) => 1 + ((i * 7919) % 1000) / 1000);
    const x = on.tensor(data, [2, n]);
    const [rows, squares] = on.scope(() => [sumLast(x), sumSquares(x)] as const); // [2, 1], []
    const row = (r: number): number => data.subarray(r * n, (r + 1) * n).reduce((total, value) => total + value, 0);
    const square = data.reduce((total, value) => total + value * value, 0);
    const off = (found: number | undefined, exact: number): number => Math.abs((found ?? Number.NaN) / exact - 1);
    const [first, second] = await rows.data();
    expect(Math.max(off(first, row(0)), off(second, row(1)))).toBeLessThan(3e-7);
    expect(off((await squares.data())[0], square)).toBeLessThan(3e-7);
    dispose([x, rows, squares]);
  });

  it("holds on to its tensors in the user's tidies, and frees its own temporaries", async () => {
    const on = engine(await tfjs({ tf, backend }));
    const start = tf.memory().numTensors;
    const kept: Tensor[] = [];
    tf.tidy(() => {
      const x = on.tensor(Float32Array.of(3, 1, 2), [3]);
      kept.push(
        x,
        on.scope(() => add(mul(x, x), x)),
      );
    });
    expect(tf.memory().numTensors).toBe(start + 2);
    expect(await Promise.all(kept.map(async (x) => Array.from(await x.data())))).toEqual([
      [3, 1, 2],
      [12, 2, 6],
    ]);
    dispose(kept);
    expect(tf.memory().numTensors).toBe(start);
  });

  it("works while the library records gradients of its own", async () => {
    const on = engine(await tfjs({ tf, backend }));
    const start = tf.memory().numTensors;
    const found: Tensor[] = [];
    const square = tf.customGrad((x) => {
      const value = x as tf.Tensor;
      return { value: tf.square(value), gradFunc: (dy: tf.Tensor) => tf.mul(tf.mul(value, 2), dy) };
    });
    const theirs = tf.grad((x: tf.Tensor) => {
      const outer = autodiff(on);
      found.push(
        ...outer.scope(() => {
          const leaf = outer.tensor(Float32Array.of(1, 2, 3), [3]);
          return grad(sum(mul(leaf, leaf)), [leaf]);
        }),
      );
      return square(x);
    });
    const five = tf.scalar(5);
    const slope = theirs(five);
    expect(Array.from(slope.dataSync())).toEqual([10]);
    expect(Array.from((await found[0]?.data()) ?? [])).toEqual([2, 4, 6]);
    tf.dispose([five, slope]);
    dispose(found);
    expect(tf.memory().numTensors).toBe(start);
  });

  it("reads on the host at once, and says that it can", async () => {
    const subject = await tfjs({ tf, backend });
    expect(subject.name).toBe(`tfjs-${backend}`);
    expect(subject.tfBackend).toBe(backend);
    expect(engine(subject).canBlock).toBe(true);
    const spec = { shape: [2, 2], dtype: "i32" } as const;
    const handle = subject.upload(Float32Array.of(1.9, -1.9, 3e9, Number.NaN), spec);
    expect(subject.downloadSync?.({ ...spec, handle })).toEqual(Int32Array.of(1, -1, 2147483647, 0));
    subject.free(handle);
  });

  it.each(["f16", "bf16"] as const)("keeps the bits of %s", async (dtype) => {
    const on = engine(await tfjs({ tf, backend }));
    const bits = Uint16Array.of(0, 0x8000, 0x3c00, 0x0001, 0x7f7f & (dtype === "f16" ? 0x7bff : 0x7fff), 0xc123);
    const x = on.tensor(bits, [6], dtype);
    expect(await x.data()).toEqual(bits);
    const back = cast(cast(x, "f32"), dtype);
    expect(await back.data()).toEqual(bits);
    x.dispose();
    back.dispose();
  });

  it("rounds to 16 bits on the device as the host does, over the whole range", async () => {
    const on = engine(await tfjs({ tf, backend }));
    // Every binade of f16, ties and their neighbours, and the overflow; of bf16 also far down.
    const values = Array.from({ length: 60 }, (_, i) => i - 40).flatMap((e) =>
      [1, 1 + 2 ** -11, 1 + 3 * 2 ** -11, 1.9997, 1 + 2 ** -8, 1 + 3 * 2 ** -8, 1.33333].flatMap((m) => [
        m * 2 ** e,
        -m * 2 ** e,
      ]),
    );
    const data = Float32Array.from([
      ...values,
      2 ** -100,
      1.3 * 2 ** -90,
      3e38,
      3.4e38,
      -3.4e38,
      65519.9,
      65520,
      0,
      -0,
    ]);
    for (const dtype of ["f16", "bf16"] as const) {
      const [x, direct] = [on.tensor(data, [data.length]), on.tensor(data, [data.length], dtype)];
      const rounded = cast(x, dtype);
      const [found, expected] = [await rounded.data(), await direct.data()];
      const wrong = Array.from(data).filter((_, i) => found[i] !== expected[i] && data[i] !== 0);
      expect(wrong).toEqual([]);
      for (const y of [x, direct, rounded]) y.dispose();
    }
  });

  it("refuses seven dimensions", async () => {
    const on = engine(await tfjs({ tf, backend }));
    const x = on.tensor(new Float32Array(128), [2, 2, 2, 2, 2, 2, 2]);
    expect(() => add(x, x)).toThrow("TensorFlow.js takes at most 6 dimensions, found [2, 2, 2, 2, 2, 2, 2]; reshape");
    const y = reshape(x, [128]);
    expect((await y.data()).length).toBe(128);
    x.dispose();
    y.dispose();
  });
});

describe("tfjs", () => {
  afterAll(() => tf.setBackend("cpu"));

  it("names the package of a backend that is not there", async () => {
    await expect(tfjs({ tf, backend: "webgl" })).rejects.toThrow(
      /could not start its backend "webgl".*@tensorflow\/tfjs-backend-webgl/,
    );
    await expect(tfjs({ tf, backend: "webgl" })).rejects.toThrow(UnsupportedError);
  });

  it("takes the backend that the library runs on", async () => {
    await tf.setBackend("wasm");
    expect((await tfjs({ tf })).name).toBe("tfjs-wasm");
  });

  it("stops when the library moved to another backend", async () => {
    const on = engine(await tfjs({ tf, backend: "cpu" }));
    const x = on.tensor(Float32Array.of(1), [1]);
    await tf.setBackend("wasm");
    expect(() => add(x, x)).toThrow(
      'tfjs-cpu: TensorFlow.js now runs on its backend "wasm"; call tf.setBackend("cpu"), or make a new engine',
    );
    await expect(x.data()).rejects.toThrow(UnsupportedError);
    await tf.setBackend("cpu");
    expect(Array.from(await x.data())).toEqual([1]);
    x.dispose();
  });

  it("tells of storage that the library's user disposed of", async () => {
    const on = engine(await tfjs({ tf, backend: "cpu" }));
    const subject = await tfjs({ tf, backend: "cpu" });
    const spec = { shape: [1], dtype: "f32" } as const;
    const handle = subject.upload(Float32Array.of(1), spec);
    handle.dispose();
    expect(() =>
      subject.kernels.add(
        [
          { ...spec, handle },
          { ...spec, handle },
        ],
        [spec],
        {},
      ),
    ).toThrow(DeviceError);
    await expect(subject.download({ ...spec, handle })).rejects.toThrow(DeviceError);
    expect(on.live()).toBe(0);
  });

  it("says that it was disposed of", async () => {
    const subject = await tfjs({ tf, backend: "cpu" });
    const on = engine(subject);
    const x = on.tensor(Float32Array.of(1), [1]);
    subject.dispose();
    expect(() => add(x, x)).toThrow("tfjs-cpu: this backend was disposed of; make a new one");
    x.dispose();
  });

  it("refuses WebGL without 32-bit floats", async () => {
    const phone = { ...tf, getBackend: () => "webgl", env: () => ({ getBool: () => false }) };
    await expect(tfjs({ tf: phone })).rejects.toThrow(/computes in 16-bit floats only.*use the wasm or webgpu backend/);
  });

  it("has cases of the shared suite for each of its kernels", async () => {
    expect(uncoveredKernels(await tfjs({ tf, backend: "cpu" }))).toEqual([]);
  });

  it("has kernels for what its fallbacks would do slowly", async () => {
    const { kernels } = await tfjs({ tf, backend: "cpu" });
    const fused = [
      ["sub", "div", "affine", "relu", "reluGrad", "sigmoid", "silu", "siluGrad", "gelu", "geluGrad", "swiglu"],
      ["swigluGrad", "linear", "softmax", "softmaxGrad", "logSoftmax", "logSoftmaxGrad", "logSumExp", "rmsNorm"],
      ["rmsNormGrad", "layerNorm", "layerNormGrad", "crossEntropy", "crossEntropyGrad", "attention", "gatherLast"],
      ["scatterLast", "dispatch", "groupedMatmul", "groupedOuter", "combineRows", "combineRowsGrad", "sumSquares"],
      ["adamw", "sgd", "pad", "rope", "broadcastTo", attentionGradOp.name],
    ].flat();
    expect(fused.filter((name) => kernels[name] === undefined)).toEqual([]);
  });
});

// What a GPU backend does with data it cannot read, on a backend that every machine has: the library under another name.
describe("the way of devices that compile for each shape and cannot be read", () => {
  it.each(["webgl", "webgpu"])("passes the suite's cases of orders, rows, experts and sums (as %s)", async (name) => {
    await tf.setBackend("cpu");
    const disguised = { ...tf, getBackend: () => name, env: () => ({ getBool: () => true }) };
    const subject = await tfjs({ tf: disguised });
    expect(subject.downloadSync === undefined).toBe(name === "webgpu");
    const on = engine(subject);
    const start = tf.memory().numTensors;
    const ops =
      /^(topk|argsort|blockEnds|dispatch|grouped|combine|moe|takeRows|addRows|scatterLast|cumsum|maxLast|log|engine)/;
    for (const one of backendCases()) if (ops.test(one.op)) await one.run(on);
    expect([on.live(), tf.memory().numTensors]).toEqual([0, start]);
  });

  it("reads nothing on the way from logits to the experts' output as webgpu", async () => {
    await tf.setBackend("cpu");
    const on = engine(await tfjs({ tf: { ...tf, getBackend: () => "webgpu" } }));
    const read = tf.Tensor.prototype.dataSync;
    let reads = 0;
    tf.Tensor.prototype.dataSync = function (this: tf.Tensor) {
      reads++;
      return read.call(this);
    } as typeof read;
    try {
      const y = on.scope(() => {
        const logits = on.tensor(
          Float32Array.from({ length: 28 }, (_, i) => Math.sin(i)),
          [7, 4],
        );
        const hidden = on.tensor(
          Float32Array.from({ length: 21 }, (_, i) => Math.cos(i)),
          [7, 3],
        );
        const w = on.tensor(
          Float32Array.from({ length: 60 }, (_, i) => Math.sin(2 * i)),
          [4, 5, 3],
        );
        const ids = topkIndices(logits, 2);
        const { rows, slots, ends } = dispatch(ids, { count: 4, bound: 14 });
        argsort(ids, { bound: 4 });
        const weights = on.tensor(new Float32Array(14).fill(0.5), [7, 2]);
        return combineRows(groupedMatmul(takeRows(hidden, rows), w, ends), weights, slots);
      });
      expect(reads).toBe(0);
      expect((await y.data()).every(Number.isFinite)).toBe(true);
      y.dispose();
    } finally {
      tf.Tensor.prototype.dataSync = read;
    }
  });
});
