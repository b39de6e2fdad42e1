// What stands behind --router, taken apart: a name, a file or a package, its options, and wrappers with theirs.
//   topK:k=1            ./my-router.ts:k=4            C:\routers\mine.js:k=4            some-package:k=4
//   topK:k=2+capacity:factor=1.25+jitter
import { existsSync } from "node:fs";
import { basename, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { UnsupportedError } from "@switchyard/core";

export type OptionValue = string | number | boolean;
type Given = readonly (readonly [option: string, value: OptionValue])[];

export interface Specification {
  /** Name of a router or a package; for a file its absolute path. */
  readonly head: string;
  readonly isFile: boolean;
  readonly options: Given;
  readonly wrappers: readonly { readonly name: string; readonly options: Given }[];
  /** How the router is called in tables: as written, a file without its folder. */
  readonly label: string;
  /** The same with the absolute path of a file: means the same in any folder. */
  readonly portable: string;
}

/** Begins like a path: ./ ../ / C:\ file: */
const path = /^(?:\.{1,2}[\\/]|[\\/]|[A-Za-z]:[\\/]|file:)/;
/** The file at the beginning: up to the first ending of a script that options, wrappers or nothing follow. */
const script = /^.+?\.[cm]?[jt]s(?=$|[:+])/;

/** Takes a specification apart. @throws UnsupportedError for what is no option=value, and for a path without the ending of a script. */
export function parseSpecification(text: string, folder: string = process.cwd()): Specification {
  const written = text.trim();
  const refuse = (why: string): never => {
    throw new UnsupportedError(`router "${written}": ${why}`);
  };
  const [file] = script.exec(written) ?? [];
  const isPath = path.test(written);
  if (isPath && file === undefined) refuse("give the file with its ending: .ts, .mts, .js or .mjs");
  const isFile = file !== undefined && (isPath || existsSync(resolve(folder, file)));
  const own = isFile ? file : (/^[^:+]*/.exec(written)?.[0] ?? "");
  const rest = written.slice(own.length);
  const [options = "", ...wrappers] = rest.split(/\+(?=[A-Za-z])/);
  const optionsOf = (parts: readonly string[]): Given =>
    parts.map((part) => {
      const [option = "", ...right] = part.split("=");
      if (option === "" || right.length === 0) refuse(`"${part}" is not option=value; write for example topK:k=2`);
      return [option, value(right.join("="))];
    });
  const absolute = isFile ? resolve(folder, own.startsWith("file:") ? fileURLToPath(own) : own) : own;
  return {
    head: absolute,
    isFile,
    options: optionsOf(options.split(":").slice(1)),
    wrappers: wrappers.map((one) => {
      const [name = "", ...parts] = one.split(":");
      return { name, options: optionsOf(parts) };
    }),
    label: isFile ? basename(absolute) + rest : written,
    portable: absolute + rest,
  };
}

function value(text: string): OptionValue {
  if (text === "true" || text === "false") return text === "true";
  const number = Number(text);
  return text.trim() === "" || Number.isNaN(number) ? text : number;
}
