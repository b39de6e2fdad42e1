// Whole parameters from pieces: gate over up, experts stacked, in one form or in several.
import { describe, expect, it } from "vitest";
import type { Source } from "../source.ts";
import { nodeKey } from "./host-matrix.ts";
import { readSource } from "./read-source.ts";
import { checkpointOf, draws, element, type RawTensor, wellFormed } from "./stored.test-util.ts";
import { widen } from "./widen.ts";

const draw = draws(3);
const floats = (dtype: string, ...shape: number[]): RawTensor => {
  const n = shape.reduce((product, d) => product * d, 1);
  return { dtype, shape, bytes: draw.bits(n * (dtype === "F32" ? 4 : 2)) };
};
const valuesOf = (tensor: RawTensor, count = tensor.shape.reduce((n, d) => n * d, 1)): number[] =>
  Array.from({ length: count }, (_, i) => element(tensor, i));

const gateUp = (dtypes: readonly string[]): { tensors: Record<string, RawTensor>; source: Source } => {
  const tensors: Record<string, RawTensor> = {};
  dtypes.forEach((dtype, e) => {
    tensors[`experts.${e}.gate.weight`] = floats(dtype, 3, 5);
    tensors[`experts.${e}.up.weight`] = floats(dtype, 3, 5);
  });
  const source: Source = {
    kind: "experts",
    shape: [dtypes.length, 6, 5],
    expert: (e) => ["gate", "up"].map((part) => ({ name: `experts.${e}.${part}.weight`, shape: [3, 5] })),
  };
  return { tensors, source };
};

describe("a stack of experts", () => {
  it.each([
    ["one form", ["BF16", "BF16", "BF16"], "bf16"],
    ["one form that is wide", ["F32", "F32"], "f32"],
    ["several forms", ["BF16", "BF16", "F16", "BF16"], "f32"],
    ["one expert", ["F16"], "f16"],
  ])("of %s", async (_, dtypes, form) => {
    const { tensors, source } = gateUp(dtypes);
    const { checkpoint, reads } = await checkpointOf(tensors);
    const host = await readSource(checkpoint, source);
    expect([nodeKey(host), host.shape]).toEqual([form, source.shape]);
    expect([...widen(host)]).toEqual(Object.values(tensors).flatMap((tensor) => valuesOf(tensor)));
    for (const [name, { bytes }] of Object.entries(tensors)) expect(reads.get(name)).toBe(bytes.length);
  });

  it("of codes keeps codes, scales and zero points, also where some experts lack these", async () => {
    const quantized = (zeros: boolean): Record<string, RawTensor> => ({
      weight: { dtype: "I8", shape: [2, 4], bytes: draw.bits(8) },
      weight_scale: { dtype: "F32", shape: [2, 1], bytes: new Uint8Array(Float32Array.of(0.5, 2).buffer) },
      ...(zeros ? { weight_zero_point: { dtype: "I8", shape: [2, 1], bytes: draw.bits(2) } } : {}),
    });
    for (const withZeros of [
      [true, true, true],
      [false, false],
      [true, false, true, true],
    ]) {
      const tensors: Record<string, RawTensor> = {};
      const expected: number[] = [];
      withZeros.forEach((zeros, e) => {
        const own = quantized(zeros);
        for (const [name, tensor] of Object.entries(own)) tensors[`${e}.${name}`] = tensor;
        for (let i = 0; i < 8; i++) {
          const at = (name: string, place: number) => {
            const tensor = own[name];
            return tensor ? element(tensor, place) : 0;
          };
          const row = Math.floor(i / 4);
          expected.push((at("weight", i) - at("weight_zero_point", row)) * at("weight_scale", row));
        }
      });
      const { checkpoint } = await checkpointOf(tensors, {
        quantization_config: {
          quant_method: "compressed-tensors",
          config_groups: { a: { weights: { strategy: "channel" } } },
        },
      });
      const host = await readSource(checkpoint, {
        kind: "experts",
        shape: [withZeros.length, 2, 4],
        expert: (e) => [{ name: `${e}.weight`, shape: [2, 4] }],
      });
      expect([nodeKey(host), wellFormed(host)]).toEqual(["int8/4", true]);
      expect(Array.from(widen(host), (x) => x + 0)).toEqual(expected.map((x) => x + 0));
    }
  });
});

it("a whole parameter is its pieces, one below the other", async () => {
  const tensors = { "a.weight": floats("BF16", 4, 3), "b.weight": floats("BF16", 2, 3) };
  const { checkpoint } = await checkpointOf(tensors);
  const host = await readSource(checkpoint, {
    kind: "whole",
    shape: [6, 3],
    pieces: [
      { name: "b.weight", shape: [2, 3] },
      { name: "a.weight", shape: [4, 3] },
    ],
  });
  expect([nodeKey(host), host.shape]).toEqual(["bf16", [6, 3]]);
  expect([...widen(host)]).toEqual([...valuesOf(tensors["b.weight"]), ...valuesOf(tensors["a.weight"])]);
});
