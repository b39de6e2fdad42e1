// What the tools know about the packages and apps of this repository: folders, manifests, source files. Plain data.
import { existsSync, globSync, readdirSync, readFileSync } from "node:fs";
import { join, sep } from "node:path";
import { root } from "./child.mjs";

type Ranges = Readonly<Record<string, string>>;

export interface Manifest {
  readonly name: string;
  readonly version: string;
  readonly description?: string;
  readonly private?: boolean;
  readonly license?: string;
  readonly type?: string;
  readonly sideEffects?: boolean | readonly string[];
  readonly engines?: Ranges;
  readonly files?: readonly string[];
  readonly exports?: Readonly<Record<string, string | Ranges>>;
  readonly scripts?: Ranges;
  readonly dependencies?: Ranges;
  readonly devDependencies?: Ranges;
  readonly optionalDependencies?: Ranges;
  readonly peerDependencies?: Ranges;
  readonly peerDependenciesMeta?: Readonly<Record<string, { readonly optional?: boolean }>>;
}

/** One text file; `path` is relative to its package, with forward slashes. */
export interface SourceFile {
  readonly path: string;
  readonly text: string;
}

export interface Package {
  /** Relative to the root, with forward slashes: `packages/core`. */
  readonly folder: string;
  readonly manifest: Manifest;
  readonly licence: string | undefined;
  readonly sources: readonly SourceFile[];
}

/** Every folder of `packages` and `apps` that has a package.json, in alphabetical order. */
export function readPackages(): Package[] {
  return ["packages", "apps"].flatMap((parent) =>
    readdirSync(join(root, parent))
      .filter((name) => existsSync(join(root, parent, name, "package.json")))
      .sort()
      .map((name) => readPackage(`${parent}/${name}`)),
  );
}

function readPackage(folder: string): Package {
  const here = join(root, folder);
  const licence = join(here, "LICENSE");
  return {
    folder,
    manifest: JSON.parse(readFileSync(join(here, "package.json"), "utf8")),
    licence: existsSync(licence) ? readFileSync(licence, "utf8") : undefined,
    sources: globSync(["src/**/*.ts", "test/**/*.ts", "*.mjs", "src/**/*.mjs"], { cwd: here })
      .map((path) => path.split(sep).join("/"))
      .filter((path) => !path.endsWith(".generated.ts"))
      .sort()
      .map((path) => ({ path, text: readFileSync(join(here, path), "utf8") })),
  };
}
