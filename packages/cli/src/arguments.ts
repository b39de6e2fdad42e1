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
}

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

/** Whole numbers from 0, apart by commas or white space. @throws UnsupportedError that names where they come from. */
export function tokenIds(what: string, text: string): number[] {
  const parts = text.split(/[\s,]+/).filter((part) => part !== "");
  const wrong = parts.find((part) => !/^\d{1,9}$/.test(part));
  if (wrong !== undefined || parts.length === 0) {
    throw new UnsupportedError(
      `${what} takes token ids separated by commas, such as 1,2,3, found ${JSON.stringify((wrong ?? text).slice(0, 80))}`,
    );
  }
  return parts.map(Number);
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
  const number = (name: string, { from, to }: Range, whole: boolean): number | undefined => {
    const value = text(name);
    if (value === undefined) return undefined;
    const pattern = whole ? /^-?\d{1,15}$/ : /^-?(\d+(\.\d*)?|\.\d+)(e[-+]?\d+)?$/i;
    const found = Number(value);
    if (pattern.test(value) && found >= from && (to === undefined || found <= to)) return found;
    const range = to === undefined ? `from ${from}` : `from ${from} to ${to}`;
    throw new UnsupportedError(
      `--${name} takes a ${whole ? "whole " : ""}number ${range}, found ${JSON.stringify(value)}`,
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
