// Fused ops against naive loops. A case runs whether the backend has a kernel of that name or core's fallback serves
// the op, so the same cases check both.
import {
  affine,
  attention,
  broadcastTo,
  combineRows,
  crossEntropy,
  dispatch,
  div,
  embedding,
  gatherLast,
  gelu,
  groupedMatmul,
  groupedOuter,
  layerNorm,
  linear,
  logSoftmax,
  logSumExp,
  moeExperts,
  pad,
  relu,
  rmsNorm,
  rope,
  scatterLast,
  sigmoid,
  silu,
  softmax,
  softmaxTopk,
  softplus,
  sub,
  sumSquares,
  swiglu,
  type Tensor,
} from "@switchyard/core";
import { floats, generator, type HostArray, integers, ints, sizeOf, uniform } from "../arrays.ts";
import * as oracle from "../oracles.ts";
import { type BackendCase, compare } from "./case.ts";

const { NaN: nan, NEGATIVE_INFINITY: low } = Number;
const show = (...shapes: readonly (readonly number[])[]): string =>
  shapes.map((shape) => (shape.length === 0 ? "scalar" : shape.join("x"))).join(" ");
/** Inputs in the order they were given: cases read better without a check at each use. */
const t = (xs: readonly Tensor[], i: number): Tensor => {
  const x = xs[i];
  if (x === undefined) throw new RangeError(`case: input ${i} is missing`);
  return x;
};
const h = (xs: readonly HostArray[], i: number): HostArray => {
  const x = xs[i];
  if (x === undefined) throw new RangeError(`case: input ${i} is missing`);
  return x;
};

function arithmetic(): BackendCase[] {
  const pairs: readonly (readonly [readonly number[], readonly number[]])[] = [
    [[7], [7]],
    [[3, 5], [5]],
    [
      [3, 5],
      [3, 1],
    ],
    [
      [3, 1],
      [1, 5],
    ],
    [[], [4]],
    [[0, 3], [3]],
    [
      [33, 19],
      [33, 19],
    ],
  ];
  const table = [
    ["sub", sub, (a: number, b: number) => a - b, -2],
    ["div", div, (a: number, b: number) => a / b, 0.5],
  ] as const;
  return table.flatMap(([name, run, f, from]) =>
    pairs.flatMap(([a, b]) => {
      const next = generator(`${name} ${show(a, b)}`);
      return compare(`${name}/broadcast ${show(a, b)}`, {
        inputs: [uniform(next, a), uniform(next, b, from, 2)],
        run: (xs) => run(t(xs, 0), t(xs, 1)),
        expect: (xs) => oracle.binary(h(xs, 0), h(xs, 1), f),
        ...(sizeOf(a) <= 20 ? { gradient: [0, 1] } : {}),
        slack: 2,
      });
    }),
  );
}

function spreads(): BackendCase[] {
  const to: readonly (readonly [readonly number[], readonly number[]])[] = [
    [[], [3]],
    [[5], [3, 5]],
    [
      [3, 1],
      [3, 5],
    ],
    [
      [2, 1, 4],
      [2, 3, 4],
    ],
    [[1], [0]],
  ];
  const padded: readonly (readonly [readonly number[], readonly number[], readonly number[]])[] = [
    [[3], [1], [2]],
    [
      [2, 3],
      [0, 2],
      [1, 0],
    ],
    [
      [2, 3, 2],
      [1, 0, 0],
      [0, 0, 3],
    ],
    [
      [0, 2],
      [2, 0],
      [1, 1],
    ],
  ];
  return [
    ...to.flatMap(([from, shape]) =>
      compare(`broadcastTo/${show(shape)} from ${show(from)}`, {
        inputs: [uniform(generator(`spread ${show(from)}`), from)],
        run: (xs) => broadcastTo(t(xs, 0), shape),
        expect: (xs) => oracle.binary(h(xs, 0), floats(shape, new Float64Array(sizeOf(shape))), (a, b) => a + b),
        gradient: [0],
      }),
    ),
    ...padded.flatMap(([shape, before, after]) =>
      compare(`pad/${before.join(",")} and ${after.join(",")} around ${show(shape)}`, {
        inputs: [uniform(generator(`pad ${show(shape)}`), shape)],
        run: (xs) => pad(t(xs, 0), before, after),
        expect: (xs) => oracle.pad(h(xs, 0), before, after),
        gradient: [0],
      }),
    ),
  ];
}

function activations(): BackendCase[] {
  const table: readonly [string, (x: Tensor) => Tensor, (x: number) => number, number[]][] = [
    ["affine", (x) => affine(x, { scale: -1.5, shift: 0.25 }), (x) => -1.5 * x + 0.25, []],
    ["relu", relu, oracle.relu, [0, -0, Number.POSITIVE_INFINITY, low]],
    ["sigmoid", sigmoid, oracle.sigmoid, [100, -100, Number.POSITIVE_INFINITY, low]],
    ["silu", silu, oracle.silu, [50, -50, 0]],
    ["softplus", softplus, oracle.softplus, [100, -100, 0]],
    ["gelu", (x) => gelu(x, { approximate: "none" }), (x) => oracle.gelu(x, false), [30, -30, 0]],
    ["gelu", (x) => gelu(x, { approximate: "tanh" }), (x) => oracle.gelu(x, true), [30, -30, 0]],
  ];
  return table.flatMap(([name, run, f, edges], row) => {
    const label = row === 6 ? "tanh" : "values";
    return [
      ...[[], [7], [0, 3], [5, 13], [515]].flatMap((shape) =>
        compare(`${name}/${label} ${show(shape)}`, {
          inputs: [uniform(generator(`${name} ${show(shape)}`), shape, -4, 4)],
          run: (xs) => run(t(xs, 0)),
          expect: (xs) => oracle.unary(h(xs, 0), f),
          ...(sizeOf(shape) <= 70 ? { gradient: [0] } : {}),
          slack: 2,
        }),
      ),
      ...edges.flatMap((value) =>
        compare(`${name}/${label} of ${Object.is(value, -0) ? "-0" : value}`, {
          inputs: [floats([1], [value])],
          run: (xs) => run(t(xs, 0)),
          expect: (xs) => oracle.unary(h(xs, 0), f),
        }),
      ),
    ];
  });
}

function gates(): BackendCase[] {
  return [[2], [5, 6], [2, 3, 14], [0, 4], [9, 66]].flatMap((shape) =>
    compare(`swiglu/values ${show(shape)}`, {
      inputs: [uniform(generator(`swiglu ${show(shape)}`), shape, -3, 3)],
      run: (xs) => swiglu(t(xs, 0)),
      expect: (xs) => oracle.swiglu(h(xs, 0)),
      ...(sizeOf(shape) <= 100 ? { gradient: [0] } : {}),
      slack: 2,
    }),
  );
}

function linears(): BackendCase[] {
  const table: readonly (readonly [readonly number[], number])[] = [
    [[5, 7], 3],
    [[1, 16], 8],
    [[2, 3, 5], 4],
    [[7], 3],
    [[33, 35], 37],
    [[65, 300], 34],
    [[0, 4], 3],
    [[3, 0], 2],
    [[1, 1], 1],
  ];
  return table.flatMap(([shape, out]) =>
    [false, true].flatMap((bias) => {
      const next = generator(`linear ${show(shape)} ${out}`);
      const inner = shape.at(-1) ?? 1;
      return compare(`linear/${bias ? "bias " : ""}${show(shape)} to ${out}`, {
        inputs: [uniform(next, shape), uniform(next, [out, inner]), ...(bias ? [uniform(next, [out])] : [])],
        run: (xs) => linear(t(xs, 0), t(xs, 1), xs[2]),
        expect: (xs) => oracle.linear(h(xs, 0), h(xs, 1), xs[2]),
        ...(sizeOf(shape) <= 40 ? { gradient: bias ? [0, 1, 2] : [0, 1] } : {}),
        slack: 2,
      });
    }),
  );
}

function softmaxes(): BackendCase[] {
  const table = [
    ["softmax", softmax, oracle.softmax],
    ["logSoftmax", logSoftmax, oracle.logSoftmax],
    ["logSumExp", logSumExp, oracle.logSumExp],
  ] as const;
  const values = table.flatMap(([name, run, f]) => [
    ...[[7], [1], [3, 5], [2, 3, 17], [4, 1], [0, 5], [9, 131]].flatMap((shape) =>
      compare(`${name}/values ${show(shape)}`, {
        inputs: [uniform(generator(`${name} ${show(shape)}`), shape, -5, 5)],
        run: (xs) => run(t(xs, 0)),
        expect: (xs) => f(h(xs, 0)),
        ...(sizeOf(shape) <= 110 ? { gradient: [0] } : {}),
        slack: 2,
      }),
    ),
    ...compare(`${name}/large values do not overflow 2x3`, {
      inputs: [floats([2, 3], [1000, 999, 0, -1000, -1001, -2000])],
      run: (xs) => run(t(xs, 0)),
      expect: (xs) => f(h(xs, 0)),
    }),
    ...compare(`${name}/minus infinity hides an entry 2x4`, {
      inputs: [floats([2, 4], [low, 1, low, 2, 0.5, low, low, low])],
      run: (xs) => run(t(xs, 0)),
      expect: (xs) => f(h(xs, 0)),
    }),
  ]);
  return [
    ...values,
    ...compare("softmax/a row of minus infinity gives zeros 2x3", {
      inputs: [floats([2, 3], [low, low, low, 1, 2, 3])],
      run: (xs) => softmax(t(xs, 0)),
      expect: (xs) => oracle.softmax(h(xs, 0)),
    }),
  ];
}

function norms(): BackendCase[] {
  const eps = 1e-5;
  return [[7], [3, 5], [2, 3, 16], [4, 1], [0, 6], [9, 67]].flatMap((shape) => {
    const next = generator(`norm ${show(shape)}`);
    const n = shape.at(-1) ?? 1;
    const [x, w, b] = [uniform(next, shape), uniform(next, [n]), uniform(next, [n])];
    // With one entry per row the layer norm is constant and its slope at x is lost in rounding.
    const small = sizeOf(shape) <= 100 && n > 1;
    return [
      ...compare(`rmsNorm/values ${show(shape)}`, {
        inputs: [x, w],
        run: (xs) => rmsNorm(t(xs, 0), t(xs, 1), { eps }),
        expect: (xs) => oracle.rmsNorm(h(xs, 0), h(xs, 1), eps),
        ...(small ? { gradient: [0, 1] } : {}),
        slack: 3,
      }),
      ...compare(`layerNorm/values ${show(shape)}`, {
        inputs: [x, w, b],
        run: (xs) => layerNorm(t(xs, 0), t(xs, 1), t(xs, 2), { eps }),
        expect: (xs) => oracle.layerNorm(h(xs, 0), h(xs, 1), h(xs, 2), eps),
        ...(small ? { gradient: [0, 1, 2] } : {}),
        slack: 5,
      }),
    ];
  });
}

function ropes(): BackendCase[] {
  const table: readonly (readonly [readonly [number, number, number, number], number, boolean])[] = [
    [[2, 3, 2, 4], 4, false],
    [[2, 3, 2, 4], 4, true],
    [[1, 5, 3, 6], 4, false],
    [[1, 1, 1, 2], 2, false],
    [[2, 0, 2, 4], 4, false],
    [[1, 3, 2, 16], 16, false],
  ];
  return table.flatMap(([shape, turned, perRow]) => {
    const next = generator(`rope ${show(shape)}`);
    const angleShape = perRow ? [shape[0], shape[1], turned / 2] : [shape[1], turned / 2];
    const angles = uniform(next, angleShape, 0, 6);
    const cos = floats(angleShape, angles.data.map(Math.cos));
    const sin = floats(angleShape, angles.data.map(Math.sin));
    return [
      ["halves", {}],
      ["interleaved", { interleaved: true }],
      ["inverse", { inverse: true }],
      ["interleaved inverse", { interleaved: true, inverse: true }],
    ].flatMap((entry) => {
      const [label, options] = entry as [string, { interleaved?: boolean; inverse?: boolean }];
      return compare(
        `rope/${label} ${show(shape)}${turned < shape[3] ? ` first ${turned}` : ""}${perRow ? " per row" : ""}`,
        {
          inputs: [uniform(next, shape), cos, sin],
          run: (xs) => rope(t(xs, 0), t(xs, 1), t(xs, 2), options),
          expect: (xs) => oracle.rope(h(xs, 0), h(xs, 1), h(xs, 2), options),
          ...(sizeOf(shape) <= 100 ? { gradient: [0] } : {}),
        },
      );
    });
  });
}

function entropies(): BackendCase[] {
  const table: readonly (readonly [string, number, number, readonly number[]])[] = [
    ["values", 3, 5, [0, 4, 2]],
    ["labels outside count nothing", 4, 5, [-1, 1, -1, 3]],
    ["one class", 2, 1, [0, 0]],
    ["no rows", 0, 5, []],
    ["wide", 5, 131, [130, 0, 7, -1, 64]],
  ];
  return table.flatMap(([label, n, v, labels]) =>
    compare(`crossEntropy/${label} ${n}x${v}`, {
      inputs: [uniform(generator(`cross ${label}`), [n, v], -4, 4), ints([n], labels)],
      run: (xs) => crossEntropy(t(xs, 0), t(xs, 1)).losses,
      expect: (xs) => oracle.crossEntropy(h(xs, 0), h(xs, 1))[0],
      ...(n * v <= 700 ? { gradient: [0] } : {}),
      slack: 2,
    }).concat(
      compare(`crossEntropy/with log-sum-exp ${label} ${n}x${v}`, {
        inputs: [uniform(generator(`cross ${label}`), [n, v], -4, 4), ints([n], labels)],
        run: (xs) => {
          const { losses, lse } = crossEntropy(t(xs, 0), t(xs, 1));
          return [losses, lse];
        },
        expect: (xs) => oracle.crossEntropy(h(xs, 0), h(xs, 1)),
        ...(n * v <= 20 ? { gradient: [0] } : {}),
        slack: 2,
      }),
    ),
  );
}

function attentions(): BackendCase[] {
  interface Case {
    readonly label: string;
    /** batch, sequence, total, heads, kv heads, width of a head */
    readonly sizes: readonly [number, number, number, number, number, number];
    readonly causal: boolean;
    readonly window?: number;
    readonly mask?: readonly number[];
    readonly values?: true;
  }
  const table: readonly Case[] = [
    { label: "causal", sizes: [2, 3, 3, 2, 2, 4], causal: true },
    { label: "full", sizes: [1, 3, 5, 2, 2, 3], causal: false },
    { label: "one query with a cache", sizes: [2, 1, 6, 2, 1, 4], causal: true },
    { label: "grouped queries", sizes: [1, 4, 4, 6, 2, 2], causal: true },
    { label: "window 2", sizes: [1, 5, 5, 2, 1, 3], causal: true, window: 2 },
    { label: "window 1 sees itself", sizes: [1, 3, 4, 1, 1, 2], causal: true, window: 1 },
    { label: "padding", sizes: [2, 3, 3, 2, 2, 4], causal: true, mask: [1, 1, 1, 0, 1, 1] },
    { label: "padding without causality", sizes: [2, 2, 3, 1, 1, 2], causal: false, mask: [1, 0, 1, 1, 1, 0] },
    { label: "rows that see nothing", sizes: [1, 3, 3, 1, 1, 2], causal: true, mask: [0, 0, 1] },
    { label: "one token", sizes: [1, 1, 1, 1, 1, 1], causal: true },
    { label: "no batch", sizes: [0, 2, 2, 1, 1, 2], causal: true },
    { label: "longer than a tile", sizes: [1, 37, 37, 2, 1, 5], causal: true, values: true },
    { label: "longer than two tiles", sizes: [1, 70, 133, 2, 1, 8], causal: true, values: true },
    { label: "longer than a tile, window 9", sizes: [1, 37, 41, 2, 2, 8], causal: true, window: 9, values: true },
  ];
  return table.flatMap(({ label, sizes: [b, s, total, heads, groups, d], causal, window, mask, values }) => {
    const next = generator(`attention ${label}`);
    const scale = 1 / Math.sqrt(d);
    const options = { causal, scale, ...(window === undefined ? {} : { window }) };
    const inputs = [
      uniform(next, [b, s, heads, d]),
      uniform(next, [b, total, groups, d]),
      uniform(next, [b, total, groups, d]),
      ...(mask ? [floats([b, total], mask)] : []),
    ];
    const name = `${label} ${b}x${s}of${total} heads ${heads}/${groups}x${d}`;
    const gradient = values ? {} : { gradient: [0, 1, 2] };
    return [
      ...compare(`attention/${name}`, {
        inputs,
        run: (xs) => attention(t(xs, 0), t(xs, 1), t(xs, 2), { ...options, ...(xs[3] ? { mask: xs[3] } : {}) }).output,
        expect: (xs) => oracle.attention(h(xs, 0), h(xs, 1), h(xs, 2), xs[3], options)[0],
        ...gradient,
        slack: 4,
      }),
      ...compare(`attention/log-sum-exp ${name}`, {
        inputs,
        run: (xs) => attention(t(xs, 0), t(xs, 1), t(xs, 2), { ...options, ...(xs[3] ? { mask: xs[3] } : {}) }).lse,
        expect: (xs) => oracle.attention(h(xs, 0), h(xs, 1), h(xs, 2), xs[3], options)[1],
        slack: 2,
      }),
      ...compare(`attention/probabilities ${name}`, {
        inputs,
        run: (xs) => {
          const asked = { ...options, probabilities: true, ...(xs[3] ? { mask: xs[3] } : {}) };
          const { output, probabilities } = attention(t(xs, 0), t(xs, 1), t(xs, 2), asked);
          if (probabilities === undefined) throw new Error("attention: asked for probabilities, got none");
          return [output, probabilities];
        },
        expect: (xs) => {
          const [out, , probabilities] = oracle.attention(h(xs, 0), h(xs, 1), h(xs, 2), xs[3], options);
          return [out, probabilities];
        },
        // Gradients of the probabilities reach q and k.
        ...(values || label === "no batch" ? {} : { gradient: [0, 1] }),
        slack: 4,
      }),
    ];
  });
}

function lookups(): BackendCase[] {
  const table: readonly (readonly [readonly number[], number, readonly number[]])[] = [
    [[3], 5, [0, 4, 4]],
    [[3, 2], 5, [0, 4, -1, 2, 1, 1]],
    [[2, 3, 2], 4, [0, 1, 3, -1, 2, 2, 0, 0, 1, 3, -1, -1]],
    [[0, 2], 3, []],
    [[3, 0], 3, []],
    [[2, 1], 1, [0, -1]],
  ];
  return [
    ...table.flatMap(([shape, n, ids]) => {
      const next = generator(`lookup ${show(shape)}`);
      return [
        ...compare(`gatherLast/${show(shape)} of ${n}`, {
          inputs: [uniform(next, [...shape.slice(0, -1), n]), ints(shape, ids)],
          run: (xs) => gatherLast(t(xs, 0), t(xs, 1)),
          expect: (xs) => oracle.gatherLast(h(xs, 0), h(xs, 1)),
          gradient: [0],
        }),
        ...compare(`scatterLast/${show(shape)} to ${n}`, {
          inputs: [uniform(next, shape), ints(shape, ids)],
          run: (xs) => scatterLast(t(xs, 0), t(xs, 1), n),
          expect: (xs) => oracle.scatterLast(h(xs, 0), h(xs, 1), n),
          gradient: [0],
        }),
      ];
    }),
    ...compare("embedding/5x3 by 2x2", {
      inputs: [uniform(generator("embedding"), [5, 3]), ints([2, 2], [4, 0, 4, 1])],
      run: (xs) => embedding(t(xs, 0), t(xs, 1)),
      expect: (xs) => oracle.takeRows(h(xs, 0), h(xs, 1)),
      gradient: [0],
    }),
  ];
}

function topks(): BackendCase[] {
  const sizes: readonly (readonly [string, number, number, number])[] = [
    ["values", 5, 8, 2],
    ["k = all", 4, 5, 5],
    ["one expert", 3, 1, 1],
    ["k = 1", 7, 3, 1],
    ["no tokens", 0, 4, 2],
    ["many experts", 3, 67, 6],
  ];
  const orders = ["softmax-topk-renormalise", "softmax-topk", "topk-softmax"] as const;
  return orders.flatMap((order) => [
    ...sizes.flatMap(([label, n, experts, k]) =>
      compare(`softmaxTopk/${order} ${label} ${n}x${experts} k ${k}`, {
        inputs: [uniform(generator(`topk ${label}`), [n, experts], -3, 3)],
        run: (xs) => {
          const { weights, ids, probabilities } = softmaxTopk(t(xs, 0), { k, order });
          return [weights, ids, probabilities];
        },
        expect: (xs) => oracle.softmaxTopk(h(xs, 0), k, order),
        gradient: [0],
        slack: 2,
      }),
    ),
    ...compare(`softmaxTopk/${order} ties 3x4 k 2`, {
      inputs: [floats([3, 4], [1, 1, 1, 1, 0, 2, 2, 0, 3, 0, 0, 3])],
      run: (xs) => {
        const { weights, ids, probabilities } = softmaxTopk(t(xs, 0), { k: 2, order });
        return [weights, ids, probabilities];
      },
      expect: (xs) => oracle.softmaxTopk(h(xs, 0), 2, order),
    }),
    ...compare(`softmaxTopk/${order} a masked expert 2x4 k 2`, {
      inputs: [floats([2, 4], [low, 1, 0, low, 2, low, low, 0.5])],
      run: (xs) => {
        const { weights, ids, probabilities } = softmaxTopk(t(xs, 0), { k: 2, order });
        return [weights, ids, probabilities];
      },
      expect: (xs) => oracle.softmaxTopk(h(xs, 0), 2, order),
    }),
  ]);
}

/** Expert ids [tokens, k] in the shapes that break dispatch kernels. */
const assignments: readonly (readonly [string, number, number, number, readonly number[]])[] = [
  ["values", 5, 2, 4, [0, 2, 3, 1, 2, 0, 1, 3, 3, 2]],
  ["an expert without a token", 4, 2, 3, [0, 2, 2, 0, 0, 2, 2, 0]],
  ["all to one", 5, 1, 3, [1, 1, 1, 1, 1]],
  ["k = all", 3, 3, 3, [0, 1, 2, 2, 1, 0, 1, 0, 2]],
  ["empty slots and nulls", 5, 2, 3, [-1, -1, 0, 3, 2, -1, 7, 1, -1, 0]],
  ["nothing chosen", 3, 2, 2, [-1, -1, -1, 2, 5, -1]],
  ["no tokens", 0, 2, 3, []],
  ["one of each", 1, 1, 1, [0]],
  ["an expert twice", 3, 2, 3, [1, 1, 0, 0, 2, 1]],
];

function dispatches(): BackendCase[] {
  const run = (xs: readonly Tensor[], count: number, bound: number): Tensor[] => {
    const { rows, slots, ends } = dispatch(t(xs, 0), { count, bound });
    return [rows, slots, ends];
  };
  return [
    ...assignments.flatMap(([label, tokens, k, count, ids]) => [
      ...compare(`dispatch/${label} ${tokens}x${k} to ${count}`, {
        inputs: [ints([tokens, k], ids)],
        run: (xs) => run(xs, count, tokens * k),
        expect: (xs) => oracle.dispatch(h(xs, 0), count, tokens * k),
      }),
    ]),
    ...compare("dispatch/bound below the slots 5x2 to 3", {
      inputs: [ints([5, 2], [-1, -1, 0, 3, 2, -1, 7, 1, -1, 0])],
      run: (xs) => run(xs, 3, 4),
      expect: (xs) => oracle.dispatch(h(xs, 0), 3, 4),
    }),
    ...compare("dispatch/many 131x4 to 17", {
      inputs: [integers(generator("dispatch"), [131, 4], -1, 19)],
      run: (xs) => run(xs, 17, 131 * 4),
      expect: (xs) => oracle.dispatch(h(xs, 0), 17, 131 * 4),
    }),
  ];
}

function grouped(): BackendCase[] {
  const blocks: readonly (readonly [string, number, readonly number[]])[] = [
    ["values", 7, [2, 3, 7]],
    ["an expert without rows", 6, [2, 2, 6]],
    ["all to one", 5, [0, 5, 5]],
    ["rows beyond the ends", 8, [1, 3, 5]],
    ["no rows taken", 4, [0, 0]],
    ["no rows", 0, [0, 0, 0]],
    ["one expert", 3, [3]],
    ["more rows than a tile", 41, [1, 18, 18, 37]],
  ];
  const sizes = [
    [5, 3],
    [16, 8],
    [1, 1],
    [7, 17],
  ] as const;
  const cases = blocks.flatMap(([label, n, closed]) =>
    sizes.flatMap(([p, q]) => {
      const next = generator(`grouped ${label} ${p} ${q}`);
      const ends = ints([closed.length], closed);
      const gradient = n * p * q * closed.length <= 400 && n > 0 ? { gradient: [0, 1] } : {};
      return [
        ...compare(`groupedMatmul/${label} ${n}x${p} to ${q}`, {
          inputs: [uniform(next, [n, p]), uniform(next, [closed.length, q, p]), ends],
          run: (xs) => groupedMatmul(t(xs, 0), t(xs, 1), t(xs, 2)),
          expect: (xs) => oracle.groupedMatmul(h(xs, 0), h(xs, 1), h(xs, 2)),
          ...gradient,
          slack: 2,
        }),
        ...compare(`groupedMatmul/transposed ${label} ${n}x${p} to ${q}`, {
          inputs: [uniform(next, [n, p]), uniform(next, [closed.length, p, q]), ends],
          run: (xs) => groupedMatmul(t(xs, 0), t(xs, 1), t(xs, 2), { transposed: true }),
          expect: (xs) => oracle.groupedMatmul(h(xs, 0), h(xs, 1), h(xs, 2), true),
          ...gradient,
          slack: 2,
        }),
        ...compare(`groupedOuter/${label} ${n}x${p} ${n}x${q}`, {
          inputs: [uniform(next, [n, p]), uniform(next, [n, q]), ends],
          run: (xs) => groupedOuter(t(xs, 0), t(xs, 1), t(xs, 2)),
          expect: (xs) => oracle.groupedOuter(h(xs, 0), h(xs, 1), h(xs, 2)),
          ...gradient,
          slack: 2,
        }),
      ];
    }),
  );
  const wide = generator("grouped wide");
  const [rows, left, w, closed] = [
    uniform(wide, [150, 40]),
    uniform(wide, [150, 37]),
    uniform(wide, [4, 37, 40]),
    ints([4], [100, 100, 131, 140]),
  ];
  const next = generator("grouped NaN");
  const poisoned = uniform(next, [6, 5]);
  poisoned.data.fill(nan, 4 * 5);
  const ends = ints([2], [1, 4]);
  return [
    ...cases,
    ...compare("groupedMatmul/several tiles 150x40 to 37", {
      inputs: [rows, w, closed],
      run: (xs) => groupedMatmul(t(xs, 0), t(xs, 1), t(xs, 2)),
      expect: (xs) => oracle.groupedMatmul(h(xs, 0), h(xs, 1), h(xs, 2)),
      slack: 2,
    }),
    ...compare("groupedMatmul/several tiles transposed 150x37 to 40", {
      inputs: [left, w, closed],
      run: (xs) => groupedMatmul(t(xs, 0), t(xs, 1), t(xs, 2), { transposed: true }),
      expect: (xs) => oracle.groupedMatmul(h(xs, 0), h(xs, 1), h(xs, 2), true),
      slack: 2,
    }),
    ...compare("groupedOuter/several tiles 150x37 150x40", {
      inputs: [left, rows, closed],
      run: (xs) => groupedOuter(t(xs, 0), t(xs, 1), t(xs, 2)),
      expect: (xs) => oracle.groupedOuter(h(xs, 0), h(xs, 1), h(xs, 2)),
      slack: 3,
    }),
    ...compare("groupedMatmul/NaN beyond the ends is not read 6x5 to 3", {
      inputs: [poisoned, uniform(next, [2, 3, 5]), ends],
      run: (xs) => groupedMatmul(t(xs, 0), t(xs, 1), t(xs, 2)),
      expect: (xs) => oracle.groupedMatmul(h(xs, 0), h(xs, 1), h(xs, 2)),
    }),
    ...compare("groupedOuter/NaN beyond the ends is not read 6x5 6x3", {
      inputs: [poisoned, uniform(next, [6, 3]), ends],
      run: (xs) => groupedOuter(t(xs, 0), t(xs, 1), t(xs, 2)),
      expect: (xs) => oracle.groupedOuter(h(xs, 0), h(xs, 1), h(xs, 2)),
    }),
  ];
}

function combines(): BackendCase[] {
  const values = assignments.flatMap(([label, tokens, k, count, ids]) => {
    const next = generator(`combine ${label}`);
    const slots = oracle.dispatch(ints([tokens, k], ids), count, tokens * k)[1];
    return compare(`combineRows/${label} ${tokens}x${k} width 3`, {
      inputs: [uniform(next, [tokens * k, 3]), uniform(next, [tokens, k]), slots],
      run: (xs) => combineRows(t(xs, 0), t(xs, 1), t(xs, 2)),
      expect: (xs) => oracle.combineRows(h(xs, 0), h(xs, 1), h(xs, 2)),
      gradient: [0, 1],
    });
  });
  const next = generator("combine NaN");
  const out = uniform(next, [4, 2]);
  out.data.fill(nan, 3 * 2);
  return [
    ...values,
    ...compare("combineRows/NaN of an unused row is not read 2x2 width 2", {
      inputs: [out, uniform(next, [2, 2]), ints([4], [1, 3, 0, -1])],
      run: (xs) => combineRows(t(xs, 0), t(xs, 1), t(xs, 2)),
      expect: (xs) => oracle.combineRows(h(xs, 0), h(xs, 1), h(xs, 2)),
    }),
    ...compare("combineRows/wide 7x2 width 35", {
      inputs: [
        uniform(next, [14, 35]),
        uniform(next, [7, 2]),
        oracle.dispatch(integers(next, [7, 2], -1, 4), 4, 14)[1],
      ],
      run: (xs) => combineRows(t(xs, 0), t(xs, 1), t(xs, 2)),
      expect: (xs) => oracle.combineRows(h(xs, 0), h(xs, 1), h(xs, 2)),
    }),
  ];
}

const moe = (xs: readonly Tensor[]): Tensor =>
  moeExperts(t(xs, 0), { gateUp: t(xs, 1), down: t(xs, 2) }, { ids: t(xs, 3), weights: t(xs, 4) });

function experts(): BackendCase[] {
  const cases = assignments.flatMap(([label, tokens, k, count, ids]) => {
    const next = generator(`experts ${label}`);
    const [width, hidden] = [5, 3];
    return compare(`moeExperts/${label} ${tokens}x${k} to ${count}`, {
      inputs: [
        uniform(next, [tokens, width], -1, 1),
        uniform(next, [count, 2 * hidden, width], -1, 1),
        uniform(next, [count, width, hidden], -1, 1),
        ints([tokens, k], ids),
        uniform(next, [tokens, k], -1, 1),
      ],
      run: moe,
      expect: (xs) => oracle.moeExperts(h(xs, 0), h(xs, 1), h(xs, 2), h(xs, 3), h(xs, 4)),
      ...(tokens <= 3 ? { gradient: [0, 1, 2, 4] } : {}),
      slack: 2,
    });
  });
  const few = generator("experts few");
  const scattered = ints([5, 2], [-1, -1, 0, 3, 2, -1, 7, 1, -1, 0]);
  // The first token has no expert: what it holds must not matter.
  const unread = uniform(few, [5, 5], -1, 1);
  unread.data.fill(nan, 0, 5);
  const weights = [uniform(few, [3, 6, 5], -1, 1), uniform(few, [3, 5, 3], -1, 1)] as const;
  const expect = (xs: readonly HostArray[]): HostArray =>
    oracle.moeExperts(h(xs, 0), h(xs, 1), h(xs, 2), h(xs, 3), h(xs, 4));
  const next = generator("experts wide");
  const wide = [
    uniform(next, [19, 33], -1, 1),
    uniform(next, [5, 34, 33], -0.5, 0.5),
    uniform(next, [5, 33, 17], -0.5, 0.5),
    integers(next, [19, 3], -1, 6),
    uniform(next, [19, 3], -1, 1),
  ];
  return [
    ...cases,
    ...compare("moeExperts/NaN of a token without expert is not read 5x2 to 3", {
      inputs: [unread, ...weights, scattered, uniform(few, [5, 2], -1, 1)],
      run: moe,
      expect,
      slack: 2,
    }),
    ...compare("moeExperts/bound below the slots 5x2 to 3", {
      inputs: [uniform(few, [5, 5], -1, 1), ...weights, scattered, uniform(few, [5, 2], -1, 1)],
      run: (xs) =>
        moeExperts(t(xs, 0), { gateUp: t(xs, 1), down: t(xs, 2) }, { ids: t(xs, 3), weights: t(xs, 4) }, { bound: 4 }),
      expect,
      gradient: [0, 1, 2, 4],
      slack: 2,
    }),
    ...compare("moeExperts/not a multiple of a tile 19x3 to 5 width 33 hidden 17", {
      inputs: wide,
      run: moe,
      expect: (xs) => oracle.moeExperts(h(xs, 0), h(xs, 1), h(xs, 2), h(xs, 3), h(xs, 4)),
      slack: 3,
    }),
  ];
}

function norm2(): BackendCase[] {
  return [[], [7], [3, 5], [0], [1031]].flatMap((shape) =>
    compare(`sumSquares/${show(shape)}`, {
      inputs: [uniform(generator(`squares ${show(shape)}`), shape)],
      run: (xs) => sumSquares(t(xs, 0)),
      expect: (xs) => oracle.sumSquares(h(xs, 0)),
      ...(sizeOf(shape) <= 15 ? { gradient: [0] } : {}),
      slack: 3,
    }),
  );
}

export const fusedCases = (): BackendCase[] => [
  ...arithmetic(),
  ...spreads(),
  ...activations(),
  ...gates(),
  ...linears(),
  ...softmaxes(),
  ...norms(),
  ...ropes(),
  ...entropies(),
  ...attentions(),
  ...lookups(),
  ...topks(),
  ...dispatches(),
  ...grouped(),
  ...combines(),
  ...experts(),
  ...norm2(),
];
