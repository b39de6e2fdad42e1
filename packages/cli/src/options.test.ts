// Every option with what it takes and what it refuses.
import { UnsupportedError } from "@switchyard/core";
import { describe, expect, test } from "vitest";
import { checkArgs } from "./options.ts";

test("defaults", () => {
  expect(checkArgs({})).toEqual({
    size: "small",
    router: ["topK", "similarityAware", "attentionAware", "nullExperts", "expertRace"],
    backend: "wasm",
    seed: 1,
    seeds: 1,
    out: "runs",
    json: false,
  });
});

test.each([
  ["90s", 90],
  ["3m", 180],
  ["10", 600],
  ["1.5h", 5400],
  ["2min", 120],
])("--time %s is %i seconds", (text, seconds) => expect(checkArgs({ time: text }).time).toBe(seconds));

test("lists are split at commas", () => {
  expect(checkArgs({ router: "topK:k=1, reMoE," }).router).toEqual(["topK:k=1", "reMoE"]);
});

describe("refusals name the option, what it takes and what was found", () => {
  test.each([
    [{ time: "soon" }, '--time takes a time such as 90s, 3m or 1h, found "soon"'],
    [{ time: "0" }, "--time takes a time"],
    [{ time: "-3m" }, "--time takes a time"],
    [{ threads: "0" }, '--threads takes a whole number from 1, found "0"'],
    [{ threads: "two" }, "--threads takes a whole number from 1"],
    [{ threads: "1.5" }, "--threads takes a whole number from 1"],
    [{ steps: "0" }, "--steps takes a whole number from 1"],
    [{ seeds: "0" }, "--seeds takes a whole number from 1"],
    [{ seed: "-1" }, "--seed takes a whole number from 0"],
    [{ size: "huge" }, '--size takes tiny, small, base, found "huge"'],
    [{ backend: "gpu" }, "--backend takes wasm, webgpu, tfjs, gpujs, cpu"],
    [{ router: " , " }, "--router takes names, separated by commas"],
    [{ name: "a/b" }, "--name takes letters"],
    [{ name: ".." }, "--name takes letters"],
    [{ out: "" }, "--out takes a folder"],
  ])("%j", (given, message) => {
    expect(() => checkArgs(given)).toThrow(UnsupportedError);
    expect(() => checkArgs(given)).toThrow(message);
  });
});
