// Weights in 16-bit floats: every product with weights takes them, and equals the product with the rounded weights.
import { describe, expect, it } from "vitest";
import { cpu } from "../cpu/backend.ts";
import { engine } from "../engine.ts";
import type { Tensor } from "../tensor.ts";
import { cast } from "./elementwise.ts";
import { groupedMatmul, moeExperts } from "./experts.ts";
import { linear, matmul } from "./matmul.ts";

const backend = cpu();
const { groupedMatmul: _, ...kernels } = backend.kernels;
const hosts = [
  engine(backend),
  engine({ ...backend, name: "cpu without groupedMatmul", kernels: kernels as typeof backend.kernels }),
];

const wave = (n: number, step: number): Float32Array =>
  Float32Array.from({ length: n }, (_, i) => Math.sin(1 + i * step));

describe.each(hosts.map((host) => [host.name, host] as const))("%s", (_, host) => {
  const x = host.tensor(wave(15, 0.7), [5, 3]);
  const bias = host.tensor(wave(4, 0.2), [4]);
  const ends = host.tensor(Int32Array.of(2, 5), [2]);
  const ids = host.tensor(Int32Array.of(0, 1, 1, 0, 1), [5, 1]);
  const shares = host.tensor(wave(5, 0.4), [5, 1]);

  it.each(["bf16", "f16"] as const)("%s", async (dtype) => {
    const rounded = (shape: number[], step: number): readonly [Tensor, Tensor] => {
      const n = shape.reduce((a, b) => a * b, 1);
      const w = cast(host.tensor(wave(n, step), shape), dtype);
      return [w, cast(w, "f32")];
    };
    const [w, w32] = rounded([4, 3], 0.9);
    const [stack, stack32] = rounded([2, 4, 3], 1.1);
    const [down, down32] = rounded([2, 3, 2], 1.3);
    const routing = { ids, weights: shares };
    const pairs: [Tensor, Tensor][] = [
      [linear(x, w, bias), linear(x, w32, bias)],
      [groupedMatmul(x, stack, ends), groupedMatmul(x, stack32, ends)],
      [moeExperts(x, { gateUp: stack, down }, routing), moeExperts(x, { gateUp: stack32, down: down32 }, routing)],
    ];
    for (const [found, expected] of pairs) {
      expect(found.dtype).toBe("f32");
      expect(Array.from(await found.data())).toEqual(Array.from(await expected.data()));
    }
    expect(() => linear(cast(x, dtype), w)).toThrow("linear: input 0 must be f32; cast() it");
    expect(() => matmul(x, cast(w, dtype), { transposeB: true })).toThrow("matmul: input 1 must be f32; cast() it");
  });
});
