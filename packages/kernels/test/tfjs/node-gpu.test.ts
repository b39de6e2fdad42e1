// @tensorflow/tfjs-node-gpu: the whole suite on a machine that has it; elsewhere one line that it is not there, and the check
// that asking for it says how to get it.
import { createRequire } from "node:module";
import util from "node:util";
import { MissingPackageError } from "@switchyard/core";
import { testBackend } from "@switchyard/testing";
import { expect, it } from "vitest";
import { tfjs } from "../../src/tfjs/backend.ts";
import { tfjsNodeGpu } from "../../src/tfjs/node-gpu.ts";

/** Whether npm installed the package; a broken installation is a failure, not an absence. */
const installed = (): boolean => {
  try {
    createRequire(import.meta.url).resolve("@tensorflow/tfjs-node-gpu");
    return true;
  } catch (error) {
    if ((error as { readonly code?: string }).code === "MODULE_NOT_FOUND") return false;
    throw error;
  }
};

if (installed()) {
  testBackend({
    name: "tfjs tensorflow",
    backend: async () => tfjs({ tf: await tfjsNodeGpu(), backend: "tensorflow" }),
  });
} else {
  console.warn("tfjs-node-gpu tests skipped: @tensorflow/tfjs-node-gpu is not installed");

  it("names the package and the line that installs it", async () => {
    await expect(tfjsNodeGpu()).rejects.toThrow(MissingPackageError);
    await expect(tfjsNodeGpu()).rejects.toThrow(/npm install @tensorflow\/tfjs-node-gpu@4\.22\.0/);
  });

  it("puts back the function of node:util that the package's kernels call", async () => {
    Reflect.deleteProperty(util, "isNullOrUndefined");
    await expect(tfjsNodeGpu()).rejects.toThrow(MissingPackageError);
    const restored: unknown = Reflect.get(util, "isNullOrUndefined");
    if (typeof restored !== "function") throw new Error("isNullOrUndefined was not restored");
    expect([null, undefined, 0, ""].map((x) => restored(x))).toEqual([true, true, false, false]);
  });
}
