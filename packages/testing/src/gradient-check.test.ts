import { customGrad, engine, matmul, mul, silu, type Tensor, takeRows } from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import { describe, expect, it } from "vitest";
import { floats, generator, ints, uniform } from "./arrays.ts";
import { gradientCheck } from "./gradient-check.ts";

const one = (xs: readonly Tensor[], i = 0): Tensor => {
  const x = xs[i];
  if (!x) throw new RangeError(`input ${i}`);
  return x;
};

describe("gradientCheck", () => {
  it("accepts right gradients and reports the worst entry", async () => {
    const next = generator("gradient check");
    const report = await gradientCheck(
      (xs) => [silu(matmul(one(xs), one(xs, 1))), mul(one(xs), 2)],
      [uniform(next, [3, 4]), uniform(next, [4, 2])],
    );
    expect(report.checked).toBe(20);
    expect(report.worst?.numeric).toBeCloseTo(report.worst?.analytic ?? Number.NaN, 6);
  });
  it("leaves integer inputs alone", async () => {
    const report = await gradientCheck(
      (xs) => takeRows(one(xs), one(xs, 1)),
      [floats([3, 1], [1, 2, 3]), ints([2], [2, -1])],
    );
    expect(report.checked).toBe(3);
  });
  it("names the entry, autodiff's value and the difference's when they disagree", async () => {
    const wrong = (x: Tensor): Tensor =>
      customGrad(
        [x],
        (y) => mul(y, y),
        (dy, [y]) => [y && mul(mul(dy, y), 3)],
      );
    const check = gradientCheck((xs) => wrong(one(xs)), [floats([2, 2], [0, 0, 4, 0])]);
    await expect(check).rejects.toThrow(/input 0, entry \[1, 0\]: autodiff gives .*, central differences give /);
  });
  it("does not accept NaN", async () => {
    const broken = (x: Tensor): Tensor =>
      customGrad(
        [x],
        (y) => mul(y, 1),
        (dy) => [mul(dy, Number.NaN)],
      );
    await expect(gradientCheck((xs) => broken(one(xs)), [floats([2], [1, 2])])).rejects.toThrow(/autodiff gives NaN/);
  });
  it("notices handles that stay alive", async () => {
    const on = engine(cpu({ precision: 64 }));
    let extra = 0;
    const leaky = { ...on, live: () => on.live() + extra++ };
    const check = gradientCheck((xs) => mul(one(xs), 2), [floats([1], [1])], { engine: leaky });
    await expect(check).rejects.toThrow(/1 handles were left alive/);
  });
});
