// Engines, scopes, giving, counted handles, errors: on the reference backend.
import { describe, expect, it } from "vitest";
import { cpu } from "./cpu/index.ts";
import {
  add,
  addOp,
  affine,
  autodiff,
  counted,
  engine,
  exp,
  grad,
  groupedMatmul,
  linear,
  lower,
  matmul,
  mul,
  type Op,
  recip,
  reshape,
  run,
  softmax,
  softmaxOp,
  sqrt,
  straightThrough,
  sum,
  type Tensor,
  UnsupportedError,
  valueAndGrad,
  watch,
} from "./index.ts";

const list = async (x: Tensor): Promise<number[]> => [...(await x.data())];
const of = (e: ReturnType<typeof engine>, ...values: number[]): Tensor =>
  e.tensor(Float32Array.from(values), [values.length]);

describe("a kernel whose result is a view", () => {
  /** The reference backend with `view` at reshape; tells how often the kernel ran. */
  const viewing = () => {
    const backend = cpu();
    let calls = 0;
    const reshape: typeof backend.kernels.reshape = (inputs, results, attrs) => {
      calls++;
      return backend.kernels.reshape(inputs, results, attrs);
    };
    reshape.view = true;
    return { e: engine({ ...backend, kernels: { ...backend.kernels, reshape } }), calls: () => calls };
  };
  it("is not called, and shares the storage with its input until both are gone", async () => {
    const { e, calls } = viewing();
    const x = of(e, 1, 2, 3, 4);
    const shape = [2, 2];
    const y = reshape(x, shape);
    shape[0] = 9;
    expect([calls(), e.live(), y.shape]).toEqual([0, 1, [2, 2]]);
    x.dispose();
    expect(await list(y)).toEqual([1, 2, 3, 4]);
    y.dispose();
    expect(e.live()).toBe(0);
  });
  it("takes over what was given, and checks shapes all the same", async () => {
    const { e } = viewing();
    const y = reshape(e.give(of(e, 1, 2, 3, 4)), [4, -1]);
    expect([y.shape, e.live()]).toEqual([[4, 1], 1]);
    expect(() => reshape(y, [3])).toThrow("reshape: cannot become [3]");
    expect(() => reshape(y, [3, -1])).toThrow("reshape: f32 [4, 1] cannot become [3, -1]");
    y.dispose();
    expect(e.live()).toBe(0);
  });
});

describe("room", () => {
  it("is there where the host reaches the memory, and belongs to its scope", async () => {
    expect(engine(cpu()).room?.([2], "f32")).toBeUndefined();
    expect(counted(engine(cpu())).room).toBeUndefined();
    const backend = cpu();
    const e = engine({
      ...backend,
      room(spec) {
        // A handle of this backend is a record that holds the array.
        const bytes = new Uint8Array(4 * spec.shape.reduce((n, d) => n * d, 1));
        const handle = backend.upload(new Float32Array(bytes.buffer), spec);
        return { handle, stays: false, bytes: () => bytes };
      },
    });
    const room = e.room?.([2, 3], "f32");
    if (!room) return expect.fail("no room");
    expect([room.tensor.shape, room.tensor.dtype, room.stays, room.bytes().length]).toEqual([[2, 3], "f32", false, 24]);
    expect(e.live()).toBe(1);
    room.tensor.dispose();
    expect(e.live()).toBe(0);
    expect(() => room.bytes()).toThrow(/room: .*disposed/);
    expect(() => e.room?.([-1], "f32")).toThrow(/not made of counts/);
    e.scope(() => {
      e.room?.([1], "f32");
    });
    expect(e.live()).toBe(0);
  });
});

describe("scope", () => {
  it("frees everything but what it returns, nested too", async () => {
    const e = engine(cpu());
    const kept = e.scope(() => {
      const a = of(e, 1, 2);
      const inner = e.scope(() => ({ deep: [add(a, a)], gone: undefined }));
      return new Map([["x", mul(inner.deep[0] as Tensor, 3)]]);
    });
    expect(e.live()).toBe(1);
    expect(await list(kept.get("x") as Tensor)).toEqual([6, 12]);
    kept.get("x")?.dispose();
    expect(e.live()).toBe(0);
  });
  it("frees everything when the body throws", () => {
    const e = engine(cpu());
    expect(() =>
      e.scope(() => {
        of(e, 1);
        throw new Error("stop");
      }),
    ).toThrow("stop");
    expect(e.live()).toBe(0);
  });
  it("refuses a promise at run time as well", () => {
    const e = engine(cpu());
    // The type rejects an async body; a caller without types must not get a tensor freed under its await.
    const body: () => never = (async () => of(e, 1)) as never;
    expect(() => e.scope(body)).toThrow(/synchronous/);
  });
  it("does not free a tensor that was made outside", async () => {
    const e = engine(cpu());
    const a = of(e, 1, 2);
    e.scope(() => add(a, 1)).dispose();
    expect(await list(a)).toEqual([1, 2]);
    a.dispose();
    expect(e.live()).toBe(0);
  });
});

describe("storage", () => {
  it("is shared by views and freed with the last of them", async () => {
    const e = engine(cpu());
    const a = of(e, 1, 2, 3, 4);
    const b = reshape(a, [2, 2]);
    expect(e.live()).toBe(1);
    a.dispose();
    a.dispose();
    expect(e.live()).toBe(1);
    expect(await list(b)).toEqual([1, 2, 3, 4]);
    b.dispose();
    expect(e.live()).toBe(0);
  });
  it("rejects use after dispose, naming the tensor", async () => {
    const e = engine(cpu());
    const a = of(e, 1, 2);
    a.dispose();
    expect(() => add(a, 1)).toThrow(/f32 \[2\] was disposed or given away/);
    await expect(a.data()).rejects.toThrow(/disposed/);
  });
  it("given away is taken over only when nobody else holds it", async () => {
    let reused = 0;
    const backend = cpu();
    const spied = {
      ...backend,
      kernels: {
        ...backend.kernels,
        add: Object.assign((...call: Parameters<typeof backend.kernels.add>) => {
          if (call[1][0]?.reuse !== undefined) reused++;
          return backend.kernels.add(...call);
        }),
      },
    };
    const e = engine(spied);
    const a = of(e, 1, 2);
    const view = reshape(a, [2, 1]);
    const y = run(addOp, [e.give(a), of(e, 1, 1)], {})[0] as Tensor;
    expect(reused).toBe(0);
    expect(await list(view)).toEqual([1, 2]);
    expect(() => add(a, 1)).toThrow(/given away/);
    const z = run(addOp, [e.give(y), of(e, 1, 1)], {})[0] as Tensor;
    expect(reused).toBe(1);
    expect(await list(z)).toEqual([3, 4]);
  });
  it("a composite may use a given input several times", async () => {
    const e = engine(cpu());
    const y = e.scope(() => softmax(e.give(of(e, 0, 0))));
    expect(await list(y)).toEqual([0.5, 0.5]);
    y.dispose();
    expect(e.live()).toBe(0);
  });
});

describe("engines", () => {
  it("refuse strangers and say what to do", () => {
    const [a, b] = [engine(cpu()), engine(cpu())];
    expect(() => add(of(a, 1), of(b, 1))).toThrow(UnsupportedError);
    expect(() => add(watch(autodiff(a), of(a, 1)), of(b, 1))).toThrow(/another one/);
    expect(() => add(watch(autodiff(a), of(a, 1)), watch(autodiff(a), of(a, 1)))).toThrow(/another one/);
  });
  it("explain how an op runs and refuse one nobody can run", () => {
    const e = engine(cpu());
    const x = of(e, 1);
    expect(e.explain(addOp, [x, x], {})).toBe("kernel");
    expect(e.explain(softmaxOp, [x], {})).toMatch(/^fallback: .*no kernel "softmax"/);
    const odd: Op = { name: "odd", shapes: ([s]) => (s ? [s] : []) };
    expect(() => run(odd, [x], {})).toThrow(/odd\(f32 \[1\]\): .*no kernel "odd", and it has no fallback/);
  });
  it("check data against the shape", () => {
    const e = engine(cpu());
    expect(() => e.tensor(new Float32Array(3), [2, 2])).toThrow(/needs 4 elements, the data has 3/);
    expect(() => e.tensor(new Float32Array(3), [-3])).toThrow(/not made of counts/);
    expect(() => e.tensor(new Uint16Array(3), [3])).toThrow(/f16 or bf16/);
    expect(() => e.tensor(JSON.parse("[1, 2, 3]"), [3])).toThrow("make it one, such as Float32Array.from(values)");
  });
  it("print the shapes of a bad matmul", () => {
    const e = engine(cpu());
    expect(() => matmul(e.tensor(new Float32Array(32), [4, 8]), e.tensor(new Float32Array(12), [6, 2]))).toThrow(
      "matmul: inner sizes differ: f32 [4, 8] x f32 [6, 2]",
    );
  });
});

describe("autodiff", () => {
  it("gives second derivatives when nested", async () => {
    const e = engine(cpu({ precision: 64 }));
    const outer = autodiff(e);
    const x0 = e.tensor(Float64Array.of(0.3, -1.2, 2), [3]);
    const result = e.scope(() => {
      const x = watch(outer, x0);
      const inside = autodiff(outer);
      const xx = watch(inside, x);
      // f = sum(exp(x) x), f' = exp(x)(x + 1), f'' = exp(x)(x + 2)
      const first = grad(sum(mul(exp(xx), xx)), xx);
      return { first: lower(first), second: grad(sum(first), x) };
    });
    const xs = await list(x0);
    const closeTo = async (y: Tensor, f: (x: number) => number) =>
      (await list(y)).forEach((v, i) => void expect(v).toBeCloseTo(f(xs[i] ?? 0), 10));
    await closeTo(result.first, (x) => Math.exp(x) * (x + 1));
    await closeTo(result.second, (x) => Math.exp(x) * (x + 2));
    result.first.dispose();
    result.second.dispose();
    x0.dispose();
    expect(e.live()).toBe(0);
  });
  it("second derivatives of a fused op with a gradient op of its own", async () => {
    const e = engine(cpu({ precision: 64 }));
    const w = e.tensor(Float64Array.of(1, -2, 0.5), [3]);
    const firstAt = async (values: number[]): Promise<number[]> => {
      const x = e.tensor(Float64Array.from(values), [3]);
      const { grads } = valueAndGrad((p: { x: Tensor }) => [sum(mul(softmax(p.x), w)), {}] as const, { x });
      return list(grads.x);
    };
    const x = e.tensor(Float64Array.of(0.1, 0.7, -0.4), [3]);
    const outer = autodiff(e);
    const second = e.scope(() => {
      const watched = watch(outer, x);
      const inside = autodiff(outer);
      const xx = watch(inside, watched);
      return grad(sum(mul(grad(sum(mul(softmax(xx), w)), xx), w)), watched);
    });
    const got = await list(second);
    const weights = await list(w);
    const h = 1e-5;
    for (let i = 0; i < 3; i++) {
      const shifted = (d: number) => [0.1, 0.7, -0.4].map((v, j) => (j === i ? v + d : v));
      const [up, down] = [await firstAt(shifted(h)), await firstAt(shifted(-h))];
      const numeric = up.reduce((n, v, j) => n + ((v - (down[j] ?? 0)) / (2 * h)) * (weights[j] ?? 0), 0);
      expect(got[i]).toBeCloseTo(numeric, 7);
    }
  });
  it("a constant of the inner engine does not cut the gradient", async () => {
    const e = engine(cpu());
    const x = of(e, 2, 3);
    const { grads } = valueAndGrad((p: { x: Tensor }) => [sum(mul(of(e, 5, 7), p.x)), {}] as const, { x });
    expect(await list(grads.x)).toEqual([5, 7]);
  });
  it("is zero where the loss does not depend on a parameter, and correct for a parameter that is used twice", async () => {
    const e = engine(cpu());
    const params = { used: of(e, 2, 3), unused: of(e, 1) };
    const { value, grads } = valueAndGrad((p: typeof params) => [sum(mul(p.used, p.used)), {}] as const, params);
    expect(await list(value)).toEqual([13]);
    expect(await list(grads.used)).toEqual([4, 6]);
    expect(await list(grads.unused)).toEqual([0]);
  });
  it("gives the gradient of an intermediate result as well", async () => {
    const e = engine(cpu());
    const recording = autodiff(e);
    const [dx, dy] = e.scope(() => {
      const x = watch(recording, of(e, 2));
      const y = mul(x, x);
      return grad(sum(mul(y, y)), [x, y]);
    }) as [Tensor, Tensor];
    expect(await list(dx)).toEqual([32]);
    expect(await list(dy)).toEqual([8]);
  });
  it("leaves nothing behind, given inputs included", () => {
    const e = engine(cpu());
    const w = e.tensor(new Float32Array(12).fill(0.1), [4, 3]);
    const before = e.live();
    for (let step = 0; step < 3; step++) {
      const { value, grads } = valueAndGrad(
        (p: { w: Tensor }) => {
          const h = linear(e.tensor(new Float32Array(6).fill(1), [2, 3]), p.w);
          return [sum(h.engine.give(softmax(h))), {}] as const;
        },
        { w },
      );
      value.dispose();
      grads.w.dispose();
      expect(e.live()).toBe(before);
    }
  });
  it("frees a chain of ten thousand ops without overflowing the stack", () => {
    const e = engine(cpu());
    const recording = autodiff(e);
    e.scope(() => {
      let y = watch(recording, of(e, 1));
      for (let i = 0; i < 10_000; i++) y = affine(recording.give(y), { scale: 1, shift: 0.5 });
      return undefined;
    });
    expect(e.live()).toBe(0);
  });
  it("says what is wrong with a loss", () => {
    const e = engine(cpu());
    const x = watch(autodiff(e), of(e, 1, 2));
    expect(() => grad(x, x)).toThrow(/must be one number, it is f32 \[2\]/);
    expect(() => grad(of(e, 1), x)).toThrow(/does not record gradients/);
  });
  it("straightThrough has one tensor's value and the other's gradient", async () => {
    const e = engine(cpu());
    const recording = autodiff(e);
    const [value, gradient] = e.scope(() => {
      const x = watch(recording, of(e, 0.4));
      const y = straightThrough(of(e, 1), mul(x, 3));
      return [lower(y), grad(sum(mul(y, y)), x)] as const;
    });
    expect(await list(value)).toEqual([1]);
    expect(await list(gradient)).toEqual([6]);
  });
});

describe("counted", () => {
  it("counts dense, composite and ragged ops, forward and backward", async () => {
    const e = engine(cpu());
    const c = counted(e);
    const [rows, w] = [
      c.tensor(new Float32Array(5 * 3).fill(1), [5, 3]),
      c.tensor(new Float32Array(2 * 4 * 3).fill(1), [2, 4, 3]),
    ];
    const ends = c.tensor(Int32Array.of(1, 4), [2]);
    const y = c.scope(() => sqrt(recip(matmul(groupedMatmul(rows, w, ends), c.tensor(new Float32Array(8), [4, 2])))));
    await c.settle();
    expect(c.counts.get("groupedMatmul")).toEqual({ calls: 1, flops: 4 * 2 * 3 * 4, bytes: 4 * (15 + 24 + 2 + 20) });
    expect(c.counts.get("matmul")).toEqual({ calls: 1, flops: 2 * 5 * 4 * 2, bytes: 4 * (20 + 8 + 10) });
    expect(c.counts.get("recip")?.flops).toBe(10);
    c.scope(() => softmax(c.tensor(new Float32Array(4), [2, 2]))).dispose();
    expect(c.counts.has("softmax")).toBe(false);
    expect(c.counts.get("exp")?.calls).toBe(1);
    const inside = autodiff(c);
    const gradient = c.scope(() => grad(sum(linear(rows, watch(inside, c.tensor(new Float32Array(6), [2, 3])))), []));
    expect(gradient).toEqual([]);
    for (const x of [rows, w, ends, y]) x.dispose();
    expect(e.live()).toBe(0);
  });
});

describe("read", () => {
  it("copies at once what was computed, through decorators and from further in", () => {
    const e = engine(cpu());
    const outer = autodiff(counted(e));
    e.scope(() => {
      const x = of(e, 1, 2);
      const found = e.read(x);
      found[0] = 9; // a copy
      expect([...e.read(mul(x, 2))]).toEqual([2, 4]);
      const [y] = watch(outer, [x]);
      expect([...outer.read(mul(y as Tensor, 3))]).toEqual([3, 6]);
      expect([...outer.read(x)]).toEqual([1, 2]);
      return undefined;
    });
    expect(e.live()).toBe(0);
  });
  it("is refused where the device cannot wait, and for what is gone or of another engine", () => {
    const { downloadSync: _, ...backend } = cpu();
    const device = engine(backend);
    expect(device.canBlock).toBe(false);
    expect(() => device.read(of(device, 1))).toThrow(UnsupportedError);
    expect(() => device.read(of(device, 1))).toThrow("cannot wait for its results; await x.data()");
    const e = engine(cpu());
    const x = of(e, 1);
    expect(() => engine(cpu()).read(x)).toThrow("belongs to engine cpu");
    x.dispose();
    expect(() => e.read(x)).toThrow("was disposed");
  });
});
