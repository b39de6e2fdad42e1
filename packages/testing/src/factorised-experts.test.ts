// The factorised experts of core held to the suite, with loops written from their equations.
import { molae, mpo, muMoEExperts } from "@switchyard/core/experts";
import type { HostArray } from "./arrays.ts";
import { testExperts } from "./test-experts.ts";

type Params = ReadonlyMap<string, HostArray>;
const get = (params: Params, path: string): HostArray => {
  const x = params.get(path);
  if (x === undefined) throw new Error(`no ${path} among ${[...params.keys()].join(", ")}`);
  return x;
};
/** One entry by its indices. */
const at = ({ data, shape }: HostArray, ...index: number[]): number =>
  data[index.reduce((place, i, axis) => place * (shape[axis] ?? 0) + i, 0)] ?? Number.NaN;
const range = (n: number): number[] => Array.from({ length: n }, (_, i) => i);
const sum = (n: number, term: (i: number) => number): number => range(n).reduce((total, i) => total + term(i), 0);
const silu = (x: number): number => x / (1 + Math.exp(-x));
const relu = (x: number): number => Math.max(x, 0);

// ---------------------------------------------------------------- muMoE
/** y_o = Σ_r Π_modes U[e_mode, r] (Σ_i x_i In[r, i] + b_r) Out[o, r] */
const cpLayer =
  (name: string, modes: readonly number[]) =>
  (params: Params, expert: number, x: readonly number[]): number[] => {
    const output = get(params, `shared.${name}Output`);
    const [out = 0, rank = 0] = output.shape;
    const share = (r: number): number => {
      if (modes.length === 1) return at(get(params, name), expert, r);
      const [, second = 1] = modes;
      return (
        at(get(params, `shared.${name}Mode0`), Math.floor(expert / second), r) *
        at(get(params, `shared.${name}Mode1`), expert % second, r)
      );
    };
    const input = get(params, `shared.${name}Input`);
    const bias = params.get(`shared.${name}Bias`);
    return range(out).map((o) =>
      sum(
        rank,
        (r) =>
          share(r) *
          (sum(x.length, (i) => (x[i] ?? 0) * at(input, r, i)) + (bias ? at(bias, r) : 0)) *
          at(output, o, r),
      ),
    );
  };
/** y_o = tr(A_e Z(x) G_o), with several modes A_e = A[e0] A'[e1]. */
const trLayer =
  (name: string, modes: readonly number[]) =>
  (params: Params, expert: number, x: readonly number[]): number[] => {
    const output = get(params, `shared.${name}Output`);
    const input = get(params, `shared.${name}Input`);
    const bias = params.get(`shared.${name}Bias`);
    const [out = 0, p = 0, r = 0] = output.shape;
    const [q = 0] = input.shape;
    const slice = (a: number, b: number): number => {
      if (modes.length === 1) return at(get(params, name), expert, a, b);
      const [first, second] = [get(params, `shared.${name}Mode0`), get(params, `shared.${name}Mode1`)];
      const [, n = 1] = modes;
      return sum(first.shape[2] ?? 0, (m) => at(first, Math.floor(expert / n), a, m) * at(second, expert % n, m, b));
    };
    const z = (b: number, c: number): number =>
      sum(x.length, (i) => (x[i] ?? 0) * at(input, b, c, i)) + (bias ? at(bias, b, c) : 0);
    return range(out).map((o) =>
      sum(p, (a) => sum(q, (b) => sum(r, (c) => slice(a, b) * z(b, c) * at(output, o, a, c)))),
    );
  };

testExperts({
  name: "muMoE, CP, one layer",
  make: (options) => muMoEExperts({ ...options, rank: 5, output: 2 }),
  row: cpLayer("linear", [4]),
  matrices: [],
});
testExperts({
  name: "muMoE, CP, two layers",
  make: (options) => muMoEExperts({ ...options, rank: 5, hidden: 7, activation: "silu" }),
  row: (params, e, x) => cpLayer("down", [4])(params, e, cpLayer("up", [4])(params, e, x).map(silu)),
  matrices: [],
});
testExperts({
  name: "muMoE, TR, two layers without bias",
  make: (options) =>
    muMoEExperts({ ...options, form: "tr", rank: [2, 3, 4], hidden: 5, activation: "silu", bias: false }),
  row: (params, e, x) => trLayer("down", [4])(params, e, trLayer("up", [4])(params, e, x).map(silu)),
  matrices: [],
});
testExperts({
  name: "muMoE, CP, 2 x 3 experts",
  count: 6,
  modes: [2, 3],
  alike: false,
  make: (options) => muMoEExperts({ ...options, modes: [2, 3], rank: 4 }),
  row: cpLayer("linear", [2, 3]),
  matrices: [],
});
testExperts({
  name: "muMoE, TR, 3 x 2 experts",
  count: 6,
  modes: [3, 2],
  alike: false,
  make: (options) => muMoEExperts({ ...options, modes: [3, 2], form: "tr", rank: [2, 3, 4, 1] }),
  row: trLayer("linear", [3, 2]),
  matrices: [],
});

// ---------------------------------------------------------------- MPOE
/** W[in, out] of one expert from its cores, by the sum over all bonds. */
const mpoMatrix = (params: Params, name: string, expert: number, central: number, n: number): number[][] => {
  const cores = range(n).map((k) =>
    k === central ? get(params, `shared.${name}Central`) : get(params, `${name}${k}`),
  );
  const dims = cores.map((core) => core.shape.slice(-4));
  const entry = (k: number, left: number, row: readonly number[], column: readonly number[]): number => {
    const core = cores[k];
    if (core === undefined) return 1;
    const lead = k === central ? [] : [expert];
    return sum(
      dims[k]?.[3] ?? 0,
      (right) => at(core, ...lead, left, row[k] ?? 0, column[k] ?? 0, right) * entry(k + 1, right, row, column),
    );
  };
  const digits = (place: number, axis: number): number[] => {
    const found: number[] = [];
    let rest = place;
    for (let k = n - 1; k >= 0; k--) {
      const d = dims[k]?.[axis] ?? 1;
      found.unshift(rest % d);
      rest = Math.floor(rest / d);
    }
    return found;
  };
  const size = (axis: number): number => dims.reduce((product, d) => product * (d[axis] ?? 1), 1);
  return range(size(1)).map((i) => range(size(2)).map((o) => entry(0, 0, digits(i, 1), digits(o, 2))));
};
const mpoRow =
  (n: number, central: number, gated: boolean) =>
  (params: Params, e: number, x: readonly number[]): number[] => {
    const through = (name: string, v: readonly number[]): number[] => {
      const w = mpoMatrix(params, name, e, central, n);
      const bias = params.get(`${name}Bias`);
      return range(w[0]?.length ?? 0).map(
        (o) => sum(v.length, (i) => (v[i] ?? 0) * (w[i]?.[o] ?? 0)) + (bias ? at(bias, e, o) : 0),
      );
    };
    if (!gated) return through("down", through("up", x).map(relu));
    const both = through("gateUp", x);
    const hidden = both.length / 2;
    return through(
      "down",
      range(hidden).map((h) => silu(both[h] ?? 0) * (both[hidden + h] ?? 0)),
    );
  };

for (const evaluation of ["reconstruct", "contract"] as const) {
  testExperts({
    name: `MPOE, three cores, ${evaluation}`,
    width: 6,
    make: ({ width: _, ...options }) =>
      mpo({ ...options, widthDims: [3, 1, 2], hiddenDims: [1, 2, 2], bond: 2, activation: "relu", evaluation }),
    row: mpoRow(3, 1, false),
    matrices: [],
  });
  testExperts({
    name: `MPOE, gated, two cores with the first one shared, ${evaluation}`,
    width: 4,
    make: ({ width: _, ...options }) =>
      mpo({ ...options, widthDims: [2, 2], hiddenDims: [3, 1], central: 0, gated: true, bias: true, evaluation }),
    row: mpoRow(2, 0, true),
    matrices: [],
  });
}

// ---------------------------------------------------------------- MoLAE
const molaeRow =
  (group: number, gated: boolean, act: (x: number) => number) =>
  (params: Params, e: number, x: readonly number[]): number[] => {
    const times = (w: HostArray, index: number, v: readonly number[]): number[] =>
      range(w.shape[1] ?? 0).map((o) => sum(v.length, (i) => (v[i] ?? 0) * at(w, index, o, i)));
    const plus = (v: readonly number[], bias: HostArray | undefined): number[] =>
      v.map((y, o) => y + (bias ? at(bias, e, o) : 0));
    const g = Math.floor(e / group);
    const mapped = (name: string): number[] =>
      plus(times(get(params, name), e, times(get(params, `shared.${name}`), g, x)), params.get(`${name}Bias`));
    const up = mapped("up");
    const inner = gated ? mapped("gate").map((value, h) => act(value) * (up[h] ?? 0)) : up.map(act);
    const own = times(get(params, "down"), e, inner);
    const map = params.get("shared.down");
    return plus(map ? times(map, g, own) : own, params.get("downBias"));
  };

testExperts({
  name: "MoLAE, one latent for all",
  make: (options) => molae({ ...options, hidden: 5, latent: 2 }),
  row: molaeRow(4, true, silu),
});
testExperts({
  name: "MoLAE, groups of two",
  count: 6,
  alike: false,
  make: (options) => molae({ ...options, hidden: 2, latent: 3, group: 2 }),
  row: molaeRow(2, true, silu),
});
testExperts({
  name: "MoLAE without gate, whole down matrices",
  count: 6,
  alike: false,
  make: (options) =>
    molae({ ...options, hidden: 4, latent: 2, group: 3, gated: false, activation: "relu", down: "full" }),
  row: molaeRow(3, false, relu),
});
testExperts({
  name: "MoLAE, every expert its own group, with bias",
  alike: false,
  make: (options) => molae({ ...options, hidden: 2, latent: 2, group: 1, bias: true }),
  row: molaeRow(1, true, silu),
});
