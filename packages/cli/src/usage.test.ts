// What --help prints fits a terminal of 80 columns and loses no word.
import { describe, expect, test } from "vitest";
import { runCommand } from "./run.test-util.ts";
import { wrapped } from "./usage.ts";

describe("wrapped", () => {
  test("breaks between words, with an indent, at 80 columns", () => {
    const words = Array.from({ length: 60 }, (_, i) => "x".repeat(1 + (i % 9))).join(" ");
    const lines = wrapped("  --head", words, 12).split("\n");
    expect(Math.max(...lines.map((line) => line.length))).toBeLessThanOrEqual(80);
    expect(lines.length).toBe(6);
    expect(lines[0]?.slice(0, 14)).toBe("  --head    x ");
    for (const line of lines.slice(1)) expect(line).toMatch(/^ {12}\S/);
    expect(lines.map((line) => line.slice(12)).join(" ")).toBe(words);
  });
  test("keeps a word that is longer than a line", () => {
    expect(wrapped("", `a ${"y".repeat(90)} b`, 0)).toBe(`a\n${"y".repeat(90)}\nb`);
  });
});

test.each([
  ...["train", "finetune", "generate", "chat", "serve", "eval", "inspect", "trace", "logits", "convert", "cache-sim"],
  ...["trace diff", "trace report"],
])("%s --help", async (command) => {
  const { code, out } = await runCommand([...command.split(" "), "--help"]);
  expect(code).toBe(0);
  const [usage = ""] = out.split("\nEXAMPLE\n");
  const long = usage.split("\n").filter((line) => line.length > 80 && !/^\s*\S+$/.test(line));
  expect(long).toEqual([]);
  expect(out).not.toContain("\u001b");
  if (command !== "serve" && command !== "trace report") expect(out).toMatch(/^ {2}--json {2,}\S/m);
});

test.each([["--help"], ["-h"], ["help"]])("%s shows all commands", async (...args) => {
  const { code, out } = await runCommand(args);
  expect(code).toBe(0);
  expect(Math.max(...out.split("\n").map((line) => line.length))).toBeLessThanOrEqual(80);
});
