// Size budgets: what a browser downloads for one subpath, bundled, minified and gzipped, without the packages it depends on.
import { readFileSync } from "node:fs";

/**
 * Budget per package and subpath; "*" stands for every subpath that is not named.
 * @type {Record<string, Record<string, string>>}
 */
const budgets = {
  "@switchyard/core": { "*": "20 kB" },
  // The race holds six strategies and three gates.
  "@switchyard/routers": { ".": "40 kB", "./expert-race": "5 kB", "*": "4 kB" },
  "@switchyard/kernels": { "*": "60 kB" },
  // Ten families, stored formats, tokenizers, strategies, conversion, traces: a page takes part of it.
  "@switchyard/models": { ".": "100 kB", "./tuning": "65 kB" },
};
const otherwise = { "*": "60 kB" };

/** The configuration for the package in the current folder: one check per exported subpath. */
export function limits() {
  const { name, exports, dependencies = {} } = JSON.parse(readFileSync("package.json", "utf8"));
  /** @type {Record<string, string>} */
  const budget = budgets[name] ?? otherwise;
  return Object.entries(exports)
    .filter(([, target]) => typeof target === "object")
    .map(([subpath, target]) => ({
      name: name + subpath.slice(1),
      path: target.default,
      limit: budget[subpath] ?? budget["*"],
      gzip: true,
      ignore: Object.keys(dependencies), // peers are left out anyway
      // Built-in modules stay imports: code for Node beside code for browsers loads them behind a check.
      modifyEsbuildConfig: (/** @type {{ external?: string[] }} */ config) => ({
        ...config,
        format: "esm",
        external: [...(config.external ?? []), "node:*"],
      }),
    }));
}
