// Reading config.json: every value is checked where it is read, because the file may come from anywhere.
import { CheckpointError, type Json } from "@switchyard/core";
import { quote } from "./safetensors.ts";

/** Typed access to a JSON object; throws CheckpointError that names the key and what was found. */
export class ConfigReader {
  readonly #config: { readonly [key: string]: Json };
  readonly #where: string;

  constructor(config: { readonly [key: string]: Json }, where = "config.json") {
    this.#config = config;
    this.#where = where;
  }

  /** The value; `null` counts as absent. */
  get(key: string): Json | undefined {
    return Object.hasOwn(this.#config, key) ? (this.#config[key] ?? undefined) : undefined;
  }

  #typed<T>(key: string, fallback: T | undefined, expected: string, is: (value: Json) => value is Json & T): T {
    const value = this.get(key) ?? fallback;
    if (value === undefined)
      throw new CheckpointError(`${this.#where}: ${quote(key)} is missing, expected ${expected}`);
    if (is(value as Json)) return value as T;
    const found = quote(JSON.stringify(value));
    throw new CheckpointError(`${this.#where}: ${quote(key)} is ${found}, expected ${expected}`);
  }

  /** A whole number from `least`, default 1. */
  whole(key: string, fallback?: number, least = 1): number {
    const is = (x: Json): x is number => typeof x === "number" && Number.isSafeInteger(x) && x >= least;
    return this.#typed(key, fallback, `a whole number from ${least}`, is);
  }

  number(key: string, fallback?: number): number {
    return this.#typed(key, fallback, "a number", (x): x is number => typeof x === "number" && Number.isFinite(x));
  }

  boolean(key: string, fallback?: boolean): boolean {
    return this.#typed(key, fallback, "true or false", (x): x is boolean => typeof x === "boolean");
  }

  string(key: string, fallback?: string): string {
    return this.#typed(key, fallback, "a text", (x): x is string => typeof x === "string");
  }

  /** Throws unless the value is absent or one of those that change nothing. */
  only(key: string, ...harmless: readonly Json[]): void {
    const value = this.get(key);
    if (value === undefined || harmless.some((x) => JSON.stringify(x) === JSON.stringify(value))) return;
    const allowed = harmless.length ? `; only ${harmless.map((x) => JSON.stringify(x)).join(" or ")} is known` : "";
    throw new CheckpointError(
      `${this.#where}: ${quote(key)} is ${quote(JSON.stringify(value))}, which this package cannot run${allowed}`,
    );
  }
}
