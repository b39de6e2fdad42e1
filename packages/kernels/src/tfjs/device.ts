// What every kernel of this adapter shares: the injected library, the traits of its backend, and the frame in which a kernel
// runs: inputs as tensors of the declared shapes, temporaries freed by tf.tidy, results kept from the user's own tidies.
import { DeviceError, type Kernel, type Operand, type Spec, UnsupportedError } from "@switchyard/core";
import type { TfCore, TfDType, TfTensor } from "./tf.ts";

/** A kernel's call: its inputs in the shapes that the engine declares, its attributes, the specs of its results. */
export interface Call<A> {
  /** Input i. */
  x(i: number): TfTensor;
  /** Number of inputs. */
  readonly count: number;
  readonly attrs: A;
  spec(i?: number): Spec;
}
export type Body<A> = (call: Call<A>) => TfTensor | readonly TfTensor[];

export interface Device {
  readonly tf: TfCore;
  /** TensorFlow.js's name of its backend: "cpu", "wasm", "webgl", "webgpu", "tensorflow". */
  readonly name: string;
  /** Whether `dataSync` works. */
  readonly canRead: boolean;
  /** Whether `dataSync` costs no more than a copy: the tensors lie in this process's memory. */
  readonly inMemory: boolean;
  /** Whether each new shape compiles a new program: what depends on data must not shape a tensor there. */
  readonly compiles: boolean;
  kernel<A>(body: Body<A>): Kernel<TfTensor>;
  /** i32 values that the host knows, or can read for little. */
  knownInts(x: TfTensor): Int32Array | undefined;
  /** i32 values, read if they must be. Only where `canRead`. */
  readInts(x: TfTensor): Int32Array;
  /** An i32 tensor whose values the host remembers. */
  ints(values: Int32Array, shape: readonly number[]): TfTensor;
  /** What is derived from the storage of x, made once and freed with it. `make` runs in a tidy of its own. */
  derived(x: TfTensor, key: string, make: () => readonly TfTensor[]): readonly TfTensor[];
  /** Frees a handle, and what was derived from its storage. */
  free(handle: TfTensor): void;
  /** Throws when the library moved on to another backend, or the device failed. */
  check(): void;
  /** Throws when the library's user disposed of the storage of x. */
  present(x: Operand<TfTensor>): void;
}

/** TensorFlow.js has broadcasting shaders and strides for at most so many dimensions on its GPU backends. */
const MOST_DIMENSIONS = 6;

export const sizeOf = (shape: readonly number[]): number => shape.reduce((n, d) => n * d, 1);
export const same = (a: readonly number[], b: readonly number[]): boolean =>
  a.length === b.length && a.every((d, i) => d === b[i]);

/** The storage type of a dtype: 16-bit floats are held as the float32 numbers they stand for, bytes as integers. */
export const storageType = (dtype: Spec["dtype"]): "float32" | "int32" =>
  dtype === "i32" || dtype === "u8" ? "int32" : "float32";

export interface DeviceOptions {
  readonly tf: TfCore;
  readonly name: string;
  /** The reason why the backend is unusable, if there is one. */
  failure(): string | undefined;
}

export function createDevice({ tf, name, failure }: DeviceOptions): Device {
  const inMemory = name === "cpu" || name === "wasm";
  const canRead = inMemory || name === "tensorflow" || name === "webgl";
  const memo = new WeakMap<object, Int32Array>();
  const derivatives = new WeakMap<object, Map<string, readonly TfTensor[]>>();

  const check = (): void => {
    const now = tf.getBackend();
    if (now !== name) {
      throw new UnsupportedError(
        `tfjs-${name}: TensorFlow.js now runs on its backend "${now}"; call tf.setBackend("${name}"), or make a new engine`,
      );
    }
    const reason = failure();
    if (reason !== undefined) throw new DeviceError(`tfjs-${name}: ${reason}`);
  };

  const present = ({ handle, shape }: Operand<TfTensor>): void => {
    if (handle.isDisposed) {
      throw new DeviceError(
        `tfjs-${name}: the storage of a tensor [${shape.join(", ")}] was disposed of by TensorFlow.js (tf.dispose, tf.removeBackend)`,
      );
    }
  };

  const view = (operand: Operand<TfTensor>): TfTensor => {
    const { handle, shape } = operand;
    present(operand);
    if (shape.length > MOST_DIMENSIONS) {
      throw new UnsupportedError(
        `tfjs-${name}: TensorFlow.js takes at most ${MOST_DIMENSIONS} dimensions, found [${shape.join(", ")}]; reshape first`,
      );
    }
    return same(handle.shape, shape) ? handle : tf.reshape(handle, [...shape]);
  };

  const read = (x: TfTensor): Int32Array => {
    const values = x.dataSync();
    if (!(values instanceof Int32Array)) throw new Error(`tfjs-${name}: expected int32, found ${x.dtype}`);
    return values;
  };

  const device: Device = {
    tf,
    name,
    canRead,
    inMemory,
    compiles: name === "webgl" || name === "webgpu",
    check,
    present,

    kernel:
      <A>(body: Body<A>): Kernel<TfTensor> =>
      (operands, results, attrs: A) => {
        check();
        // No program runs on nothing: several backends cannot.
        if (results.every((spec) => sizeOf(spec.shape) === 0)) return results.map((spec) => tf.keep(zeros(tf, spec)));
        return tidy(tf, () => {
          const views = operands.map(view);
          const found = body({
            count: views.length,
            attrs,
            x: (i) => item(views, i),
            spec: (i = 0) => item(results, i),
          });
          const ys: readonly TfTensor[] = isList(found) ? found : [found];
          // A tensor that came in belongs to someone else: a result is a reference of its own.
          const taken = new Set(operands.map((x) => x.handle));
          return results.map((spec, i) => {
            const y = item(ys, i);
            const type = storageType(spec.dtype);
            if (y.dtype !== type) throw new Error(`tfjs-${name}: a kernel made ${y.dtype} where ${type} was due`);
            const own = same(y.shape, spec.shape) && !taken.has(y) ? y : another(tf, y, spec.shape);
            taken.add(own);
            return tf.keep(own);
          });
        });
      },

    knownInts: (x) => memo.get(x.dataId) ?? (inMemory ? device.readInts(x) : undefined),
    readInts(x) {
      const values = memo.get(x.dataId) ?? read(x).slice();
      memo.set(x.dataId, values);
      return values;
    },
    ints(values, shape) {
      const x = tf.tensor(values, [...shape], "int32");
      // Tensors are immutable, so what was written once stays true for as long as the storage lives.
      memo.set(x.dataId, values);
      return x;
    },

    derived(x, key, make) {
      const made = derivatives.get(x.dataId) ?? new Map<string, readonly TfTensor[]>();
      derivatives.set(x.dataId, made);
      const list = made.get(key) ?? tidy(tf, () => make().map((y) => tf.keep(y)));
      made.set(key, list);
      return list;
    },
    free(handle) {
      for (const list of derivatives.get(handle.dataId)?.values() ?? []) for (const y of list) y.dispose();
      derivatives.delete(handle.dataId);
      handle.dispose();
    },
  };
  return device;
}

/** Frees what `body` makes and does not keep. */
function tidy<T>(tf: TfCore, body: () => T): T {
  const results: T[] = [];
  tf.tidy(() => {
    results.push(body());
  });
  return item(results, 0);
}

const isList = (x: TfTensor | readonly TfTensor[]): x is readonly TfTensor[] => Array.isArray(x);

/** A second reference to the same storage. Not tf.clone, which copies on the wasm backend. */
export const another = (tf: TfCore, x: TfTensor, shape: readonly number[] = x.shape): TfTensor =>
  tf.reshape(x, [...shape]);

export const zeros = (tf: TfCore, spec: Spec): TfTensor => tf.zeros([...spec.shape], storageType(spec.dtype));

export function item<T>(list: readonly T[], i: number): T {
  const found = list[i];
  if (found === undefined) throw new RangeError(`item ${i} of a list of ${list.length} is missing`);
  return found;
}

/** A number as a scalar of the tensor's own dtype: a plain number would turn integers into floats. */
export const like = (tf: TfCore, x: TfTensor, value: number): TfTensor =>
  tf.scalar(value, x.dtype === "int32" ? "int32" : "float32");

/** A bool mask as numbers 0 and 1. */
export const numbers = (tf: TfCore, mask: TfTensor, dtype: TfDType = "float32"): TfTensor => tf.cast(mask, dtype);

/** [rows, last] of a tensor of any rank; a scalar is [1, 1]. */
export const matrixOf = (tf: TfCore, x: TfTensor): TfTensor => {
  const last = x.shape.at(-1) ?? 1;
  return x.shape.length === 2 ? x : tf.reshape(x, [last === 0 ? 0 : x.size / last, last]);
};
