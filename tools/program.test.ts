// The program as it is published: the file that package.json names, over what the build made.
import { execFile } from "node:child_process";
import { readFileSync } from "node:fs";
import { promisify } from "node:util";
import { expect, it } from "vitest";

const cli = new URL("../packages/cli/", import.meta.url);
const run = promisify(execFile);

it("starts as the file that bin names, which stands in files", async () => {
  const { version, bin, files } = JSON.parse(readFileSync(new URL("package.json", cli), "utf8")) as {
    readonly version: string;
    readonly bin: Readonly<Record<string, string>>;
    readonly files: readonly string[];
  };
  const program = bin.switchyard ?? "";
  expect(files).toContain(program.split("/")[1]);
  const { stdout } = await run(process.execPath, [new URL(program, cli).pathname, "--version"]);
  expect(stdout.trim()).toContain(version);
});
