// The order of ids and the choice of one, on the host.
import { ShapeError } from "@switchyard/core";
import { describe, expect, it } from "vitest";
import { noise } from "./decoding.test-util.ts";
import { argmax, decoded, descending, picker } from "./pick.ts";

const none = Number.NEGATIVE_INFINITY;

describe("descending", () => {
  it("is a stable sort, for every length and with equal values", () => {
    for (let n = 0; n < 40; n++) {
      const values = Float64Array.from(noise(n, n), (x, i) => (i % 7 === 3 ? none : Math.round(x)));
      const sorted = [...values.keys()].sort((a, b) => {
        const [x, y] = [values[a] ?? 0, values[b] ?? 0];
        return x === y ? a - b : y - x;
      });
      expect([...descending(values)]).toEqual(sorted);
      if (n > 0) expect(argmax(values)).toBe(sorted[0]);
    }
  });
});

describe("picker", () => {
  it("never takes what is excluded, at either end of the draw", () => {
    const logits = Float64Array.of(none, 1, none, 2, 1);
    for (const options of [{}, { topK: 5 }, { topP: 1 }, { minP: 0 }, { temperature: 1e-9 }, { temperature: 0 }]) {
      const pick = picker("sample", options);
      expect(pick(logits, [], () => 0)).toBe(3);
      expect([1, 3, 4]).toContain(pick(logits, [], () => 1 - 2 ** -24));
    }
    expect(picker("sample", {})(logits, [], () => 1 - 2 ** -24)).toBe(4);
    expect(picker("sample", { minP: 1 })(logits, [], () => 0.999)).toBe(3);
  });

  it("does not draw where there is nothing to draw", () => {
    const pick = picker("sample", { temperature: 0, repetitionPenalty: 3 });
    const never = () => expect.unreachable();
    expect(pick(Float64Array.of(2, 1, -1), [], never)).toBe(0);
    expect(pick(Float64Array.of(2, 1, -1), [0], never)).toBe(1);
    expect(pick(Float64Array.of(-1, -2.9, -4), [0], never)).toBe(1);
  });

  it.each([
    [{ repetitionPenalty: 0 }, /some name: repetitionPenalty is 0/],
    [{ temperature: Number.NaN }, /temperature is NaN/],
    [{ topK: 1.5 }, /topK is 1.5/],
    [{ topP: 1.1 }, /topP is 1.1/],
    [{ minP: -0.1 }, /minP is -0.1/],
  ])("refuses %o", (options, message) => {
    expect(() => picker("some name", options)).toThrow(message);
    expect(() => picker("some name", options)).toThrow(ShapeError);
  });
});

it("decoded tells the token and the most likely ones", () => {
  const logits = Float64Array.of(0, Math.log(2), Math.log(5));
  const near = (p: number) => expect.closeTo(Math.log(p), 12);
  expect(decoded(logits, 0, { count: 0 })).toEqual({ id: 0, logProbability: near(1 / 8) });
  expect(decoded(logits, 1, { count: 2 })).toEqual({
    id: 1,
    logProbability: near(1 / 4),
    top: [
      { id: 2, logProbability: near(5 / 8) },
      { id: 1, logProbability: near(1 / 4) },
    ],
  });
  expect(decoded(logits, 1, { count: 9 }).top).toHaveLength(3);
});
