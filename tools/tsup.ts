// The one build of every package: an ES module and its types for each subpath that package.json exports.
import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import type { Options } from "tsup";

interface Manifest {
  readonly exports?: Readonly<Record<string, string | { readonly default: string }>>;
  readonly bin?: Readonly<Record<string, string>>;
}

/**
 * Options for the package in the current folder. `./dist/a/b.js` under `exports` or `bin` is built from `src/a/b.ts`, so a
 * new subpath needs one entry in package.json and nothing here. `more` adds what only one package needs (worker files).
 */
export function library(more: Options = {}): Options {
  const manifest: Manifest = JSON.parse(readFileSync("package.json", "utf8"));
  const targets = [
    ...Object.values(manifest.exports ?? {}).map((target) => (typeof target === "string" ? target : target.default)),
    ...Object.values(manifest.bin ?? {}),
  ].filter((target) => target.startsWith("./dist/") && target.endsWith(".js"));
  const entry = Object.fromEntries(
    [...new Set(targets)].map((target) => {
      const name = target.slice("./dist/".length, -".js".length);
      return [name, `src/${name}.ts`];
    }),
  );
  return {
    format: ["esm"],
    dts: true,
    clean: true,
    target: "es2023",
    platform: "node",
    // "node:fs" keeps its prefix: bundlers for browsers recognise built-in modules by it.
    removeNodeProtocol: false,
    // Without the path mapping to sources: the types of the other packages must stay imports. Inlined, the Tensor of
    // routers and the Tensor of core would be two types.
    tsconfig: fileURLToPath(new URL("tsconfig/build.json", import.meta.url)),
    ...more,
    entry: { ...entry, ...(more.entry as Record<string, string> | undefined) },
    external: [/^@switchyard\//, ...(more.external ?? [])],
  };
}
