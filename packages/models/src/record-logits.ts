// Everything a model computes on the way from a prompt to its logits, under the names by which other programs can compare it.
import { type Engine, ShapeError, type Tensor } from "@switchyard/core";
import type { ForwardOptions, Model } from "./model.ts";
import type { TensorSource } from "./safetensors.ts";

/** One recorded tensor; floats are f32, expert ids i32. */
export interface RecordedTensor {
  readonly name: string;
  readonly shape: readonly number[];
  readonly data: Float32Array | Int32Array;
}

/** The ids of one sequence as a tensor [1, sequence]. Throws ShapeError for ids that the model does not have. */
export function sequenceTensor(
  { engine, vocabulary, context }: Model & { readonly engine: Engine },
  ids: ArrayLike<number>,
  what: string,
): Tensor {
  if (ids.length === 0) throw new ShapeError(`${what}: there are no ids; give at least one`);
  if (ids.length > context) {
    throw new ShapeError(`${what}: there are ${ids.length} ids, but the context of the model is ${context}`);
  }
  const wrong = Array.from(ids).find((id) => !Number.isInteger(id) || id < 0 || id >= vocabulary);
  if (wrong !== undefined) throw new ShapeError(`${what}: id ${wrong} is not in a vocabulary of ${vocabulary}`);
  return engine.tensor(Int32Array.from(ids), [1, ids.length]);
}

/**
 * Runs a prompt once and gives what was computed (T ids, width H, E experts, K of them per token, vocabulary V):
 *
 * - `embed` [T, H]: the embedding, before any factor
 * - `layers.{l}.attn_out` [T, H]: what attention gives, before it is added
 * - `layers.{l}.moe_in` [T, H]: what router and experts see, after the norm
 * - `layers.{l}.router_logits` [T, E]: the router's scores, before softmax or sigmoid
 * - `layers.{l}.topk_indices` [T, K] i32 and `layers.{l}.topk_weights` [T, K]: chosen experts, best first, and the weights of their outputs
 * - `layers.{l}.moe_out` [T, H]: what the experts give, shared ones included, before it is added
 * - `layers.{l}.hidden` [T, H]: what layer l gives
 * - `final_norm` [T, H], `logits` [T, V]
 *
 * Layers without experts have no `moe_` and no router's tensors, routers without scores no `router_logits`; plans that are not sparse
 * have no `topk_`. Throws ShapeError for ids that the model does not have, and what a pass of the model throws.
 *
 * @example const tensors = await recordLogits(model, [1, 2, 3]);
 */
export async function recordLogits(
  model: Model & { readonly engine: Engine },
  ids: ArrayLike<number>,
  options: Pick<ForwardOptions, "override" | "allowNonCausal"> = {},
): Promise<readonly RecordedTensor[]> {
  const length = ids.length;
  const routed = new Set(model.routing.filter(({ part }) => part === "feedForward").map(({ layer }) => layer));
  const reading: Promise<RecordedTensor>[] = [];
  /** Reading begins at once: the tensor is gone after the call. */
  const record = (name: string, x: Tensor, shape: readonly number[]): void => {
    const read = async (): Promise<RecordedTensor> => {
      const data = await x.data();
      return { name, shape, data: data instanceof Int32Array ? data : Float32Array.from(data) };
    };
    reading.push(read());
  };
  const input = sequenceTensor(model, ids, "recordLogits");
  try {
    const { width, vocabulary } = model;
    const logits = await model.step(input, {
      ...options,
      positions: "all",
      watch(what, x, layer) {
        const at = `layers.${layer}`;
        const names = {
          embed: "embed",
          attention: `${at}.attn_out`,
          moeInput: routed.has(layer) ? `${at}.moe_in` : undefined,
          moeOutput: routed.has(layer) ? `${at}.moe_out` : undefined,
          hidden: `${at}.hidden`,
          finalNorm: "final_norm",
        };
        const name = names[what];
        if (name !== undefined) record(name, x, [length, width]);
      },
      trace: {
        record(place, { plan, logits: scores }) {
          const where = model.routing[place];
          if (where?.part !== "feedForward") return;
          const at = `layers.${where.layer}`;
          if (scores) record(`${at}.router_logits`, scores, scores.shape);
          if (plan.kind !== "sparse") return;
          record(`${at}.topk_indices`, plan.experts, plan.experts.shape);
          record(`${at}.topk_weights`, plan.weights, plan.weights.shape);
        },
      },
    });
    try {
      record("logits", logits, [length, vocabulary]);
      return await Promise.all(reading);
    } finally {
      await Promise.allSettled(reading);
      logits.dispose();
    }
  } finally {
    await Promise.allSettled(reading);
    input.dispose();
  }
}

/** Recorded tensors as a file holds them, for `encodeSafetensors`. */
export const recordedSources = (tensors: readonly RecordedTensor[]): TensorSource[] =>
  tensors.map(({ name, shape, data }) => ({
    name,
    dtype: data instanceof Int32Array ? "I32" : "F32",
    shape,
    bytes: () => new Uint8Array(data.buffer, data.byteOffset, data.byteLength),
  }));
