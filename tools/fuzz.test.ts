// npm run fuzz as a program: what it prints, how it is stopped, and that wrong options are refused.
import { spawn, spawnSync } from "node:child_process";
import { once } from "node:events";
import { join } from "node:path";
import { expect, test } from "vitest";
import { root } from "./child.mjs";

const program = join(root, "tools", "fuzz.ts");
const run = (...args: string[]) => spawnSync(process.execPath, [program, ...args], { encoding: "utf8" });

test("reads as many mutants as asked and says what it saw", () => {
  const { status, stdout, stderr } = run("--mutants", "600", "--seed", "5");
  expect({ status, stderr }).toEqual({ status: 0, stderr: "" });
  const line = /^600 mutants in .*: (\d+) read, (\d+) refused for (\d+) kinds of reasons; at most .* MiB\n$/.exec(
    stdout,
  );
  expect(Number(line?.[1]) + Number(line?.[2]), stdout).toBe(600);
  expect(Number(line?.[3])).toBeGreaterThan(20);
});

test("ends with its figures when it is interrupted", async () => {
  const child = spawn(process.execPath, [program, "--mutants", "2000000000"], { stdio: ["ignore", "pipe", "inherit"] });
  let output = "";
  child.stdout.on("data", (text) => {
    output += text;
  });
  // The first line comes after five seconds: by then the thread is at work.
  await once(child.stdout, "data");
  child.kill("SIGINT");
  const [code] = await once(child, "close");
  expect(code).toBe(130);
  expect(output).toMatch(/^[\d,]+ of 2,000,000,000, about .* left\n(.*\n)*stopped\n[\d,]+ mutants in /);
});

test.each([
  [["--mutants", "0"], "fuzz: --mutants is 0; expected a whole number from 1 to 2147483648\n"],
  [["--seed", "x"], "fuzz: --seed is x; expected a whole number from 0 to 2147483648\n"],
])("refuses %j", (args, message) => {
  expect(run(...args)).toMatchObject({ status: 1, stdout: "", stderr: message });
});
