// One instance of gpu.js in one mode: compiles programs, keeps them, launches them, and holds arrays on the device.
// One call at a time: the backend's queue sees to that.
import { DeviceError, UnsupportedError } from "@switchyard/core";
import { type GpuClass, type GpuInstance, type GpujsMode, type GpuKernel, member } from "./gpu.ts";
import { MOST_ELEMENTS, type Program, sourceOf } from "./program.ts";

/** Floats on the device of a mode: the array itself on "cpu" and "webasm", a texture or a buffer elsewhere. */
export type Resident = Float32Array | DeviceArray;
/** gpu.js's handle of a result that stays on the device. */
export interface DeviceArray {
  delete(): void;
}

export type Params = Readonly<Record<string, number>>;

export interface Device {
  readonly mode: GpujsMode;
  /** Computes `length` elements. */
  launch(program: Program, arrays: readonly Resident[], length: number, params: Params): Promise<Resident>;
  /** Brings floats to the device; the array belongs to it from now on. */
  put(data: Float32Array): Promise<Resident>;
  /** The elements; not to be written to. */
  get(x: Resident, length: number): Promise<Float32Array>;
  drop(x: Resident): void;
  /** Arrays alive, kernels held, kernels compiled so far. */
  stats(): { readonly arrays: number; readonly kernels: number; readonly compiled: number };
  close(): Promise<void>;
}

interface Entry {
  readonly name: string;
  readonly kernel: GpuKernel;
  length: number;
  /** Results alive, of modes where a result needs its kernel until it is deleted. */
  alive: number;
  /** What ran first, in the mode that was asked for. */
  checked: object | undefined;
}

// A kernel sees host arrays or device arrays, never both: for another kind gpu.js puts another kernel in its place,
// which does not know the size that was set.
const upload: Program = { name: "upload", arrays: ["x"], body: "return x[i];" };
const echo: Program = { name: "echo", arrays: ["x"], body: "return x[i];" };
/** Its result is on the host. */
const download: Program = { name: "download", arrays: ["x"], body: "return x[i];" };

/** What a kernel of each mode calls itself. */
const ownNames: Readonly<Record<GpujsMode, string>> = {
  webgpu: "webgpu",
  webgl2: "gpu",
  webgl: "gpu",
  webasm: "webasm",
  cpu: "cpu",
};

/**
 * A device that has carried three numbers there and back, through a kernel.
 * @throws UnsupportedError where the mode does not work here, with gpu.js's reason.
 */
export async function openDevice(gpu: GpuInstance, mode: GpujsMode, mostKernels: number): Promise<Device> {
  const device = createDevice(gpu, mode, mostKernels);
  const sent = Float32Array.of(0.1, -3, 2 ** 24 - 1);
  try {
    const there = await device.put(sent.slice());
    const copy = await device.launch(echo, [there], sent.length, {});
    const back = await device.get(copy, sent.length);
    for (const x of [there, copy]) device.drop(x);
    if (sent.some((x, i) => x !== back[i])) {
      throw new UnsupportedError(
        `gpujs: mode "${mode}" answers [${back.join(", ")}] for [${sent.join(", ")}]: ${others}`,
      );
    }
  } catch (error) {
    await device.close();
    if (UnsupportedError.isInstance(error)) throw error;
    throw new UnsupportedError(`gpujs: mode "${mode}" does not work here: ${messageOf(error)}; ${others}`, {
      cause: error,
    });
  }
  return device;
}

const others = 'choose another mode, or "async" for the best one that works';

/** @throws UnsupportedError where gpu.js refuses the mode. */
export function startGpu(GPU: GpuClass, mode: GpujsMode): GpuInstance {
  try {
    return new GPU({ mode });
  } catch (cause) {
    throw new UnsupportedError(`gpujs: gpu.js has no mode "${mode}" here: ${messageOf(cause)}; ${others}`, { cause });
  }
}

export function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

export function createDevice(gpu: GpuInstance, mode: GpujsMode, mostKernels: number): Device {
  const onHost = mode === "cpu" || mode === "webasm";
  const entries = new Map<string, Entry>();
  /** All arrays alive, with the kernels that made them where they need those. */
  const owners = new Map<Resident, Entry | undefined>();
  let most = mostKernels;
  let compiled = 0;
  let failure: string | undefined;

  // On the host gpu.js compiles for given sizes (webasm even for given arguments), and constants make the faster code.
  // On a GPU one kernel serves all sizes, so that another batch or a longer sequence compiles nothing.
  const keyOf = ({ name, sizes = [] }: Program, arrays: readonly Resident[], length: number, params: Params): string =>
    onHost ? [name, length, ...sizes.map((size) => params[size]), ...arrays.map(lengthOf)].join(" ") : name;

  function compile(program: Program, arrays: readonly Resident[], length: number, params: Params): Entry {
    const { name, sizes = [], numbers = [] } = program;
    const types = (names: readonly string[], type: string) => names.map((one) => [one, type]);
    const kernel: GpuKernel = gpu.createKernel(sourceOf(program, onHost), {
      output: [length],
      pipeline: program !== download,
      immutable: program !== download,
      precision: "single",
      // The default computes small arrays in lower precision where a GPU has one.
      tactic: "precision",
      // The default stops loops whose bound is no literal after 1000 rounds, without a word.
      loopMaxIterations: MOST_ELEMENTS,
      argumentTypes: Object.fromEntries([
        ...program.arrays.map((one, i) => [one, typeOf(arrays[i])]),
        ...(onHost ? [] : types(sizes, "Integer")),
        ...types(numbers, "Float"),
      ]),
      ...(onHost
        ? {
            constants: Object.fromEntries(sizes.map((size) => [size, sizeOf(program, params, size)])),
            constantTypes: Object.fromEntries(types(sizes, "Integer")),
          }
        : { dynamicOutput: true, dynamicArguments: true, asyncMode: true }),
    });
    compiled++;
    return { name, kernel, length, alive: 0, checked: undefined };
  }

  function entryOf(program: Program, arrays: readonly Resident[], length: number, params: Params): Entry {
    const key = keyOf(program, arrays, length, params);
    let entry = entries.get(key);
    // The map is in the order of last use.
    entries.delete(key);
    entry ??= compile(program, arrays, length, params);
    entries.set(key, entry);
    shrink(most, key);
    // A kernel that reads its own last result must have left it: on WebGL it would else take an old texture for the new
    // result, and with it that one's size.
    if (entry.length !== length || arrays.some((x) => owners.get(x) === entry)) {
      entry.kernel.setOutput([length]);
      entry.length = length;
    }
    return entry;
  }

  /** Lets go of the kernels used longest ago, but not of the one at work, until there are `to`. */
  function shrink(to: number, atWork?: string): void {
    for (const [key, { alive, kernel }] of entries) {
      if (entries.size <= to) break;
      if (alive > 0 || key === atWork) continue;
      entries.delete(key);
      kernel.destroy();
      // On "cpu" gpu.js keeps it in its list.
      const all = member(gpu, "kernels");
      if (Array.isArray(all) && all.includes(kernel.kernel)) all.splice(all.indexOf(kernel.kernel), 1);
    }
  }

  async function run(
    program: Program,
    arrays: readonly Resident[],
    length: number,
    params: Params,
  ): Promise<{ readonly entry: Entry; readonly result: unknown }> {
    const { name, sizes = [], numbers = [] } = program;
    try {
      const entry = entryOf(program, arrays, length, params);
      const values = [...(onHost ? [] : sizes), ...numbers].map((size) => sizeOf(program, params, size));
      const result = await entry.kernel.apply(undefined, [...arrays, ...values]);
      checkMode(entry);
      return { entry, result };
    } catch (cause) {
      // Every kernel of "webasm" has a memory of its own, and browsers set a terabyte of addresses aside for memories:
      // about a hundred. One half makes room, also for others on the page.
      if (mode === "webasm" && cause instanceof RangeError && entries.size > 1) {
        most = entries.size >> 1;
        entries.delete(keyOf(program, arrays, length, params));
        shrink(most);
        return run(program, arrays, length, params);
      }
      if (UnsupportedError.isInstance(cause)) throw cause;
      throw new DeviceError(`gpujs: kernel "${name}" failed in mode "${mode}": ${messageOf(cause)}`, { cause });
    }
  }

  /** gpu.js goes on in mode "cpu" when another one cannot run a kernel: its result is not where the others are. */
  function checkMode(entry: Entry): void {
    const { name, kernel, checked } = entry;
    if (kernel.kernel === checked) return;
    const ran = member(kernel.kernel.constructor, "mode");
    if (ran !== ownNames[mode]) {
      const reason = member(kernel.kernel, "fallbackReason") ?? "it gave no reason";
      throw new UnsupportedError(
        `gpujs: asked for mode "${mode}", but gpu.js ran kernel "${name}" in mode "${ran}": ${reason}; ${others}`,
      );
    }
    if (checked) throw new Error("gpu.js replaced the kernel by one for other arguments");
    entry.checked = kernel.kernel;
  }

  /** WebGPU reports what is invalid or does not fit to the device only, and goes on with zeros. */
  function watch(result: unknown): void {
    const found = member(member(result, "context"), "device");
    if (watching || !(found instanceof EventTarget)) return;
    watching = true;
    found.addEventListener("uncapturederror", (event) => {
      failure ??= messageOf(member(event, "error"));
    });
  }
  let watching = mode !== "webgpu";

  /** Numbers of a device that failed are never handed out. WebGL keeps its errors until somebody asks. */
  function checkDevice(kernel: GpuKernel): void {
    const context = member(kernel.kernel, "context");
    const ask = (question: string): unknown => {
      const answer = member(context, question);
      return typeof answer === "function" ? answer.call(context) : undefined;
    };
    if (ask("isContextLost") === true) failure ??= "the WebGL context was lost";
    const code = ask("getError") ?? 0;
    if (code !== 0) failure ??= `WebGL error ${code}${code === 0x505 ? ", out of memory" : ""}`;
    if (failure !== undefined) {
      throw new DeviceError(`gpujs: the device of mode "${mode}" failed: ${failure}; make a new backend`);
    }
  }

  const device: Device = {
    mode,

    async launch(program, arrays, length, params) {
      const { entry, result } = await run(program, arrays, length, params);
      if (!isResident(result)) {
        throw new DeviceError(
          `gpujs: kernel "${program.name}" of mode "${mode}" answered no array, found ${typeof result}`,
        );
      }
      watch(result);
      owners.set(result, onHost ? undefined : entry);
      if (!onHost) entry.alive++;
      return result;
    },

    async put(data) {
      if (!onHost) return device.launch(upload, [data], data.length, {});
      owners.set(data, undefined);
      return data;
    },

    async get(x, length) {
      if (x instanceof Float32Array) return x;
      const { entry, result } = await run(download, [x], length, {});
      checkDevice(entry.kernel);
      if (!(result instanceof Float32Array)) throw new DeviceError(`gpujs: mode "${mode}" read no Float32Array`);
      return result;
    },

    drop(x) {
      if (!owners.has(x)) throw new Error("gpujs: a device array was dropped twice");
      const entry = owners.get(x);
      owners.delete(x);
      if (entry) entry.alive--;
      if (!(x instanceof Float32Array)) x.delete();
    },

    stats: () => ({ arrays: owners.size, kernels: entries.size, compiled }),

    async close() {
      for (const x of [...owners.keys()]) device.drop(x);
      entries.clear();
      await gpu.destroy();
    },
  };
  return device;
}

const isResident = (x: unknown): x is Resident =>
  x instanceof Float32Array || typeof member(x, "delete") === "function";

/** Arrays that are alike to gpu.js's compiler. */
const lengthOf = (x: Resident): number => (x instanceof Float32Array ? x.length : 0);

function typeOf(x: Resident | undefined): string {
  const type = member(x, "type");
  return typeof type === "string" ? type : "Array";
}

function sizeOf({ name }: Program, params: Params, size: string): number {
  const value = params[size];
  if (value === undefined) throw new Error(`gpujs: program "${name}" was launched without "${size}"`);
  return value;
}
