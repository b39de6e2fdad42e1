// Tensors in and out of TensorFlow.js without a copy: both sides hold references to one storage, which the library counts.
import { type Engine, type Kernel, lower, type Op, type Spec, type Tensor, UnsupportedError } from "@switchyard/core";
import { another, type Device, sizeOf, zeros } from "./device.ts";
import type { TfTensor } from "./tf.ts";

interface Adopt {
  readonly tensor: TfTensor;
  readonly spec: Spec;
}
interface Expose {
  take(tensor: TfTensor): void;
}
const adoptOp: Op<Adopt> = { name: "tfjs.adopt", shapes: (_, { spec }) => [spec] };
const exposeOp: Op<Expose> = { name: "tfjs.expose", shapes: () => [] };

/** The two doors, in a backend's table beside its kernels. */
export function interopKernels(device: Device): Readonly<Record<string, Kernel<TfTensor>>> {
  const { tf, check } = device;
  return {
    [adoptOp.name]: (_, __, { tensor, spec }: Adopt) => {
      check();
      if (sizeOf(spec.shape) === 0) return [tf.keep(zeros(tf, spec))];
      return [tf.keep(tensor.dtype === "bool" ? tf.cast(tensor, "float32") : another(tf, tensor))];
    },
    [exposeOp.name]: ([x], _, { take }: Expose) => {
      check();
      if (x) take(another(tf, x.handle, x.shape));
      return [];
    },
  };
}

/**
 * A tensor of TensorFlow.js as a tensor of an engine on the same library, sharing its storage: float32 becomes f32, int32 i32; a bool
 * becomes an f32 mask, which is a copy. The caller owns the result, and `tensor` may be disposed of at once. On an autodiff engine
 * the result is a constant of its root: `watch` it for gradients.
 *
 * @throws UnsupportedError for an engine on another backend, and for complex64 and strings.
 */
export function fromTfjs(engine: Engine, tensor: TfTensor): Tensor {
  const root = engine.root;
  const dtype = tensor.dtype === "int32" ? "i32" : "f32";
  if (tensor.dtype !== "float32" && tensor.dtype !== "int32" && tensor.dtype !== "bool") {
    throw new UnsupportedError(
      `fromTfjs: a tensor of dtype ${tensor.dtype}; take float32, int32 or bool, such as tf.real(x) or tf.imag(x) of a complex one`,
    );
  }
  if (tensor.isDisposed) {
    throw new UnsupportedError(`fromTfjs: the tensor [${tensor.shape.join(", ")}] was disposed of; tf.keep() it`);
  }
  const attrs: Adopt = { tensor, spec: { shape: [...tensor.shape], dtype } };
  if (root.explain(adoptOp, [], attrs) !== "kernel") {
    throw new UnsupportedError(
      `fromTfjs: the engine ${engine.name} does not run on TensorFlow.js; use engine.tensor(await tensor.data(), tensor.shape)`,
    );
  }
  const [x] = root.run(adoptOp, [], attrs);
  if (!x) throw new Error("fromTfjs: the backend gave no tensor");
  return x;
}

/**
 * The TensorFlow.js tensor of x, sharing its storage: f32 gives float32, i32 int32; f16 and bf16 give float32 and u8 int32, which is
 * how they are stored. The caller owns the result, as that of any TensorFlow.js function. It carries no gradient of ours.
 *
 * @example const logits: tf.Tensor = toTfjs(x);
 * @throws UnsupportedError for a tensor whose engine does not run on TensorFlow.js.
 */
export function toTfjs<T extends TfTensor = TfTensor>(x: Tensor): T {
  // TensorFlow.js made it: it is of whatever class the caller's copy of the library declares.
  return expose(x) as T;
}

function expose(x: Tensor): TfTensor {
  return x.engine.scope(() => {
    let value = x;
    while (value.engine !== value.engine.root) {
      const inner = lower(value);
      if (inner.engine === value.engine) break;
      value = inner;
    }
    const { root } = value.engine;
    let found: TfTensor | undefined;
    const attrs: Expose = {
      take(tensor) {
        found = tensor;
      },
    };
    if (value.engine !== root || root.explain(exposeOp, [value], attrs) !== "kernel") {
      throw new UnsupportedError(
        `toTfjs: the tensor lives on ${x.engine.name}, which is not TensorFlow.js; use tf.tensor(await x.data(), x.shape)`,
      );
    }
    root.run(exposeOp, [value], attrs);
    if (!found) throw new Error("toTfjs: the backend gave no tensor");
    return found;
  });
}
