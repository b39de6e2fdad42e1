// The fields of a request body: each is read by what it must be, and what nobody reads is refused by name.
import type { Json } from "@switchyard/core";
import { ApiError, badParameter } from "./errors.ts";

interface Range {
  readonly from: number;
  readonly to?: number;
}

export type Body = { readonly [key: string]: Json };

/** Lists and objects may be nested without end; they are only named. */
const shown = (value: Json): string => {
  if (Array.isArray(value)) return "a list";
  if (typeof value === "object" && value !== null) return "an object";
  const text = JSON.stringify(value);
  return text.length > 60 ? `${text.slice(0, 60)}...` : text;
};

export const isBody = (value: Json | undefined): value is Body =>
  typeof value === "object" && value !== null && !Array.isArray(value);

/** null stands for an absent field everywhere, as clients send it. Everything throws ApiError. */
export class Fields {
  readonly #body: Body;
  readonly #prefix: string;
  readonly #read = new Set<string>();

  constructor(body: Body, prefix = "") {
    this.#body = body;
    this.#prefix = prefix;
  }

  /** As messages name it. */
  path(name: string): string {
    return `${this.#prefix}${name}`;
  }

  value(name: string): Json | undefined {
    this.#read.add(name);
    const found = Object.hasOwn(this.#body, name) ? this.#body[name] : undefined;
    return found ?? undefined;
  }

  refuse(name: string, expected: string): never {
    const value = this.value(name);
    const path = this.path(name);
    throw badParameter(path, `'${path}' must be ${expected}${value === undefined ? "" : `, found ${shown(value)}`}.`);
  }

  number(name: string, { from, to = Number.POSITIVE_INFINITY }: Range, whole = false): number | undefined {
    const value = this.value(name);
    if (value === undefined) return undefined;
    const fits = typeof value === "number" && value >= from && value <= to && (!whole || Number.isSafeInteger(value));
    if (fits) return value;
    const range = to === Number.POSITIVE_INFINITY ? `from ${from}` : `from ${from} to ${to}`;
    return this.refuse(name, `a ${whole ? "whole " : ""}number ${range}`);
  }

  whole(name: string, range: Range): number | undefined {
    return this.number(name, range, true);
  }

  flag(name: string): boolean | undefined {
    const value = this.value(name);
    return value === undefined || typeof value === "boolean" ? value : this.refuse(name, "true or false");
  }

  text(name: string): string | undefined {
    const value = this.value(name);
    return value === undefined || typeof value === "string" ? value : this.refuse(name, "a string");
  }

  object(name: string): Fields | undefined {
    const value = this.value(name);
    if (value === undefined) return undefined;
    return isBody(value) ? new Fields(value, `${this.path(name)}.`) : this.refuse(name, "an object");
  }

  get names(): readonly string[] {
    return Object.keys(this.#body);
  }

  /** Fields that may be there and change nothing. */
  ignore(...names: readonly string[]): void {
    for (const name of names) this.#read.add(name);
  }

  /** Fields that are known and not served: only a value that asks for nothing passes. */
  unsupported(name: string, harmless: (value: Json) => boolean, instead: string): void {
    const value = this.value(name);
    if (value === undefined || harmless(value)) return;
    const path = this.path(name);
    throw badParameter(path, `'${path}' is not supported by this server: ${instead}.`, "unsupported_parameter");
  }

  /** Refuses fields that nobody asked for: a misspelt one must not be lost silently. */
  finish(): void {
    const unknown = this.names.find((name) => !this.#read.has(name));
    if (unknown === undefined) return;
    const path = this.path(unknown);
    throw new ApiError(400, `Unknown parameter: '${path.slice(0, 80)}'.`, {
      param: path.slice(0, 80),
      code: "unknown_parameter",
    });
  }
}
