// From tokens back to text, as the `decoder` of tokenizer.json says and as the Rust library does it: for byte-level tokens and for
// those of SentencePiece, with bytes as `<0x0A>` and spaces as U+2581. Other kinds stay with @huggingface/tokenizers.
import type { Json } from "@switchyard/core";
import { byteOf } from "./byte-level.ts";
import { isRecord } from "./checkpoint.ts";

export interface TokenDecoder {
  /** Text of tokens that stand alone; undefined: the library does that as it should. */
  readonly decode?: (tokens: readonly string[]) => string;
  /** The bytes of a token, which is no added one; `first`: at the beginning of a text, where a space may fall away. */
  bytes(token: string, first: boolean): readonly number[] | undefined;
}

type Step = (tokens: readonly string[]) => readonly string[];

const encoder = new TextEncoder();
const byteToken = /^<0x([0-9A-Fa-f]{2})>$/;

/** Runs of byte tokens become text; where a run is no UTF-8, each of its bytes becomes U+FFFD. */
const byteFallback: Step = (tokens) => {
  const result: string[] = [];
  let run: number[] = [];
  const flush = (): void => {
    if (run.length === 0) return;
    try {
      result.push(new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(Uint8Array.from(run)));
    } catch {
      result.push("\ufffd".repeat(run.length));
    }
    run = [];
  };
  for (const token of tokens) {
    const found = byteToken.exec(token)?.[1];
    if (found !== undefined) run.push(Number.parseInt(found, 16));
    else {
      flush();
      result.push(token);
    }
  }
  flush();
  return result;
};

interface Part {
  readonly step: Step;
  /** What it does to a token inside a text. */
  inside?(token: string): string;
  readonly isBytes?: boolean;
}

function part(decoder: { readonly [key: string]: Json }): Part | undefined {
  const { type, content, pattern, start = 0, stop = 0, replacement = "\u2581", prepend_scheme: scheme } = decoder;
  if (type === "ByteFallback") return { step: byteFallback, isBytes: true };
  if (type === "Fuse") return { step: (tokens) => [tokens.join("")] };
  if (type === "Replace" && isRecord(pattern) && typeof pattern.String === "string" && typeof content === "string") {
    const { String: from } = pattern;
    const inside = (token: string): string => token.split(from).join(content);
    return { step: (tokens) => tokens.map(inside), inside };
  }
  if (type === "Strip" && content === " " && (start === 0 || start === 1) && stop === 0) {
    return { step: (tokens) => tokens.map((token) => (start === 1 && token.startsWith(" ") ? token.slice(1) : token)) };
  }
  if (type === "Metaspace" && typeof replacement === "string") {
    const inside = (token: string): string => token.split(replacement).join(" ");
    const atStart = (token: string): string =>
      scheme === "never" || decoder.add_prefix_space === false ? inside(token) : token.split(replacement).join("");
    return { step: (tokens) => tokens.map((token, i) => (i === 0 ? atStart(token) : inside(token))), inside };
  }
  return undefined;
}

const flat = (decoder: { readonly [key: string]: Json }): readonly { readonly [key: string]: Json }[] | undefined => {
  if (decoder.type !== "Sequence") return [decoder];
  if (!Array.isArray(decoder.decoders)) return undefined;
  return decoder.decoders.every((one: Json) => isRecord(one)) ? decoder.decoders.flatMap((one) => flat(one) ?? []) : [];
};

/** The decoder of a tokenizer.json; undefined where it is of another kind. */
export function tokenDecoder(decoder: Json | undefined): TokenDecoder | undefined {
  if (!isRecord(decoder)) return undefined;
  if (decoder.type === "ByteLevel") {
    return {
      bytes(token) {
        const bytes = Array.from(token, (character) => byteOf.get(character));
        return bytes.every((b) => b !== undefined) ? (bytes as number[]) : undefined;
      },
    };
  }
  const parts = (flat(decoder) ?? []).map(part);
  if (parts.length === 0 || parts.some((one) => one === undefined)) return undefined;
  const known = parts as readonly Part[];
  const hasBytes = known.some(({ isBytes }) => isBytes);
  const decode = (tokens: readonly string[]): string =>
    known.reduce<readonly string[]>((list, { step }) => step(list), tokens).join("");
  return {
    decode,
    bytes(token, first) {
      const found = hasBytes ? byteToken.exec(token)?.[1] : undefined;
      if (found !== undefined && !(first && found === "20" && decode([token]) === "")) {
        return [Number.parseInt(found, 16)];
      }
      const text = first ? decode([token]) : known.reduce((rest, { inside }) => inside?.(rest) ?? rest, token);
      return Array.from(encoder.encode(text));
    },
  };
}
