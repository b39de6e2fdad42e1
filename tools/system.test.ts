// CI installs a browser and a Vulkan loader where it can, and ends with its one line whatever happens.
import { spawnSync } from "node:child_process";
import { chmodSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { root } from "./child.mjs";
import { aptGet, missingPackages, type System } from "./system.mjs";

const debian = (...files: readonly string[]): System => ({
  platform: "linux",
  architecture: "x64",
  user: 1000,
  path: ["/usr/local/bin", "/usr/bin"],
  browser: undefined,
  exists: (file) => files.includes(file),
});
const library = "/usr/lib/x86_64-linux-gnu/libvulkan.so.1";
const apt = "/usr/bin/apt-get";

test("what is missing", () => {
  expect(missingPackages(debian(apt))).toEqual(["chromium", "libvulkan1"]);
  expect(missingPackages(debian(apt, library))).toEqual(["chromium"]);
  expect(missingPackages(debian(apt, "/usr/local/bin/google-chrome"))).toEqual(["libvulkan1"]);
  expect(missingPackages({ ...debian(apt, library), browser: "/opt/chrome" })).toEqual([]);
  expect(missingPackages(debian(apt, library, "/usr/bin/chromium"))).toEqual([]);
  expect(missingPackages({ ...debian(apt, library), architecture: "arm64" })).toEqual(["chromium", "libvulkan1"]);
});

test("nothing without apt-get", () => {
  expect(missingPackages(debian())).toEqual([]);
  expect(missingPackages({ ...debian(apt), platform: "darwin" })).toEqual([]);
});

test("apt-get as root, with sudo, or not at all", () => {
  expect(aptGet({ ...debian(), user: 0 })?.slice(0, 3)).toEqual(["env", "DEBIAN_FRONTEND=noninteractive", "apt-get"]);
  expect(aptGet(debian("/usr/bin/sudo"))?.slice(0, 3)).toEqual(["sudo", "-n", "env"]);
  expect(aptGet(debian())).toBeUndefined();
});

// Programs that write down how they were called, on a PATH without anything else.
describe.skipIf(process.platform !== "linux")("CI where every installation fails", () => {
  let folder: string;
  const script = (name: string, text: string): void => {
    writeFileSync(join(folder, name), text);
    chmodSync(join(folder, name), 0o755);
  };
  beforeAll(() => {
    folder = mkdtempSync(join(tmpdir(), "switchyard-ci-"));
    // Whoever runs this test: with root CI calls env, else sudo.
    const record = `#!/bin/sh\necho "$*" >> "${join(folder, "calls")}"\nexit 100\n`;
    for (const name of ["env", "sudo", "apt-get"]) script(name, record);
    const npm = `require("fs").appendFileSync(${JSON.stringify(join(folder, "calls"))}, "npm " + process.argv[2] + " " + process.env.SWITCHYARD_REQUIRE_GPU + "\\n"); process.exit(1);`;
    script("npm-cli.js", npm);
  });
  afterAll(() => rmSync(folder, { recursive: true, force: true }));

  test("tries with new lists, runs the tests, ends with the one line and an exit code", () => {
    const { SWITCHYARD_CHROMIUM: _, SWITCHYARD_REQUIRE_GPU: __, ...rest } = process.env;
    const env = { ...rest, PATH: folder, npm_execpath: join(folder, "npm-cli.js") };
    const { status, stdout, stderr } = spawnSync(process.execPath, [join(root, "tools", "ci.mjs")], {
      env,
      encoding: "utf8",
    });
    const calls = readFileSync(join(folder, "calls"), "utf8").trim().split("\n");
    expect(calls.map((call) => call.match(/(install|update|npm) .*| update$/)?.[0].trim())).toEqual([
      expect.stringMatching(/^install --no-install-recommends chromium/),
      "update",
      "npm test 1",
    ]);
    expect(stderr).toMatch(
      /Installing chromium.*\nRunning .*apt-get.* install.*\nRunning .*apt-get.* update\n.*could not be/,
    );
    expect(stdout).toBe("0 passed, 1 failed\n");
    expect(status).toBe(1);
  });
});
