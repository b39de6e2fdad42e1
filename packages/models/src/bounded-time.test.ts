// The bound on time: what is in time is as it was, what is not is cut off, also inside a regular expression.
import { expect, it } from "vitest";
import { withinTime } from "./bounded-time.ts";

const late = (): Error => new RangeError("late");

it("gives results and errors as they are", () => {
  const result = { a: 1 };
  expect(withinTime(1000, () => result, late)).toBe(result);
  expect(withinTime(1000, () => undefined, late)).toBeUndefined();
  const error = new TypeError("mine");
  expect(() =>
    withinTime(
      1000,
      () => {
        throw error;
      },
      late,
    ),
  ).toThrow(error);
  expect(withinTime(1000, () => withinTime(1000, () => 1, late) + withinTime(1000, () => 2, late), late)).toBe(3);
});

it("cuts off a loop and a regular expression that tries all ways, and works afterwards", () => {
  const text = `${"a".repeat(60)}!`;
  const endless = (): never => {
    for (;;) Math.random();
  };
  const started = performance.now();
  for (const act of [() => /^(?:a+)+$/u.test(text), endless]) {
    expect(() => withinTime(50, act as () => unknown, late)).toThrow(RangeError);
    expect(withinTime(1000, () => text.length, late)).toBe(61);
  }
  expect(performance.now() - started).toBeLessThan(10_000);
});
