// Optimiser steps against a scalar loop: several steps in a row, in place and on copies, on a device that splits its tensors.
import type { Spec, TypedArray } from "@switchyard/core";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { call, floats, type Host, hasGpu, testGpu, uniform } from "../call.test-util.ts";
import type { OwnedGpu, WebgpuHandle } from "../device.ts";
import { optimiserKernels } from "./optimiser.ts";

const size = (shape: readonly number[]): number => shape.reduce((n, d) => n * d, 1);
const f32 = (shape: readonly number[]): Spec => ({ shape, dtype: "f32" });

interface State {
  p: number;
  m: number;
  v: number;
}
const adam = { lr: 0.01, beta1: 0.9, beta2: 0.95, eps: 1e-8, weightDecay: 0.1 };
const adamAt = (t: number) => ({ ...adam, correction1: 1 - adam.beta1 ** t, correction2: 1 - adam.beta2 ** t });
/** 1711.05101, algorithm 2, one number at a time. */
function adamw({ p, m, v }: State, g: number, t: number): State {
  const m2 = adam.beta1 * m + (1 - adam.beta1) * g;
  const v2 = adam.beta2 * v + (1 - adam.beta2) * g * g;
  const update = m2 / (1 - adam.beta1 ** t) / (Math.sqrt(v2 / (1 - adam.beta2 ** t)) + adam.eps);
  return { p: p - adam.lr * (update + adam.weightDecay * p), m: m2, v: v2 };
}
const sgdAttrs = (nesterov: boolean) => ({ lr: 0.1, momentum: 0.9, weightDecay: 0.01, nesterov });
function sgd(p: number, velocity: number, grad: number, nesterov: boolean): [p: number, velocity: number] {
  const g = grad + 0.01 * p;
  const v = 0.9 * velocity + g;
  return [p - 0.1 * (nesterov ? g + 0.9 * v : v), v];
}
const close = (found: TypedArray, exact: readonly number[]): void => {
  expect(found.length).toBe(exact.length);
  const errors = exact.map((y, i) => Math.abs((found[i] ?? Number.NaN) - y));
  expect(Math.max(0, ...errors)).toBeLessThan(2e-6);
};

const devices = [
  ["in one buffer", {}, true],
  ["in one buffer, as on a graphics card", {}, false],
  ["split over buffers of 4096 bytes", { maxStorageBufferBindingSize: 4096 }, true],
  ["with 3 workgroups per dimension", { maxComputeWorkgroupsPerDimension: 3 }, false],
] as const;
describe.skipIf(!hasGpu).each(devices)("optimiser kernels, tensors %s", (_, limits, software) => {
  if (!hasGpu) return;
  let gpu: OwnedGpu;
  let kernels: ReturnType<typeof optimiserKernels>;
  beforeAll(() => {
    gpu = testGpu(limits);
    kernels = optimiserKernels({ ...gpu, software });
  });
  afterAll(() => gpu.dispose());

  it.each([[[]], [[0]], [[1]], [[7]], [[37, 61]]])("adamw takes three steps on a parameter %j", async (shape) => {
    const n = size(shape);
    const scale = floats([], [0.5]);
    let state: Host[] = [uniform(1, shape), floats(shape, new Float32Array(n)), floats(shape, new Float32Array(n))];
    let exact: State[] = Array.from(state[0]?.data ?? [], (p) => ({ p, m: 0, v: 0 }));
    for (let t = 1; t <= 3; t++) {
      const grad = uniform(10 + t, shape);
      const [p, m, v] = state as [Host, Host, Host];
      const results = [f32(shape), f32(shape), f32(shape)];
      const found = await call(gpu, kernels.adamw, [p, grad, m, v, scale], results, adamAt(t));
      exact = exact.map((one, i) => adamw(one, 0.5 * (grad.data[i] as number), t));
      state = found.map((data) => floats(shape, data));
    }
    close(
      state[0]?.data as TypedArray,
      exact.map((one) => one.p),
    );
    close(
      state[1]?.data as TypedArray,
      exact.map((one) => one.m),
    );
    close(
      state[2]?.data as TypedArray,
      exact.map((one) => one.v),
    );
  });

  it("adamw leaves a parameter alone that never had a gradient", async () => {
    const shape = [5];
    const zero = floats(shape, new Float32Array(5));
    const p = uniform(2, shape);
    const inputs = [p, zero, zero, zero, floats([], [1])];
    const [after] = await call(gpu, kernels.adamw, inputs, [f32(shape), f32(shape), f32(shape)], {
      ...adamAt(1),
      weightDecay: 0,
    });
    expect([...(after as TypedArray)]).toEqual([...p.data]);
  });

  it("adamw works in the storage it was given, and copies what it was not", async () => {
    const shape = [41, 53];
    const spec = f32(shape);
    const given = [
      uniform(3, shape),
      uniform(4, shape),
      uniform(5, shape),
      floats(shape, uniform(6, shape).data.map(Math.abs)),
    ];
    const handles = given.map((x) => gpu.upload(x.data, x));
    const scale = gpu.upload(Float32Array.of(2), f32([]));
    const inputs = [...handles.map((handle) => ({ ...spec, handle })), { ...f32([]), handle: scale }];
    const [p, , m, v] = handles as [WebgpuHandle, WebgpuHandle, WebgpuHandle, WebgpuHandle];
    const results = kernels.adamw(inputs, [{ ...spec, reuse: p }, spec, { ...spec, reuse: v }], adamAt(4));
    expect(results[0]).toBe(p);
    expect(results[1]).not.toBe(m);
    expect(results[2]).toBe(v);
    const exact = Array.from({ length: size(shape) }, (_, i) => {
      const [a, g, b, c] = given.map((x) => x.data[i] as number) as [number, number, number, number];
      return adamw({ p: a, m: b, v: c }, 2 * g, 4);
    });
    const read = (handle: WebgpuHandle | undefined) => gpu.download({ ...spec, handle: handle as WebgpuHandle });
    close(
      await read(results[0]),
      exact.map((one) => one.p),
    );
    close(
      await read(results[1]),
      exact.map((one) => one.m),
    );
    close(
      await read(results[2]),
      exact.map((one) => one.v),
    );
    expect([...(await read(m))]).toEqual([...(given[2] as Host).data]);
  });

  it.each([false, true])("sgd, nesterov %s", async (nesterov) => {
    for (const shape of [[7], [31, 67]]) {
      const [p, grad, velocity] = [uniform(7, shape), uniform(8, shape), uniform(9, shape)];
      const inputs = [p, grad, velocity, floats([], [3])];
      const found = await call(gpu, kernels.sgd, inputs, [f32(shape), f32(shape)], sgdAttrs(nesterov));
      const exact = Array.from(p.data, (x, i) =>
        sgd(x, velocity.data[i] as number, 3 * (grad.data[i] as number), nesterov),
      );
      close(
        found[0] as TypedArray,
        exact.map(([x]) => x),
      );
      close(
        found[1] as TypedArray,
        exact.map(([, v]) => v),
      );
    }
  });

  it("takes a gradient that is split at other places than the parameter", async () => {
    // As [37, 61] parts hold 16 rows, as [2257] 1024 elements.
    const [shape, flat] = [[37, 61], [37 * 61]];
    const [p, grad, velocity] = [uniform(11, shape), uniform(12, flat), uniform(13, shape)];
    const handles = [p, grad, velocity].map((x) => gpu.upload(x.data, x)) as [WebgpuHandle, WebgpuHandle, WebgpuHandle];
    const scale = { ...f32([]), handle: gpu.upload(Float32Array.of(1), f32([])) };
    const inputs = [...handles.map((handle) => ({ ...f32(shape), handle })), scale];
    const reuse = [
      { ...f32(shape), reuse: handles[0] },
      { ...f32(shape), reuse: handles[2] },
    ];
    const [after] = kernels.sgd(inputs, reuse, sgdAttrs(false));
    expect(after).toBe(handles[0]);
    const exact = Array.from(p.data, (x, i) => sgd(x, velocity.data[i] as number, grad.data[i] as number, false)[0]);
    close(await gpu.download({ ...f32(shape), handle: handles[0] }), exact);
  });
});
