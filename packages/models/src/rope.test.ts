// Rotary frequencies: the formulas written out once more, numbers recorded from Hugging Face Transformers, what core's `rope`
// makes of the tables, and every refusal.
import { readFileSync } from "node:fs";
import { CheckpointError, type Json, rope, ShapeError } from "@switchyard/core";
import { describe, expect, it } from "vitest";
import { makeEngine } from "./models.test-util.ts";
import { type Rotary, ropeTables, rotary } from "./rope.ts";

interface RecordedCase {
  readonly name: string;
  readonly headSize: number;
  readonly theta: number;
  readonly scaling: { readonly [key: string]: Json } | null;
  readonly maxPositions: number;
  readonly originalPositions?: number;
  readonly partial?: number;
  readonly at: readonly { readonly length: number; readonly inverse: readonly number[]; readonly scaling: number }[];
}
const recorded = JSON.parse(readFileSync(new URL("../test/fixtures/rope.json", import.meta.url), "utf8")) as {
  readonly cases: readonly RecordedCase[];
};

const close = (found: ArrayLike<number>, expected: ArrayLike<number>, tolerance = 1e-12): void => {
  expect(found.length).toBe(expected.length);
  for (let i = 0; i < expected.length; i++) {
    const e = expected[i] as number;
    expect(Math.abs((found[i] as number) - e), `entry ${i}`).toBeLessThanOrEqual(tolerance * Math.abs(e));
  }
};

describe("recorded numbers", () => {
  it.each(recorded.cases)("$name", ({ scaling, at, name: _, ...options }) => {
    const found = rotary(scaling, options);
    for (const { length, inverse, scaling: expected } of at) {
      const one = found.at(length);
      close(one.inverse, inverse, 3e-6); // float32 there
      expect(one.scaling).toBeCloseTo(expected, 12);
    }
  });

  it("says the same in the newer spelling", () => {
    for (const { scaling, at, name: _, theta, partial, ...options } of recorded.cases) {
      const { type, ...rest } = scaling ?? {};
      const record = {
        ...rest,
        ...(type ? { rope_type: type } : {}),
        rope_theta: theta,
        ...(partial ? { partial_rotary_factor: partial } : {}),
      };
      const old = rotary(scaling, { ...options, theta, ...(partial ? { partial } : {}) });
      const now = rotary(record, { ...options, key: "rope_parameters" });
      for (const { length } of at) expect(now.at(length)).toEqual(old.at(length));
      expect([now.type, now.size, now.changesAfter]).toEqual([old.type, old.size, old.changesAfter]);
    }
  });
});

describe("formulas", () => {
  const size = 12;
  const theta = 6000;
  const plain = [0, 2, 4, 6, 8, 10].map((i) => 1 / theta ** (i / 12));

  it("default and linear", () => {
    close(rotary(null, { headSize: size, theta }).at(5).inverse, plain);
    const linear = rotary({ type: "linear", factor: 8 }, { headSize: size, theta });
    close(
      linear.at(999).inverse,
      plain.map((x) => x / 8),
    );
    expect([linear.at(5).scaling, linear.changesAfter, linear.type]).toEqual([1, undefined, "linear"]);
  });

  it("dynamic grows the base with the length beyond the longest trained one", () => {
    const found = rotary({ rope_type: "dynamic", factor: 3 }, { headSize: size, theta, maxPositions: 100 });
    expect(found.changesAfter).toBe(100);
    close(found.at(1).inverse, plain);
    close(found.at(100).inverse, plain);
    for (const length of [101, 250, 10_000]) {
      const base = theta * ((3 * length) / 100 - 2) ** (12 / 10);
      close(
        found.at(length).inverse,
        [0, 2, 4, 6, 8, 10].map((i) => 1 / base ** (i / 12)),
      );
    }
  });

  it("yarn mixes by the number of turns", () => {
    const record = { rope_type: "yarn", factor: 16, original_max_position_embeddings: 512, beta_fast: 8, beta_slow: 2 };
    // Pair d turns 512 / (2 pi theta^(2 d / size)) times; the ramp is straight in d between the pairs that turn 8 and 2 times.
    const pair = (turns: number) => (Math.log(512 / (2 * Math.PI * turns)) / Math.log(theta)) * (size / 2);
    for (const truncate of [true, false]) {
      const [from, to] = truncate ? [Math.floor(pair(8)), Math.ceil(pair(2))] : [pair(8), pair(2)];
      const expected = plain.map((x, d) => {
        if (d <= from) return x;
        if (d >= to) return x / 16;
        const share = (d - from) / (to - from);
        return x * (1 - share) + (x / 16) * share;
      });
      const found = rotary({ ...record, truncate }, { headSize: size, theta });
      close(found.at(1).inverse, expected);
      expect(found.at(1).scaling).toBeCloseTo(0.1 * Math.log(16) + 1, 14);
      expect(found.softmaxScaling).toBe(1);
      expect(expected[0]).toBe(plain[0]);
      expect(expected[5]).toBe((plain[5] as number) / 16);
    }
  });

  it("yarn scales attention by mscale, mscale_all_dim or attention_factor", () => {
    const scalings = (more: { readonly [key: string]: Json }): [number, number] => {
      const record = { type: "yarn", factor: 40, original_max_position_embeddings: 4096, ...more };
      const found = rotary(record, { headSize: 64, theta: 10000 });
      return [found.at(1).scaling, found.softmaxScaling];
    };
    const m = (by: number): number => 0.1 * by * Math.log(40) + 1;
    expect(scalings({})).toEqual([m(1), 1]);
    expect(scalings({ mscale: 0.7 })).toEqual([m(1), 1]);
    expect(scalings({ mscale: 0.7, mscale_all_dim: 0.9 })).toEqual([m(0.7) / m(0.9), m(0.9) ** 2]);
    expect(scalings({ mscale_all_dim: 0.9 })).toEqual([m(1), m(0.9) ** 2]);
    expect(scalings({ mscale: 0.7, mscale_all_dim: 0.9, attention_factor: 1.5 })).toEqual([1.5, m(0.9) ** 2]);
    expect(scalings({ factor: 1, mscale: 0.7, mscale_all_dim: 0.9 })).toEqual([1, 1]);
  });

  it("llama3 interpolates long wavelengths", () => {
    const record = {
      rope_type: "llama3",
      factor: 8,
      low_freq_factor: 1,
      high_freq_factor: 4,
      original_max_position_embeddings: 256,
    };
    const kinds = new Set<string>();
    const expected = plain.map((x) => {
      const wavelength = (2 * Math.PI) / x;
      if (wavelength < 256 / 4) {
        kinds.add("short");
        return x;
      }
      if (wavelength > 256 / 1) {
        kinds.add("long");
        return x / 8;
      }
      kinds.add("between");
      const smooth = (256 / wavelength - 1) / (4 - 1);
      return (1 - smooth) * (x / 8) + smooth * x;
    });
    expect(kinds.size).toBe(3);
    close(rotary(record, { headSize: size, theta }).at(1).inverse, expected);
  });

  it("longrope changes all factors past the original length, PhiMoE's scalings with them", () => {
    const short = [1, 1.2, 1.4, 1.5, 1.7, 2];
    const long = [1.3, 1.7, 2.5, 4, 5, 7];
    const record = {
      rope_type: "longrope",
      short_factor: short,
      long_factor: long,
      short_mscale: 1.15,
      long_mscale: 1.3,
      original_max_position_embeddings: 64,
    };
    const options = { headSize: size, theta, maxPositions: 128, originalPositions: 64 };
    const found = rotary(record, options);
    expect(found.changesAfter).toBe(64);
    for (const [length, factors, scaling] of [
      [1, short, 1.15],
      [64, short, 1.15],
      [65, long, 1.3],
      [128, long, 1.3],
    ] as const) {
      close(
        found.at(length).inverse,
        plain.map((x, i) => x / (factors[i] as number)),
      );
      expect(found.at(length).scaling).toBe(scaling);
    }
    const { short_mscale: _, long_mscale: __, ...without } = record;
    expect(rotary(without, options).at(65).scaling).toBeCloseTo(Math.sqrt(1 + Math.log(2) / Math.log(64)), 14);
    expect(rotary({ ...without, rope_type: "su" }, options).type).toBe("longrope");
    expect(rotary(without, { ...options, maxPositions: 64 }).at(65).scaling).toBe(1);
  });
});

describe("tables", () => {
  it("hold scaled cosines and sines of the new positions, by the frequencies of the whole length", () => {
    const record = { rope_type: "dynamic", factor: 2 };
    const found = rotary(record, { headSize: 8, theta: 100, maxPositions: 10 });
    for (const [past, positions] of [
      [0, 5],
      [7, 3],
      [7, 4],
      [30, 1],
    ] as const) {
      const { cos, sin } = ropeTables(found, { past, positions });
      expect([cos.length, sin.length]).toEqual([positions * 4, positions * 4]);
      const length = past + positions;
      const base = length > 10 ? 100 * ((2 * length) / 10 - 1) ** (8 / 6) : 100;
      for (let p = 0; p < positions; p++) {
        for (let j = 0; j < 4; j++) {
          expect(cos[p * 4 + j]).toBeCloseTo(Math.cos((past + p) / base ** (j / 4)), 12);
          expect(sin[p * 4 + j]).toBeCloseTo(Math.sin((past + p) / base ** (j / 4)), 12);
        }
      }
    }
    expect(ropeTables(found, { past: 3, positions: 0 })).toEqual({
      cos: new Float64Array(0),
      sin: new Float64Array(0),
    });
    const scaled: Pick<Rotary, "at" | "size"> = {
      size: 2,
      at: () => ({ inverse: Float64Array.of(1), scaling: 3 }),
    };
    expect(ropeTables(scaled, { past: 2, positions: 1 }).cos[0]).toBe(3 * Math.cos(2));
    expect(() => ropeTables(found, { positions: -1 })).toThrow(ShapeError);
  });

  it.each([false, true])("turn part of a head, pairs interleaved: %s", async (interleaved) => {
    const on = makeEngine(64);
    const found = rotary(null, { headSize: 6, theta: 50, partial: 0.7, interleaved });
    expect([found.size, found.interleaved]).toEqual([4, interleaved]);
    const { cos, sin } = ropeTables(found, { past: 3, positions: 2 });
    const x = Float64Array.from({ length: 12 }, (_, i) => Math.sin(3 * i + 1));
    const table = (values: Float64Array) => on.tensor(values, [2, 2]);
    const y = await rope(on.tensor(x, [1, 2, 1, 6]), table(cos), table(sin), found).data();
    const expected = Array.from(x);
    for (let p = 0; p < 2; p++) {
      for (let pair = 0; pair < 2; pair++) {
        const [a, b] = interleaved ? [2 * pair, 2 * pair + 1] : [pair, pair + 2];
        const angle = (3 + p) / 50 ** (pair / 2);
        const [u, v] = [x[6 * p + a] as number, x[6 * p + b] as number];
        expected[6 * p + a] = u * Math.cos(angle) - v * Math.sin(angle);
        expected[6 * p + b] = v * Math.cos(angle) + u * Math.sin(angle);
      }
    }
    for (let i = 0; i < 12; i++) expect(y[i]).toBeCloseTo(expected[i] as number, 12);
  });
});

describe("refusals", () => {
  const options = { headSize: 4, theta: 100, maxPositions: 64 };
  const yarn = { rope_type: "yarn", factor: 2 };
  const llama3 = {
    rope_type: "llama3",
    factor: 2,
    low_freq_factor: 1,
    high_freq_factor: 4,
    original_max_position_embeddings: 32,
  };
  const longrope = { rope_type: "longrope", short_factor: [1, 2], long_factor: [3, 4], factor: 2 };
  it.each([
    [[], /"rope_scaling" is "\[\]", expected an object/],
    ["yarn", /expected an object or null/],
    [{ factor: 2 }, /"rope_type" is missing .*supported are default, linear, dynamic, yarn, llama3, longrope/],
    [{ rope_type: "mrope" }, /rope_scaling: "rope_type" is "mrope"; supported are default, linear/],
    [{ type: 3 }, /"type" is "3", expected a text/],
    [{ type: "linear", rope_type: "yarn", factor: 2 }, /"rope_type" is "yarn", but "type" is "linear"/],
    [{ rope_type: "linear" }, /"factor" is missing, expected a number/],
    [{ rope_type: "linear", factor: "2" }, /"factor" is "\\"2\\"", expected a number/],
    [{ rope_type: "linear", factor: 0.5 }, /"factor" is 0.5, expected a number from 1/],
    [{ rope_type: "dynamic", alpha: 1000 }, /"alpha" is "1000", a key this package does not know; known are rope_type/],
    [{ full_attention: yarn }, /"full_attention" is an object; hand the record of one kind of layer/],
    [{ ...yarn, beta_fast: 1, beta_slow: 2 }, /"beta_fast" is 1 and "beta_slow" 2, expected/],
    [{ ...yarn, truncate: 0 }, /"truncate" is "0", expected true or false/],
    [{ ...yarn, attention_factor: -1 }, /"attention_factor" is -1, expected a number above 0/],
    [
      { ...yarn, original_max_position_embeddings: 1.5 },
      /"original_max_position_embeddings" is "1.5", expected a whole/,
    ],
    [{ ...yarn, rope_theta: 0 }, /"rope_theta" is 0, expected a number above 0/],
    [{ ...yarn, rope_theta: 1 }, /"rope_theta" is 1, expected more than 1 for type "yarn"/],
    [{ ...yarn, partial_rotary_factor: 0.75 }, /"partial_rotary_factor" is 0.75, which turns 3 of 4 channels/],
    [{ ...yarn, partial_rotary_factor: 2 }, /"partial_rotary_factor" is 2, which turns 8 of 4/],
    [{ ...llama3, high_freq_factor: 1 }, /"high_freq_factor" is 1, expected more than "low_freq_factor", which is 1/],
    [{ ...llama3, original_max_position_embeddings: null }, /"original_max_position_embeddings" is missing/],
    [{ ...longrope, long_factor: [1] }, /"long_factor" is 1 numbers, expected 2 numbers above 0/],
    [{ ...longrope, long_factor: [1, null] }, /"long_factor" is a list with "null"/],
    [{ ...longrope, short_factor: [0, 1] }, /"short_factor" is a list with "0"/],
    [{ ...longrope, short_factor: 2 }, /"short_factor" is "2"/],
    [{ rope_type: "longrope", long_factor: [1, 2] }, /"short_factor" is missing/],
    [{ ...longrope, factor: null }, /"factor" is missing/],
    [
      { ...longrope, factor: 3, original_max_position_embeddings: 32 },
      /"factor" is 3, but .* is 2, .*attention_factor/,
    ],
    [{ ...longrope, short_mscale: 1.1 }, /"long_mscale" is missing/],
  ] as [Json, RegExp][])("%j", (record, message) => {
    expect(() => rotary(record, options)).toThrow(message);
    expect(() => rotary(record, options)).toThrow(CheckpointError);
  });

  it("names what the config lacks beside the record", () => {
    const dynamic = { rope_type: "dynamic", factor: 2 };
    expect(() => rotary(dynamic, { headSize: 4, theta: 100 })).toThrow(/"dynamic" needs "max_position_embeddings"/);
    expect(() => rotary(dynamic, { ...options, headSize: 2 })).toThrow(/at least 4 turned channels, found 2/);
    expect(() => rotary(yarn, { headSize: 4, theta: 100 })).toThrow(/"original_max_position_embeddings" is missing/);
    expect(() => rotary(null, { headSize: 4 })).toThrow(/"rope_theta" is missing/);
    expect(() => rotary(llama3, { ...options, originalPositions: 16 })).not.toThrow();
    const twice = { ...yarn, original_max_position_embeddings: 32 };
    expect(() => rotary(twice, { ...options, originalPositions: 16 })).toThrow(/is 32, but 16 beside the record/);
    expect(() => rotary({ rope_type: "mrope" }, { ...options, key: "rope_parameters" })).toThrow(/rope_parameters: /);
    expect(rotary({ rope_theta: 7 }, { headSize: 4, key: "rope_parameters" }).type).toBe("default");
    expect(() => rotary(null, { ...options, headSize: 0 })).toThrow(ShapeError);
  });
});
