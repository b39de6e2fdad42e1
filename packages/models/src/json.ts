// JSON from strangers: what JSON.parse would accept in silence (equal keys, `__proto__`) or answer with a crash (endless
// nesting, more keys than a Set can hold) is refused by a scan before anything is built from it.
import { CheckpointError, type Json } from "@switchyard/core";
import { quote } from "./safetensors.ts";

export interface JsonLimits {
  /** Levels of objects and lists inside each other; default 64. */
  readonly depth?: number;
  /** Objects, lists, numbers, texts and literals, and keys beside them; default 10 million. */
  readonly values?: number;
  /** Accepts keys called `__proto__`: a vocabulary may hold that word. Default false. */
  readonly anyKey?: boolean;
}

/**
 * Parses JSON from an untrusted file; `where` is shown in errors.
 * Throws CheckpointError for text that is not JSON, an object with a key twice, a key `__proto__`, and what is deeper or
 * larger than the limits.
 */
export function parseUntrusted(text: string, where: string, limits: JsonLimits = {}): Json {
  scan(text, where, limits);
  try {
    return JSON.parse(text) as Json;
  } catch (cause) {
    throw new CheckpointError(`${where} is not valid JSON: ${cause instanceof Error ? cause.message : cause}`, {
      cause,
    });
  }
}

/** Does not judge the grammar: of text that is no JSON it only has to come to an end. */
function scan(text: string, where: string, { depth = 64, values = 10_000_000, anyKey = false }: JsonLimits): void {
  /** Of each open object its keys so far (made with the first), of each open list false. */
  const open: (Set<string> | undefined | false)[] = [];
  let count = 0;
  let at = 0;
  while (at < text.length) {
    const c = text[at];
    if (c === '"') {
      const end = endOfText(text, at);
      if (end === undefined) return; // JSON.parse says so in its own words
      if (open.at(-1) !== false && open.length > 0 && isKey(text, end)) {
        const key = plain(text.slice(at, end));
        if (key === undefined) return;
        if (key === "__proto__" && !anyKey) throw new CheckpointError(`${where} has the key "__proto__", not allowed`);
        const keys = open.at(-1) || new Set<string>();
        if (keys.has(key)) throw new CheckpointError(`${where} has the key ${quote(key)} twice in one object`);
        open[open.length - 1] = keys.add(key);
        count++;
      }
      at = end;
      continue;
    }
    if (c === "{" || c === "[") {
      if (open.length === depth) throw new CheckpointError(`${where} nests more than ${depth} objects and lists`);
      open.push(c === "[" ? false : undefined);
      count++;
    } else if (c === "}" || c === "]") open.pop();
    else if (c === ",") count++;
    if (count > values) throw new CheckpointError(`${where} holds more than ${values} values`);
    at++;
  }
}

/** The position after the closing quote; undefined where there is none. */
function endOfText(text: string, start: number): number | undefined {
  let at = start + 1;
  for (;;) {
    const end = text.indexOf('"', at);
    if (end < 0) return undefined;
    let slashes = 0;
    // Ends at the quote before at the latest, so that no work is done twice.
    while (text[end - 1 - slashes] === "\\") slashes++;
    if (slashes % 2 === 0) return end + 1;
    at = end + 1;
  }
}

function isKey(text: string, end: number): boolean {
  let at = end;
  while (text[at] === " " || text[at] === "\n" || text[at] === "\r" || text[at] === "\t") at++;
  return text[at] === ":";
}

/** The text that a quoted one stands for; undefined where its escapes are wrong, which JSON.parse reports later. */
function plain(quoted: string): string | undefined {
  if (!quoted.includes("\\")) return quoted.slice(1, -1);
  try {
    return JSON.parse(quoted) as string;
  } catch (error) {
    if (error instanceof SyntaxError) return undefined;
    throw error;
  }
}
