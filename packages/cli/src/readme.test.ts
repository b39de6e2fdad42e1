// The README names every option of the commands that run and rewrite checkpoints, and the options of every strategy.
import { readFileSync } from "node:fs";
import { stripVTControlCharacters } from "node:util";
import { expect, test } from "vitest";
import { runCommand } from "./run.test-util.ts";
import { optionsOf, strategyNames } from "./strategies.ts";

const readme = readFileSync(new URL("../README.md", import.meta.url), "utf8");
const sections = new Map(readme.split(/^## /m).map((part) => [part.split("\n")[0], part]));
const section = (title: string): string => sections.get(title) ?? "";

test.each([
  ["finetune", "Fine-tuning checkpoints"],
  ["generate", "Running checkpoints"],
  ["chat", "Talking with a model"],
  ["serve", "Serving a model"],
  ["eval", "How well a model foretells a text"],
  ["logits", "Comparing with other programs"],
  ["convert", "Converting checkpoints"],
  ["inspect", "Looking into a model"],
  ["trace", "Looking into a model"],
  ["cache-sim", "How large a cache of experts must be"],
])("%s", async (command, title) => {
  const { out } = await runCommand([command, "--help"]);
  const options = [...stripVTControlCharacters(out).matchAll(/^ +(--[a-z-]+)/gm)].map(([, option = ""]) => option);
  expect(options.length).toBeGreaterThanOrEqual(5);
  // What several commands share is explained once.
  const text = `${section(title)}${section("Running checkpoints")}${section("Use")}`;
  for (const option of options) expect(text, `${command} ${option}`).toMatch(new RegExp(`${option}\\b`));
});

test("strategies", () => {
  const rows = section("Running checkpoints").split("\n");
  for (const name of strategyNames) {
    const row = rows.find((line) => line.startsWith(`| \`${name}\` |`)) ?? "";
    const own = optionsOf[name].filter(
      (option) => !row.includes("those of `sample`") || !optionsOf.sample.includes(option),
    );
    for (const option of own) expect(row, name).toContain(`--${option}`);
    if (row.includes("those of `sample`"))
      expect(optionsOf[name]).toEqual(expect.arrayContaining([...optionsOf.sample]));
  }
});
