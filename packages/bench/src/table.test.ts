// What is printed: rates from times, spreads, reasons, and whether goals are met.
import { expect, it } from "vitest";
import { chosen, markdownTable, reached, tableText } from "./table.ts";

const summary = (median: number, min = median, max = median) => ({ median, min, max, count: 3 });

it("prints rates, times, errors, reasons and goals", () => {
  const wall = summary(0.02, 0.019, 0.025);
  const table = {
    case: "matmul",
    title: "a product",
    threads: 2,
    unit: "GFLOP/s",
    amounts: { ours: 1.5, peer: 1.5, broken: 1.5 },
    entries: [
      { name: "ours", timing: { name: "ours", samples: [], wall, cpu: summary(0.03), runs: 4 }, error: 0 },
      { name: "peer", timing: { name: "peer", samples: [], wall: summary(0.05), runs: 2 }, error: 1.25e-6 },
      { name: "broken", failed: "no such device" },
    ],
    figures: [
      { label: "ours : peer", value: summary(2.5, 2.4, 2.6), cpu: summary(2.45), goal: { least: 3 } },
      { label: "share", value: summary(0.05), goal: { most: 0.1 } },
    ],
  } as const;
  const text = tableText(table);
  expect(text.split("\n")).toEqual([
    "a product, 2 threads",
    "          GFLOP/s  ms: median (min to max)  CPUs busy   error",
    "  ours       75.0      20.0 (19.0 to 25.0)       1.50  0.0e+0",
    "  peer       30.0      50.0 (50.0 to 50.0)          -  1.3e-6",
    "  broken        -                        -          -       -  no such device",
    "  ours : peer = 2.50 (2.40 to 2.60), in CPU time 2.45   goal at least 3: missed",
    "  share = 0.0500 (0.0500 to 0.0500)   goal at most 0.1: reached",
  ]);
  expect(tableText(table, { ours: 2, peer: 1 })).toContain("\n  peer (1 thread)     30.0 ");
});

it("a goal is about the median; no goal, no verdict", () => {
  expect(reached({ label: "", value: summary(1, 0, 9), goal: { least: 0.9, most: 1.1 } })).toBe(true);
  expect(reached({ label: "", value: summary(1.2), goal: { least: 0.9, most: 1.1 } })).toBe(false);
  expect(reached({ label: "", value: summary(Number.NaN), goal: { least: 0 } })).toBe(false);
  expect(reached({ label: "", value: summary(1) })).toBeUndefined();
});

const onDevice = {
  case: "gpu",
  title: "a layer",
  unit: "GB/s",
  amounts: { ours: 6, peer: 6, broken: 6 },
  entries: [
    { name: "ours", timing: { name: "ours", samples: [], wall: summary(0.02), device: summary(0.015), runs: 4 } },
    { name: "peer", timing: { name: "peer", samples: [], wall: summary(0.05), runs: 2 }, note: "sorted" },
    { name: "broken", failed: "no | device" },
  ],
  figures: [{ label: "ours : peer", value: summary(2.5, 2.4, 2.6), goal: { least: 3 } }],
} as const;

it("prints the device's own time where there is one, notes, and no threads where they do not matter", () => {
  expect(tableText(onDevice).split("\n")).toEqual([
    "a layer",
    "          GB/s  ms: median (min to max)  device ms  CPUs busy  error",
    "  ours     300      20.0 (20.0 to 20.0)       15.0          -      -",
    "  peer     120      50.0 (50.0 to 50.0)          -          -      -  sorted",
    "  broken     -                        -          -          -      -  no | device",
    "  ours : peer = 2.50 (2.40 to 2.60)   goal at least 3: missed",
  ]);
});

it("writes the same as one Markdown table", () => {
  const other = { ...onDevice, title: "another", entries: onDevice.entries.slice(0, 1), figures: [] };
  expect(markdownTable([onDevice, other]).split("\n")).toEqual([
    "| case | rates | ratios and shares |",
    "| --- | --- | --- |",
    "| a layer | ours 300; peer 120; broken: no \\| device (GB/s) | ours : peer 2.50 (2.40 to 2.60), goal at least 3 missed |",
    "| another | ours 300 (GB/s) |  |",
  ]);
});

it("chooses what a list names", () => {
  expect(chosen("case", undefined, ["a", "b"])).toEqual(["a", "b"]);
  expect(chosen("case", "b, a", ["a", "b"])).toEqual(["b", "a"]);
  expect(chosen("peer", "none", ["a"])).toEqual([]);
  expect(() => chosen("case", "a,c", ["a", "b"])).toThrow('--case: unknown "c"; known are a, b');
});
