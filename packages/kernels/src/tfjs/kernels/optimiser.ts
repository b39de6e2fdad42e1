// One optimiser step. TensorFlow.js tensors are immutable: storage that was given away is freed, not overwritten.
import type { AdamwAttrs, Kernel, SgdAttrs } from "@switchyard/core";
import type { Device } from "../device.ts";
import type { TfTensor } from "../tf.ts";

export function optimiserKernels({ tf, kernel }: Device): { readonly [P in "adamw" | "sgd"]: Kernel<TfTensor> } {
  return {
    adamw: kernel<AdamwAttrs>(({ x, attrs }) => {
      const { lr, beta1, beta2, eps, weightDecay, correction1, correction2 } = attrs;
      const param = x(0);
      const g = tf.mul(x(1), x(4));
      const m = tf.add(tf.mul(x(2), beta1), tf.mul(g, 1 - beta1));
      const v = tf.add(tf.mul(x(3), beta2), tf.mul(tf.square(g), 1 - beta2));
      const root = tf.add(tf.sqrt(tf.mul(v, 1 / correction2)), eps);
      const step = tf.mul(tf.div(m, root), lr / correction1);
      const decayed = weightDecay === 0 ? param : tf.mul(param, 1 - lr * weightDecay);
      return [tf.sub(decayed, step), m, v];
    }),
    sgd: kernel<SgdAttrs>(({ x, attrs: { lr, momentum, weightDecay, nesterov } }) => {
      const param = x(0);
      const scaled = tf.mul(x(1), x(3));
      const g = weightDecay === 0 ? scaled : tf.add(scaled, tf.mul(param, weightDecay));
      const velocity = momentum === 0 ? g : tf.add(tf.mul(x(2), momentum), g);
      const step = nesterov ? tf.add(g, tf.mul(velocity, momentum)) : velocity;
      return [tf.sub(param, tf.mul(step, lr)), velocity];
    }),
  };
}
