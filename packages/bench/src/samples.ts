// Text that a trained model writes, token by token with the experts it went to.
import { type Codec, type ComparisonOptions, decodeText, type Subject } from "./experiment.ts";
import { knownWords, words } from "./metrics.ts";
import { type Moment, watch } from "./probe.ts";
import type { Sample, SampleToken } from "./results.ts";

const rounded = (x: number, digits: number): number => Number(x.toFixed(digits));
const characters = (text: string, most: number): string => [...text].slice(0, most).join("");

/** Six words or less of a held-out block, from the first line that begins with fifteen characters of text: no model has seen them. */
export function promptFrom(block: Uint8Array): string {
  const lines = decodeText(block).split("\n").slice(1);
  for (const [i] of lines.entries()) {
    const [words] = /^\S+(?:\s\S+){0,5}/.exec(lines.slice(i, i + 3).join("\n")) ?? [""];
    if (words.length >= 15) return characters(words, 80);
  }
  return characters(decodeText(block).trimStart(), 40).trimEnd();
}

/** Texts of tokens; a character split over tokens goes to the last of them. */
function tokenTexts(ids: Int32Array, codec: Codec): readonly string[] {
  const decoder = new TextDecoder();
  const texts = [...ids].map((id) =>
    id === codec.separator ? "" : decoder.decode(codec.bytes([id]), { stream: true }),
  );
  const rest = decoder.decode();
  return texts.map((text, i) => (i === texts.length - 1 ? text + rest : text));
}

/** One sample per domain: words of its held-out text, continued by the model, and the experts of every token. */
export async function writeSamples(
  { domains, codec, sampleTokens = 100 }: Pick<ComparisonOptions, "domains" | "codec" | "sampleTokens">,
  subject: Subject,
  moment: Moment,
  seed: number,
): Promise<readonly Sample[]> {
  if (sampleTokens === 0) return [];
  const vocabulary = new Set(domains.flatMap(({ training }) => training.flatMap((block) => words(decodeText(block)))));
  const samples: Sample[] = [];
  for (const [index, { validation }] of domains.entries()) {
    const prompt = promptFrom(validation[0] ?? new Uint8Array(0));
    const start = Int32Array.of(codec.separator, ...codec.encode(prompt));
    const { params, buffers } = moment;
    const written = await subject.generate(params, buffers, start, sampleTokens, seed * 1000 + index);
    const ids = Int32Array.of(...start, ...written);
    const { layers } = await watch(moment, {
      shape: [1, ids.length],
      ids,
      labels: new Int32Array(ids.length).fill(-1),
    });
    const tokens = tokenTexts(ids, codec).map(
      (text, token): SampleToken => ({
        text,
        layers: layers.map(({ k, experts, ids: chosen, weights }) => {
          const slots = Array.from({ length: k }, (_, j) => token * k + j).filter((at) => {
            const id = chosen[at] ?? -1;
            return id >= 0 && id < experts;
          });
          return {
            experts: slots.map((at) => chosen[at] ?? 0),
            weights: slots.map((at) => rounded(weights[at] ?? 0, 4)),
          };
        }),
      }),
    );
    const text = decodeText(codec.bytes(written.filter((id) => id !== codec.separator)));
    samples.push({ prompt, text, knownWords: rounded(knownWords(text, vocabulary), 4), tokens: tokens.slice(1) });
  }
  return samples;
}
