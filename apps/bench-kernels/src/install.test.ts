// Which file of a package `import` would get.
import { expect, it } from "vitest";
import { exportedFile } from "./install.ts";

it("follows the conditions node and import, in the package's order", () => {
  expect(exportedFile("./a.js")).toBe("./a.js");
  expect(exportedFile({ ".": { types: "./t.d.ts", node: { import: "./n.mjs", require: "./n.cjs" } } })).toBe("./n.mjs");
  expect(exportedFile({ "./sub": "./s.js", ".": { browser: "./b.js", default: "./d.js" } })).toBe("./d.js");
  expect(exportedFile({ ".": { require: "./c.cjs" } })).toBeUndefined();
  expect(exportedFile(undefined)).toBeUndefined();
});
