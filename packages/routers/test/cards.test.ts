import { readdirSync, readFileSync } from "node:fs";
import type { RouterPlugin } from "@switchyard/core/moe";
import { describe, expect, it } from "vitest";
import type { RouterCard } from "../src/parts.ts";

const here = (path: string): URL => new URL(path, import.meta.url);
const files = readdirSync(here("../src"))
  .filter(
    (name) => name.endsWith(".ts") && !name.endsWith(".test.ts") && name !== "index.ts" && !name.endsWith("parts.ts"),
  )
  .map((name) => name.slice(0, -3));
const manifest: { exports: Record<string, unknown> } = JSON.parse(readFileSync(here("../package.json"), "utf8"));

interface RouterFile {
  readonly card: RouterCard;
  readonly [factory: string]: unknown;
}
type Factory = (options: { k: number }) => RouterPlugin;

describe.each(files)("%s", (file) => {
  const load = (): Promise<RouterFile> => import(`../src/${file}.ts`);

  it("has a card that agrees with the plugin", async () => {
    const { card, ...rest } = await load();
    const plugin = (rest[card.name] as Factory)({ k: 1 });
    expect(plugin.name).toBe(card.name);
    expect(plugin.plans).toEqual(card.plans);
    expect(plugin.needs).toEqual(card.needs);
    const { training, evaluation } = plugin.causal;
    expect(card.causal).toBe(training && evaluation ? "yes" : training ? "training" : evaluation ? "evaluation" : "no");
    expect(card.paper).toMatch(/^\d{4}\.\d{5}$/);
    expect(JSON.parse(JSON.stringify(card))).toEqual(card);
  });
  it("names its paper in the header, has a subpath, and is exported", async () => {
    const { card } = await load();
    expect(
      readFileSync(here(`../src/${file}.ts`), "utf8")
        .split("\n")
        .slice(0, 3)
        .join(" "),
    ).toContain(card.paper);
    expect(manifest.exports[`./${file}`]).toEqual({ types: `./dist/${file}.d.ts`, default: `./dist/${file}.js` });
    expect(Object.keys(await import("../src/index.ts"))).toContain(card.name);
    expect(file).toBe(
      card.name
        .replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`)
        .replace("mo-e", "moe")
        .replace("s-moe", "smoe")
        .replace("mo-l-e", "mole")
        .replace("-f-f-d", "-ffd"),
    );
  });
});
