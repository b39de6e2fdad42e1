// What `npm run bench:kernels` measures: each case sets our backends and the peers to the same work and says what we aim for.
import { availableParallelism } from "node:os";
import {
  type Benchmark,
  type Candidate,
  type CompareOptions,
  type Comparison,
  type Contender,
  compare,
  contender,
  decodeCase,
  decodeProduct,
  denseLayer,
  denseProduct,
  type Entry,
  type Figure,
  type Goal,
  type LanguageModelCase,
  type LayerCase,
  layerDispatch,
  layerFlops,
  layers,
  measure,
  moeLayer,
  oneTokenProducts,
  type ProductCase,
  routing,
  type Summary,
  speedup,
  summarise,
  type Table,
  type Timing,
  trainingStep,
  type Workload,
} from "@switchyard/bench/kernels";
import type { Engine } from "@switchyard/core";
import { type Ceiling, ceiling } from "./ceiling.ts";
import { generation } from "./generation.ts";
import type { Peer } from "./peers/peer.ts";
import { everyRouter } from "./routers.ts";
import { streaming } from "./streaming.ts";

export type Variant = "relaxed" | "plain";

export interface Context {
  readonly threads: number;
  readonly quick: boolean;
  readonly variants: readonly Variant[];
  readonly peers: readonly Peer[];
  readonly measuring: CompareOptions;
  /** One of our backends; kept open for the next case. */
  engine(variant: Variant, threads: number): Promise<Engine>;
}

type Case = (context: Context) => AsyncGenerator<Table>;

const ourName = (variant: Variant): string => `switchyard ${variant}`;
const giga = 1e-9;

async function candidates<C>(context: Context, benchmark: Benchmark<C>, one: C): Promise<readonly Candidate[]> {
  const made: Candidate[] = [];
  for (const variant of context.variants) {
    const engine = await context.engine(variant, context.threads);
    made.push({ name: ourName(variant), open: () => contender(ourName(variant), benchmark.setup(engine, one)) });
  }
  return made;
}

/** Goals are for one thread unless the case says otherwise. */
type Goals = (variant: Variant, peer: string) => Goal | undefined;

const ratios = ({ ratios: all }: Comparison, goals: Goals): readonly Figure[] =>
  all.map(({ ours, peer, speedup: value, cpuSpeedup: cpu }) => {
    const goal = goals(ours.endsWith("plain") ? "plain" : "relaxed", peer);
    return { label: `${ours} : ${peer}`, value, ...(cpu && { cpu }), ...(goal && { goal }) };
  });

const everyone = (amount: number, entries: readonly Entry[]): Readonly<Record<string, number>> =>
  Object.fromEntries(entries.map(({ name }) => [name, amount]));

async function product(context: Context, name: string, one: ProductCase, goals: Goals): Promise<Table> {
  const peers = context.peers.flatMap((peer): Candidate[] =>
    peer.product ? [{ name: peer.name, open: async () => (await peer.product?.(one)) ?? missing(peer.name) }] : [],
  );
  const found = await compare(await candidates(context, denseProduct, one), peers, context.measuring);
  return {
    case: name,
    title: `y = x wᵀ, x [${one.tokens}, ${one.inner}], w [${one.outer}, ${one.inner}], f32`,
    threads: context.threads,
    unit: "GFLOP/s",
    amounts: everyone(2 * one.tokens * one.inner * one.outer * giga, found.entries),
    entries: found.entries,
    figures: ratios(found, goals),
  };
}

const missing = (name: string): never => {
  throw new Error(`${name} cannot do this`);
};

const perVariant =
  (relaxed: number, plain: number, ...peers: string[]): Goals =>
  (variant, peer) =>
    peers.includes(peer) ? { least: variant === "relaxed" ? relaxed : plain } : undefined;
const none: Goals = () => undefined;

async function* matmul(context: Context): AsyncGenerator<Table> {
  for (const tokens of context.quick ? [16, 256] : [16, 256, 1024]) {
    const goals = tokens >= 256 && context.threads === 1 ? perVariant(2.5, 1.5, "onnxruntime-web") : none;
    yield product(context, "matmul", { tokens, inner: 1024, outer: 4096 }, goals);
  }
}

async function* skinny(context: Context): AsyncGenerator<Table> {
  yield product(context, "skinny", { tokens: 8, inner: 2048, outer: 768 }, perVariant(2, 2, "onnxruntime-web"));
}

const layerTitle = ({ layer, experts, width, hidden, k, tokens }: LayerCase): string =>
  `MoE layer ${layer}: ${experts} experts, width ${width}, expert width ${hidden}, top-${k}, SwiGLU, ${tokens} tokens, f32`;

const layer = (name: "A" | "B"): Case =>
  async function* (context) {
    for (const tokens of context.quick ? [16, 256] : [1, 16, 256, 1024]) {
      const one: LayerCase = { layer: name, ...layers[name], tokens };
      const peers = context.peers.flatMap((peer): Candidate[] =>
        peer.layer ? [{ name: peer.name, open: async () => (await peer.layer?.(one)) ?? missing(peer.name) }] : [],
      );
      const found = await compare(await candidates(context, moeLayer, one), peers, context.measuring);
      const goals = perVariant(2.5, 1.6, "tfjs-backend-wasm", "@jax-js/jax");
      yield {
        case: `moe-${name.toLowerCase()}`,
        title: layerTitle(one),
        threads: context.threads,
        unit: "GFLOP/s",
        amounts: everyone(layerFlops(one) * giga, found.entries),
        entries: found.entries,
        figures: ratios(found, tokens >= 16 && context.threads === 1 ? goals : none),
      };
    }
  };

/** llama.cpp only runs whole models: a model of such layers, against our layer as often, each time with other weights. */
async function* stack(context: Context): AsyncGenerator<Table> {
  const depth = 2;
  const goals: Goals = (variant) => (variant === "relaxed" ? { least: 1.8 } : undefined);
  for (const tokens of context.quick ? [256] : [1, 16, 256, 1024]) {
    const one: LayerCase = { layer: "A", ...layers.A, tokens };
    const ours: Candidate[] = [];
    for (const variant of context.variants) {
      const engine = await context.engine(variant, context.threads);
      const name = ourName(variant);
      ours.push({
        name,
        open() {
          const each = Array.from({ length: depth }, () => contender(name, moeLayer.setup(engine, one)));
          return {
            name,
            async run() {
              for (const layer of each) await layer.run();
            },
            async dispose() {
              for (const layer of each) await layer.dispose?.();
            },
          };
        },
      });
    }
    const peers = context.peers.flatMap((peer): Candidate[] =>
      peer.stack ? [{ name: peer.name, open: async () => (await peer.stack?.(one, depth)) ?? missing(peer.name) }] : [],
    );
    const found = await compare(ours, peers, context.measuring);
    yield {
      case: "stack",
      title: `${layerTitle(one)}: ${depth} of them, in llama.cpp with little attention`,
      threads: context.threads,
      unit: "GFLOP/s",
      amounts: everyone(depth * layerFlops(one) * giga, found.entries),
      entries: found.entries,
      figures: ratios(found, tokens >= 256 && context.threads === 1 ? goals : none),
    };
  }
}

/** The losses of the first three steps are what must agree. */
const trainingContender = (name: string, workload: Workload) => ({
  ...contender(name, workload),
  async output() {
    const losses: number[] = [];
    for (let step = 0; step < 3; step++) {
      const loss = workload.run();
      losses.push((await loss.data())[0] as number);
      loss.dispose();
    }
    return losses;
  },
});

async function* training(context: Context): AsyncGenerator<Table> {
  const [full] = trainingStep.cases;
  if (full === undefined) return;
  const one: LanguageModelCase = context.quick ? { ...full, batch: 2 } : full;
  const ours: Candidate[] = [];
  for (const variant of context.variants) {
    const engine = await context.engine(variant, context.threads);
    const name = ourName(variant);
    ours.push({ name, open: () => trainingContender(name, trainingStep.setup(engine, one)) });
  }
  const peers = context.peers.flatMap((peer): Candidate[] =>
    peer.training ? [{ name: peer.name, open: async () => (await peer.training?.(one)) ?? missing(peer.name) }] : [],
  );
  const found = await compare(ours, peers, context.measuring);
  const { layers: depth, width, heads, experts, hidden, k, vocabulary, batch, sequence } = one;
  yield {
    case: "training",
    title:
      `training step: ${depth} layers, width ${width}, ${heads} heads, ${experts} experts of ${hidden}, top-${k}, ` +
      `vocabulary ${vocabulary}, ${batch} x ${sequence} tokens, AdamW, f32`,
    threads: context.threads,
    unit: "tokens/s",
    amounts: everyone(batch * sequence, found.entries),
    entries: found.entries,
    figures: ratios(found, (_, peer) => (peer === "PyTorch" ? { least: 0.6 } : { least: 3 })),
  };
}

// ---------------------------------------------------------------- our own figures
/** Measures our contenders (and loops) against each other, and frees them. */
async function timings(context: Context, all: readonly Candidate[]): Promise<readonly Timing[]> {
  const ready = [];
  try {
    for (const candidate of all) ready.push(await candidate.open());
    return await measure(ready, context.measuring);
  } finally {
    for (const one of ready) await one.dispose?.();
  }
}

const ratio = (numerator: Timing, denominator: Timing): Summary => speedup(denominator, numerator);

async function best(context: Context, threads = context.threads): Promise<Engine> {
  return context.engine(context.variants[0] ?? "relaxed", threads);
}

const ownTable = (
  context: Context,
  rest: Pick<Table, "case" | "title" | "unit" | "amounts" | "figures">,
  found: readonly Timing[],
): Table => ({ threads: context.threads, ...rest, entries: found.map((timing) => ({ name: timing.name, timing })) });

async function* sparse(context: Context): AsyncGenerator<Table> {
  const one: LayerCase = { layer: "A", ...layers.A, tokens: context.quick ? 64 : 256 };
  const engine = await best(context);
  const [dispatched, dense] = (await timings(context, [
    { name: "sparse", open: () => contender("sparse", moeLayer.setup(engine, one)) },
    { name: "dense", open: () => contender("dense", denseLayer.setup(engine, one)) },
  ])) as [Timing, Timing];
  const amount = layerFlops(one) * giga;
  yield ownTable(
    context,
    {
      case: "sparse",
      title: `${layerTitle(one)}: against our own evaluation of all experts (GFLOP of the chosen ones)`,
      unit: "GFLOP/s",
      amounts: { sparse: amount, dense: amount },
      figures: [{ label: "sparse : dense", value: ratio(dense, dispatched), goal: { least: 3 } }],
    },
    [dispatched, dense],
  );
}

async function* dispatch(context: Context): AsyncGenerator<Table> {
  const engine = await best(context);
  for (const one of layerDispatch.cases.filter(({ tokens }) => !context.quick || tokens === 256)) {
    const [whole, part] = (await timings(context, [
      { name: "layer", open: () => contender("layer", moeLayer.setup(engine, one)) },
      { name: "dispatch", open: () => contender("dispatch", layerDispatch.setup(engine, one)) },
    ])) as [Timing, Timing];
    yield ownTable(
      context,
      {
        case: "dispatch",
        title: `${layerTitle(one)}: choose, sort, gather and scatter alone`,
        unit: "tokens/s",
        amounts: { layer: one.tokens, dispatch: one.tokens },
        figures: [{ label: "dispatch : layer", value: ratio(part, whole), goal: { most: 0.1 } }],
      },
      [whole, part],
    );
  }
}

/** Routers that people use every day: their routing and dispatch should stay a small part of the layer. */
const common: readonly string[] = [
  "topK",
  "switchRouter",
  "noisyTopK",
  "deepSeekV2",
  "deepSeekV3",
  "nullExperts",
  "reMoE",
];

/** Every router with the layer's sizes: what it costs beside topK, and the common ones beside the whole layer. */
async function* routers(context: Context): AsyncGenerator<Table> {
  const engine = await best(context);
  const one: LayerCase = { layer: "B", ...layers.B, tokens: context.quick ? 256 : 1024 };
  const { experts, width, tokens, k } = one;
  const failed: Entry[] = [];
  const rows: Candidate[] = [];
  for (const [name, router] of everyRouter(k)) {
    const open = (): Contender => contender(name, routing(engine, { experts, width, tokens, router }));
    try {
      // Once, so that one router that cannot run here does not end the case.
      const tried = open();
      try {
        await tried.run();
      } finally {
        await tried.dispose?.();
      }
      rows.push({ name, open });
    } catch (error) {
      failed.push({ name, failed: (error as Error).message });
    }
  }
  const whole: Candidate = {
    name: "whole layer with topK",
    open: () => contender("whole layer with topK", moeLayer.setup(engine, one)),
  };
  const found = await timings(context, [...rows, whole]);
  const timingOf = (name: string): Timing => found.find((timing) => timing.name === name) ?? missing(name);
  const layer = timingOf(whole.name);
  const table = ownTable(
    context,
    {
      case: "routers",
      title: `${layerTitle(one)}: routing, sorting, gathering and combining, with experts that compute nothing`,
      unit: "tokens/s",
      amounts: Object.fromEntries(found.map(({ name }) => [name, tokens])),
      figures: [
        ...rows.flatMap(({ name }) =>
          name === "topK" ? [] : { label: `${name} : topK`, value: ratio(timingOf(name), timingOf("topK")) },
        ),
        ...common.map((name) => ({
          label: `${name} : layer`,
          value: ratio(timingOf(name), layer),
          goal: { most: 0.1 },
        })),
      ],
    },
    found,
  );
  yield { ...table, entries: [...table.entries, ...failed] };
}

async function* scaling(context: Context): AsyncGenerator<Table> {
  const engine = await best(context);
  for (const name of ["A", "B"] as const) {
    const named = (tokens: number): string => `${tokens} tokens`;
    const candidate = (tokens: number): Candidate => ({
      name: named(tokens),
      open: () => contender(named(tokens), moeLayer.setup(engine, { layer: name, ...layers[name], tokens })),
    });
    const start = 256;
    const sizes = context.quick ? [512] : [512, 1024, 2048, 4096];
    const found: Timing[] = [];
    const figures: Figure[] = [];
    // In pairs, because every workload holds weights of its own.
    for (const tokens of sizes) {
      const [few, many] = (await timings(context, [candidate(start), candidate(tokens)])) as [Timing, Timing];
      if (found.length === 0) found.push(few);
      found.push(many);
      const growth = many.samples.map((seconds, i) => ((seconds / (few.samples[i] ?? Number.NaN)) * start) / tokens);
      figures.push({
        label: `time per token, ${many.name} : ${few.name}`,
        value: summarise(growth),
        goal: { least: 0.9, most: 1.1 },
      });
    }
    yield ownTable(
      context,
      {
        case: "scaling",
        title: `${layerTitle({ layer: name, ...layers[name], tokens: 0 }).replace(", 0 tokens", "")}: time per token`,
        unit: "tokens/s",
        amounts: Object.fromEntries([start, ...sizes].map((tokens) => [named(tokens), tokens])),
        figures,
      },
      found,
    );
  }
}

/** Runs `body` with the ceiling loops on some threads, and ends their threads. */
async function withCeiling<R>(threads: number, bytes: number, body: (on: Ceiling) => Promise<R>): Promise<R> {
  const on = await ceiling(threads, bytes);
  try {
    return await body(on);
  } finally {
    await on.close();
  }
}

const asCandidate = (one: { readonly name: string }, open: Candidate["open"]): Candidate => ({ name: one.name, open });

/** Weights of few bits, as many bytes of each as the bf16 product reads. */
const fewBits = (["fp8", "int8", "int4", "mxfp4"] as const).map((weights) => decodeCase(weights, 4096, 2 ** 27));

async function* oneToken(context: Context): AsyncGenerator<Table> {
  const engine = await best(context);
  const products = [
    ...oneTokenProducts.map((one) => ({ one, setup: () => denseProduct.setup(engine, one) })),
    ...fewBits.map((one) => ({ one, setup: () => decodeProduct.setup(engine, one) })),
  ];
  for (const { one, setup } of products) {
    const workload = setup();
    const name = `${one.weights} weights`;
    try {
      yield await withCeiling(context.threads, workload.bytes, async (limit) => {
        const loop = limit.memory();
        const [ours, reading] = (await timings(context, [
          { name, open: () => contender(name, { ...workload, dispose: () => undefined }) },
          asCandidate(loop, () => loop),
        ])) as [Timing, Timing];
        const [bytes, read] = [workload.bytes * giga, loop.amount * giga];
        const share = summarise(
          ours.samples.map((seconds, i) => bytes / seconds / (read / (reading.samples[i] ?? Number.NaN))),
        );
        return ownTable(
          context,
          {
            case: "one-token",
            title: `one token, w [${one.outer}, ${one.inner}] in ${one.weights}: share of the memory's speed`,
            unit: "GB/s",
            amounts: { [name]: bytes, [loop.name]: read },
            figures: [{ label: `${name} : ${loop.name}`, value: share, goal: { least: 0.8 } }],
          },
          [ours, reading],
        );
      });
    } finally {
      workload.dispose();
    }
  }
}

/** How much a second thread (or more) helps us, against how much it helps the loop with the same limit. */
async function* threads(context: Context): AsyncGenerator<Table> {
  const many = context.threads > 1 ? context.threads : Math.max(2, Math.min(4, availableParallelism()));
  const variant = context.variants[0] ?? "relaxed";
  const memoryCase = oneTokenProducts[0] as ProductCase;
  const bytes = 4 * memoryCase.inner * memoryCase.outer;
  const tokens = context.quick ? 64 : 256;
  const work: readonly (readonly [string, "arithmetic" | "memory", (engine: Engine) => Workload])[] = [
    ["matmul", "arithmetic", (engine) => denseProduct.setup(engine, { tokens, inner: 1024, outer: 4096 })],
    ["layer A", "arithmetic", (engine) => moeLayer.setup(engine, { layer: "A", ...layers.A, tokens })],
    ["one token", "memory", (engine) => denseProduct.setup(engine, memoryCase)],
  ];
  for (const [name, kind, setup] of work) {
    const table = await withCeiling(1, bytes, (single) =>
      withCeiling(many, bytes, async (parallel) => {
        const loopOf = (on: Ceiling) => (kind === "memory" ? on.memory() : on.arithmetic(variant));
        const named = (n: number, what: string): string => `${what}, ${n} thread${n > 1 ? "s" : ""}`;
        const all: Candidate[] = [];
        const amounts: Record<string, number> = {};
        for (const [n, on] of [
          [1, single],
          [many, parallel],
        ] as const) {
          const engine = await context.engine(variant, n);
          const workload = setup(engine);
          const loop = { ...loopOf(on), name: named(n, loopOf(on).name) };
          amounts[named(n, name)] = (kind === "memory" ? workload.bytes : workload.flops) * giga;
          amounts[loop.name] = loop.amount * giga;
          all.push({ name: named(n, name), open: () => contender(named(n, name), workload) });
          all.push(asCandidate(loop, () => loop));
        }
        const found = await timings(context, all);
        const rates = found.map((t) => t.samples.map((seconds) => (amounts[t.name] ?? Number.NaN) / seconds));
        const gain = (from: number, to: number): number[] =>
          (rates[to] ?? []).map((rate, i) => rate / (rates[from]?.[i] ?? Number.NaN));
        const [ours, loops] = [gain(0, 2), gain(1, 3)];
        return ownTable(
          context,
          {
            case: "threads",
            title: `${name}: what ${many} threads gain, ours and the loop with the same limit`,
            unit: kind === "memory" ? "GB/s" : "GFLOP/s",
            amounts,
            figures: [
              { label: `gain of ${name}`, value: summarise(ours) },
              { label: "gain of the loop", value: summarise(loops) },
              {
                label: "our gain : the loop's",
                value: summarise(ours.map((own, i) => own / (loops[i] ?? Number.NaN))),
                goal: { least: 0.9 },
              },
            ],
          },
          found,
        );
      }),
    );
    yield { ...table, threads: many };
  }
}

/** What --case names. */
export const cases: Readonly<Record<string, Case>> = {
  matmul,
  skinny,
  "moe-a": layer("A"),
  "moe-b": layer("B"),
  stack,
  training,
  sparse,
  dispatch,
  routers,
  scaling,
  "one-token": oneToken,
  threads,
  generation,
  streaming,
};
