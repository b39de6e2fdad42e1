// The arguments of a command, checked: every wrong one is refused in one line that names the option and what it takes.
import { parseArgs } from "node:util";
import { UnsupportedError } from "@switchyard/core";
import { parseBytes } from "@switchyard/models";
import type { ArgsDef } from "citty";

export interface Given {
  readonly positionals: readonly string[];
  /** Every method answers undefined for an option that was not given. */
  text(name: string): string | undefined;
  /** An option that may be given several times. */
  texts(name: string): readonly string[];
  flag(name: string): boolean;
  whole(name: string, range: Range): number | undefined;
  number(name: string, range: Range): number | undefined;
  choice<T extends string>(name: string, choices: readonly T[]): T | undefined;
  /** Parts between commas. */
  list(name: string): readonly string[] | undefined;
  /** Token ids between commas. */
  ids(name: string): readonly number[] | undefined;
  /** Bytes: 512MB, 3GB, 2GiB. */
  bytes(name: string): number | undefined;
}

interface Range {
  readonly from: number;
  readonly to?: number;
  /** Why there is nothing beyond, for the refusal. */
  readonly why?: string;
}

/** "1 window", "2 windows". */
export const count = (n: number, one: string, many = `${one}s`): string => `${n} ${n === 1 ? one : many}`;

/** @throws UnsupportedError that names the option. */
export function byteSize(option: string, text: string): number {
  try {
    return parseBytes(text);
  } catch (cause) {
    const found = JSON.stringify(text);
    throw new UnsupportedError(`--${option} takes a size such as 512MB, 3GB or 2GiB, found ${found}`, { cause });
  }
}

export function shownBytes(bytes: number): string {
  const [unit, size] = bytes >= 1e9 ? ["GB", 1e9] : bytes >= 1e6 ? ["MB", 1e6] : bytes >= 1e3 ? ["kB", 1e3] : ["B", 1];
  return `${(bytes / (size as number)).toFixed(size === 1 ? 0 : 2)} ${unit}`;
}

/**
 * Whole numbers from 0, apart by white space or a comma; a comma may stand at the end.
 * @throws UnsupportedError that names where they come from, what is wrong and its place.
 */
export function tokenIds(what: string, text: string): number[] {
  const ids: number[] = [];
  const refuse = (found: string): never => {
    const shown = found.length > 80 ? `${found.slice(0, 80)}...` : found;
    throw new UnsupportedError(`${what} takes token ids separated by commas, such as 1,2,3, found ${shown}`);
  };
  const parts = text.split(",");
  for (const [i, part] of parts.entries()) {
    const words = part.split(/\s+/).filter((word) => word !== "");
    if (words.length === 0 && (i < parts.length - 1 || ids.length === 0)) {
      // A long list is shown from the id before the hole on.
      const around = text.trim().length <= 40 ? text.trim() : `${ids.at(-1) ?? ""},,`;
      refuse(`${JSON.stringify(around)}, where id number ${ids.length + 1} is missing`);
    }
    for (const word of words) {
      if (!/^\d{1,9}$/.test(word)) refuse(`${JSON.stringify(word.slice(0, 60))} as id number ${ids.length + 1}`);
      ids.push(Number(word));
    }
  }
  return ids;
}

/** Reads arguments by the options of a command, named for messages. @throws UnsupportedError for what a user can mend. */
export function readArguments(command: string, spec: ArgsDef, rest: readonly string[]): Given {
  const options = Object.entries(spec).filter(([, { type }]) => type !== "positional");
  const { values, positionals } = parseArgs({
    args: [...rest],
    options: Object.fromEntries(
      options.map(([name, option]) => [
        name,
        {
          type: option.type === "boolean" ? "boolean" : "string",
          multiple: true,
          ...("alias" in option && typeof option.alias === "string" ? { short: option.alias } : {}),
        },
      ]),
    ),
    allowPositionals: true,
    // Refused below, in our words.
    strict: false,
  });
  const known = new Map(options);
  const given = new Map<string, readonly string[]>();
  const flags = new Set<string>();
  for (const [name, value] of Object.entries(values)) {
    const type = known.get(name)?.type;
    if (type === undefined) {
      const names = options.map(([one]) => `--${one}`).join(", ");
      throw new UnsupportedError(`unknown option --${name}; the options are ${names}`);
    }
    const list = Array.isArray(value) ? value : [value];
    if (type === "boolean") {
      if (list.some((one) => typeof one === "string")) throw new UnsupportedError(`--${name} takes no value`);
      flags.add(name);
      continue;
    }
    const texts = list.filter((one) => typeof one === "string");
    if (texts.length < list.length || texts.includes("")) {
      throw new UnsupportedError(`--${name} takes a value; see switchyard ${command} --help`);
    }
    // `--prompt --json` would take the next option for a text; `--prompt=--json` says that it is one.
    const swallowed = texts.find(
      (one) => one.startsWith("--") && known.has(one.slice(2)) && !rest.includes(`--${name}=${one}`),
    );
    if (swallowed !== undefined) {
      throw new UnsupportedError(
        `--${name} takes a value, found the option ${swallowed}; a value of that name is written --${name}=${swallowed}`,
      );
    }
    given.set(name, texts);
  }
  const text = (name: string): string | undefined => {
    const [only, ...more] = given.get(name) ?? [];
    if (more.length === 0) return only;
    throw new UnsupportedError(`--${name} is given ${more.length + 1} times; once is enough`);
  };
  const number = (name: string, { from, to, why }: Range, whole: boolean): number | undefined => {
    const value = text(name);
    if (value === undefined) return undefined;
    const pattern = whole ? /^-?\d{1,15}$/ : /^-?(\d+(\.\d*)?|\.\d+)(e[-+]?\d+)?$/i;
    const found = Number(value);
    if (pattern.test(value) && found >= from && (to === undefined || found <= to)) return found;
    const range = to === undefined ? `from ${from}` : `from ${from} to ${to}`;
    const reason = why === undefined ? "" : ` (${why})`;
    throw new UnsupportedError(
      `--${name} takes a ${whole ? "whole " : ""}number ${range}${reason}, found ${JSON.stringify(value)}`,
    );
  };
  return {
    positionals,
    text,
    texts: (name) => given.get(name) ?? [],
    flag: (name) => flags.has(name),
    whole: (name, range) => number(name, range, true),
    number: (name, range) => number(name, range, false),
    choice<T extends string>(name: string, choices: readonly T[]) {
      const value = text(name);
      if (value === undefined) return undefined;
      const found = choices.find((one) => one === value);
      if (found !== undefined) return found;
      throw new UnsupportedError(`--${name} takes ${choices.join(", ")}, found ${JSON.stringify(value)}`);
    },
    list: (name) =>
      text(name)
        ?.split(",")
        .map((part) => part.trim()),
    ids(name) {
      const value = text(name);
      return value === undefined ? undefined : tokenIds(`--${name}`, value);
    },
    bytes(name) {
      const value = text(name);
      return value === undefined ? undefined : byteSize(name, value);
    },
  };
}

/** So many positional arguments, neither fewer nor more. @throws UnsupportedError with the example. */
export function exactly(count: number, { positionals }: Given, what: string, example: string): readonly string[] {
  if (positionals.length === count) return positionals;
  const found = positionals.length === 0 ? "none" : positionals.map((one) => JSON.stringify(one)).join(", ");
  throw new UnsupportedError(`${what}, found ${found}: ${example}`);
}

/** Columns of text, the first to the left, the others to the right. */
export function table(rows: readonly (readonly string[])[]): string {
  const widths = (rows[0] ?? []).map((_, i) => Math.max(...rows.map((row) => row[i]?.length ?? 0)));
  const line = (row: readonly string[]): string =>
    row.map((cell, i) => (i === 0 ? cell.padEnd(widths[i] ?? 0) : cell.padStart(widths[i] ?? 0))).join("  ");
  return rows.map(line).join("\n");
}
