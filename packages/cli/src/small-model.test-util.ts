// A small untrained checkpoint with a tokenizer, and the recorded ones of the models package.
import { join } from "node:path";
import { engine, random } from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import { saveModel, type Tokenizer, tokenizer, trainTokenizer, transformer } from "@switchyard/models";
import { topK } from "@switchyard/routers/top-k";

export const fixture = (name: string): string =>
  join(import.meta.dirname, "..", "..", "models", "test", "fixtures", name);

export const sampleText = "A whale ship was my Yale College and my Harvard. ".repeat(4);

/** Saved into `folder` in the OLMoE layout. */
export async function saveSmallModel(folder: string): Promise<Tokenizer> {
  const on = engine(cpu());
  const words = tokenizer(await trainTokenizer([sampleText], { vocabulary: 290 }));
  const sizes = { vocabulary: words.vocabulary, width: 16, layers: 2, heads: 2, experts: 4, hidden: 16, context: 64 };
  const model = transformer(on, { ...sizes, router: topK({ k: 2 }), qkNorm: "projection" }, random(on, 1));
  await saveModel(model, folder, { tokenizer: words });
  return words;
}
