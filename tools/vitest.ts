// Tests run against the sources of every package, so nothing has to be built first: each subpath of each package.json, such as
// ./dist/moe/index.js, stands for its source, src/moe/index.ts.
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { defineConfig, type ViteUserConfig } from "vitest/config";
import { useSoftwareDriver } from "./software-gpu.ts";

const packages = join(import.meta.dirname, "..", "packages");

interface Alias {
  readonly find: RegExp;
  readonly replacement: string;
}

export const alias: Alias[] = readdirSync(packages).flatMap((folder) => {
  const manifest = join(packages, folder, "package.json");
  if (!existsSync(manifest)) return [];
  const { name, exports } = JSON.parse(readFileSync(manifest, "utf8"));
  return Object.entries<string | { readonly default: string }>(exports).flatMap(([subpath, target]) => {
    if (typeof target === "string") return [];
    const source = target.default.replace(/^\.\/dist\/(.*)\.js$/, "src/$1.ts");
    return [{ find: new RegExp(`^${name}${subpath.slice(1)}$`), replacement: join(packages, folder, source) }];
  });
});

useSoftwareDriver();
const config: ViteUserConfig = defineConfig({
  resolve: { alias },
  test: { include: ["src/**/*.test.ts", "test/**/*.test.ts"], testTimeout: 60_000 },
});
export default config;
