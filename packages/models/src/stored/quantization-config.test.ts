// What config.json says about codes: every spelling that is known, and everything else refused by its key.
import { CheckpointError, type Json } from "@switchyard/core";
import { describe, expect, it } from "vitest";
import { quantizationOf } from "./quantization-config.ts";

type Config = { readonly [key: string]: Json };
const of = (quantization_config: Json) => quantizationOf({ quantization_config });
const group = (weights: Json, more: Config = {}): Json => ({
  quant_method: "compressed-tensors",
  format: "pack-quantized",
  config_groups: { group_0: { targets: ["Linear"], weights } },
  ...more,
});
const only = (weights: Json) => of(group(weights)).schemes;
const all = Number.POSITIVE_INFINITY;

describe("the quantisation of a config", () => {
  it("is none where it says nothing", () => {
    const none = { method: "none", schemes: [] };
    expect(quantizationOf({})).toEqual(none);
    expect(of(null)).toEqual(none);
    expect(quantizationOf({ text_config: null })).toEqual(none);
  });

  it("is found under its older key, and in the config of the text model", () => {
    const fp8 = { quant_method: "fp8", weight_block_size: [2, 3] };
    const expected = { method: "fp8", schemes: [{ type: "float", bits: 8, symmetric: true, rows: 2, group: 3 }] };
    expect(quantizationOf({ compression_config: fp8 })).toEqual(expected);
    expect(quantizationOf({ text_config: { quantization_config: fp8 } })).toEqual(expected);
  });

  it("is understood once for each config", () => {
    const config = { quantization_config: group({}) };
    expect(quantizationOf(config)).toBe(quantizationOf(config));
  });

  it("of fp8 has blocks of 128 x 128 by default, and one scale where there are none", () => {
    expect(of({ quant_method: "fp8" }).schemes).toMatchObject([{ rows: 128, group: 128 }]);
    expect(of({ quant_method: "fp8", weight_block_size: null }).schemes).toMatchObject([{ rows: all, group: all }]);
  });

  it("of a method that nothing here reads has no schemes", () => {
    expect(of({ quant_method: "gptq", bits: 4 })).toEqual({ method: "gptq", schemes: [] });
    expect(of({ quant_method: "mxfp4" })).toEqual({ method: "mxfp4", schemes: [] });
  });

  it.each([
    [{}, { type: "int", bits: 8, symmetric: true, rows: all, group: all }],
    [
      { num_bits: 4, group_size: 32 },
      { type: "int", bits: 4, symmetric: true, rows: 1, group: 32 },
    ],
    [
      { num_bits: 4, group_size: -1, symmetric: false },
      { bits: 4, symmetric: false, rows: 1, group: all },
    ],
    [
      { strategy: "channel", group_size: null },
      { rows: 1, group: all },
    ],
    [
      { strategy: "GROUP", group_size: 64, type: "INT" },
      { type: "int", rows: 1, group: 64 },
    ],
    [
      { type: "float", strategy: "block", block_structure: [4, 8] },
      { type: "float", rows: 4, group: 8 },
    ],
    [
      { type: "float", strategy: "block", block_structure: "4x8" },
      { rows: 4, group: 8 },
    ],
  ])("of compressed-tensors: %j", (weights: Json, expected) => {
    expect(only(weights)).toMatchObject([expected]);
  });

  it("leaves out groups that have no weights", () => {
    expect(of(group(null)).schemes).toEqual([]);
    expect(of(group({}, { transform_config: {}, sparsity_config: {} })).schemes).toHaveLength(1);
    expect(of(group({}, { sparsity_config: { format: "dense" } })).schemes).toHaveLength(1);
  });
});

describe("refused by its key:", () => {
  it.each<readonly [string, Json, RegExp]>([
    ["no record", 4, /quantization_config must be a record, found "4"/],
    ["no method", {}, /\.quant_method must be a word, found "nothing"/],
    ["a block of one size", { quant_method: "fp8", weight_block_size: [128] }, /\.weight_block_size must be two sizes/],
    [
      "rotated weights",
      group({}, { transform_config: { config_groups: { a: {} } } }),
      /\.transform_config: weights that were rotated/,
    ],
    [
      "sparse weights",
      group({}, { sparsity_config: { format: "sparse-24-bitmask" } }),
      /\.sparsity_config\.format .*sparse-24-bitmask/,
    ],
    ["groups that are a list", group({}, { config_groups: [] }), /\.config_groups must be a record/],
    ["a group that is a word", group({}, { config_groups: { a: "W4A16" } }), /\.config_groups\."a" must be a record/],
    ["weights that are a word", group("W4A16"), /"group_0"\.weights must be a record/],
    ["another type", group({ type: "bool" }), /weights\.type must be "int" or "float"/],
    ["no bits", group({ num_bits: 0 }), /weights\.num_bits must be a number of bits/],
    ["bits in words", group({ num_bits: "4" }), /weights\.num_bits/],
    ["a symmetry in words", group({ symmetric: "yes" }), /weights\.symmetric must be true or false/],
    ["a group of nothing", group({ group_size: 0 }), /weights\.group_size must be a size/],
    ["groups without a size", group({ strategy: "group" }), /the strategy "group" needs a group_size/],
    ["blocks without a size", group({ strategy: "block" }), /weights\.block_structure must be two sizes/],
    [
      "another strategy",
      group({ strategy: "token" }),
      /weights\.strategy .*token.* is not supported; supported are "tensor"/,
    ],
    [
      "thousands of groups",
      group({}, { config_groups: Object.fromEntries(Array.from({ length: 1001 }, (_, i) => [`g${i}`, {}])) }),
      /at most 1000/,
    ],
  ])("%s", (_, value, message) => {
    expect(() => of(value)).toThrow(message);
    expect(() => of(value)).toThrow(CheckpointError);
  });
});
