// Tests run against the sources of every package, so nothing has to be built first.
import { fileURLToPath } from "node:url";
import { defineConfig, type ViteUserConfig } from "vitest/config";

const source = (path: string): string => fileURLToPath(new URL(`../packages/${path}`, import.meta.url));

export const alias = [
  { find: /^@switchyard\/core\/cpu$/, replacement: source("core/src/cpu/index.ts") },
  { find: /^@switchyard\/bench\/kernels$/, replacement: source("bench/src/kernels.ts") },
  { find: /^@switchyard\/kernels\/wasm$/, replacement: source("kernels/src/wasm/index.ts") },
  { find: /^@switchyard\/routers\/(.+)$/, replacement: source("routers/src/$1.ts") },
  { find: /^@switchyard\/([a-z]+)$/, replacement: source("$1/src/index.ts") },
];

const config: ViteUserConfig = defineConfig({
  resolve: { alias },
  test: { include: ["src/**/*.test.ts", "test/**/*.test.ts"], testTimeout: 60_000 },
});
export default config;
