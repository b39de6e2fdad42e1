// The tests of the tools. They run what users get, so packages come from their builds, not from their sources.
import { defineConfig, type ViteUserConfig } from "vitest/config";

const config: ViteUserConfig = defineConfig({
  test: { name: "tools", root: import.meta.dirname, include: ["*.test.ts"], testTimeout: 120_000 },
});
export default config;
