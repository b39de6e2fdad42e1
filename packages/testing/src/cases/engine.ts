// A backend as a whole: transfers, handles, storage that is given away, memory, a Mixture-of-Experts layer and a
// training step.
// What has no closed form is compared with the float64 reference backend.
import {
  type AdamwAttrs,
  adamwOp,
  add,
  affine,
  autodiff,
  combineRows,
  concat,
  crossEntropy,
  dispatch,
  dispose,
  type Engine,
  embedding,
  engine as engineOf,
  grad,
  groupedMatmul,
  linear,
  lower,
  matmul,
  mean,
  mul,
  reshape,
  rmsNorm,
  run,
  type SgdAttrs,
  sgdOp,
  softmaxTopk,
  sub,
  swiglu,
  type Tensor,
  takeRows,
  watch,
} from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import { assertClose, floats, generator, type HostArray, integers, ints, type Tolerance, uniform } from "../arrays.ts";
import * as oracle from "../oracles.ts";
import { type BackendCase, behaviour, compare, download, evaluate, upload } from "./case.ts";

const get = <T>(list: readonly T[], i: number): T => {
  const item = list[i];
  if (item === undefined) throw new RangeError(`case: item ${i} is missing`);
  return item;
};

/** Reads, compares and frees. */
async function check(what: string, x: Tensor, expected: HostArray, tolerance: Tolerance): Promise<void> {
  try {
    assertClose(what, await download(x), expected, tolerance);
  } finally {
    x.dispose();
  }
}

const adamwOptions: AdamwAttrs = {
  lr: 0.1,
  beta1: 0.9,
  beta2: 0.99,
  eps: 1e-8,
  weightDecay: 0.05,
  correction1: 0.1,
  correction2: 0.01,
};

function sgdOracle(inputs: readonly HostArray[], o: SgdAttrs): HostArray[] {
  const [param, grad, velocity, scale] = [get(inputs, 0), get(inputs, 1), get(inputs, 2), get(inputs, 3)];
  const at = (x: HostArray, i: number): number => x.data[i] ?? 0;
  const v = Float64Array.from(velocity.data, (old, i) => {
    const g = at(grad, i) * at(scale, 0) + o.weightDecay * at(param, i);
    return o.momentum * old + g;
  });
  const p = Float64Array.from(param.data, (old, i) => {
    const g = at(grad, i) * at(scale, 0) + o.weightDecay * old;
    const step = o.nesterov ? g + o.momentum * (v[i] ?? 0) : (v[i] ?? 0);
    return old - o.lr * step;
  });
  return [
    { shape: param.shape, data: p },
    { shape: param.shape, data: v },
  ];
}

function optimisers(): BackendCase[] {
  return [[], [7], [0], [5, 13], [1031]].flatMap((shape) => {
    const next = generator(`optimiser ${shape.join()}`);
    const [param, g, m] = [uniform(next, shape), uniform(next, shape), uniform(next, shape)];
    const v = uniform(next, shape, 0.01, 2);
    const scale = floats([], [0.75]);
    const label = shape.length === 0 ? "scalar" : shape.join("x");
    const step = (xs: readonly HostArray[]) =>
      oracle.adamw(get(xs, 0), get(xs, 1), get(xs, 2), get(xs, 3), get(xs, 4), adamwOptions);
    return [
      ...compare(`adamw/${label}`, {
        inputs: [param, g, m, v, scale],
        run: (xs) => run(adamwOp, xs, adamwOptions),
        expect: step,
        slack: 4,
      }),
      ...compare(`adamw/given away ${label}`, {
        inputs: [param, g, m, v, scale],
        run: (xs) =>
          run(
            adamwOp,
            xs.map((x, i) => (i === 1 || i === 4 ? x : x.engine.give(x))),
            adamwOptions,
          ),
        expect: step,
        slack: 4,
      }),
      ...[false, true].flatMap((nesterov) => {
        const options: SgdAttrs = { lr: 0.1, momentum: 0.8, weightDecay: 0.03, nesterov };
        const name = `sgd/${nesterov ? "nesterov " : ""}`;
        const inputs = [param, g, m, scale];
        return [
          ...compare(`${name}${label}`, {
            inputs,
            run: (xs) => run(sgdOp, xs, options),
            expect: (xs) => sgdOracle(xs, options),
            slack: 2,
          }),
          ...compare(`${name}given away ${label}`, {
            inputs,
            run: (xs) =>
              run(
                sgdOp,
                xs.map((x, i) => (i === 0 || i === 2 ? x.engine.give(x) : x)),
                options,
              ),
            expect: (xs) => sgdOracle(xs, options),
            slack: 2,
          }),
        ];
      }),
    ];
  });
}

function transfers(): BackendCase[] {
  const shapes: readonly (readonly number[])[] = [[], [0], [1], [7], [3, 0, 2], [2, 3, 5], [1031]];
  return [
    ...shapes.map((shape) =>
      behaviour(`engine/upload and download ${shape.length === 0 ? "scalar" : shape.join("x")}`, async (engine) => {
        const next = generator(`transfer ${shape.join()}`);
        const exact = { absolute: 0, relative: 0 };
        const x = uniform(next, shape);
        await check("f32", upload(engine, x), x, exact);
        const ids = integers(next, shape, -2147483648, 2147483647);
        await check("i32", upload(engine, ids), ids, exact);
        const bytes = Uint8Array.from(ids.data, (value) => value & 255);
        await check("u8", engine.tensor(bytes, shape), floats(shape, bytes), exact);
        const singles = Float32Array.from(x.data);
        await check("f32 from Float32Array", engine.tensor(singles, shape), x, exact);
      }),
    ),
    behaviour("engine/upload copies its data", async (engine) => {
      const data = Float32Array.of(1, 2, 3);
      const x = engine.tensor(data, [3]);
      data.fill(9);
      await check("after the host array changed", x, floats([3], [1, 2, 3]), { absolute: 0, relative: 0 });
    }),
    behaviour("engine/download is a copy", async (engine) => {
      const x = engine.tensor(Float32Array.of(1, 2, 3), [3]);
      const first = await x.data();
      first.fill(9);
      await check("after the downloaded array changed", x, floats([3], [1, 2, 3]), { absolute: 0, relative: 0 });
    }),
    behaviour("engine/infinities and NaN survive a transfer", async (engine) => {
      const x = floats([4], [Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY, Number.NaN, -0]);
      await check("round trip", upload(engine, x), x, { absolute: 0, relative: 0 });
    }),
    behaviour("engine/many reads at once", async (engine, tolerance) => {
      const xs = Array.from({ length: 16 }, (_, i) => engine.tensor(Float32Array.of(i, -i), [2]));
      const ys = engine.scope(() => xs.map((x) => affine(x, { scale: 2, shift: 1 })));
      const reads = ys.map((y, i) => check(`read ${i}`, y, floats([2], [2 * i + 1, 1 - 2 * i]), tolerance));
      await Promise.all(reads);
      for (const x of xs) x.dispose();
    }),
    behaviour("engine/a read keeps what it saw when the tensor is freed", async (engine) => {
      const next = generator("pending reads");
      const x = uniform(next, [37, 11]);
      const source = upload(engine, x);
      const y = engine.scope(() => affine(source, { scale: 2, shift: 0 }));
      const reads = [source.data(), y.data(), y.data()];
      source.dispose();
      y.dispose();
      // Memory given back too early would be taken by these.
      const others = engine.scope(() => {
        const nines = floats([37, 11], new Float64Array(37 * 11).fill(9));
        return Array.from({ length: 4 }, () => affine(upload(engine, nines), { scale: 1, shift: 1 }));
      });
      const found = await Promise.all(reads);
      for (const other of others) other.dispose();
      for (const [i, data] of found.entries()) {
        const expected = floats([37, 11], i === 0 ? x.data : x.data.map((value) => 2 * value));
        assertClose(`read ${i}`, floats([37, 11], data), expected, { absolute: 0, relative: 0 });
      }
    }),
    behaviour("engine/a read keeps what it saw when the tensor is given away", async (engine) => {
      const next = generator("pending gifts");
      const arrays = [0, 1, 2].map(() => uniform(next, [37, 11], 0.1, 1));
      const [param, m, v] = arrays.map((x) => upload(engine, x));
      if (!param || !m || !v) throw new Error("three tensors were uploaded");
      const before = [param, m, v].map((x) => x.data());
      const [one, g] = [engine.tensor(Float32Array.of(1), []), upload(engine, get(arrays, 1))];
      const updated = run(adamwOp, [engine.give(param), g, engine.give(m), engine.give(v), one], adamwOptions);
      const [changed, ...rest] = updated;
      if (!changed) throw new Error("adamw has three results");
      const between = changed.data();
      const last = add(engine.give(changed), g);
      const sum = await last.data();
      const seen = await between;
      for (const [i, read] of before.entries())
        assertClose(`input ${i}`, floats([37, 11], await read), get(arrays, i), { absolute: 0, relative: 0 });
      const step = oracle.binary(floats([37, 11], seen), get(arrays, 1), (a, b) => a + b);
      assertClose("after one more sum", floats([37, 11], sum), step, { absolute: 1e-6, relative: 1e-6 });
      dispose([...rest, last, one, g]);
    }),
  ];
}

function storage(): BackendCase[] {
  const exact = { absolute: 0, relative: 0 };
  return [
    behaviour("engine/a view outlives its source", async (engine) => {
      const x = engine.tensor(Float32Array.of(1, 2, 3, 4, 5, 6), [6]);
      const view = reshape(x, [2, 3]);
      x.dispose();
      // Storage freed too early would be taken by these.
      const others = Array.from({ length: 8 }, () => engine.tensor(new Float32Array(6).fill(9), [6]));
      await check("the view", view, floats([2, 3], [1, 2, 3, 4, 5, 6]), exact);
      for (const other of others) other.dispose();
    }),
    behaviour("engine/ops leave their inputs alone", async (engine) => {
      const next = generator("inputs");
      const [x, y, v] = [uniform(next, [5, 7]), uniform(next, [5, 7]), uniform(next, [5, 7], 0, 1)];
      const [a, b, c] = [upload(engine, x), upload(engine, y), upload(engine, v)];
      engine.scope(() => {
        add(a, b);
        mul(a, b);
        sub(a, b);
        affine(a, { scale: 3, shift: 1 });
        run(adamwOp, [a, b, b, c, engine.tensor(Float32Array.of(1), [])], adamwOptions);
        return undefined;
      });
      await check("first input", a, x, exact);
      await check("second input", b, y, exact);
      await check("third input", c, v, exact);
    }),
    behaviour("engine/giving away leaves other holders alone", async (engine, tolerance) => {
      const next = generator("give");
      const shape = [4, 6];
      const arrays = [uniform(next, shape), uniform(next, shape), uniform(next, shape), uniform(next, shape, 0, 1)];
      const [param, g, m, v] = arrays.map((x) => upload(engine, x));
      if (!param || !g || !m || !v) throw new Error("four tensors were uploaded");
      // The view holds the storage of param, which may therefore not be overwritten; m and v may be.
      const view = reshape(param, [24]);
      const scale = engine.tensor(Float32Array.of(1), []);
      const updated = run(adamwOp, [engine.give(param), g, engine.give(m), engine.give(v), scale], adamwOptions);
      const one = floats([], [1]);
      const expected = oracle.adamw(get(arrays, 0), get(arrays, 1), get(arrays, 2), get(arrays, 3), one, adamwOptions);
      await check("the view of the old parameter", view, { shape: [24], data: get(arrays, 0).data }, exact);
      const loose = { absolute: tolerance.absolute * 4, relative: tolerance.relative * 4 };
      for (const [i, y] of updated.entries()) await check(`result ${i}`, y, get(expected, i), loose);
      await check("the gradient, which was not given", g, get(arrays, 1), exact);
      scale.dispose();
    }),
    behaviour("engine/given away to add, mul and sub", async (engine, tolerance) => {
      const next = generator("give arithmetic");
      const [x, row] = [uniform(next, [5, 7]), uniform(next, [7])];
      for (const [name, op, f] of [
        ["add", add, (a: number, b: number) => a + b],
        ["mul", mul, (a: number, b: number) => a * b],
        ["sub", sub, (a: number, b: number) => a - b],
      ] as const) {
        const y = upload(engine, row);
        // The small operand is given too: its storage does not fit the result.
        const broadcast = op(engine.give(upload(engine, x)), engine.give(y));
        await check(`${name} with a row`, broadcast, oracle.binary(x, row, f), tolerance);
        const gift = engine.give(upload(engine, x));
        await check(`${name} with itself`, op(gift, gift), oracle.binary(x, x, f), tolerance);
        const whole = upload(engine, x);
        const small = op(engine.give(upload(engine, row)), whole);
        await check(`a row ${name} the whole`, small, oracle.binary(row, x, f), tolerance);
        whole.dispose();
      }
    }),
    behaviour("engine/a thousand updates in place", async (engine, tolerance) => {
      let x = engine.tensor(new Float32Array(37), [37]);
      const one = engine.tensor(new Float32Array(37).fill(1), [37]);
      const before = engine.live();
      for (let i = 0; i < 1000; i++) x = add(engine.give(x), one);
      if (engine.live() !== before) throw new Error(`${engine.live() - before} handles more after updates in place`);
      one.dispose();
      await check("the sum", x, floats([37], new Float32Array(37).fill(1000)), tolerance);
    }),
    behaviour("engine/what is given to concat grows", async (engine) => {
      const next = generator("concat");
      for (const [shape, axis] of [
        [[1, 3, 5], 1],
        [[3, 5], 0],
        [[2, 1, 4], 1],
        [[0, 7], 0],
      ] as const) {
        const parts = Array.from({ length: 30 }, () => uniform(next, shape));
        const before = engine.live();
        let all = upload(engine, get(parts, 0));
        let view: Tensor | undefined;
        for (const part of parts.slice(1)) {
          const x = upload(engine, part);
          // Someone else looks at the storage: it may not be written behind.
          if (part === parts[17]) view = reshape(all, [all.size]);
          all = concat([engine.give(all), x], axis);
          x.dispose();
        }
        await check(`30 parts of [${shape}]`, all, oracle.concat(parts, axis), exact);
        const seen = oracle.concat(parts.slice(0, 17), axis);
        if (view) await check("the view", view, { shape: [seen.data.length], data: seen.data }, exact);
        if (engine.live() !== before) throw new Error(`${engine.live() - before} handles more after growing`);
      }
    }),
    behaviour("engine/memory of many sizes is reused", async (engine, tolerance) => {
      const next = generator("sizes");
      const kept: [Tensor, HostArray][] = [];
      for (let i = 0; i < 300; i++) {
        const x = uniform(next, [1 + Math.floor(next() * 500)]);
        const y = engine.scope(() => affine(upload(engine, x), { scale: 2, shift: 0 }));
        kept.push([y, { shape: x.shape, data: x.data.map((value) => 2 * value) as Float64Array }]);
        // Frees in an order of its own.
        const at = Math.floor(next() * kept.length);
        if (next() < 0.8)
          for (const [tensor, expected] of kept.splice(at, 1)) await check(`step ${i}`, tensor, expected, tolerance);
      }
      for (const [tensor, expected] of kept) await check("kept to the end", tensor, expected, tolerance);
    }),
    behaviour("engine/memory grows while tensors live", async (engine, tolerance) => {
      const n = 1 << 19;
      const small = engine.tensor(Float32Array.of(1, 2, 3), [3]);
      const ones = engine.tensor(new Float32Array(n).fill(1), [n]);
      const kept = engine.scope(() => Array.from({ length: 8 }, (_, i) => affine(ones, { scale: i, shift: 0 })));
      await check("a small tensor from before", small, floats([3], [1, 2, 3]), exact);
      for (const [i, x] of kept.entries())
        await check(`large tensor ${i}`, x, floats([n], new Float32Array(n).fill(i)), tolerance);
      ones.dispose();
    }),
  ];
}

/** A small Mixture-of-Experts language model, written in the ops a real one uses. */
interface Tiny {
  readonly table: Tensor;
  readonly norm: Tensor;
  readonly router: Tensor;
  readonly gateUp: Tensor;
  readonly down: Tensor;
}
const sizes = { vocabulary: 11, width: 10, hidden: 6, experts: 5, k: 2, tokens: 13 };

function tinyParameters(): { readonly [P in keyof Tiny]: HostArray } {
  const next = generator("tiny model");
  const { vocabulary, width, hidden, experts } = sizes;
  return {
    table: uniform(next, [vocabulary, width], -1, 1),
    norm: uniform(next, [width], 0.5, 1.5),
    router: uniform(next, [experts, width], -1, 1),
    gateUp: uniform(next, [experts, 2 * hidden, width], -0.6, 0.6),
    down: uniform(next, [experts, width, hidden], -0.6, 0.6),
  };
}

function moeLayer(p: Tiny, hidden: Tensor): Tensor {
  const { weights, ids } = softmaxTopk(linear(hidden, p.router), { k: sizes.k, order: "softmax-topk-renormalise" });
  const { rows, slots, ends } = dispatch(ids, { count: sizes.experts, bound: sizes.tokens * sizes.k });
  const inner = swiglu(groupedMatmul(takeRows(hidden, rows), p.gateUp, ends)); // [tokens * k, hidden]
  return combineRows(groupedMatmul(inner, p.down, ends), weights, slots); // [tokens, width]
}

function tinyLoss(p: Tiny, ids: Tensor, labels: Tensor): Tensor {
  const hidden = embedding(p.table, ids); // [tokens, width]
  const out = add(hidden, moeLayer(p, rmsNorm(hidden, p.norm, { eps: 1e-6 })));
  return mean(crossEntropy(linear(out, p.table), labels).losses);
}

const tinyTokens = (): { ids: HostArray; labels: HostArray } => {
  const next = generator("tiny tokens");
  const ids = integers(next, [sizes.tokens], 0, sizes.vocabulary);
  const labels = integers(next, [sizes.tokens], 0, sizes.vocabulary);
  labels.data[3] = -1;
  return { ids, labels };
};

/** Losses and final parameters of `steps` AdamW steps; handles must not grow from step to step. */
async function train(engine: Engine, steps: number): Promise<HostArray[]> {
  const { ids, labels } = tinyTokens();
  const start = tinyParameters();
  const names = Object.keys(start) as (keyof Tiny)[];
  let params = Object.fromEntries(names.map((name) => [name, upload(engine, start[name])]));
  const zeros = (): Record<string, Tensor> =>
    Object.fromEntries(
      names.map((name) => [name, engine.tensor(new Float32Array(start[name].data.length), start[name].shape)]),
    );
  let [m, v] = [zeros(), zeros()];
  const inputs = [upload(engine, ids), upload(engine, labels)] as const;
  const losses: number[] = [];
  const live: number[] = [];
  for (let step = 1; step <= steps; step++) {
    const result = engine.scope(() => {
      const outer = autodiff(engine);
      const watched = watch(outer, params);
      const loss = tinyLoss(asTiny(watched), ...inputs);
      return { loss: lower(loss), grads: grad(loss, watched) };
    });
    losses.push((await result.loss.data())[0] ?? Number.NaN);
    const options = { ...adamwOptions, lr: 0.01, correction1: 1 - 0.9 ** step, correction2: 1 - 0.99 ** step };
    const old = { params, m, v };
    const updated = engine.scope(() => {
      const scale = engine.tensor(Float32Array.of(1), []);
      return names.map((name) => {
        const give = (from: Record<string, Tensor>): Tensor => engine.give(named(from, name));
        return run(adamwOp, [give(old.params), named(result.grads, name), give(old.m), give(old.v), scale], options);
      });
    });
    const column = (i: number): Record<string, Tensor> =>
      Object.fromEntries(names.map((name, row) => [name, get(get(updated, row), i)]));
    [params, m, v] = [column(0), column(1), column(2)];
    dispose(result);
    live.push(engine.live());
  }
  if (new Set(live).size !== 1)
    throw new Error(`live handles after each training step: ${live.join(", ")}, expected one number`);
  const values = await Promise.all(names.map((name) => download(named(params, name))));
  dispose([params, m, v, ...inputs]);
  return [floats64([steps], losses), ...values];
}
const floats64 = (shape: readonly number[], values: readonly number[]): HostArray => ({
  shape,
  data: Float64Array.from(values),
});
const named = (from: Readonly<Record<string, Tensor>>, name: string): Tensor => {
  const x = from[name];
  if (x === undefined) throw new Error(`no tensor "${name}"`);
  return x;
};
const asTiny = (p: Readonly<Record<string, Tensor>>): Tiny => ({
  table: named(p, "table"),
  norm: named(p, "norm"),
  router: named(p, "router"),
  gateUp: named(p, "gateUp"),
  down: named(p, "down"),
});
const reference = (): Engine => engineOf(cpu({ precision: 64 }));

function models(): BackendCase[] {
  const times = (tolerance: Tolerance, factor: number): Tolerance => ({
    absolute: tolerance.absolute * factor,
    relative: tolerance.relative * factor,
  });
  return [
    behaviour("engine/a Mixture-of-Experts layer end to end", async (engine, tolerance) => {
      const params = tinyParameters();
      const hidden = uniform(generator("moe hidden"), [sizes.tokens, sizes.width], -1, 1);
      const inputs = [hidden, params.table, params.norm, params.router, params.gateUp, params.down];
      const layer = ([x, table, norm, router, gateUp, down]: readonly Tensor[]): Tensor =>
        moeLayer(asTiny({ table, norm, router, gateUp, down } as Record<string, Tensor>), x as Tensor);
      const [found] = await evaluate(engine, inputs, layer);
      const logits = oracle.linear(hidden, params.router);
      const [weights, ids] = oracle.softmaxTopk(logits, sizes.k, "softmax-topk-renormalise");
      const expected = oracle.moeExperts(hidden, params.gateUp, params.down, ids, weights);
      assertClose("output", found as HostArray, expected, times(tolerance, 3));
    }),
    behaviour("engine/gradients of a Mixture-of-Experts model", async (engine, tolerance) => {
      const gradients = async (on: Engine): Promise<HostArray[]> => {
        const { ids, labels } = tinyTokens();
        const host = tinyParameters();
        const tree = on.scope(() => {
          const outer = autodiff(on);
          const params = asTiny(mapHost(host, (x) => upload(outer, x)));
          const loss = tinyLoss(params, upload(on, ids), upload(on, labels));
          return { loss: lower(loss), grads: grad(loss, { ...params }) };
        });
        const values = await Promise.all([tree.loss, ...Object.values(tree.grads)].map(download));
        dispose(tree);
        return values;
      };
      const [found, expected] = [await gradients(engine), await gradients(reference())];
      for (const [i, y] of expected.entries()) assertClose(`array ${i}`, get(found, i), y, times(tolerance, 10));
    }),
    behaviour("engine/five training steps", async (engine, tolerance) => {
      const [found, expected] = [await train(engine, 5), await train(reference(), 5)];
      const [first, last] = [get(expected, 0).data[0] ?? 0, get(expected, 0).data[4] ?? 0];
      if (!(last < first)) throw new Error(`the loss went from ${first} to ${last}`);
      // AdamW divides by the root of v: a gradient near 0 turns rounding into a visible step.
      for (const [i, y] of expected.entries()) assertClose(`array ${i}`, get(found, i), y, times(tolerance, 100));
    }),
    behaviour("engine/the same work twice gives the same bits", async (engine) => {
      const [first, second] = [await train(engine, 2), await train(engine, 2)];
      for (const [i, y] of first.entries()) assertClose(`array ${i}`, get(second, i), y, { absolute: 0, relative: 0 });
    }),
    behaviour("engine/second derivatives", async (engine, tolerance) => {
      // d²/dx² of sum(x³) is 6 x; x³ as products and one matmul.
      const x = floats([3, 1], [1, -2, 0.5]);
      const outer = autodiff(engine);
      const most = autodiff(outer);
      const second = outer.scope(() => {
        const leaf = upload(outer, x);
        const again = get(watch(most, [leaf]), 0);
        const cube = mean(matmul(mul(again, again), again, { transposeA: true })); // [1, 1] -> []
        const [slope] = grad(cube, [again]);
        if (!slope) throw new Error("no gradient");
        return get(grad(mean(slope), [leaf]), 0);
      });
      await check(
        "second derivative",
        second,
        floats(
          [3, 1],
          [...x.data].map((value) => 2 * value),
        ),
        times(tolerance, 5),
      );
    }),
    ...compare("engine/ids and floats in one expression 4x3", {
      inputs: [uniform(generator("mixed"), [5, 3]), ints([4], [4, -1, 0, 2]), uniform(generator("row"), [3])],
      run: (xs) => mul(takeRows(get(xs, 0), get(xs, 1)), get(xs, 2)),
      expect: (xs) => oracle.binary(oracle.takeRows(get(xs, 0), get(xs, 1)), get(xs, 2), (a, b) => a * b),
      gradient: [0, 2],
    }),
  ];
}
const mapHost = (
  host: { readonly [P in keyof Tiny]: HostArray },
  f: (x: HostArray) => Tensor,
): Record<string, Tensor> => Object.fromEntries(Object.entries(host).map(([name, x]) => [name, f(x)]));

export const engineCases = (): BackendCase[] => [...optimisers(), ...transfers(), ...storage(), ...models()];
