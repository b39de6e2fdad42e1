// Puts the TensorFlow.js backend together: the library that was handed in, its traits, kernel tables, upload and download.
import {
  type Backend,
  DeviceError,
  type Kernel,
  type Operand,
  ShapeError,
  type Spec,
  type TypedArray,
  UnsupportedError,
} from "@switchyard/core";
import { another, createDevice, type Device, sizeOf, storageType } from "./device.ts";
import { fromBits, toBits } from "./half.ts";
import { interopKernels } from "./interop.ts";
import { attentionKernels } from "./kernels/attention.ts";
import { elementwiseKernels } from "./kernels/elementwise.ts";
import { expertKernels } from "./kernels/experts.ts";
import { matmulKernels } from "./kernels/matmul.ts";
import { normaliseKernels } from "./kernels/normalise.ts";
import { optimiserKernels } from "./kernels/optimiser.ts";
import { orderKernels } from "./kernels/order.ts";
import { reduceKernels } from "./kernels/reduce.ts";
import { rowKernels } from "./kernels/rows.ts";
import { shapeKernels } from "./kernels/shape.ts";
import type { TfCore, TfNamespace, TfTensor, TfValues } from "./tf.ts";
import { watchDevice } from "./watch.ts";

export interface TfjsOptions {
  /** The namespace: `import * as tf from "@tensorflow/tfjs"`, or tfjs-core, tfjs-node, tfjs-node-gpu. */
  readonly tf: TfNamespace;
  /** TensorFlow.js's backend: "webgpu", "webgl", "wasm", "cpu" or "tensorflow"; default: the one it has chosen. */
  readonly backend?: string;
}

/** The handle of a tensor: a kept tensor of TensorFlow.js. */
export type TfjsHandle = TfTensor;

export interface TfjsBackend extends Backend<TfjsHandle> {
  /** TensorFlow.js's name of the backend that it runs on. */
  readonly tfBackend: string;
  dispose(): void;
}

/**
 * A backend over TensorFlow.js, whichever of its own backends is current. The tensors live in the library, kept from `tf.tidy`.
 *
 * @example const device = engine(await tfjs({ tf, backend: "wasm" }));
 * @throws UnsupportedError when the backend cannot be started, or has no 32-bit floats (WebGL on some phones).
 */
export async function tfjs({ tf: namespace, backend }: TfjsOptions): Promise<TfjsBackend> {
  const tf = namespace as TfCore;
  if (backend !== undefined && tf.getBackend() !== backend) {
    const why = await setBackend(tf, backend);
    if (why !== undefined) {
      throw new UnsupportedError(
        `tfjs: TensorFlow.js could not start its backend "${backend}"${why}; import its package ` +
          `(@tensorflow/tfjs-backend-${backend}; "tensorflow" comes with tfjs-node) before, and see that the machine has what it needs`,
      );
    }
  }
  await tf.ready();
  return tfjsNow(tf);
}

/** Why the library did not switch to `backend`; undefined when it did. */
async function setBackend(tf: TfCore, backend: string): Promise<string | undefined> {
  try {
    return (await tf.setBackend(backend)) ? undefined : "";
  } catch (error) {
    return `: ${messageOf(error)}`;
  }
}

/** The same for a library that is ready, on its current backend. */
export function tfjsNow(tf: TfCore): TfjsBackend {
  const name = tf.getBackend();
  if (!name) {
    throw new UnsupportedError("tfjs: TensorFlow.js has no backend yet; await tf.ready(), or tfjs({ tf, backend })");
  }
  if (name === "webgl" && !tf.env().getBool("WEBGL_RENDER_FLOAT32_ENABLED")) {
    throw new UnsupportedError(
      "tfjs-webgl: this device's WebGL computes in 16-bit floats only, too coarse for routing and training; use the wasm or webgpu backend",
    );
  }
  const watch = watchDevice(tf.backend());
  let open = true;
  const device = createDevice({
    tf,
    name,
    failure: () => (open ? watch.failure() : "this backend was disposed of; make a new one"),
  });
  const kernels = kernelsOf(device);

  const decode = (x: Operand<TfTensor>, values: TfValues): TypedArray => {
    if (Array.isArray(values)) throw new DeviceError(`tfjs-${name}: the library gave strings for ${x.dtype}`);
    const failure = watch.failure();
    if (failure !== undefined) throw new DeviceError(`tfjs-${name}: ${failure}`);
    const { dtype } = x;
    switch (dtype) {
      case "f32":
        return Float32Array.from(values);
      case "i32":
        return Int32Array.from(values);
      case "u8":
        return Uint8Array.from(values);
      case "f16":
      case "bf16":
        return Uint16Array.from(values, (value) => toBits(value, dtype));
      default:
        return dtype satisfies never;
    }
  };
  const reading = (x: Operand<TfTensor>, error: unknown): DeviceError =>
    DeviceError.isInstance(error)
      ? error
      : new DeviceError(`tfjs-${name}: reading ${x.dtype} [${x.shape.join(", ")}] failed: ${messageOf(error)}`, {
          cause: error,
        });

  return {
    name: `tfjs-${name}`,
    tfBackend: name,
    kernels,
    upload(data, spec) {
      device.check();
      if (data.length !== sizeOf(spec.shape)) {
        throw new ShapeError(
          `tfjs: upload: [${spec.shape.join(", ")}] needs ${sizeOf(spec.shape)} elements, found ${data.length}`,
        );
      }
      const values = encode(data, spec);
      return tf.keep(
        values instanceof Int32Array
          ? device.ints(values, spec.shape)
          : tf.tensor(values, [...spec.shape], storageType(spec.dtype)),
      );
    },
    async download(x) {
      device.check();
      device.present(x);
      // A reference of its own: the tensor may be freed while the device is still at it.
      const held = tf.keep(another(tf, x.handle));
      try {
        return decode(x, await watch.reading(held.data()));
      } catch (error) {
        throw reading(x, error);
      } finally {
        held.dispose();
      }
    },
    ...(device.canRead
      ? {
          downloadSync(x: Operand<TfTensor>): TypedArray {
            device.check();
            device.present(x);
            try {
              return decode(x, x.handle.dataSync());
            } catch (error) {
              throw reading(x, error);
            }
          },
        }
      : {}),
    free: (handle) => device.free(handle),
    dispose() {
      open = false;
      watch.stop();
    },
  };
}

function kernelsOf(device: Device): TfjsBackend["kernels"] {
  const table = {
    ...elementwiseKernels(device),
    ...shapeKernels(device),
    ...reduceKernels(device),
    ...rowKernels(device),
    ...matmulKernels(device),
    ...orderKernels(device),
    ...normaliseKernels(device),
    ...expertKernels(device),
    ...attentionKernels(device),
    ...optimiserKernels(device),
  };
  // Found by name like any other, but not listed: they are doors to the library, not arithmetic.
  const doors: Readonly<Record<string, Kernel<TfTensor>>> = interopKernels(device);
  return Object.assign(Object.create(doors), table);
}

/** A copy in the storage type. A Uint16Array given for a 16-bit float holds its bits; any other array holds numbers. */
function encode(data: TypedArray, { dtype }: Spec): Float32Array | Int32Array {
  switch (dtype) {
    case "f32":
      return Float32Array.from(data);
    case "i32":
      return Int32Array.from(data, (value) =>
        Number.isNaN(value) ? 0 : Math.min(Math.max(value, -(2 ** 31)), 2 ** 31 - 1),
      );
    case "u8":
      return Int32Array.from(data, (value) => (Number.isNaN(value) ? 0 : Math.min(Math.max(value, 0), 255)));
    case "f16":
    case "bf16": {
      const bits = data instanceof Uint16Array;
      return Float32Array.from(data, (value) => fromBits(bits ? value : toBits(value, dtype), dtype));
    }
    default:
      return dtype satisfies never;
  }
}

const messageOf = (error: unknown): string => (error instanceof Error ? error.message : String(error));
