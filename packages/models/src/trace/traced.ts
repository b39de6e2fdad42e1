// A model whose every step is recorded: what decodes with it need not know.
import { type Tensor, UnsupportedError } from "@switchyard/core";
import type { Model } from "../model.ts";
import type { TraceRecorder } from "./recorder.ts";

/**
 * The same model; each call of `step` becomes a pass of the recorder (made with `routing: model.routing`). `sequences` numbers the rows
 * of a batch as the trace shall have them, by default 0, 1, 2, ...; a row keeps its number when others leave the batch. Rows with the same
 * prompt are run as one until it ends, and all have the number of the first. A strategy that runs several rows for one text (strong
 * and weak) has them all recorded. Prompts that run one after the other (beam, contrastiveSearch, selfConsistency) are numbered in their
 * order, those of self-consistency with as many numbers as each has samples. Throws UnsupportedError for a step with a trace or a mask of its own.
 *
 * @example
 * const recorder = traceRecorder(await traceFile("run.trace"), { model: { name: "olmoe" }, routing: model.routing });
 * for await (const { text } of generate(traced(model, recorder), { prompt, tokenizer })) process.stdout.write(text);
 * await recorder.close();
 */
export function traced<M extends Model>(
  model: M,
  recorder: TraceRecorder,
  options: { readonly sequences?: readonly number[] } = {},
): M {
  return {
    ...model,
    async step(ids: Tensor, given: Parameters<Model["step"]>[1] = {}) {
      if (given.trace || given.mask) {
        throw new UnsupportedError(
          "traced: this step has a trace or a mask of its own; record it with recorder.pass()",
        );
      }
      const [batch = 0, sequence = 0] = ids.shape;
      const past = given.cache?.length ?? 0;
      const flat = await ids.data();
      const pass = recorder.pass({
        ids: Array.from({ length: batch }, (_, row) => flat.subarray(row * sequence, (row + 1) * sequence)),
        past,
        ...(given.padding
          ? {
              mask: given.padding.map((before) =>
                Uint8Array.from({ length: past + sequence }, (_, i) => (i < before ? 0 : 1)),
              ),
            }
          : {}),
        sequences: (given.sequences ?? given.cache?.origins ?? Array.from({ length: batch }, (_, row) => row)).map(
          (row) => options.sequences?.[row] ?? row,
        ),
      });
      const logits = await model.step(ids, { ...given, trace: pass });
      try {
        await pass.done();
        return logits;
      } catch (error) {
        logits.dispose();
        throw error;
      }
    },
  };
}
