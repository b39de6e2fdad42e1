// A language model as a task for core's trainer: cross entropy of the next token, padding left out.
import { crossEntropy, mul, type Random, reshape, ShapeError, sum } from "@switchyard/core";
import type { Pass } from "@switchyard/core/moe";
import type { Task } from "@switchyard/core/train";
import type { LanguageModel } from "./model.ts";

/** Sequences on the host, row-major [batch, sequence]. */
export interface TextBatch {
  readonly shape: readonly [batch: number, sequence: number];
  readonly ids: Int32Array;
  /** The id that each position should predict; -1 where there is none (padding, the prompt of a dialogue). */
  readonly labels: Int32Array;
  /** 1 = real token, 0 = padding; absent: all are real. */
  readonly mask?: Float32Array;
}

/**
 * The task of training `model` on batches of text, for `trainer(engine, task, options)`, which takes its parameters and
 * buffers over: afterwards use `model.with({ params: trainer.params, buffers: trainer.buffers })`.
 * The loss is the mean over the labelled positions, in nats. `batch(index)` must give the same batch for the same
 * index.
 */
export function languageModelTask(model: LanguageModel, data: { batch(index: number): TextBatch }): Task<TextBatch> {
  const { engine, vocabulary } = model;
  return {
    params: model.params,
    routers: model.routers,
    batch: (index) => checked(data.batch(index), `batch ${index}`, vocabulary),
    forward(params, buffers, batch, info): Pass {
      const { shape, ids, labels, mask } = batch;
      const tokens = shape[0] * shape[1];
      const { microBatch: _, ...options } = info;
      const { logits, routed } = model.forward(params, engine.tensor(ids, shape), {
        ...options,
        buffers,
        ...(mask ? { mask: engine.tensor(mask, shape) } : {}),
      });
      const { losses } = crossEntropy(reshape(logits, [tokens, vocabulary]), engine.tensor(labels, [tokens]));
      return { loss: mul(sum(losses), 1 / Math.max(labelled(batch), 1)), logits, layers: routed };
    },
    info: (batch) => ({
      labels: engine.tensor(batch.labels, batch.shape),
      ...(batch.mask ? { mask: engine.tensor(batch.mask, batch.shape) } : {}),
      tokens: labelled(batch),
    }),
  };
}

const labelled = ({ labels }: TextBatch): number => labels.reduce((n, label) => n + (label >= 0 ? 1 : 0), 0);

function checked(batch: TextBatch, what: string, vocabulary: number): TextBatch {
  const { shape, ids, labels, mask } = batch;
  const tokens = shape[0] * shape[1];
  if (ids.length !== tokens || labels.length !== tokens || (mask && mask.length !== tokens)) {
    throw new ShapeError(
      `${what}: [${shape}] needs ${tokens} ids, labels and mask entries; ` +
        `found ${ids.length}, ${labels.length}, ${mask?.length ?? "none"}`,
    );
  }
  const wrong = ids.find((id) => id < 0 || id >= vocabulary) ?? labels.find((id) => id < -1 || id >= vocabulary);
  if (wrong !== undefined) throw new ShapeError(`${what}: id ${wrong} is not in a vocabulary of ${vocabulary}`);
  return batch;
}

/**
 * Batches of random windows of a text: every index gives the same windows again, whatever came before. Labels are the
 * ids one further on. Throws ShapeError where the text is shorter than one window.
 *
 * @example languageModelTask(model, randomWindows(ids, { batch: 8, sequence: 128, random: random(engine, 1) }))
 */
export function randomWindows(
  ids: Int32Array,
  options: { readonly batch: number; readonly sequence: number; readonly random: Random },
): { batch(index: number): TextBatch } {
  const { batch, sequence, random } = options;
  const starts = ids.length - sequence;
  if (starts < 1) {
    throw new ShapeError(
      `randomWindows: ${ids.length} ids are too few for windows of ${sequence} and the label after each`,
    );
  }
  return {
    batch(index) {
      const from = Array.from(random.at("windows", index).host("uniform", batch), (u) => Math.floor(u * starts));
      const gather = (ahead: number): Int32Array => {
        const rows = new Int32Array(batch * sequence);
        for (const [row, at] of from.entries())
          rows.set(ids.subarray(at + ahead, at + ahead + sequence), row * sequence);
        return rows;
      };
      return { shape: [batch, sequence], ids: gather(0), labels: gather(1) };
    },
  };
}
