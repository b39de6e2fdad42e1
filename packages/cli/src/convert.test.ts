// The command on recorded checkpoints: what it prints, that its figures and checksums are those of the files, and every refusal in one line.
import { createHash } from "node:crypto";
import { cpSync, mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { basename, join } from "node:path";
import { afterAll, expect, test } from "vitest";
import { runCommand } from "./run.test-util.ts";

const root = mkdtempSync(join(tmpdir(), "switchyard-cli-convert-"));
afterAll(() => rmSync(root, { recursive: true }));
const path = (name: string): string => join(root, name);
function fixture(name: string): string {
  const from = join(import.meta.dirname, "..", "..", "models", "test", "fixtures", name);
  cpSync(from, path(name), { recursive: true, filter: (file) => !basename(file).startsWith("golden") });
  return path(name);
}
const run = (...args: string[]) => runCommand(["convert", ...args]);

test("copies, and says so", async () => {
  const source = fixture("mixtral");
  const { code, out, error } = await run(source, path("copy"));
  expect([code, error]).toEqual([0, ""]);
  expect(out).toContain(`Copied to ${path("copy")}`);
  expect(out).toMatch(/source {3}\d+ tensors, 478464 bytes: each byte found once in the target \(\d+ unchanged\)/);
  expect(out).toContain("dropped  no tensor");
  const names = readdirSync(source);
  expect(out).toContain(`files    ${names.length} written, ${names.length} of them byte-identical copies`);
  for (const name of names) {
    const bytes = readFileSync(join(path("copy"), name));
    expect(bytes.equals(readFileSync(join(source, name)))).toBe(true);
    expect(out).toContain(`${createHash("sha256").update(bytes).digest("hex")}  ${name}`);
  }
});

test("converts, splits and fuses, and names what it kept", async () => {
  const { code, out } = await run(
    fixture("deepseek_v3"),
    path("half"),
    "--dtype",
    "f16",
    "--shard-size",
    "0.1MB",
    "--experts",
    "fused",
  );
  expect(code).toBe(0);
  expect(out).toContain("Converted to");
  expect(out).toMatch(/values {3}\d+ in another type, \d+ rounded, \d+ of them to zero, 0 to the largest number/);
  expect(out).toMatch(/kept {5}2 tensors in the stored type:\n {4}model.*e_score_correction_bias.*which experts/);
  expect(out).toMatch(/model-00001-of-0000\d\.safetensors {2}\d/);
  expect(JSON.parse(readFileSync(join(path("half"), "config.json"), "utf8")).torch_dtype).toBe("float16");
  const again = await run(fixture("deepseek_v3"), path("half"), "--replace", "--json");
  const certificate = JSON.parse(again.out);
  expect([again.code, certificate.schema, certificate.changed]).toEqual([0, "switchyard/convert/1", false]);
  expect(readdirSync(path("half")).sort()).toEqual(readdirSync(path("deepseek_v3")).sort());
  expect(certificate.tensors).toHaveLength(certificate.totals.source.tensors);
});

test("stops at Ctrl-C and leaves nothing", async () => {
  const control = new AbortController();
  control.abort();
  const { main } = await import("./main.ts");
  let error = "";
  const streams = {
    out: () => undefined,
    error: (text: string) => {
      error += text;
    },
  };
  const code = await main(["convert", fixture("olmoe"), path("stopped")], { streams, signal: control.signal });
  expect([code, error]).toEqual([130, "Stopped; nothing was changed.\n"]);
  expect(readdirSync(root)).not.toContain("stopped");
});

test.skipIf(process.platform !== "linux")(
  "refuses a file system that takes no folders, and does not wait",
  async () => {
    const { code, error } = await run(fixture("olmoe"), "/proc/no-such");
    expect([code, error]).toEqual([
      1,
      "switchyard: cannot make the folder /proc/no-such: /proc takes no new folders; choose another place\n",
    ]);
  },
);

test("explains itself", async () => {
  const { code, out } = await run("--help");
  expect(code).toBe(0);
  for (const part of ["--dtype", "--shard-size", "--experts", "--saturate", "--replace", "--json", "EXAMPLE"]) {
    expect(out).toContain(part);
  }
});

test.each([
  [[], /takes a checkpoint folder and a folder to write to, found none: switchyard convert DIR OUT/],
  [["a"], /found "a"/],
  [["a", "b", "c"], /found "a", "b", "c"/],
  [["a", "b", "--dtype", "int8"], /--dtype takes f32, f16, bf16, found "int8"/],
  [["a", "b", "--dtype"], /--dtype takes a value; see switchyard convert --help/],
  [["a", "b", "--dtype", "f16", "--dtype", "f32"], /--dtype is given 2 times/],
  [["a", "b", "--experts", "both"], /--experts takes fused, separate, found "both"/],
  [["a", "b", "--shard-size", "lots"], /--shard-size takes a size such as 512MB/],
  [["a", "b", "--json=yes"], /--json takes no value/],
  [["a", "b", "--layers", "3"], /unknown option --layers; the options are --dtype, /],
  [["nowhere", "b"], /nowhere has no config\.json/],
])("refuses %j", async (args, message) => {
  const { code, out, error } = await run(...args);
  expect([code, out]).toEqual([1, ""]);
  expect(error).toMatch(message);
  expect(error.trim().split("\n")).toHaveLength(1);
});

test("refuses a folder that holds something, and the source", async () => {
  const source = fixture("olmoe");
  for (const [target, message] of [
    [source, /is the source folder itself/],
    [join(source, "out"), /lies in the source folder/],
    [fixture("jetmoe"), /is not empty: it holds "config\.json"\. .*--replace/],
  ] as const) {
    const { code, error } = await run(source, target);
    expect(code).toBe(1);
    expect(error).toMatch(message);
  }
});
