// Kernels of core over a queue: a call answers with handles at once, and its work runs after that of all earlier calls.
// A failure stays in the handles that depend on it, and surfaces where one is read.
import type { DType, Kernel, Operand, Spec, TypedArray } from "@switchyard/core";
import { DeviceError, UnsupportedError } from "@switchyard/core";
import type { Device, Params, Resident } from "./device.ts";
import { MOST_ELEMENTS, type Program } from "./program.ts";
import { encode, floatsOf } from "./storage.ts";

/** Numbers on the host, on the device, or on both. Types other than f32 live on the host; the device sees floats. */
export interface Value {
  readonly dtype: DType;
  readonly length: number;
  host: TypedArray | undefined;
  device: Resident | undefined;
  /** What was made from this value for the kernels that index with it. */
  readonly derived: Map<string, Value>;
}

/** The handle of a tensor: its value once the queue has come to it, or why there is none. */
export interface GpujsHandle {
  value: Value | undefined;
  error: unknown;
}

/** An input of a kernel when its turn has come. */
export interface Input extends Spec {
  readonly value: Value;
}

/** What the body of a kernel works with. Values it makes and does not return are dropped when it ends. */
export interface Work {
  /** Runs a program for `length` elements. */
  run(program: Program, length: number, arrays: readonly Value[], params?: Params): Promise<Value>;
  /** The elements; not to be written to. */
  host(x: Value): Promise<TypedArray>;
  /** A value made of a host array that belongs to it from now on. */
  value(dtype: DType, data: TypedArray): Value;
  /** Floats computed from x on the host, kept as long as x lives. `key` says what they are. */
  derive(x: Value, key: string, make: (data: TypedArray) => Float32Array): Promise<Value>;
}

export type Body = (
  inputs: readonly Input[],
  results: readonly Spec[],
  // biome-ignore lint/suspicious/noExplicitAny: kernel tables hold ops of every attribute type
  attrs: any,
  work: Work,
) => Promise<readonly Value[]>;
// biome-ignore lint/suspicious/noExplicitAny: kernel tables hold ops of every attribute type
export type Refusal = (inputs: readonly Spec[], attrs: any) => string | undefined;

export interface Calls {
  /** Makes a kernel of a body that runs when its turn has come. */
  kernel(name: string, body: Body, unsupported?: Refusal): Kernel<GpujsHandle>;
  upload(data: TypedArray, spec: Spec): GpujsHandle;
  download(x: Operand<GpujsHandle>): Promise<TypedArray>;
  free(handle: GpujsHandle): void;
  /** Runs a task in its turn. */
  enqueue<T>(task: () => T | Promise<T>): Promise<T>;
}

export const sizeOf = (shape: readonly number[]): number => shape.reduce((n, d) => n * d, 1);
export const lastOf = (spec: Spec): number => spec.shape.at(-1) ?? 1;
/** Product of all dimensions but the last. */
export const rowsOf = (spec: Spec): number => sizeOf(spec.shape.slice(0, -1));

/** list[i] of a list that is known to be long enough. */
export function at<T>(list: readonly T[], i: number): T {
  const item = list[i];
  if (item === undefined) throw new RangeError(`gpujs: argument ${i} of ${list.length} is missing`);
  return item;
}

/** Refuses inputs of another dtype than the letters say: f (f32), i (i32), w (f32, bf16 or f16), ? (any). */
export const only =
  (letters: string): Refusal =>
  (inputs) => {
    for (const [i, { dtype, format }] of inputs.entries()) {
      const letter = letters[Math.min(i, letters.length - 1)];
      const fits =
        letter === "?" ||
        (letter === "f" && dtype === "f32") ||
        (letter === "i" && dtype === "i32") ||
        (letter === "w" && (dtype === "f32" || dtype === "bf16" || dtype === "f16"));
      if (!fits) return `input ${i} is ${dtype}`;
      if (format !== undefined) return `input ${i} has the format ${format}`;
    }
    return undefined;
  };

/** Refuses arrays whose indices are no longer exact on the device. */
function checkLength(what: string, n: number): void {
  if (n <= MOST_ELEMENTS) return;
  throw new UnsupportedError(
    `gpujs: ${what}: an array of ${n} elements, but gpu.js computes indices in f32, ` +
      `which is exact up to ${MOST_ELEMENTS}; ` +
      "split the tensor, or use @switchyard/kernels/wasm or /webgpu",
  );
}

const makeValue = (dtype: DType, length: number, host?: TypedArray, device?: Resident): Value => ({
  dtype,
  length,
  host,
  device,
  derived: new Map(),
});

/** `opened` must have a handler for its rejection. */
export function createCalls(opened: Promise<Device>, isOpen: () => boolean): Calls {
  // Each task settles before the next one starts, and none rejects here.
  let tail: Promise<unknown> = Promise.resolve();
  const enqueue: Calls["enqueue"] = (task) => {
    const result = tail.then(task);
    tail = result.catch(() => undefined);
    return result;
  };
  const checkOpen = (): void => {
    if (!isOpen()) throw new UnsupportedError("gpujs: this backend was disposed of");
  };

  async function place(device: Device, x: Value): Promise<Resident> {
    if (x.device !== undefined) return x.device;
    if (x.host === undefined) throw new DeviceError("gpujs: a tensor is used after it was freed");
    checkLength("an index array", x.length);
    // gpu.js has no empty arrays. The element is never read.
    x.device = await device.put(x.length === 0 ? new Float32Array(1) : floatsOf(x.dtype, x.host));
    if (x.dtype === "f32" && x.length > 0) x.host = undefined;
    return x.device;
  }
  async function fetchHost(device: Device, x: Value): Promise<TypedArray> {
    if (x.host !== undefined) return x.host;
    if (x.device === undefined) throw new DeviceError("gpujs: a tensor is used after it was freed");
    return device.get(x.device, x.length);
  }
  function release(device: Device, x: Value): void {
    if (x.device !== undefined) device.drop(x.device);
    x.device = undefined;
    x.host = undefined;
    for (const one of x.derived.values()) release(device, one);
    x.derived.clear();
  }

  function workOn(device: Device): { readonly work: Work; readonly made: Set<Value> } {
    const made = new Set<Value>();
    const keep = (x: Value): Value => {
      made.add(x);
      return x;
    };
    const work: Work = {
      async run(program, length, arrays, params = {}) {
        if (length === 0) return keep(makeValue("f32", 0, new Float32Array(0)));
        const residents: Resident[] = [];
        for (const x of arrays) residents.push(await place(device, x));
        return keep(makeValue("f32", length, undefined, await device.launch(program, residents, length, params)));
      },
      host: (x) => fetchHost(device, x),
      value: (dtype, data) => keep(makeValue(dtype, data.length, data)),
      async derive(x, key, make) {
        const old = x.derived.get(key);
        if (old) return old;
        const data = make(await fetchHost(device, x));
        const fresh = makeValue("f32", data.length, data);
        x.derived.set(key, fresh);
        return fresh;
      },
    };
    return { work, made };
  }

  return {
    enqueue,

    kernel(name, body, unsupported) {
      const kernel: Kernel<GpujsHandle> = (inputs, specs, attrs) => {
        checkOpen();
        const reason = unsupported?.(inputs, attrs);
        if (reason !== undefined) throw new UnsupportedError(`gpujs: ${name}: ${reason}; cast() it first`);
        for (const spec of [...inputs, ...specs]) if (spec.dtype === "f32") checkLength(name, sizeOf(spec.shape));
        const results = specs.map((): GpujsHandle => ({ value: undefined, error: undefined }));
        // The task keeps its failure in the results, so that nobody has to wait for it.
        enqueue(async () => {
          try {
            const device = await opened;
            const { work, made } = workOn(device);
            let values: readonly Value[] = [];
            try {
              values = await body(inputs.map(inputOf), specs, attrs, work);
            } finally {
              for (const value of made) if (!values.includes(value)) release(device, value);
            }
            results.forEach((handle, i) => {
              handle.value = at(values, i);
            });
          } catch (error) {
            for (const handle of results) handle.error = error;
          }
        });
        return results;
      };
      if (unsupported) kernel.unsupported = unsupported;
      return kernel;
    },

    upload(data, spec) {
      checkOpen();
      if (spec.dtype === "f32") checkLength("upload", data.length);
      return { value: makeValue(spec.dtype, data.length, encode(data, spec)), error: undefined };
    },

    download(x) {
      checkOpen();
      return enqueue(async () => {
        const device = await opened;
        const data = await fetchHost(device, contentOf(x.handle));
        return data.slice();
      });
    },

    free(handle) {
      if (!isOpen()) return;
      enqueue(async () => {
        // Where the device never opened there is nothing to give back, and each read says why.
        const device = await opened.catch(() => undefined);
        if (device && handle.value) release(device, handle.value);
        handle.value = undefined;
        handle.error = new DeviceError("gpujs: a tensor is used after it was freed");
      });
    },
  };
}

function contentOf({ value, error }: GpujsHandle): Value {
  if (value === undefined) throw error;
  return value;
}

const inputOf = ({ handle, ...spec }: Operand<GpujsHandle>): Input => ({ ...spec, value: contentOf(handle) });
