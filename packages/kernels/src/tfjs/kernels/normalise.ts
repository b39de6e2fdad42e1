// Softmax and its relatives, cross entropy, RMS norm and layer norm, with their gradients.
import type { Kernel } from "@switchyard/core";
import { type Device, like, numbers, zeros } from "../device.ts";
import type { TfTensor } from "../tf.ts";
import { log, select } from "./elementwise.ts";
import { maxLast, sumTo } from "./reduce.ts";
import { gatherLast } from "./rows.ts";

interface Norm {
  readonly eps: number;
}

export function normaliseKernels(device: Device): { readonly [fused: string]: Kernel<TfTensor> } {
  const { tf, kernel } = device;
  const sumLast = (x: TfTensor): TfTensor => tf.sum(x, -1, true);
  const meanLast = (x: TfTensor): TfTensor => tf.mean(x, -1, true);
  /** Sum over all rows of x [..., n]: [n]. */
  const perColumn = (x: TfTensor): TfTensor => {
    const shape = [x.shape.at(-1) ?? 1];
    return x.size === 0 ? tf.zeros(shape) : tf.reshape(sumTo(device, x, shape), shape);
  };

  const logSumExp = (x: TfTensor): TfTensor => {
    const top = safeMax(device, x);
    return tf.add(log(device, sumLast(tf.exp(tf.sub(x, top)))), top);
  };
  const rmsScale = (x: TfTensor, eps: number): TfTensor => tf.rsqrt(tf.add(meanLast(tf.square(x)), eps)); // [..., 1]
  /** x without its mean, over its standard deviation, and one over that. */
  const standard = (x: TfTensor, eps: number): { readonly unit: TfTensor; readonly scale: TfTensor } => {
    const centred = tf.sub(x, meanLast(x));
    const scale = rmsScale(centred, eps);
    return { unit: tf.mul(centred, scale), scale };
  };
  /** Where a label names a class: [n]. */
  const isLabel = (labels: TfTensor, classes: number): TfTensor =>
    tf.logicalAnd(tf.greaterEqual(labels, like(tf, labels, 0)), tf.less(labels, like(tf, labels, classes)));

  return {
    softmax: kernel(({ x }) => softmax(device, x(0))),
    softmaxGrad: kernel(({ x }) => {
      const [y, dy] = [x(0), x(1)];
      return tf.mul(y, tf.sub(dy, sumLast(tf.mul(y, dy))));
    }),
    logSoftmax: kernel(({ x }) => tf.sub(x(0), logSumExp(x(0)))),
    logSoftmaxGrad: kernel(({ x }) => {
      const [y, dy] = [x(0), x(1)];
      return tf.sub(dy, tf.mul(tf.exp(y), sumLast(dy)));
    }),
    logSumExp: kernel(({ x }) => logSumExp(x(0))),

    crossEntropy: kernel(({ x }) => {
      const [logits, labels] = [x(0), x(1)];
      const [n = 0, classes = 0] = logits.shape;
      const lse = tf.reshape(logSumExp(logits), [n]);
      const picked = tf.reshape(gatherLast(device, logits, tf.reshape(labels, [n, 1])), [n]);
      return [select(device, isLabel(labels, classes), tf.sub(lse, picked), 0, [n]), lse];
    }),
    crossEntropyGrad: kernel(({ x }) => {
      const [logits, labels, lse, dloss] = [x(0), x(1), x(2), x(3)];
      const [n = 0, classes = 0] = logits.shape;
      const p = tf.exp(tf.sub(logits, tf.reshape(lse, [n, 1])));
      const hot = numbers(tf, tf.equal(tf.reshape(labels, [n, 1]), tf.range(0, classes, 1, "int32"))); // [n, classes]
      const weight = tf.mul(dloss, numbers(tf, isLabel(labels, classes)));
      return tf.mul(tf.sub(p, hot), tf.reshape(weight, [n, 1]));
    }),

    rmsNorm: kernel<Norm>(({ x, attrs: { eps } }) => tf.mul(tf.mul(x(0), rmsScale(x(0), eps)), x(1))),
    rmsNormGrad: kernel<Norm>(({ x, attrs: { eps }, spec }) => {
      const [input, w, dy] = [x(0), x(1), x(2)];
      if (input.size === 0) return [zeros(tf, spec(0)), zeros(tf, spec(1))];
      const scale = rmsScale(input, eps);
      const unit = tf.mul(input, scale);
      const g = tf.mul(dy, w);
      return [tf.mul(tf.sub(g, tf.mul(unit, meanLast(tf.mul(g, unit)))), scale), perColumn(tf.mul(dy, unit))];
    }),
    layerNorm: kernel<Norm>(({ x, attrs: { eps } }) => tf.add(tf.mul(standard(x(0), eps).unit, x(1)), x(2))),
    layerNormGrad: kernel<Norm>(({ x, attrs: { eps }, spec }) => {
      const [input, w, dy] = [x(0), x(1), x(2)];
      if (input.size === 0) return [zeros(tf, spec(0)), zeros(tf, spec(1)), zeros(tf, spec(2))];
      const { unit, scale } = standard(input, eps);
      const g = tf.mul(dy, w);
      const centred = tf.sub(tf.sub(g, meanLast(g)), tf.mul(unit, meanLast(tf.mul(g, unit))));
      return [tf.mul(centred, scale), perColumn(tf.mul(dy, unit)), perColumn(dy)];
    }),
  };
}

/** The maximum of the last axis; 0 for a row of -inf only, so that subtracting it gives -inf and not NaN. */
export function safeMax(device: Device, x: TfTensor): TfTensor {
  const { tf } = device;
  const top = maxLast(device, x);
  return select(device, tf.less(top, -3e38), 0, top, top.shape);
}

/** Softmax over the last axis; zeros for a row of -inf only. */
export function softmax(device: Device, x: TfTensor): TfTensor {
  const { tf } = device;
  const e = tf.exp(tf.sub(x, safeMax(device, x)));
  return tf.div(e, tf.maximum(tf.sum(e, -1, true), 1e-30));
}
