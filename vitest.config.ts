// One run over every package, every app and the tools themselves.
import { defineConfig, type ViteUserConfig } from "vitest/config";

const config: ViteUserConfig = defineConfig({
  test: { projects: ["packages/*/vitest.config.ts", "apps/*/vitest.config.ts", "tools/vitest.config.ts"] },
});
export default config;
