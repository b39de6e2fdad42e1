// The packages keep to the import directions, and the checker notices when they do not.
import { describe, expect, test } from "vitest";
import { violations } from "./boundaries.ts";
import { type Manifest, type Package, readPackages } from "./workspace.ts";

const packages = readPackages();

test("packages import only what the architecture allows", () => {
  expect(packages.length).toBeGreaterThan(6);
  expect(packages.flatMap((one) => one.sources).length).toBeGreaterThan(50);
  expect(violations(packages)).toEqual([]);
});

// ------------------------------------------------------------------------------------------------ the checker itself

const good: Manifest = {
  name: "@switchyard/routers",
  version: "0.1.0",
  license: "MIT",
  type: "module",
  sideEffects: false,
  engines: { node: ">=22" },
  peerDependencies: { "@switchyard/core": "^0.1.0" },
  devDependencies: { "@switchyard/core": "*", "@switchyard/testing": "*" },
};

/** A small repository: core and one more package, with one source file. */
function example(manifest: Partial<Manifest>, text = "", path = "src/a.ts"): Package[] {
  const whole: Manifest = { ...good, ...manifest };
  const licence = "MIT License";
  return [
    {
      folder: "packages/core",
      manifest: { ...good, name: "@switchyard/core", peerDependencies: {}, devDependencies: {} },
      licence,
      sources: [],
    },
    { folder: whole.name.replace("@switchyard", "packages"), manifest: whole, licence, sources: [{ path, text }] },
  ];
}

describe("violations", () => {
  test("a sound example has none", () => {
    const text = 'import type { Tensor } from "@switchyard/core";\nimport { x } from "./x.ts";\nexport const y = x;';
    expect(violations(example({}, text))).toEqual([]);
    expect(violations(example({}, 'import { testRouter } from "@switchyard/testing";', "src/a.test.ts"))).toEqual([]);
  });

  test.each([
    ["a wrong edge", 'import { wasm } from "@switchyard/kernels/wasm";', "imports @switchyard/kernels/wasm"],
    ["a wrong edge by import()", 'const x = await import("@switchyard/models");', "imports @switchyard/models"],
    ["a wrong edge by a type", 'type X = import("@switchyard/bench").Y;', "imports @switchyard/bench"],
    ["a wrong edge by re-export", 'export * from "@switchyard/testing";', "imports @switchyard/testing"],
    ["a relative path out of the package", 'import { x } from "../../core/src/x.ts";', "lies outside its package"],
    ["a built-in module", 'import { join } from "node:path";', "imports node:path"],
    ["an undeclared package", 'import * as tf from "@tensorflow/tfjs-core";', "which its package.json does not name"],
    ["its own name", 'import { topK } from "@switchyard/routers";', "imports its own package by name"],
  ])("%s in a source", (_, text, fault) => {
    const faults = violations(example({}, text));
    expect(faults).toHaveLength(1);
    expect(faults[0]).toContain(fault);
  });

  test("types only where only types are allowed", () => {
    const manifest = {
      name: "@switchyard/testing",
      devDependencies: { "@switchyard/core": "*", "@switchyard/models": "*" },
    };
    expect(violations(example(manifest, 'import { type Model } from "@switchyard/models";'))).toEqual([
      "packages/testing/src/a.ts: imports @switchyard/models, which its package.json does not name",
    ]);
    expect(violations(example(manifest, 'import { load } from "@switchyard/models";'))[0]).toContain(
      "testing may import core",
    );
  });

  test("code in index.ts", () => {
    const faults = violations(example({}, 'export { x } from "./x.ts";\nexport const y = 1;', "src/index.ts"));
    expect(faults).toEqual(["packages/routers/src/index.ts: index.ts only lists exports, found: export const y = 1;"]);
  });

  test.each<[string, Partial<Manifest>, string]>([
    ["a dependency of routers", { dependencies: { left: "^1.0.0" } }, "routers has no dependencies, found left"],
    [
      "a peer of routers",
      { peerDependencies: { ...good.peerDependencies, left: "1" } },
      "no peer but core, found left",
    ],
    ["core as no peer", { peerDependencies: {} }, "core must be a peer dependency"],
    ["core as a dependency", { dependencies: { "@switchyard/core": "^0.1.0" } }, "core must be a peer dependency only"],
    ["an install script", { scripts: { postinstall: "node x.js" } }, 'the script "postinstall" would run'],
    ["an old Node", { engines: { node: ">=18" } }, "engines.node is >=18"],
    ["another licence", { license: "ISC" }, "needs the MIT licence"],
    [
      "a loose range",
      { peerDependencies: { "@switchyard/core": "*" } },
      "the range of @switchyard/core is *, not ^0.1.0",
    ],
    [
      "an older range",
      { peerDependencies: { "@switchyard/core": "^0.0.9" } },
      "the range of @switchyard/core is ^0.0.9",
    ],
    [
      "a later range",
      { peerDependencies: { "@switchyard/core": "^0.1.1" } },
      "the range of @switchyard/core is ^0.1.1",
    ],
    ["a peer that is not built before", { devDependencies: {} }, "turbo orders builds by it"],
    [
      "a wrong edge",
      { devDependencies: { ...good.devDependencies, "@switchyard/cli": "*" } },
      "routers must not depend on cli",
    ],
    ["another folder", { name: "@switchyard/kernels", private: true }, "is private"],
  ])("%s in a manifest", (_, manifest, fault) => {
    expect(violations(example(manifest)).join("\n")).toContain(fault);
  });
});
