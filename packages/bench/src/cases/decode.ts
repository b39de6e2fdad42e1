// One token at a time: nothing is used twice, so speed is the bytes of the weights per second. Products with one row in every
// storage type, and the sparse layer over tokens that together use every expert.
import {
  concat,
  linear,
  moeExperts,
  type QuantizedFormat,
  type QuantizedWeights,
  quantizedLinear,
  softmaxTopk,
  type Tensor,
} from "@switchyard/core";
import type { Benchmark } from "../harness.ts";
import { noise } from "./data.ts";
import { type LayerCase, layerData, layerFlops, layers } from "./moe-layer.ts";

export const weightFormats = ["f32", "f16", "bf16", "int8", "int4", "mxfp4", "fp8"] as const;
export type WeightFormat = (typeof weightFormats)[number];

export interface DecodeCase {
  readonly weights: WeightFormat;
  readonly inner: number;
  readonly outer: number;
}

/** Neighbours that share a scale; of fp8 as many lines do, too. */
const groupOf = (format: QuantizedFormat): number => (format === "mxfp4" ? 32 : 128);
const isQuantized = (weights: WeightFormat): weights is QuantizedFormat =>
  weights === "int8" || weights === "int4" || weights === "mxfp4" || weights === "fp8";
const inBytes = (format: QuantizedFormat): boolean => format === "int8" || format === "fp8";

/** Bits of one weight, its share of the scale included. */
export const bitsPerWeight: Readonly<Record<WeightFormat, number>> = {
  f32: 32,
  f16: 16,
  bf16: 16,
  int8: 8 + 32 / groupOf("int8"),
  int4: 4 + 32 / groupOf("int4"),
  mxfp4: 4 + 8 / groupOf("mxfp4"),
  fp8: 8 + 32 / groupOf("fp8") ** 2,
};

/** The case with about that many bytes of weights; `inner` is a multiple of 128. */
export const decodeCase = (weights: WeightFormat, inner: number, bytes: number): DecodeCase => ({
  weights,
  inner,
  outer: Math.max(1, Math.round((8 * bytes) / (bitsPerWeight[weights] * inner))),
});

/** Pseudo-random words (xorshift32, Marsaglia 2003). */
function words(n: number, seed: number): Uint32Array<ArrayBuffer> {
  const values = new Uint32Array(n);
  let state = Math.imul(seed, 0x9e3779b1) >>> 0 || 1;
  for (let i = 0; i < n; i++) {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    values[i] = state;
  }
  return values;
}
const bytes = (n: number, seed: number): Uint8Array<ArrayBuffer> =>
  new Uint8Array(words(Math.ceil(n / 4), seed).buffer, 0, n);

export interface DecodeData {
  /** [1, inner] */
  readonly x: Float32Array<ArrayBuffer>;
  /** f32 values; bits of f16 and bf16; codes, which are u8. */
  readonly stored: Float32Array<ArrayBuffer> | Uint16Array<ArrayBuffer> | Uint8Array<ArrayBuffer>;
  readonly scales?: Float32Array<ArrayBuffer> | Uint8Array<ArrayBuffer>;
}

/** Random weights written in their storage type at once: signs and fractions of 16-bit floats, whole codes. */
export function decodeData({ weights, inner, outer }: DecodeCase): DecodeData {
  const n = inner * outer;
  const x = noise(inner, 1);
  if (weights === "f32") return { x, stored: noise(n, 2, Math.sqrt(3 / inner)) };
  if (!isQuantized(weights)) {
    // 1/8 to 1/4 with either sign: exponent 12 of f16, 124 of bf16.
    const [kept, exponent] = weights === "f16" ? [0x83ff, 12 << 10] : [0x807f, 124 << 7];
    const stored = new Uint16Array(words(Math.ceil(n / 2), 2).buffer, 0, n);
    for (let i = 0; i < n; i++) stored[i] = ((stored[i] as number) & kept) | exponent;
    return { x, stored };
  }
  const stored = bytes(inBytes(weights) ? n : n / 2, 2);
  const groups = n / groupOf(weights);
  if (weights === "fp8") {
    // Finite ones: the last exponent, 15, loses a bit.
    for (const [i, code] of stored.entries()) if ((code & 0x78) === 0x78) stored[i] = code ^ 0x40;
    const blocks = Math.ceil(outer / groupOf("fp8")) * (inner / groupOf("fp8"));
    return { x, stored, scales: noise(blocks, 3, 0.002).map((scale) => scale + 0.003) };
  }
  if (weights !== "mxfp4") {
    const largest = weights === "int8" ? 128 : 8;
    return { x, stored, scales: noise(groups, 3, 0.4 / largest).map((scale) => scale + 0.6 / largest) };
  }
  return { x, stored, scales: bytes(groups, 3).map((byte) => 122 + (byte & 3)) };
}

const e4m3 = (code: number): number => {
  const [exponent, fraction] = [(code >> 3) & 15, (code & 7) / 8];
  return (code & 128 ? -1 : 1) * (exponent === 0 ? fraction * 2 ** -6 : (1 + fraction) * 2 ** (exponent - 7));
};
const e2m1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6];

/** Weight i of `decodeData`, as a number. */
function weightAt({ weights, inner }: DecodeCase, { stored, scales }: DecodeData, i: number): number {
  if (weights === "f32") return stored[i] as number;
  if (!isQuantized(weights)) {
    const bits = stored[i] as number;
    const [fraction, exponent, bias] = weights === "f16" ? [10, (bits >> 10) & 31, 15] : [7, (bits >> 7) & 255, 127];
    return (bits & 0x8000 ? -1 : 1) * 2 ** (exponent - bias) * (1 + (bits & (2 ** fraction - 1)) / 2 ** fraction);
  }
  if (weights === "fp8") {
    const [line, block] = [Math.floor(i / inner), groupOf("fp8")];
    const at = Math.floor(line / block) * (inner / block) + Math.floor((i % inner) / block);
    return e4m3(stored[i] as number) * (scales?.[at] as number);
  }
  const scale = scales?.[Math.floor(i / groupOf(weights))] as number;
  if (weights === "int8") return (((stored[i] as number) << 24) >> 24) * scale;
  const code = ((stored[i >> 1] as number) >> (4 * (i & 1))) & 15;
  if (weights === "int4") return (code - 8) * scale;
  return (code & 8 ? -1 : 1) * (e2m1[code & 7] as number) * 2 ** (scale - 127);
}

/** Element `row` of the product, in double precision. */
export function decodeRow(one: DecodeCase, data: DecodeData, row: number): number {
  let total = 0;
  for (let p = 0; p < one.inner; p++) total += (data.x[p] as number) * weightAt(one, data, row * one.inner + p);
  return total;
}

export const decodeProduct: Benchmark<DecodeCase> = {
  name: "decode",
  cases: weightFormats.map((weights) => decodeCase(weights, 4096, 2 ** 28)),
  setup(engine, one) {
    const { weights, inner, outer } = one;
    const data = decodeData(one);
    const x = engine.tensor(data.x, [1, inner]);
    let product: () => Tensor;
    let held: Tensor[];
    if (isQuantized(weights)) {
      const group = groupOf(weights);
      const rows = weights === "fp8" ? group : 1;
      const codes = engine.tensor(data.stored, [outer, inBytes(weights) ? inner : inner / 2]);
      const scales = engine.tensor(data.scales ?? new Float32Array(0), [Math.ceil(outer / rows), inner / group]);
      const w: QuantizedWeights = { codes, scales, format: weights, group, ...(rows > 1 ? { rows } : {}) };
      held = [codes, scales];
      product = () => quantizedLinear(x, w);
    } else {
      const w = engine.tensor(data.stored, [outer, inner], weights);
      held = [w];
      product = () => linear(x, w);
    }
    return {
      run: product, // [1, outer]
      flops: 2 * inner * outer,
      bytes: data.stored.byteLength + (data.scales?.byteLength ?? 0),
      dispose() {
        for (const tensor of [x, ...held]) tensor.dispose();
      },
    };
  },
};

/**
 * Tokens of one layer after each other, as many as it takes to use every expert once (experts / k): token s chooses experts s k to
 * s k + k - 1, so no weight is found in a cache from the token before. Gives their outputs, [experts / k, width].
 */
export const decodeLayer: Benchmark<LayerCase> = {
  name: "decode-layer",
  cases: Object.entries(layers).map(([layer, size]) => ({ layer, ...size, tokens: size.experts / size.k })),
  setup(engine, one) {
    const { experts, width, hidden, k, tokens } = one;
    const data = decodeLayerData(one);
    const row = (from: Float32Array, n: number, token: number): Tensor =>
      engine.tensor(from.slice(token * n, (token + 1) * n), [1, n]);
    const rows = Array.from({ length: tokens }, (_, token) => ({
      x: row(data.x, width, token),
      logits: row(data.logits, experts, token),
    }));
    const gateUp = engine.tensor(data.gateUp, [experts, 2 * hidden, width]);
    const down = engine.tensor(data.down, [experts, width, hidden]);
    return {
      run: () =>
        engine.scope(() =>
          concat(
            rows.map(({ x, logits }) =>
              moeExperts(x, { gateUp, down }, softmaxTopk(logits, { k, order: "softmax-topk-renormalise" })),
            ),
            0,
          ),
        ),
      flops: layerFlops(one),
      bytes: 4 * tokens * k * 3 * width * hidden,
      dispose() {
        for (const { x, logits } of rows) for (const tensor of [x, logits]) tensor.dispose();
        for (const tensor of [gateUp, down]) tensor.dispose();
      },
    };
  },
};

/** As `layerData`, with logits that choose k other experts for every token. */
export const decodeLayerData = (one: LayerCase): ReturnType<typeof layerData> => {
  const data = layerData(one);
  const chosen = (slot: number): boolean => Math.floor((slot % one.experts) / one.k) === Math.floor(slot / one.experts);
  return { ...data, logits: data.logits.map((logit, slot) => logit + (chosen(slot) ? 10 : 0)) };
};
