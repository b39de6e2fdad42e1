import { engine, type Kernel } from "@switchyard/core";
import { type CpuBackend, type CpuHandle, cpu } from "@switchyard/core/cpu";
import { describe, expect, it } from "vitest";
import { bytes, floats } from "./arrays.ts";
import { backendCases, primitiveNames, primitivesOnly, uncoveredKernels } from "./backend-cases.ts";
import * as oracle from "./oracles.ts";
import { readSkips } from "./skip.ts";
import { testBackend } from "./test-backend.ts";

testBackend({ name: "cpu", backend: () => cpu() });
testBackend({
  name: "cpu, float64, without fused kernels",
  backend: () => primitivesOnly(cpu({ precision: 64 })),
  tolerance: { absolute: 1e-11, relative: 1e-11 },
});

const cases = backendCases();
const names = cases.map(({ name }) => name);

/** The cases of one op that fail when a kernel is wrong. */
async function failures(
  op: string,
  change: (backend: CpuBackend) => Partial<Record<string, Kernel<CpuHandle>>>,
): Promise<string[]> {
  const backend = cpu();
  const on = engine({ ...backend, kernels: { ...backend.kernels, ...change(backend) } });
  const failed: string[] = [];
  for (const one of cases.filter((entry) => entry.op === op)) {
    await one.run(on).catch((error: Error) => failed.push(`${one.name}: ${error.message}`));
  }
  return failed;
}

describe("the backend suite can fail", () => {
  it("runs clean on the right kernels", async () => {
    expect(await failures("matmul", () => ({}))).toEqual([]);
  });
  // Each primitive replaced by another's loop, or by one that forgets what makes it hard.
  const wrong: readonly [PropertyKey & string, (b: CpuBackend) => Kernel<CpuHandle>][] = [
    ["add", (b) => b.kernels.mul],
    ["mul", (b) => b.kernels.add],
    ["maximum", (b) => b.kernels.add],
    ["less", (b) => (inputs, results, attrs) => b.kernels.less([...inputs].reverse(), results, attrs)],
    [
      "where",
      (b) =>
        ([c, x, y], results, attrs) =>
          b.kernels.where(
            [c, y, x].flatMap((v) => v ?? []),
            results,
            attrs,
          ),
    ],
    ["recip", (b) => b.kernels.exp],
    ["exp", (b) => b.kernels.tanh],
    ["log", (b) => b.kernels.sqrt],
    ["sqrt", (b) => b.kernels.log],
    ["tanh", (b) => b.kernels.erf],
    ["erf", (b) => b.kernels.tanh],
    ["floor", (b) => (inputs, results) => b.kernels.cast(inputs, results, { dtype: "f32" })],
    ["transpose", (b) => (inputs, results) => b.kernels.reshape(inputs, results, results[0])],
    [
      "slice",
      (b) => (inputs, results, attrs) =>
        b.kernels.slice(inputs, results, { ...attrs, start: attrs.start.map(() => 0) }),
    ],
    ["concat", (b) => (inputs, results, attrs) => b.kernels.concat([...inputs].reverse(), results, attrs)],
    [
      "sumTo",
      (b) => (inputs, results, attrs) =>
        b.kernels.sumTo(
          inputs.map((x) => ({ ...x, shape: [...x.shape].reverse() })),
          results,
          attrs,
        ),
    ],
    ["cumsum", (b) => (inputs, results, attrs) => b.kernels.cumsum(inputs, results, { ...attrs, exclusive: false })],
    ["matmul", (b) => (inputs, results, attrs) => b.kernels.matmul(inputs, results, { ...attrs, transposeB: false })],
    [
      "topkIndices",
      (b) =>
        (inputs, results, { k }) =>
          b.kernels.argsort(inputs, results, { descending: false, k }),
    ],
    ["argsort", (b) => (inputs, results) => b.kernels.argsort(inputs, results, {})],
    ["addRows", (b) => (inputs, results, attrs) => b.kernels.takeRows(inputs, results, attrs)],
    [
      "takeRows",
      (b) => (inputs, results) => [
        b.upload(new Float32Array(size(results)).fill(1), results[0] ?? none),
        ...inputs.slice(9).map((x) => x.handle),
      ],
    ],
    ["blockEnds", (b) => (_, results) => [b.upload(new Int32Array(size(results)), results[0] ?? none)]],
    ["cast", (b) => (inputs, results) => b.kernels.floor(inputs, results, {})],
    ["maxLast", (b) => (_, results) => [b.upload(new Float32Array(size(results)), results[0] ?? none)]],
    ["softmax", (b) => b.kernels.exp],
    [
      "attention",
      (b) => (_, results) =>
        results.map((spec) => b.upload(new Float32Array(spec.shape.reduce((n, d) => n * d, 1)), spec)),
    ],
    ["quantizedLinear", (b) => (_, results) => [b.upload(new Float32Array(size(results)), results[0] ?? none)]],
    ["quantizedGroupedMatmul", (b) => (_, results) => [b.upload(new Float32Array(size(results)), results[0] ?? none)]],
  ];
  const none = { shape: [], dtype: "f32" } as const;
  const codes = (w: oracle.StoredWeights, change: (byte: number) => number): oracle.StoredWeights => ({
    ...w,
    codes: bytes(w.codes.shape, w.codes.data.map(change)),
  });
  const size = (results: readonly { readonly shape: readonly number[] }[]): number =>
    (results[0]?.shape ?? []).reduce((n, d) => n * d, 1);
  it.each(wrong)("a wrong %s", async (op, make) => {
    expect(await failures(op, (backend) => ({ [op]: make(backend) }))).not.toEqual([]);
  });
  it("covers every primitive but reshape, which has no result of its own", () => {
    const broken = new Set(wrong.map(([op]) => op));
    expect(primitiveNames.filter((name) => !broken.has(name))).toEqual(["reshape"]);
  });
  it("an unstable sort", async () => {
    const failed = await failures("argsort", (b) => ({
      argsort: (inputs, results, attrs) => {
        const x = inputs[0];
        const y = results[0];
        if (!x || !y) throw new Error("argsort has one input");
        // Reversed rows, sorted and mapped back: ties come higher index first.
        const n = x.shape.at(-1) ?? 1;
        const data = b.downloadSync(x);
        const flipped = data.map((_, i) => data[i - (i % n) + (n - 1 - (i % n))] ?? 0);
        const [sorted] = b.kernels.argsort([{ ...x, handle: b.upload(flipped, x) }], results, attrs);
        if (!sorted) throw new Error("argsort has one result");
        return [
          b.upload(
            b.downloadSync({ ...y, handle: sorted }).map((i) => n - 1 - i),
            y,
          ),
        ];
      },
    }));
    expect(failed.join("\n")).toMatch(/ties 4x6/);
    expect(failed.join("\n")).not.toMatch(/ascending values 3x5/);
  });
  it.each<[string, RegExp, (w: oracle.StoredWeights) => oracle.StoredWeights]>([
    ["nothing wrong", /^$/, (w) => w],
    [
      "nibbles in the other order",
      /int4.*mxfp4/s,
      (w) => (w.format === "int8" ? w : codes(w, (x) => (x >> 4) | (x << 4))),
    ],
    ["int8 codes without a sign", /int8/, (w) => (w.format === "int8" ? codes(w, (x) => Math.min(x, 127)) : w)],
    ["blocks of one line", /fp8 by 32x32/, (w) => ({ ...w, rows: 1 })],
    [
      "subnormals of fp8 flushed",
      /fp8/,
      (w) => (w.format === "fp8" ? codes(w, (x) => ((x & 0x78) === 0 ? x & 0x80 : x)) : w),
    ],
    ["zeros forgotten", /with zeros/, ({ zeros: _, ...w }) => w],
    [
      "every second scale forgotten",
      /by 32/,
      (w) => ({
        ...w,
        scales: { ...w.scales, data: w.scales.data.map((_, i, all) => all[i - (i % 2)] ?? 0) as Uint8Array },
      }),
    ],
    [
      "small exponents flushed",
      /exponent 1 /,
      (w) =>
        w.format === "mxfp4"
          ? {
              ...w,
              scales: bytes(
                w.scales.shape,
                w.scales.data.map((e) => (e < 64 ? 0 : e)),
              ),
            }
          : w,
    ],
    [
      "no NaN",
      /255 is NaN/,
      (w) =>
        w.format === "mxfp4"
          ? {
              ...w,
              scales: bytes(
                w.scales.shape,
                w.scales.data.map((e) => e % 255),
              ),
            }
          : w,
    ],
  ])("dequantize with %s", async (_, expected, spoil) => {
    const failed = await failures("dequantize", (b) => ({
      dequantize: (inputs, results, attrs) => {
        const [c, s, z] = inputs.map((x) => (x.dtype === "u8" ? bytes : floats)(x.shape, b.downloadSync(x)));
        if (!c || !s) throw new Error("dequantize has two inputs or three");
        const { data } = oracle.dequantize(spoil({ codes: c, scales: s, zeros: z, ...attrs }));
        return [b.upload(data, results[0] ?? none)];
      },
    }));
    expect(failed.map((line) => line.split(":")[0]).join("\n")).toMatch(expected);
  });
  it("a kernel that overwrites its input", async () => {
    const failed = await failures("engine", (b) => ({
      add: (inputs, results, attrs) => {
        const [x] = inputs;
        const [y] = b.kernels.add(inputs, results, attrs);
        if (x?.handle.data && x.dtype === "f32") x.handle.data.fill(7);
        return y ? [y] : [];
      },
    }));
    expect(failed.join("\n")).toMatch(/ops leave their inputs alone/);
  });
  it("a handle that is not freed", async () => {
    const backend = cpu();
    const on = engine(backend);
    const leaky = { ...on, live: () => on.live() + calls++ };
    let calls = 0;
    await expect(cases[0]?.run(leaky)).rejects.toThrow(/handles were left alive/);
  });
  it("says what was found", async () => {
    const [first] = await failures("add", (b) => ({ add: b.kernels.mul }));
    expect(first).toMatch(/^add\/broadcast .*: entry \[.*\] is .*, expected .* \(difference .*, allowed .*\)$/);
  });
});

describe("cases and skips", () => {
  it("have distinct names", () => {
    expect(names.length).toBeGreaterThan(1000);
    expect(names.filter((name, i) => names.indexOf(name) !== i)).toEqual([]);
  });
  it("every primitive has cases", () => {
    const ops = new Set(cases.map(({ op }) => op));
    expect(primitiveNames.filter((name) => !ops.has(name))).toEqual([]);
  });
  it("names kernels without a case", () => {
    const backend = cpu();
    const extended = {
      ...backend,
      kernels: { ...backend.kernels, softmaxGrad: backend.kernels.add, flux: backend.kernels.add },
    };
    expect(uncoveredKernels(extended)).toEqual(["flux"]);
  });
  it("a skip of an unknown case or without a reason is a fault", () => {
    const { faults, reasons } = readSkips(
      [
        { reason: "no f16", tests: ["cast/f32 to f16 rounds to nearest even 6", "cast/nonsense"] },
        { reason: " ", tests: ["add/broadcast 7 7"] },
      ],
      names,
    );
    expect(reasons.get("cast/f32 to f16 rounds to nearest even 6")).toBe("no f16");
    expect(faults).toHaveLength(2);
    expect(faults[0]).toMatch(/"cast\/nonsense", which is no case.*"cast\//);
    expect(faults[1]).toMatch(/gives no reason/);
  });
});
