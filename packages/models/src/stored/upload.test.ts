// Stored matrices on the backends that Node has: which type each holds them in, what that costs, and that products, grouped products
// and rows of them are those of the numbers they stand for.
import "@tensorflow/tfjs-backend-cpu";
import {
  autodiff,
  dispose,
  type Engine,
  engine,
  leaves,
  type Tensor,
  type Tree,
  UnsupportedError,
} from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import { gpujs } from "@switchyard/kernels/gpujs";
import { tfjs } from "@switchyard/kernels/tfjs";
import { wasm } from "@switchyard/kernels/wasm";
import { requestDevice, webgpu } from "@switchyard/kernels/webgpu";
import * as tf from "@tensorflow/tfjs-core";
import { GPU } from "gpu.js";
import { afterAll, describe, expect, it } from "vitest";
import { below, bytesOfHost, type HostMatrix, nodeKey, stack } from "./host-matrix.ts";
import { groupedProduct, lookup, product } from "./product.ts";
import { draws } from "./stored.test-util.ts";
import { planUpload, type UploadPlan, upload, uploadFloats } from "./upload.ts";
import { widen } from "./widen.ts";

const inner = 64;
type Form =
  | "f32"
  | "bf16"
  | "f16"
  | "int8/16"
  | "int8/16 zeros"
  | "int4/32"
  | "int4/32 zeros"
  | "mxfp4"
  | "fp8/4x32"
  | "fp8/1x64";
const forms: readonly Form[] = [
  "f32",
  "bf16",
  "f16",
  "int8/16",
  "int8/16 zeros",
  "int4/32",
  "int4/32 zeros",
  "mxfp4",
  "fp8/4x32",
  "fp8/1x64",
];

/** A matrix [out, 64] of numbers of a usual size. */
function random(form: Form, out: number, seed: number): HostMatrix {
  const draw = draws(seed);
  const shape = [out, inner];
  const small = (): number => (draw.below(2001) - 1000) / 1024;
  const size = out * inner;
  if (form === "f32") return { kind: "floats", dtype: form, shape, data: Float32Array.from({ length: size }, small) };
  if (form === "bf16" || form === "f16") {
    // Exponents of 2^-3 to 1.
    const [bits, bias] = form === "f16" ? [10, 15] : [7, 127];
    const one = (): number => (draw.below(2) << 15) | ((bias - draw.below(4)) << bits) | draw.below(2 ** bits);
    return { kind: "floats", dtype: form, shape, data: Uint16Array.from({ length: size }, one) };
  }
  const [, format = "mxfp4", rowsText, groupText, zeros] =
    /^([a-z0-9]+)\/?(?:(\d+)x)?(\d+)?( zeros)?$/.exec(form) ?? [];
  const [rows, group] = [Number(rowsText ?? 1), Number(groupText ?? 32)];
  const grid = Math.ceil(out / rows) * (inner / group);
  const packed = format === "int4" || format === "mxfp4";
  const codes = draw.bits(packed ? size / 2 : size);
  const scale = format === "int8" ? 2 ** -7 : format === "fp8" ? 2 ** -8 : 2 ** -3;
  return {
    kind: "codes",
    format: format as "int8",
    shape,
    group,
    rows,
    // NaN is not compared.
    codes: format === "fp8" ? codes.map((code) => (code % 128 === 127 ? 1 : code)) : codes,
    scales:
      format === "mxfp4"
        ? Uint8Array.from({ length: grid }, () => 122 + draw.below(6))
        : Float32Array.from({ length: grid }, () => scale * (1 + draw.below(64) / 64)),
    ...(zeros ? { zeros: Uint8Array.from({ length: grid }, () => draw.below(16)) } : {}),
  };
}

const close = (found: ArrayLike<number>, expected: ArrayLike<number>, tolerance: number): void => {
  expect(found.length).toBe(expected.length);
  const worst = Array.prototype.reduce.call(
    found,
    (top, x, i) => Math.max(Number(top), Math.abs(Number(x) - (expected[i] ?? Number.NaN))),
    0,
  );
  expect(worst).toBeLessThan(tolerance);
};

/** The software driver of Vulkan that the tests of this project use, or a GPU. */
const device = await requestDevice().catch((error: unknown) => {
  if (!UnsupportedError.isInstance(error)) throw error;
  if (process.env.SWITCHYARD_REQUIRE_GPU === "1") throw error;
  console.warn(`stored matrices on WebGPU: skipped, ${error.message}`);
  return undefined;
});

interface Subject {
  readonly name: string;
  readonly skip?: boolean;
  open(): Promise<Engine>;
  /** Forms ("bf16", "stack of bf16") that it holds as they are stored. */
  readonly keeps: RegExp;
  /** Products differ from exact ones by so much at most. */
  readonly tolerance?: number;
}
const subjects: readonly Subject[] = [
  { name: "reference", open: async () => engine(cpu()), keeps: /^f32$|^stack of [bf]+\d\d$/ },
  { name: "wasm", open: async () => engine(await wasm({ threads: 1 })), keeps: /./ },
  { name: "autodiff over wasm", open: async () => autodiff(engine(await wasm({ threads: 1 }))), keeps: /./ },
  {
    name: "webgpu",
    skip: device === undefined,
    open: async () => engine(await webgpu(device ? { device } : {})),
    keeps: /^(?!.*fp8)/,
  },
  { name: "tfjs", open: async () => engine(await tfjs({ tf, backend: "cpu" })), keeps: /\b(f32|bf16|f16)$/ },
  { name: "gpu.js", open: async () => engine(gpujs({ GPU, mode: "cpu" })), keeps: /\b(f32|bf16|f16)$/ },
];

for (const { name, skip = false, open, keeps, tolerance = 2e-5 } of subjects) {
  describe.skipIf(skip)(name, async () => {
    const on = skip ? engine(cpu()) : await open();
    const start = on.live();
    afterAll(() => expect(on.live()).toBe(start));

    const read = async (f: () => Tensor): Promise<ArrayLike<number>> => {
      const y = on.scope(f);
      const data = await y.data();
      y.dispose();
      return data;
    };
    /** Uploads, checks what was said about it, and runs. */
    const held = async (host: HostMatrix, run: (params: Tree) => Promise<void>): Promise<void> => {
      const told: (readonly [UploadPlan, readonly number[]])[] = [];
      const tree = upload(on, host, { widened: (plan, shape) => told.push([plan, shape]) });
      const plan = planUpload(on, host);
      const kept = keeps.test(`${host.shape.length === 3 ? "stack of " : ""}${nodeKey(host)}`);
      expect([kept, plan.form]).toEqual([kept, kept ? nodeKey(host) : "f32"]);
      const wide = 4 * host.shape.reduce((n, d) => n * d, 1);
      if (kept) expect([plan.bytes, plan.widened, told]).toEqual([bytesOfHost(host), undefined, []]);
      else {
        expect(plan).toMatchObject({ bytes: wide, widened: { from: nodeKey(host), bytes: bytesOfHost(host) } });
        expect(plan.widened?.reason).toMatch(/\S/);
        expect(told).toEqual([[plan, host.shape]]);
      }
      // What lies there now has the elements that were promised.
      const sizes = { f32: 4, i32: 4, bf16: 2, f16: 2, u8: 1 };
      const bytes = leaves(tree).reduce((n, [, leaf]) => n + leaf.size * sizes[leaf.dtype], 0);
      expect(bytes).toBe(plan.bytes);
      await run({ w: tree });
      dispose(tree);
    };

    it.each(forms)("%s: products, grouped products and rows", async (form) => {
      const out = 11;
      const host = random(form, out, 5);
      const values = widen(host);
      const draw = draws(8);
      const rows = 3;
      const x = Float32Array.from({ length: rows * inner }, () => (draw.below(2001) - 1000) / 1024);
      const bias = Float32Array.from({ length: out }, (_, i) => i / 8);
      const dot = (w: ArrayLike<number>, row: number, line: number): number => {
        let sum = 0;
        for (let i = 0; i < inner; i++) sum += Number(x[row * inner + i]) * Number(w[line * inner + i]);
        return sum;
      };
      await held(host, async (params) => {
        const plain = await read(() => product(params, "w", on.tensor(x, [1, rows, inner])));
        close(
          plain,
          Array.from({ length: rows * out }, (_, i) => dot(values, Math.floor(i / out), i % out)),
          tolerance,
        );
        const added = await read(() => product(params, "w", on.tensor(x, [rows, inner]), on.tensor(bias, [out])));
        close(
          added,
          Array.from(plain, (y, i) => y + Number(bias[i % out])),
          tolerance,
        );
        const ids = [10, 0, 7, 3];
        const taken = await read(() => lookup(params, "w", on.tensor(Int32Array.from(ids), [2, 2])));
        close(
          taken,
          ids.flatMap((id) => [...values.subarray(id * inner, (id + 1) * inner)]),
          1e-7,
        );
      });
      // Three experts, of which the second has no row.
      const experts = [1, 2, 3].map((seed) => random(form, out, seed));
      await held(stack(experts), async (params) => {
        const ends = Int32Array.of(1, 1, 3);
        const grouped = await read(() =>
          groupedProduct(params, "w", on.tensor(x, [rows, inner]), on.tensor(ends, [3])),
        );
        const ofRow = [0, 2, 2].map((e) => widen(experts[e] ?? host));
        close(
          grouped,
          Array.from({ length: rows * out }, (_, i) => {
            const row = Math.floor(i / out);
            return dot(ofRow[row] ?? [], row, i % out);
          }),
          tolerance,
        );
      });
    });

    it("gate over up, whose blocks do not meet, is one matrix", async () => {
      const parts = [random("fp8/4x32", 6, 1), random("fp8/4x32", 6, 2)];
      const both = below(parts);
      await held(both, async (params) => {
        const one = new Float32Array(inner).fill(1);
        const found = await read(() => product(params, "w", on.tensor(one, [1, inner])));
        const sums = parts.flatMap((part) =>
          Array.from({ length: 6 }, (_, r) =>
            widen(part)
              .subarray(r * inner, (r + 1) * inner)
              .reduce((s, v) => s + v, 0),
          ),
        );
        close(found, sums, tolerance);
      });
    });

    it("vectors and what is asked for as floats are f32", async () => {
      const host = random("int4/32 zeros", 3, 7);
      const x = uploadFloats(on, host);
      expect([x.dtype, x.shape]).toEqual(["f32", [3, inner]]);
      close(await x.data(), widen(host), 1e-7);
      x.dispose();
      const half: HostMatrix = { kind: "floats", dtype: "bf16", shape: [2], data: Uint16Array.of(0x3f80, 0xc000) };
      const norm = upload(on, half) as Tensor;
      expect([norm.dtype, ...(await norm.data())]).toEqual(["f32", 1, -2]);
      norm.dispose();
    });
  });
}

it("leaves nothing behind where the device has no room for all of it", async () => {
  const whole = await wasm({ threads: 1 });
  let left = 1;
  const on = engine({
    ...whole,
    upload(data, spec) {
      if (left-- === 0) throw new Error("no room");
      return whole.upload(data, spec);
    },
  });
  expect(() => upload(on, random("int4/32 zeros", 3, 1))).toThrow("no room");
  expect(on.live()).toBe(0);
});

describe("a tree without such a matrix is refused by name", () => {
  const on = engine(cpu());
  const x = on.tensor(new Float32Array(4), [1, 4]);
  it.each([
    [{}, /the parameters lack "w"/],
    [{ w: {} }, /"w" is no matrix: .*; found nothing/],
    [{ w: { "int5/3": { codes: x, scales: x } } }, /"w" is no matrix: .*; found int5\/3/],
    [{ w: { mxfp4: { codes: x } } }, /"w" is no matrix/],
    [{ w: { mxfp4: { codes: x, scales: x }, "int8/2": { codes: x, scales: x } } }, /found mxfp4, int8\/2/],
  ])("%#", (params: Tree, message) => {
    expect(() => product(params, "w", x)).toThrow(message);
    expect(() => groupedProduct(params, "w", x, x)).toThrow(message);
    expect(() => lookup(params, "w", x)).toThrow(message);
  });
});
