import { describe, expect, it } from "vitest";
import { cpu } from "./cpu/index.ts";
import { engine, random } from "./index.ts";
import { philox } from "./random.ts";

const source = (seed: number) => random(engine(cpu()), seed);
const mean = (x: Float64Array): number => x.reduce((n, v) => n + v, 0) / x.length;

describe("random", () => {
  it("is Philox 4x32-10: the known answer of its authors' Random123 for counter 0 and key 0", () => {
    const words = new Uint32Array(4);
    philox(words, 0, 0, 0);
    expect([...words]).toEqual([0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
  });
  it("is a function of its keys alone", () => {
    const draw = (...key: (string | number)[]) => [
      ...source(7)
        .at(...key)
        .host("uniform", 5),
    ];
    expect(draw("step", 3)).toEqual(draw("step", 3));
    const all = [
      draw("step", 3),
      draw("step", 4),
      draw("ste", "p", 3),
      draw("3", "step"),
      draw(3),
      draw("3"),
      draw(3.5),
      draw(-3),
    ];
    expect(new Set(all.map((x) => x.join())).size).toBe(all.length);
    expect([...source(8).host("uniform", 5)]).not.toEqual([...source(7).host("uniform", 5)]);
    expect(source(7).at("a").at("b").host("normal", 3)).toEqual(source(7).at("a", "b").host("normal", 3));
  });
  it("a longer draw begins like a shorter one", () => {
    const r = source(1).at("x");
    expect([...r.host("normal", 9)].slice(0, 5)).toEqual([...r.host("normal", 5)]);
  });
  it("has the moments of its distributions", () => {
    const n = 100_000;
    const u = source(1).host("uniform", n);
    const z = source(2).host("normal", n);
    const x = source(3).host("exponential", n);
    expect(mean(u)).toBeCloseTo(0.5, 2);
    expect(u.every((v) => v >= 0 && v < 1)).toBe(true);
    expect(mean(z)).toBeCloseTo(0, 1);
    expect(mean(z.map((v) => v * v))).toBeCloseTo(1, 1);
    expect(mean(z.map((v) => v ** 4))).toBeGreaterThan(2.8);
    expect(mean(z.map((v) => v ** 4))).toBeLessThan(3.2);
    expect(mean(x)).toBeCloseTo(1, 1);
    const neighbours = mean(u.map((v, i) => (v - 0.5) * ((u[i + 1] ?? 0.5) - 0.5))) * 12;
    expect(Math.abs(neighbours)).toBeLessThan(0.015);
  });
  it("fills 16 bins evenly (chi-squared)", () => {
    const bins = new Float64Array(16);
    const n = 64_000;
    for (const v of source(9).at("layer", 3, "noise").host("uniform", n))
      bins[Math.floor(v * 16)] = (bins[Math.floor(v * 16)] ?? 0) + 1;
    const chi = bins.reduce((sum, count) => sum + (count - n / 16) ** 2 / (n / 16), 0);
    expect(chi).toBeLessThan(37.7); // 0.999 quantile of 15 degrees of freedom
  });
  it("makes tensors of the asked shape", async () => {
    const x = source(1).uniform([2, 0, 3]);
    expect(x.shape).toEqual([2, 0, 3]);
    const y = source(1).exponential([2, 3]);
    expect((await y.data()).length).toBe(6);
  });
});
