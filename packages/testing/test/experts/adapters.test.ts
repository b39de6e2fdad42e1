// Low-rank experts, adapters, sets of different experts and experts of few dimensions, held to the suite of experts.
import { adapter, heterogeneous, hydraLora, lora, lowDimensional, prompt } from "@switchyard/core/experts";
import type { Experts, Initial } from "@switchyard/core/moe";
import { type ExpertsOptions, type ExpertsSuite, type HostArray, testExperts } from "@switchyard/testing";

type Values = ReadonlyMap<string, HostArray>;
/** Matrix e of a parameter (or the only one) times x, plus its bias. */
function product(params: Values, path: string, x: readonly number[], e?: number): number[] {
  const w = params.get(path);
  if (!w) throw new Error(`no parameter ${path}; there are ${[...params.keys()].join(", ")}`);
  const [out = 0, inner = 0] = w.shape.slice(-2);
  const first = e === undefined ? 0 : e * out;
  const bias = params.get(`${path}Bias`);
  return Array.from({ length: out }, (_, o) =>
    x.reduce((sum, v, i) => sum + v * (w.data[(first + o) * inner + i] ?? Number.NaN), bias?.data[first + o] ?? 0),
  );
}
const silu = (x: number): number => x / (1 + Math.exp(-x));

// ---------------------------------------------------------------- low-rank experts
const lowRank =
  (scale: (e: number) => number, { ranks, a = "a" }: { ranks?: readonly number[]; a?: string } = {}) =>
  (params: Values, e: number, x: readonly number[]): number[] => {
    const inner = product(params, a, x, a === "a" ? e : undefined);
    const kept = inner.map((v, i) => (i < (ranks?.[e] ?? inner.length) ? v : 0));
    return product(params, "b", kept, e).map((v) => v * scale(e));
  };
testExperts({
  name: "lora",
  make: (options) => lora({ ...options, out: 5, rank: 2, alpha: 16 }),
  row: lowRank(() => 8),
});
testExperts({
  name: "lora with one A",
  make: (options) => lora({ ...options, rank: 2, sharedA: true }),
  row: lowRank(() => 1, { a: "shared.a" }),
});
const ranks = [1, 4, 2, 3];
for (const sharedA of [false, true])
  testExperts({
    name: `lora of different ranks, ${sharedA ? "one A" : "an A each"}`,
    make: (options) => lora({ ...options, rank: ranks, alpha: 6, sharedA }),
    row: lowRank((e) => 6 / (ranks[e] ?? 1), { ranks, a: sharedA ? "shared.a" : "a" }),
    alike: false,
  });

// ---------------------------------------------------------------- mixtures inside an adapter
for (const sharedA of [true, false])
  testExperts({
    name: `hydraLora, ${sharedA ? "one A" : "an A for each head"}`,
    make: (options) => hydraLora({ ...options, out: 2, rank: 2, heads: 3, alpha: 1, sharedA }),
    row(params, e, x) {
      const logits = product(params, "gate", x, e).map(Math.exp);
      const total = logits.reduce((sum, v) => sum + v, 0);
      const inner = product(params, "a", x, e);
      const weighed = logits.flatMap((v, h) => [0, 1].map((r) => ((inner[sharedA ? r : 2 * h + r] ?? 0) * v) / total));
      return product(params, "b", weighed, e).map((v) => v / 2);
    },
  });

// ---------------------------------------------------------------- bottlenecks
for (const bias of [false, true])
  testExperts({
    name: `adapter, ${bias ? "with" : "without"} bias`,
    make: (options) => adapter({ ...options, hidden: 2, out: 4, bias, scale: 4 }),
    row: (params, e, x) => product(params, "up", product(params, "down", x, e).map(silu), e).map((v) => 4 * v),
  });

// ---------------------------------------------------------------- different experts
const only = (options: ExpertsOptions, name: string): Initial =>
  "params" in options
    ? { params: (options.params as Readonly<Record<string, typeof options.params>>)[name] ?? {} }
    : { engine: options.engine, random: options.random.at(name) };
const several = (options: ExpertsOptions): Experts => {
  const { width } = options;
  return heterogeneous({
    small: lora({ count: 2, width, rank: 1, ...only(options, "small") }),
    deep: lowDimensional({ count: 1, width, low: 2, hidden: 3, ...only(options, "deep") }),
    large: lora({ count: 1, width, rank: 3, alpha: 6, ...only(options, "large") }),
    bottleneck: adapter({ count: 2, width, hidden: 2, ...only(options, "bottleneck") }),
  });
};
const under = (params: Values, name: string): Values =>
  new Map([...params].flatMap(([path, x]) => (path.startsWith(`${name}.`) ? [[path.slice(name.length + 1), x]] : [])));
const reduced = (path: "shared." | "", decoded = true): NonNullable<ExpertsSuite["row"]> => {
  const own = (e: number): number | undefined => (path === "" ? e : undefined);
  return (params, e, x) => {
    const code = product(params, `${path}encoder`, x, own(e));
    const y = product(
      params,
      "down",
      product(params, "up", code, e).map((v) => Math.max(v, 0)),
      e,
    );
    return decoded ? product(params, `${path}decoder`, y, own(e)) : y;
  };
};
testExperts({
  name: "heterogeneous",
  make: several,
  count: 6,
  alike: false,
  matrices: ["small.a", "small.b", "large.a", "large.b", "bottleneck.down", "bottleneck.up", "deep.shared.encoder"],
  row(params, e, x) {
    if (e < 2) return lowRank(() => 1)(under(params, "small"), e, x);
    if (e === 2) return reduced("shared.")(under(params, "deep"), 0, x);
    if (e === 3) return lowRank(() => 2)(under(params, "large"), 0, x);
    const own = under(params, "bottleneck");
    return product(own, "up", product(own, "down", x, e - 4).map(silu), e - 4);
  },
});

// ---------------------------------------------------------------- few dimensions
testExperts({
  name: "lowDimensional",
  make: (options) => lowDimensional({ ...options, low: 2, hidden: 5 }),
  row: reduced("shared."),
});
testExperts({
  name: "lowDimensional with encoders of their own",
  make: (options) => lowDimensional({ ...options, low: 2, hidden: 5, encoder: "own" }),
  row: reduced(""),
});
testExperts({
  name: "lowDimensional with one output",
  make: (options) => lowDimensional({ ...options, low: 2, hidden: 5, out: 1, bias: false, reconstruction: 0 }),
  row: reduced("shared.", false),
});

// ---------------------------------------------------------------- prompts
const length = 3;
testExperts({
  name: "prompt",
  make: (options) => prompt({ ...options, heads: 2, length }),
  width: 4,
  matrices: ["keys"],
  row(params, e, x) {
    const at = (path: string, i: number, j: number): number => params.get(path)?.data[(e * length + i) * 4 + j] ?? 0;
    return [0, 1].flatMap((h) => {
      const scores = Array.from({ length }, (_, i) =>
        Math.exp([2 * h, 2 * h + 1].reduce((dot, j) => dot + (x[j] ?? 0) * at("keys", i, j), 0) / Math.SQRT2),
      );
      const total = scores.reduce((sum, v) => sum + v, 0);
      const gate = Math.tanh(params.get("gate")?.data[2 * e + h] ?? 0);
      return [2 * h, 2 * h + 1].map((j) => gate * scores.reduce((y, v, i) => y + (v / total) * at("values", i, j), 0));
    });
  },
});
