// Changing one value of a JSON file without touching the rest: numbers keep their spelling, keys their order, lines their indentation.
import { CheckpointError, type Json } from "@switchyard/core";

/** After a JSON text that begins at `at`: its closing quote. */
function endOfText(text: string, at: number): number {
  for (let i = at + 1; i < text.length; i++) {
    if (text[i] === "\\") i++;
    else if (text[i] === '"') return i + 1;
  }
  throw new CheckpointError("a text in a JSON file has no end");
}

const skip = (text: string, at: number): number => {
  let i = at;
  while (/\s/.test(text[i] ?? "")) i++;
  return i;
};

/** After the value that begins at `at`. */
function endOfValue(text: string, at: number): number {
  let depth = 0;
  for (let i = at; i < text.length; ) {
    const c = text[i];
    if (c === '"') {
      i = endOfText(text, i);
      if (depth === 0) return i;
      continue;
    }
    if (c === "{" || c === "[") depth++;
    else if (c === "}" || c === "]") {
      if (depth === 0) return i;
      depth--;
      if (depth === 0) return i + 1;
    } else if (depth === 0 && (c === "," || /\s/.test(c ?? ""))) return i;
    i++;
  }
  return text.length;
}

/**
 * The text of a JSON object (valid, without equal keys) with a key of its own set to a value: replaced where it is, added at
 * the end where it is not. Throws CheckpointError for a text that holds no object.
 */
export function setTopLevel(text: string, key: string, value: Json): string {
  const start = skip(text, 0);
  if (text[start] !== "{") throw new CheckpointError("a JSON object was expected");
  let at = skip(text, start + 1);
  /** After the last value. */
  let end = start + 1;
  /** From the brace, or from the comma, to the key: how entries are set apart. */
  let gap = text.slice(start + 1, at);
  while (text[at] === '"') {
    const afterKey = endOfText(text, at);
    const valueAt = skip(text, skip(text, afterKey) + 1);
    const valueEnd = endOfValue(text, valueAt);
    if (JSON.parse(text.slice(at, afterKey)) === key) {
      return text.slice(0, valueAt) + JSON.stringify(value) + text.slice(valueEnd);
    }
    end = valueEnd;
    at = skip(text, valueEnd);
    if (text[at] !== ",") break;
    const next = skip(text, at + 1);
    gap = text.slice(at + 1, next);
    at = next;
  }
  const comma = end === start + 1 ? "" : ",";
  const entry = `${comma}${comma ? gap : ""}${JSON.stringify(key)}: ${JSON.stringify(value)}`;
  return text.slice(0, end) + entry + text.slice(end);
}
