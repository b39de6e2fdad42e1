// What the parts of a fine-tuning run share: where it shows how far it is, and what ends it; and the loss on held-out text.
import { evaluateTokens, type LanguageModel } from "@switchyard/models";
import type { ProgressBar } from "../progress.ts";
import type { TuningText } from "./data.ts";
import type { Measured } from "./state.ts";

export interface JobContext {
  note(text: string): void;
  /** Of what may end at once, and of the steps. */
  readonly bar: ProgressBar;
  readonly training: ProgressBar;
  /** Told when there is something to keep. */
  begin(): void;
  readonly signal: AbortSignal;
}

/** Loss on what is held out, over windows of the length that is trained on. */
export async function measure(
  model: LanguageModel,
  { heldOut }: TuningText,
  { length, title }: { readonly length: number; readonly title: string },
  { bar, signal }: JobContext,
): Promise<Measured> {
  let [nats, tokens, bytes]: [number, number, number | undefined] = [0, 0, 0];
  const total = heldOut.reduce((sum, { ids }) => sum + ids.length, 0);
  let before = 0;
  for (const part of heldOut) {
    const found = await evaluateTokens(model, part.ids, {
      context: Math.min(model.context, length + 1),
      stride: Math.max(1, Math.floor(length / 2)),
      signal,
      onProgress: ({ done, total: all }) => bar.update(title, before + (part.ids.length * done) / all, total),
    });
    nats += found.nats;
    tokens += found.scored;
    bytes = part.bytes === undefined || bytes === undefined ? undefined : bytes + part.bytes;
    before += part.ids.length;
  }
  bar.end();
  const bitsPerByte = bytes === undefined || bytes === 0 ? {} : { bitsPerByte: nats / Math.LN2 / bytes };
  return { loss: nats / tokens, perplexity: Math.exp(nats / tokens), ...bitsPerByte, tokens };
}
