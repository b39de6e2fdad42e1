// Routers from files and packages: what is found, and a clear sentence for everything that is not a router.
import { existsSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { UnsupportedError } from "@switchyard/core";
import { afterAll, describe, expect, test } from "vitest";
import { routerFrom, routersFrom } from "./routers.ts";

const folder = mkdtempSync(join(tmpdir(), "switchyard-plugin-"));
afterAll(() => rmSync(folder, { recursive: true }));
const example = fileURLToPath(new URL("../../../apps/router-plugin/src/tempered.ts", import.meta.url));

/** Writes a file of the folder and gives its path. */
function file(name: string, content: string): string {
  const path = join(folder, name);
  mkdirSync(dirname(path), { recursive: true });
  writeFileSync(path, content);
  return path;
}
/** A plugin in plain JavaScript, as an expression. */
const plain = (more = "", name = "plain"): string =>
  `({ name: "${name}", causal: { training: true, evaluation: true }, needs: [], plans: ["sparse"], init: () => ({}), ${more} })`;
const from = (text: string): ReturnType<typeof routerFrom> => routerFrom(text, folder);

describe("files", () => {
  test("the example package, as TypeScript, with options and wrappers", async () => {
    const { label, plugin, digest, specification } = await from(`${example}:k=1:zLoss=0+capacity:factor=2`);
    expect(label).toBe("tempered.ts:k=1:zLoss=0+capacity:factor=2");
    expect(plugin.name).toBe("tempered+capacity");
    expect(plugin.options).toMatchObject({ router: { name: "tempered", options: { k: 1, zLoss: 0, floor: 0.1 } } });
    expect(specification).toBe(`${example}:k=1:zLoss=0+capacity:factor=2`);
    expect(digest).toMatch(/^[0-9a-f]{64}$/);
  });
  test.each([
    ["default.mjs", `export default (o) => ${plain("options: { k: 2, ...o }")}; export const other = () => 1;`],
    ["named.mjs", `export const router = (o) => ${plain("options: { k: 2, ...o }")}; export const other = () => 1;`],
    ["only.mjs", `export const mine = (o) => ${plain("options: { k: 2, ...o }")}; export const card = {};`],
    ["later.mjs", `export default async (o) => ${plain("options: { k: 2, ...o }")};`],
  ])("%s: the factory is found", async (name, content) => {
    file(name, content);
    expect((await from(`./${name}:k=3`)).plugin.options).toEqual({ k: 3 });
  });
  test("a plugin instead of a factory, unless it is given options", async () => {
    file("value.mjs", `export default ${plain()};`);
    expect((await from("./value.mjs")).plugin.name).toBe("plain");
    await expect(from("./value.mjs:k=3")).rejects.toThrow("exports a plugin, not a factory, so it takes no options");
  });
  test("two of the same name are told apart by folder only in the settings", async () => {
    file("a/same.mjs", `export default ${plain()};`);
    file("b/same.mjs", `export default ${plain()};`);
    await expect(routersFrom(["./a/same.mjs", "./b/same.mjs"], folder)).rejects.toThrow('"same.mjs" is named twice');
  });

  test.each<[string, string | undefined, RegExp]>([
    ["missing.ts", undefined, /there is no file .*missing\.ts/],
    ["nothing.mjs", "export {};", /exports nothing; expected a factory such as defineRouter/],
    ["several.mjs", "export const a = () => 1; export const b = () => 2;", /exports a, b; expected a factory/],
    ["number.mjs", "export default 7;", /what it exports is no router: it is a number, not an object/],
    [
      "shape.mjs",
      "export default () => ({ name: 'x' });",
      /what its factory returned is no router: it has no init\(context\)/,
    ],
    ["name.mjs", `export default () => ${plain("", "a b")};`, /no router: its name must be a word/],
    [
      "causal.mjs",
      `export default () => ${plain("causal: true")};`,
      /causal must say \{ training: boolean, evaluation: boolean \}/,
    ],
    [
      "plans.mjs",
      `export default () => ${plain("plans: ['spare']")};`,
      /plans must list the kinds of plan it returns, of sparse/,
    ],
    ["needs.mjs", `export default () => ${plain("needs: ['luck']")};`, /needs must be a list, empty or of tokenIds/],
    ["options.mjs", `export default () => ${plain("options: { k: Infinity }")};`, /options must be plain data/],
    [
      "ahead.mjs",
      `export default () => ${plain("causal: { training: false, evaluation: true }")};`,
      /looking at later tokens.*; use one of topK/,
    ],
    [
      "throws.mjs",
      "export default () => {\n  throw new RangeError('k is odd');\n};",
      /its factory threw RangeError: k is odd \(line 2 of .*throws\.mjs\)/,
    ],
    ["loads.mjs", "const x = undefined;\nx.y;\nexport default () => 1;", /cannot be loaded: TypeError: /],
    ["imports.mjs", "import './not-there.mjs';", /imports a file that is not there|cannot be loaded/],
  ])("%s is refused", async (name, content, message) => {
    if (content !== undefined) file(name, content);
    const error = await from(`./${name}`).catch((reason: unknown) => reason);
    expect(error).toBeInstanceOf(UnsupportedError);
    expect((error as Error).message).toMatch(message);
    expect((error as Error).message.startsWith(`router "${name}"`)).toBe(true);
  });
  test("a folder, and an option that the plugin has not", async () => {
    mkdirSync(join(folder, "folder.js"));
    await expect(from("./folder.js")).rejects.toThrow("is not a file");
    await expect(from(`${example}:heat=1`)).rejects.toThrow(
      'there is no option "heat"; its options are k, floor, zLoss',
    );
    file("loose.mjs", `export default () => ${plain("options: { k: 2 }")};`);
    await expect(from("./loose.mjs:q=1")).rejects.toThrow('plain has no option "q"; its options are k');
  });
});

describe("packages", () => {
  const installed = (name: string, manifest: object, files: Readonly<Record<string, string>>): void => {
    file(`node_modules/${name}/package.json`, JSON.stringify({ name, type: "module", ...manifest }));
    for (const [path, content] of Object.entries(files)) file(`node_modules/${name}/${path}`, content);
  };
  const factory = (name: string): string => `export default (o) => ${plain("options: { k: 2, ...o }", name)};`;

  test("resolved from the folder, by main, by exports and by its import condition", async () => {
    installed("router-main", { main: "lib/index.js" }, { "lib/index.js": factory("main") });
    installed(
      "@scope/router",
      { exports: { ".": { default: "./x.js" }, "./more": "./y.js" } },
      { "x.js": factory("x"), "y.js": factory("y") },
    );
    installed(
      "router-import",
      { exports: { ".": { types: "./x.d.ts", import: "./x.js" } } },
      { "x.js": factory("imported") },
    );
    installed("router-sugar", { exports: { import: "./x.js" } }, { "x.js": factory("sugar") });
    const names = ["router-main:k=1", "@scope/router", "@scope/router/more:k=4", "router-import", "router-sugar"];
    const found = await routersFrom(names, folder);
    expect(found.map(({ plugin, label, specification }) => [plugin.name, label, specification])).toEqual(
      ["main", "x", "y", "imported", "sugar"].map((name, i) => [name, names[i], names[i]]),
    );
    expect(found.map(({ plugin }) => plugin.options?.k)).toEqual([1, 2, 4, 2, 2]);
    expect(new Set(found.map(({ digest }) => digest)).size).toBe(5);
    expect(existsSync(join(folder, "node_modules"))).toBe(true);
  });
  test("an unknown one names the routers, files and the folder", async () => {
    await expect(from("router-nowhere")).rejects.toThrow(`unknown router "router-nowhere"; the routers are topK, `);
    await expect(from("router-nowhere")).rejects.toThrow(`no package of that name is installed for ${folder}`);
    // A module of Node, and what an object inherits, are no routers.
    for (const name of ["assert", "toString", "..", "a b"])
      await expect(from(name)).rejects.toThrow(`unknown router "${name}"`);
  });
  test("one that cannot be imported says so", async () => {
    installed("router-closed", { exports: { "./other": "./x.js" } }, { "x.js": factory("x") });
    await expect(from("router-closed")).rejects.toThrow(/router "router-closed": the package cannot be resolved from /);
    installed("router-broken", { exports: "./x.js" }, { "x.js": "export default 1 +;" });
    await expect(from("router-broken")).rejects.toThrow(/cannot be loaded/);
  });
});
