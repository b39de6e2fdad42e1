// A whole model in the formats of compressed-tensors, mixed as real checkpoints mix them, against the same model with the numbers that
// its codes stand for.
import { dispose, type Engine, engine, leaves, type Tensor } from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import { wasm } from "@switchyard/kernels/wasm";
import { beforeAll, describe, expect, it } from "vitest";
import { openCheckpoint } from "../checkpoint.ts";
import { readModel } from "../pretrained.ts";
import { toFloat32 } from "../safetensors.ts";
import { packLines, packZeros } from "./pack.ts";
import { type Config, checkpointOf, element, type RawTensor, type RawTensors } from "./stored.test-util.ts";

const fixture = new URL("../../test/fixtures/mixtral", import.meta.url).pathname;

const floats = (values: Float32Array, ...shape: number[]): RawTensor => ({
  dtype: "F32",
  shape,
  bytes: new Uint8Array(values.slice().buffer),
});
const bytes = (dtype: string, values: ArrayLike<number>, ...shape: number[]): RawTensor => ({
  dtype,
  shape,
  bytes: Uint8Array.from(values, (value) => value & 255),
});
const words = (data: Int32Array, columns: number): RawTensor => ({
  dtype: "I32",
  shape: [data.length / columns, columns],
  bytes: new Uint8Array(data.buffer),
});

interface Quantised {
  readonly tensors: RawTensors;
  /** What they stand for. */
  readonly values: Float32Array;
}
/** A matrix [out, in] in another form. */
type Recipe = (name: string, w: Float32Array, shape: readonly [number, number]) => Quantised;

/** Codes of so many bits, the nearest to the elements, a scale for each group of a row. */
const ints =
  (bits: number, size: number | undefined, zeros: boolean, packed: boolean): Recipe =>
  (name, w, [out, inner]) => {
    const group = size ?? inner;
    const groups = inner / group;
    const [low, high] = [-(2 ** (bits - 1)), 2 ** (bits - 1) - 1];
    const scale = new Float32Array(out * groups);
    const zero = new Int8Array(out * groups);
    const codes = new Int8Array(out * inner);
    const values = new Float32Array(out * inner);
    for (let g = 0; g < out * groups; g++) {
      const part = w.subarray(g * group, (g + 1) * group);
      const [least, most] = [Math.min(0, ...part), Math.max(0, ...part)];
      const step = zeros ? (most - least) / (high - low) : Math.max(most, -least) / high;
      scale[g] = step || 1;
      zero[g] = zeros ? Math.round(low - least / (scale[g] as number)) : 0;
      part.forEach((x, i) => {
        const code = Math.min(high, Math.max(low, Math.round(x / (scale[g] as number)) + (zero[g] as number)));
        codes[g * group + i] = code;
        values[g * group + i] = (code - (zero[g] as number)) * (scale[g] as number);
      });
    }
    const scales = { [`${name}_scale`]: floats(scale, out, groups) };
    if (!packed) return { tensors: { [name]: bytes("I8", codes, out, inner), ...scales }, values };
    const shape = {
      dtype: "I64",
      shape: [2],
      bytes: new Uint8Array(BigInt64Array.of(BigInt(out), BigInt(inner)).buffer),
    };
    const each = Math.floor(32 / bits);
    return {
      tensors: {
        [`${name}_packed`]: words(packLines(codes, { bits, length: inner }), Math.ceil(inner / each)),
        [`${name}_shape`]: shape,
        ...(zeros ? { [`${name}_zero_point`]: words(packZeros(zero, { bits, groups }), groups) } : {}),
        ...scales,
      },
      values,
    };
  };

const everyCode = bytes(
  "F8_E4M3",
  Array.from({ length: 256 }, (_, i) => i),
  256,
);
/** The nearest fp8 numbers, a scale for each row. */
const fp8: Recipe = (name, w, [out, inner]) => {
  const table = Array.from({ length: 256 }, (_, code) => element(everyCode, code));
  const scale = new Float32Array(out);
  const values = new Float32Array(out * inner);
  const codes = Array.from(w, (x, i) => {
    const row = Math.floor(i / inner);
    if (i % inner === 0) scale[row] = Math.max(...w.subarray(i, i + inner).map(Math.abs)) / 448;
    const wanted = x / (scale[row] as number);
    let best = 0;
    table.forEach((value, code) => {
      if (Math.abs(value - wanted) < Math.abs((table[best] as number) - wanted)) best = code;
    });
    values[i] = (table[best] as number) * (scale[row] as number);
    return best;
  });
  const tensors = { [name]: bytes("F8_E4M3", codes, out, inner), [`${name}_scale`]: floats(scale, out, 1) };
  return { tensors, values };
};

const layers: readonly { readonly attention: Recipe; readonly experts: Recipe }[] = [
  { attention: ints(8, undefined, false, false), experts: ints(4, 8, true, true) },
  { attention: fp8, experts: ints(8, 8, false, true) },
];
const scheme = (weights: Config): Config => ({ targets: ["Linear"], weights, input_activations: null });
const quantization: Config = {
  quant_method: "compressed-tensors",
  format: "mixed-precision",
  ignore: ["lm_head", "re:.*gate$"],
  config_groups: {
    group_0: scheme({ num_bits: 4, type: "int", symmetric: false, strategy: "group", group_size: 8 }),
    group_1: scheme({ num_bits: 8, type: "int", symmetric: true, strategy: "channel" }),
    group_2: scheme({ num_bits: 8, type: "float", symmetric: true, strategy: "channel" }),
    group_3: scheme({ num_bits: 8, type: "int", symmetric: true, strategy: "group", group_size: 8 }),
  },
};

const quantised: Record<string, RawTensor> = {};
const meant: Record<string, RawTensor> = {};
let config: Config = {};
beforeAll(async () => {
  const checkpoint = await openCheckpoint(fixture);
  config = checkpoint.config;
  for (const name of checkpoint.names) {
    const { dtype, shape } = checkpoint.stored(name);
    const w = toFloat32(await checkpoint.read(name), dtype, name);
    const [, layer, part] = /layers\.(\d)\.(self_attn|block_sparse_moe\.experts)\..*weight$/.exec(name) ?? [];
    const recipe = layers[Number(layer)]?.[part === "self_attn" ? "attention" : "experts"];
    const [out = 0, inner = 0] = shape;
    const made = recipe?.(name, w, [out, inner]);
    meant[name] = floats(made?.values ?? w, ...shape);
    Object.assign(quantised, made?.tensors ?? { [name]: meant[name] });
  }
  await checkpoint.close();
});

const ids = Int32Array.of(7, 200, 31, 5, 90, 91);
/** Logits of all positions in one pass, then of four tokens one by one. */
async function logitsOf(on: Engine, tensors: RawTensors, more: Config): Promise<{ logits: number[]; codes: number }> {
  const { checkpoint } = await checkpointOf(tensors, { ...config, ...more });
  const { model, close } = await readModel(checkpoint, { engine: on });
  const codes = leaves(model.params).filter(([path]) => path.endsWith(".codes")).length;
  const logits: number[] = [];
  const take = async (x: Tensor): Promise<void> => {
    logits.push(...(await x.data()));
    x.dispose();
  };
  const tokens = on.tensor(ids, [1, ids.length]);
  await take(on.scope(() => model.forward(model.params, tokens).logits));
  const cache = model.newCache(1);
  for (const id of ids.subarray(0, 4)) {
    const token = on.tensor(Int32Array.of(id), [1, 1]);
    await take(await model.step(token, { cache }));
    token.dispose();
  }
  cache.dispose();
  dispose([tokens]);
  await close();
  return { logits, codes };
}

describe("a model in int4 with zero points, int8 in words and in bytes, and fp8", () => {
  it("gives on the reference backend the bits of the model with their numbers", async () => {
    const on = engine(cpu());
    const found = await logitsOf(on, quantised, { quantization_config: quantization });
    const expected = await logitsOf(on, meant, {});
    expect(found.logits).toEqual(expected.logits);
    expect([found.codes, on.live()]).toEqual([0, 0]);
  });

  it("stays as it is stored on wasm, and gives these logits but for rounding", async () => {
    const backend = await wasm({ threads: 1 });
    const on = engine(backend);
    const found = await logitsOf(on, quantised, { quantization_config: quantization });
    const expected = await logitsOf(on, meant, {});
    const worst = found.logits.reduce(
      (top, x, i) => Math.max(top, Math.abs(x - (expected.logits[i] ?? Number.NaN))),
      0,
    );
    expect(worst).toBeLessThan(2e-5);
    // Per layer: q, k, v, o; gate and up in one; down.
    expect([found.codes, expected.codes, on.live()]).toEqual([12, 0, 0]);
    backend.dispose?.();
  });
});
