// The shared suite in the modes that run without a device.
import { engine } from "@switchyard/core";
import { testBackend } from "@switchyard/testing";
import { GPU } from "gpu.js";
import { describe, expect, it } from "vitest";
import { gpujs } from "../../src/gpujs/index.ts";
import { checkLargeIntegers, checkLongLoops } from "./long-loops.ts";

for (const mode of ["cpu", "webasm"] as const) {
  testBackend({ name: `gpujs ${mode}`, backend: () => gpujs({ GPU, mode }) });

  describe(`gpujs ${mode}`, () => {
    it("runs loops to their end and keeps integers exact", async () => {
      const backend = gpujs({ GPU, mode });
      const on = engine(backend);
      await checkLongLoops(on);
      await checkLargeIntegers(on);
      expect(await backend.mode).toBe(mode);
      expect((await backend.stats()).arrays).toBe(0);
      await backend.dispose();
    });
  });
}
