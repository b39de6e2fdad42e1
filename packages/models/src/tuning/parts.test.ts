import { dispose, leaves, ShapeError } from "@switchyard/core";
import { describe, expect, it } from "vitest";
import { makeEngine } from "../models.test-util.ts";
import { layerOf, partOf, type TuningPart, tuningParts } from "./parts.ts";
import { families, familyModel } from "./tuning.test-util.ts";

describe("partOf", () => {
  it.each<[string, TuningPart]>([
    ["embed", "embed"],
    ["embed.int8/32.codes", "embed"],
    ["embed.lora/2.b", "embed"],
    ["head", "head"],
    ["headBias", "head"],
    ["norm", "norms"],
    ["normBias", "norms"],
    ["layers.0.attentionNorm", "norms"],
    ["layers.12.moeNormBias", "norms"],
    ["layers.0.attention.q", "attention"],
    ["layers.0.attention.q.lora/0.5.a", "attention"],
    ["layers.0.attention.qNorm", "attention"],
    ["layers.0.attention.sinks", "attention"],
    ["layers.0.attention.experts.input", "attention"],
    ["layers.0.attention.router.weight", "router"],
    ["layers.0.moe.router.weight.lora/2.b", "router"],
    ["layers.0.moe.router.bias", "router"],
    ["layers.0.moe.experts.down", "experts"],
    ["layers.0.moe.experts.down.mxfp4.codes", "experts"],
    ["layers.0.moe.experts.gateUp.lora/2.base.int8/32.codes", "experts"],
    ["layers.0.moe.experts.gateUpBias", "experts"],
    ["layers.0.moe.shared.0.experts.down", "shared"],
    ["layers.0.moe.shared.0.gate", "shared"],
    ["layers.0.moeBias", "shared"],
    ["layers.0.dense.gateUp", "dense"],
  ])("%s is of %s", (path, part) => expect(partOf(path)).toBe(part));

  it.each(["", "layers", "layers.0", "layers.x.attention.q", "layers.0.moe", "layers.0.other.q", "toString", "norms"])(
    "%j is no parameter",
    (path) => expect(() => partOf(path)).toThrow(ShapeError),
  );

  it("knows every parameter of every family", async () => {
    const on = makeEngine();
    const found = new Set<TuningPart>();
    for (const name of families) {
      const { params, buffers } = await familyModel(name, on);
      for (const [path] of leaves(params)) found.add(partOf(path));
      dispose([params, ...buffers]);
    }
    expect(found).toEqual(new Set(tuningParts));
    expect(on.live()).toBe(0);
  });
});

it("layerOf reads the number of the layer", () => {
  expect(layerOf("layers.12.moeNorm")).toBe(12);
  expect(layerOf("layers.1.moe.experts.down.lora/2.a")).toBe(1);
  expect(layerOf("embed")).toBeUndefined();
});
