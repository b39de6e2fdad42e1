// Putting stored matrices together: every element keeps its value, and forms are kept wherever the parts allow it.
import { ShapeError } from "@switchyard/core";
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { below, bytesOfHost, type HostMatrix, nodeKey, stack } from "./host-matrix.ts";
import { draws, sameNumbers, wellFormed } from "./stored.test-util.ts";
import { widen } from "./widen.ts";

type Form = "f32" | "bf16" | "f16" | "int8" | "int4" | "mxfp4" | "fp8";
interface Choice {
  readonly form: Form;
  readonly group: number;
  readonly rows: number;
  readonly zeros: boolean;
}

/** A matrix [out, in] of random elements. */
function random(
  { form, group, rows, zeros }: Choice,
  [out, inner]: readonly [number, number],
  seed: number,
): HostMatrix {
  const draw = draws(seed);
  const shape = [out, inner];
  const scalesOf = (n: number): Float32Array => Float32Array.from({ length: n }, () => (1 + draw.below(999)) / 512);
  if (form === "f32") return { kind: "floats", dtype: form, shape, data: scalesOf(out * inner) };
  if (form === "bf16" || form === "f16") {
    const bytes = draw.bits(2 * out * inner);
    return { kind: "floats", dtype: form, shape, data: new Uint16Array(bytes.buffer) };
  }
  const line = form === "int4" || form === "mxfp4" ? inner / 2 : inner;
  const block = form === "fp8" ? rows : 1;
  const [down, across] = [Math.ceil(out / block), Math.ceil(inner / group)];
  return {
    kind: "codes",
    format: form,
    shape,
    group,
    rows: block,
    codes: draw.bits(out * line),
    scales: form === "mxfp4" ? draw.bits(down * across) : scalesOf(down * across),
    ...(zeros && form.startsWith("int")
      ? { zeros: draw.bits(down * across).map((byte) => (form === "int4" ? byte & 15 : byte)) }
      : {}),
  };
}

/** Groups that a form may have for rows of this length. */
const groupsOf = (form: Form, inner: number): readonly number[] =>
  form === "mxfp4"
    ? [32]
    : [1, 2, 3, 4, 5, 6, 8, 16, 32, 64, inner].filter(
        (group) => group <= inner && (form === "fp8" || inner % group === 0),
      );

const concatenated = (parts: readonly HostMatrix[]): number[] => parts.flatMap((part) => [...widen(part)]);

const anyParts = fc
  .record({
    form: fc.constantFrom<Form>("f32", "bf16", "f16", "int8", "int4", "mxfp4", "fp8"),
    inner: fc.constantFrom(32, 64),
    odd: fc.boolean(),
    parts: fc.array(
      fc.record({
        out: fc.integer({ min: 1, max: 13 }),
        pick: fc.nat(),
        rows: fc.integer({ min: 1, max: 9 }),
        zeros: fc.boolean(),
      }),
      { minLength: 1, maxLength: 4 },
    ),
    seed: fc.integer(),
  })
  .map(({ form, inner: even, odd, parts, seed }) => {
    const inner = odd && (form === "fp8" || form === "int8") ? even - 7 : even;
    const groups = groupsOf(form, inner);
    const made = (equal: boolean) =>
      parts.map(({ out, pick, rows, zeros }, i) => {
        const own = equal ? (parts[0]?.out ?? 1) : out;
        const choice = { form, group: groups[pick % groups.length] ?? inner, rows: Math.min(rows, own), zeros };
        return random(choice, [own, inner], seed + i);
      });
    return { form, below: made(false), stack: made(true), inner };
  });

describe("below", () => {
  it("keeps every value and the form", () => {
    fc.assert(
      fc.property(anyParts, ({ form, below: parts, inner }) => {
        const host = below(parts);
        const out = parts.reduce((n, { shape }) => n + (shape[0] ?? 0), 0);
        expect(host.shape).toEqual([out, inner]);
        expect(nodeKey(host).replace(/\/.*/, "")).toBe(form);
        expect(wellFormed(host)).toBe(true);
        expect(sameNumbers(widen(host), concatenated(parts))).toBe(true);
      }),
      { numRuns: 300 },
    );
  });

  it("keeps blocks that end with the part, and takes the coarsest that fit where they do not", () => {
    const part = (out: number, rows: number): HostMatrix =>
      random({ form: "fp8", group: 8, rows, zeros: false }, [out, 16], out);
    expect(nodeKey(below([part(8, 4), part(8, 4)]))).toBe("fp8/4x8");
    expect(nodeKey(below([part(8, 4), part(7, 4)]))).toBe("fp8/4x8");
    expect(nodeKey(below([part(6, 4), part(6, 4)]))).toBe("fp8/2x8");
    expect(nodeKey(below([part(7, 4), part(7, 4)]))).toBe("fp8/1x8");
    // A block as high as its part is no limit for the others.
    expect(nodeKey(below([part(8, 8), part(8, 8)]))).toBe("fp8/8x8");
    expect(nodeKey(below([part(8, 8), part(5, 5)]))).toBe("fp8/8x8");
    const across = (group: number): HostMatrix => random({ form: "fp8", group, rows: 1, zeros: false }, [2, 20], group);
    expect(nodeKey(below([across(8), across(20)]))).toBe("fp8/1x8");
  });

  it("widens what is of different formats, exactly", () => {
    const choice = { group: 8, rows: 1, zeros: false };
    const parts = (["int4", "bf16", "f16", "f32"] as const).map((form, i) => random({ ...choice, form }, [3, 16], i));
    for (const some of [parts, parts.slice(1, 3), parts.slice(0, 2), parts.slice(2)]) {
      const host = below(some);
      expect(nodeKey(host)).toBe("f32");
      expect(sameNumbers(widen(host), concatenated(some))).toBe(true);
    }
  });

  it("takes vectors, and one part as it is", () => {
    const vector = (...data: number[]): HostMatrix => ({
      kind: "floats",
      dtype: "f32",
      shape: [data.length],
      data: Float32Array.from(data),
    });
    expect(below([vector(1, 2), vector(), vector(3)])).toEqual(vector(1, 2, 3));
    const one = vector(1);
    expect(below([one])).toBe(one);
  });

  it("refuses rows that differ", () => {
    const part = (inner: number): HostMatrix =>
      random({ form: "int8", group: inner, rows: 1, zeros: false }, [2, inner], 1);
    expect(() => below([part(4), part(6)])).toThrow("below: rows differ or are no rows: [2,4], [2,6]");
    expect(() => below([])).toThrow(ShapeError);
    const stacked = stack([part(4), part(4)]);
    expect(() => below([stacked, stacked])).toThrow(ShapeError);
  });
});

describe("stack", () => {
  it("keeps every value and the form", () => {
    fc.assert(
      fc.property(anyParts, ({ form, stack: parts }) => {
        const host = stack(parts);
        expect(host.shape).toEqual([parts.length, ...(parts[0]?.shape ?? [])]);
        expect(nodeKey(host).replace(/\/.*/, "")).toBe(form);
        expect(wellFormed(host)).toBe(true);
        expect(sameNumbers(widen(host), concatenated(parts))).toBe(true);
      }),
      { numRuns: 300 },
    );
  });

  it("refuses shapes that differ", () => {
    const part = (out: number): HostMatrix => random({ form: "int4", group: 8, rows: 1, zeros: false }, [out, 8], 1);
    expect(() => stack([part(2), part(3)])).toThrow("stack: shapes differ: [2,8], [3,8]");
    expect(() => stack([])).toThrow(ShapeError);
    expect(() => stack([stack([part(2)])])).toThrow(ShapeError);
  });
});

it("counts the bytes of codes, scales and zero points", () => {
  expect(bytesOfHost(random({ form: "int4", group: 8, rows: 1, zeros: true }, [3, 16], 1))).toBe(
    3 * 8 + 4 * 3 * 2 + 3 * 2,
  );
  expect(bytesOfHost(random({ form: "mxfp4", group: 32, rows: 1, zeros: false }, [3, 64], 1))).toBe(3 * 32 + 3 * 2);
  expect(bytesOfHost(random({ form: "bf16", group: 1, rows: 1, zeros: false }, [3, 5], 1))).toBe(30);
});
