// The lock file serves every contributor: no addresses of one registry, and the native tools of every platform.
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "vitest";
import { root } from "./child.mjs";

interface Entry {
  readonly resolved?: string;
  readonly optionalDependencies?: Readonly<Record<string, string>>;
}
const lock: { readonly packages: Readonly<Record<string, Entry>> } = JSON.parse(
  readFileSync(join(root, "package-lock.json"), "utf8"),
);

test("no address of a registry", () => {
  const addresses = Object.values(lock.packages).flatMap(({ resolved }) =>
    resolved?.includes("://") ? [resolved] : [],
  );
  expect(Object.keys(lock.packages).length).toBeGreaterThan(100);
  expect(addresses).toEqual([]);
});

test("every optional package, also those of other platforms: npm ci refuses a lock file without them", () => {
  const wanted = Object.entries(lock.packages).flatMap(([path, { optionalDependencies = {} }]) =>
    Object.keys(optionalDependencies).map((name) => ({ path, name })),
  );
  expect(wanted.length).toBeGreaterThan(20);
  expect(wanted.filter(({ path, name }) => !reachable(path, name))).toEqual([]);
});

/** Is there an entry that `name` resolves to when it is imported from `path`? */
function reachable(path: string, name: string): boolean {
  if (lock.packages[`${path}${path ? "/" : ""}node_modules/${name}`]) return true;
  const up = path.lastIndexOf("/node_modules/");
  return path !== "" && reachable(up < 0 ? "" : path.slice(0, up), name);
}
