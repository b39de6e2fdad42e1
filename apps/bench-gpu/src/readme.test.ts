// The README's section is written between its markers only, and only by a whole run on a GPU.
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { expect, it } from "vitest";
import { closing, filled, opening, type Report, reasonToLeave, section, writeReadme } from "./readme.ts";

const wall = { median: 0.5, min: 0.4, max: 0.6, count: 3 };
const report: Report = {
  device: {
    name: "GPU 3000",
    vendor: "maker",
    architecture: "tenth",
    software: false,
    features: ["timestamp-query"],
    limits: { maxBufferSize: 1024 },
  },
  date: "2030-01-02T03:04:05.678Z",
  host: { cpu: "CPU 1", platform: "linux x64" },
  versions: { Node: "24.0.0", "gpu.js": "2.24.1" },
  clock: "Wall clock.",
  tables: [
    {
      case: "moe-a",
      title: "a layer",
      unit: "GFLOP/s",
      amounts: { switchyard: 100, "gpu.js": 100 },
      entries: [
        { name: "switchyard", timing: { name: "switchyard", samples: [0.5], wall, runs: 1 } },
        { name: "gpu.js", failed: "no luck" },
      ],
      figures: [{ label: "ours : theirs", value: { median: 12, min: 11, max: 13, count: 3 }, goal: { least: 10 } }],
    },
  ],
};

it("names device, date, host and versions over one table", () => {
  expect(section(report).split("\n")).toEqual([
    "**GPU 3000** (maker tenth), 2030-01-02, linux x64, CPU 1; Node 24.0.0, gpu.js 2.24.1.",
    "Limits: maxBufferSize 1024. Features: timestamp-query. Wall clock.",
    "",
    "| case | rates | ratios and shares |",
    "| --- | --- | --- |",
    "| a layer | switchyard 200; gpu.js: no luck (GFLOP/s) | ours : theirs 12.0 (11.0 to 13.0), goal at least 10 reached |",
  ]);
});

it("replaces what stands between the markers in a file, and nothing else", () => {
  const folder = mkdtempSync(join(tmpdir(), "switchyard-readme-"));
  try {
    const path = join(folder, "README.md");
    writeFileSync(path, `# Kernels\n\n${opening}\nold figures\n${closing}\n\n## Limits\n`);
    writeReadme(path, report);
    const once = readFileSync(path, "utf8");
    expect(once).toBe(`# Kernels\n\n${opening}\n${section(report)}\n${closing}\n\n## Limits\n`);
    writeReadme(path, report);
    expect(readFileSync(path, "utf8")).toBe(once);
  } finally {
    rmSync(folder, { recursive: true });
  }
});

it("refuses a README without its markers", () => {
  expect(() => filled("# Kernels\n", "text")).toThrow(`no ${opening} followed by ${closing}`);
  expect(() => filled(`${closing}${opening}`, "text")).toThrow("no <!-- bench:gpu -->");
});

it("the README of the kernels has a place for the figures", () => {
  const readme = readFileSync(new URL("../../../packages/kernels/README.md", import.meta.url), "utf8");
  expect(filled(readme, "figures")).toContain(`${opening}\nfigures\n${closing}`);
});

it("keeps only whole runs on a GPU", () => {
  expect(reasonToLeave({ software: false, whole: true })).toBeUndefined();
  expect(reasonToLeave({ software: true, whole: true })).toContain("on the processor");
  expect(reasonToLeave({ software: false, whole: false })).toContain("--quick");
});
