// Modes, failures, memory and caches of the gpu.js adapter; the numbers are the shared suite's business.
import { engine, exp, log, MissingPackageError, matmul, mul, type Tensor, UnsupportedError } from "@switchyard/core";
import { GPU } from "gpu.js";
import { afterEach, describe, expect, it, vi } from "vitest";
import { findGpujs, type GpuClass } from "../../src/gpujs/gpu.ts";
import { gpujs, loadGpujs } from "../../src/gpujs/index.ts";
import { wrapped } from "./wrap.ts";

const ones = Float32Array.of(1, 2, 3);

/** Whatever nobody handled while the test ran. */
const unhandled: unknown[] = [];
process.on("unhandledRejection", (reason) => unhandled.push(reason));
afterEach(async () => {
  // Rejections are reported in a task of their own.
  await new Promise((resolve) => setTimeout(resolve, 10));
  expect(unhandled.splice(0)).toEqual([]);
});

describe("the package", () => {
  it("is found", async () => {
    expect(await loadGpujs()).toBe(GPU);
  });

  it("is found as a bundler presents it", async () => {
    expect(await findGpujs(async () => ({ default: { GPU } }))).toBe(GPU);
    expect(await findGpujs(async () => ({ default: GPU }))).toBe(GPU);
  });

  it("is named where it is missing, with what to install and how", async () => {
    const missing = findGpujs(() => Promise.reject(new Error("Cannot find package 'gpu.js'")));
    await expect(missing).rejects.toSatisfy(MissingPackageError.isInstance);
    await expect(missing).rejects.toThrow(/npm install gpu\.js .*"overrides": .*"gl": "npm:empty-npm-package/);
    await expect(findGpujs(async () => ({}))).rejects.toThrow(/no class GPU/);
  });
});

describe("modes", () => {
  // A constant of a type that "webasm" cannot have: gpu.js goes on in "cpu" and only warns.
  const degrading = (text: string): GpuClass =>
    wrapped({
      settings(source, settings) {
        if (!source.includes(text)) return settings;
        const { constants, constantTypes } = settings;
        return {
          ...settings,
          constants: { ...constants, odd: [1, 2] },
          constantTypes: { ...constantTypes, odd: "Array(2)" },
        };
      },
    });

  it("are refused at once where gpu.js does not have them", () => {
    expect(() => gpujs({ GPU, mode: "webgl2" })).toThrow(
      /gpujs: gpu\.js has no mode "webgl2" here.*choose another mode/,
    );
    expect(() => gpujs({ GPU, mode: "webgpu" })).toThrow(UnsupportedError);
    expect(() => gpujs({ GPU, mode: "opengl" as "cpu" })).toThrow(/no mode "opengl"; the modes are async, webgpu/);
  });

  it("are refused when gpu.js degrades silently", async () => {
    const warned = vi.spyOn(console, "warn").mockImplementation(() => undefined);
    const backend = gpujs({ GPU: degrading("exp"), mode: "webasm" });
    const x = engine(backend).tensor(ones, [3]);
    const y = exp(x);
    const reason =
      /asked for mode "webasm", but gpu\.js ran kernel "exp" in mode "cpu": constant "odd" .*not supported/;
    await expect(y.data()).rejects.toThrow(reason);
    await expect(y.data()).rejects.toSatisfy(UnsupportedError.isInstance);
    expect(warned).toHaveBeenCalled();
    warned.mockRestore();
    y.dispose();
    await backend.dispose();
  });

  it("are passed over in mode async when gpu.js degrades", async () => {
    const warned = vi.spyOn(console, "warn").mockImplementation(() => undefined);
    const backend = gpujs({ GPU: degrading("this.thread") });
    expect(await backend.mode).toBe("cpu");
    expect(backend.note).toMatch(/asked for mode "webasm", but gpu\.js ran kernel "echo" in mode "cpu"/);
    warned.mockRestore();
    await backend.dispose();
  });

  it("are tried from the best one down in mode async, with the reasons in the note", async () => {
    const backend = gpujs({ GPU });
    const y = exp(engine(backend).tensor(ones, [3]));
    expect((await y.data())[0]).toBeCloseTo(Math.E, 5);
    expect(await backend.mode).toBe("webasm");
    expect(backend.note).toMatch(/no mode "webgpu".*no mode "webgl2".*no mode "webgl"/);
    y.dispose();
    await backend.dispose();
  });

  it("without an adapter are no modes", async () => {
    const before = Object.getOwnPropertyDescriptor(globalThis, "navigator");
    const gpu = { requestAdapter: async () => null };
    Object.defineProperty(globalThis, "navigator", { value: { gpu }, configurable: true });
    try {
      const backend = gpujs({ GPU, mode: "webgpu" });
      const y = exp(engine(backend).tensor(ones, [3]));
      await expect(y.data()).rejects.toThrow(/mode "webgpu" does not work here: .*no adapter is available/);
      await expect(backend.mode).rejects.toSatisfy(UnsupportedError.isInstance);
      y.dispose();
      await backend.dispose();
      const other = gpujs({ GPU });
      expect(await other.mode).toBe("webasm");
      expect(other.note).toMatch(/no adapter is available/);
      await other.dispose();
    } finally {
      if (before) Object.defineProperty(globalThis, "navigator", before);
      else Reflect.deleteProperty(globalThis, "navigator");
    }
  });

  it("are refused when they do not carry numbers", async () => {
    const backend = gpujs({ GPU: wrapped({ call: () => new Float32Array(3) }), mode: "cpu" });
    const on = engine(backend);
    const [x, y] = [on.tensor(ones, [3]), exp(on.tensor(ones, [3]))];
    const reason = /gpujs: mode "cpu" answers \[0, 0, 0\] for \[0\.1.*, -3, 16777215\]: choose another mode/;
    await expect(backend.mode).rejects.toThrow(reason);
    for (const read of [x.data(), y.data(), backend.stats()]) await expect(read).rejects.toThrow(reason);
    for (const one of [x, y]) one.dispose();
    await backend.dispose();
  });

  it("are refused when they do not start, by every read and nothing else", async () => {
    const refuse = (): never => {
      throw new Error("no compiler");
    };
    const backend = gpujs({ GPU: wrapped({ settings: refuse }), mode: "webasm" });
    const y = exp(engine(backend).tensor(ones, [3]));
    await expect(y.data()).rejects.toThrow(/mode "webasm" does not work here: .*no compiler; choose another mode/);
    y.dispose();
    await backend.dispose();
    const nothing = gpujs({ GPU: wrapped({ settings: refuse }) });
    await expect(nothing.mode).rejects.toThrow(
      /no mode of gpu\.js works here: .*"webasm".*no compiler.*"cpu".*no compiler/,
    );
    await nothing.dispose();
  });
});

describe("failures", () => {
  it("surface where a tensor is read and nowhere else", async () => {
    const failing = wrapped({
      call(source, run) {
        if (source.includes("Math.log")) throw new Error("a driver's fault");
        return run();
      },
    });
    const backend = gpujs({ GPU: failing, mode: "cpu" });
    const on = engine(backend);
    const { bad, worse, good } = on.scope(() => {
      const x = on.tensor(ones, [3]);
      const bad = log(x);
      return { bad, worse: mul(bad, x), good: mul(x, x) };
    });
    const message = 'gpujs: kernel "log" failed in mode "cpu": a driver\'s fault';
    await expect(worse.data()).rejects.toThrow(message);
    await expect(bad.data()).rejects.toMatchObject({ name: "DeviceError", message });
    expect([...(await good.data())]).toEqual([1, 4, 9]);
    for (const x of [bad, worse, good]) x.dispose();
    expect(on.live()).toBe(0);
    expect((await backend.stats()).arrays).toBe(0);
    await backend.dispose();
  });

  it("of promises are failures too", async () => {
    const failing = wrapped({
      call: (source, run) => (source.includes("exp") ? Promise.reject(new Error("late")) : run()),
    });
    const backend = gpujs({ GPU: failing, mode: "cpu" });
    const y = exp(engine(backend).tensor(ones, [3]));
    await expect(y.data()).rejects.toThrow('gpujs: kernel "exp" failed in mode "cpu": late');
    y.dispose();
    await backend.dispose();
  });

  it("take the place of calls after the end", async () => {
    const backend = gpujs({ GPU, mode: "cpu" });
    const on = engine(backend);
    const x = on.tensor(ones, [3]);
    const read = exp(x).data();
    const ended = backend.dispose();
    // What was called before still arrives.
    expect((await read)[0]).toBeCloseTo(Math.E, 5);
    await ended;
    await backend.dispose();
    expect(() => exp(x)).toThrow(/disposed of/);
    expect(() => on.tensor(ones, [3])).toThrow(/disposed of/);
    await expect(x.data()).rejects.toThrow(/disposed of/);
    x.dispose();
  });
});

describe("limits", () => {
  it("of exact indices are named", () => {
    const backend = gpujs({ GPU, mode: "cpu" });
    const on = engine(backend);
    expect(() => on.tensor(new Float32Array(2 ** 24 + 1), [2 ** 24 + 1])).toThrow(
      /16777217 elements.*exact up to 16777216/,
    );
    const row = on.tensor(new Float32Array(2 ** 13), [1, 2 ** 13]);
    const column = on.tensor(new Float32Array(2 ** 12), [2 ** 12, 1]);
    expect(() => matmul(column, row)).toThrow(UnsupportedError);
    for (const x of [row, column]) x.dispose();
  });

  it("do not bind integers on the host", async () => {
    const on = engine(gpujs({ GPU, mode: "cpu" }));
    const n = 2 ** 24 + 1;
    const x = on.tensor(new Int32Array(n).fill(7), [n]);
    expect((await x.data())[n - 1]).toBe(7);
    x.dispose();
  });
});

describe("the cache of kernels", () => {
  it("is bounded", async () => {
    const backend = gpujs({ GPU, mode: "cpu", kernels: 4 });
    const on = engine(backend);
    const kept: Tensor[] = [];
    for (let n = 1; n <= 12; n++) kept.push(exp(on.tensor(new Float32Array(n), [n])));
    for (const [i, y] of kept.entries()) expect([...(await y.data())]).toEqual(new Array(i + 1).fill(1));
    // Twelve sizes, and the one of the start.
    expect(await backend.stats()).toMatchObject({ kernels: 4, compiled: 13 });
    // The one used last is still there.
    const again = exp(on.tensor(new Float32Array(12), [12]));
    expect(await backend.stats()).toMatchObject({ kernels: 4, compiled: 13 });
    for (const y of [...kept, again]) y.dispose();
    await backend.dispose();
    expect(() => gpujs({ GPU, kernels: 0 })).toThrow(/kernels must be a whole number/);
  });

  it("makes room where the host has none", async () => {
    // As a browser does with about a hundred memories.
    const alive = new Set<object>();
    let refused = 0;
    const tight = wrapped({
      call(_, run, kernel) {
        if (!alive.has(kernel) && alive.size >= 6) {
          refused++;
          throw new RangeError("WebAssembly.Memory(): could not allocate memory");
        }
        alive.add(kernel);
        return run();
      },
      destroyed: (kernel) => alive.delete(kernel),
    });
    const backend = gpujs({ GPU: tight, mode: "webasm" });
    const on = engine(backend);
    for (let n = 1; n <= 20; n++) {
      const y = exp(on.tensor(new Float32Array(n), [n]));
      expect([...(await y.data())]).toEqual(new Array(n).fill(1));
      y.dispose();
    }
    expect(refused).toBe(1);
    // Half of what was held when room ran out, so that others find some too.
    expect((await backend.stats()).kernels).toBe(3);
    await backend.dispose();
  });

  it("gives up where a kernel does not fit at all", async () => {
    const full = wrapped({
      call(source, run) {
        if (source.includes("exp")) throw new RangeError("could not allocate memory");
        return run();
      },
    });
    const backend = gpujs({ GPU: full, mode: "webasm" });
    const y = exp(engine(backend).tensor(ones, [3]));
    await expect(y.data()).rejects.toThrow(/kernel "exp" failed in mode "webasm": could not allocate memory/);
    y.dispose();
    await backend.dispose();
  });
});
