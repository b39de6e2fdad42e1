// The package also runs in browsers: node: modules are only imported inside functions, through builtIn().
import { readdir, readFile } from "node:fs/promises";
import { expect, it } from "vitest";

it("imports no node: module at load time", async () => {
  const root = new URL(".", import.meta.url);
  const files = (await readdir(root, { recursive: true })).filter(
    (name) => name.endsWith(".ts") && !/\.test(-util)?\.ts$/.test(name),
  );
  expect(files.length).toBeGreaterThan(10);
  for (const name of files) {
    const source = (await readFile(new URL(name, root), "utf8")).replace(/^ *(\/?\*|\/\/).*$/gm, "");
    expect(source.match(/^(import|export) .*["'](node:|fs|path)/gm), name).toBeNull();
    // `typeof import("node:fs")` is a type and leaves no trace.
    expect(source.match(/(?<!typeof )\bimport\(["']/g), name).toBeNull();
    for (const [, used] of source.matchAll(/\b(process|window|navigator|Buffer)\b\s*\??\./g)) {
      expect(source.includes(`globalThis.${used}?.`), `${name}: ${used} without globalThis`).toBe(true);
    }
  }
});
