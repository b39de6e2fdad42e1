// What `npm run bench:gpu` measures on one device: each case sets our kernels against the peers, or against what the device can do
// at best, and says what we aim for. It knows neither the device nor the libraries: those are handed in.
import {
  type Benchmark,
  type Candidate,
  type CompareOptions,
  type Comparison,
  compare,
  type DecodeCase,
  decodeCase,
  decodeData,
  decodeLayer,
  decodeProduct,
  decodeRow,
  denseProduct,
  type Entry,
  type Figure,
  type Goal,
  type GroupedCase,
  groupedProduct,
  type LayerCase,
  type LayerSize,
  layerFlops,
  layerGradientFlops,
  layers,
  measure,
  moeLayer,
  moeLayerGradients,
  type Queue,
  queued,
  relativeError,
  type Summary,
  speedup,
  summarise,
  type Table,
  type Timing,
  type Workload,
  weightFormats,
} from "@switchyard/bench/kernels";
import type { Engine } from "@switchyard/core";
import type { Copy } from "./copy.ts";
import type { Peer } from "./peers/peer.ts";

/** How large the work is. */
export interface Sizes {
  readonly layers: Readonly<Record<"A" | "B", LayerSize>>;
  readonly tokens: readonly number[];
  /** Tokens whose rows the grouped products have. */
  readonly groupedTokens: number;
  /** Bytes of the weights of one-token products, and their inner size. */
  readonly decode: { readonly bytes: number; readonly inner: number };
}

export const sizes = {
  /** Layers A and B as everywhere else; weights beyond any cache of a GPU. */
  full: {
    layers,
    tokens: [1, 16, 256, 1024, 4096],
    groupedTokens: 1024,
    decode: { bytes: 2 ** 28, inner: 4096 },
  },
  /** As full, on a driver that computes on the processor and was asked for it. */
  patient: {
    layers,
    tokens: [1, 16, 256],
    groupedTokens: 128,
    decode: { bytes: 2 ** 28, inner: 4096 },
  },
  /** For a driver that computes on the processor: the same numbers of experts, everything else much smaller. */
  small: {
    layers: { A: { experts: 8, width: 64, hidden: 128, k: 2 }, B: { experts: 64, width: 64, hidden: 32, k: 8 } },
    tokens: [1, 16, 64],
    groupedTokens: 64,
    decode: { bytes: 2 ** 22, inner: 1024 },
  },
} as const satisfies Readonly<Record<string, Sizes>>;

/** Few of the sizes, to see that it runs. */
export const quick = (from: Sizes): Sizes => ({ ...from, tokens: from.tokens.filter((n) => n === 1 || n === 16) });

export interface Context {
  /** Ours. */
  readonly engine: Engine;
  readonly queue: Queue;
  readonly peers: readonly Peer[];
  readonly sizes: Sizes;
  readonly measuring: CompareOptions;
  /** Figures are judged by their goals; without, on a driver that computes on the processor, they are only reported. */
  readonly judged: boolean;
  /** A kernel that copies about that many bytes. */
  copy(bytes: number): Promise<Copy>;
}

type Case = (context: Context) => AsyncGenerator<Table>;

const ours = "switchyard";
const giga = 1e-9;

const candidate = <C>({ engine, queue }: Context, name: string, benchmark: Benchmark<C>, one: C): Candidate => ({
  name,
  open: () => queued(name, benchmark.setup(engine, one), queue),
});

const goalOf = ({ judged }: Context, goal: Goal | undefined): { readonly goal?: Goal } =>
  judged && goal ? { goal } : {};

const layerTitle = ({ layer, experts, width, hidden, k }: LayerCase): string =>
  `MoE layer ${layer}: ${experts} experts, width ${width}, expert width ${hidden}, top-${k}, SwiGLU`;
const tokensOf = (n: number): string => `${n} token${n === 1 ? "" : "s"}`;

/** How many times faster than the peers, and what we aim for on a GPU. */
const goals: Readonly<Record<string, Goal>> = { "tfjs-webgpu": { least: 3 }, "gpu.js": { least: 10 } };

const ratios = (context: Context, { ratios: all }: Comparison): readonly Figure[] =>
  all.map(({ ours: own, peer, speedup: value }) => ({
    label: `${own} : ${peer}`,
    value,
    ...goalOf(context, goals[peer]),
  }));

const everyone = (amount: number, entries: readonly Entry[]): Readonly<Record<string, number>> =>
  Object.fromEntries(entries.map(({ name }) => [name, amount]));

const layer = (name: "A" | "B"): Case =>
  async function* (context) {
    for (const tokens of context.sizes.tokens) {
      const one: LayerCase = { layer: name, ...context.sizes.layers[name], tokens };
      const works = [
        { what: "forward", benchmark: moeLayer, flops: layerFlops(one), of: (peer: Peer) => peer.layer },
        {
          what: "forward and backward",
          benchmark: moeLayerGradients,
          flops: layerGradientFlops(one),
          of: (peer: Peer) => peer.gradients,
        },
      ];
      for (const { what, benchmark, flops, of } of works) {
        const peers = context.peers.flatMap((peer): Candidate[] => {
          const open = of(peer);
          return open ? [{ name: peer.name, open: () => open(one) }] : [];
        });
        const found = await compare([candidate(context, ours, benchmark, one)], peers, context.measuring);
        yield {
          case: `moe-${name.toLowerCase()}`,
          title: `${layerTitle(one)}, ${tokensOf(tokens)}, f32, ${what}`,
          unit: "GFLOP/s",
          amounts: everyone(flops * giga, found.entries),
          entries: found.entries,
          figures: ratios(context, found),
        };
      }
    }
  };

/** Opens, measures in turn and frees. */
async function timings(context: Context, all: readonly Candidate[]): Promise<readonly Timing[]> {
  const ready = [];
  try {
    for (const one of all) ready.push(await one.open());
    return await measure(ready, context.measuring);
  } finally {
    for (const one of ready) await one.dispose?.();
  }
}

/** The first of a list that cannot be empty. */
function first<T>(list: readonly T[]): T {
  const [item] = list;
  if (item === undefined) throw new RangeError("nothing was measured");
  return item;
}

async function* grouped(context: Context): AsyncGenerator<Table> {
  for (const name of ["A", "B"] as const) {
    const { experts, width, hidden, k } = context.sizes.layers[name];
    const rows = context.sizes.groupedTokens * k;
    const products = [
      { inner: width, outer: 2 * hidden, what: "gate and up" },
      { inner: hidden, outer: width, what: "down" },
    ];
    for (const { inner, outer, what } of products) {
      const named = (load: string): string => `grouped, ${load}`;
      const cases = (["balanced", "skewed"] as const).map(
        (load): GroupedCase => ({ experts, rows, inner, outer, load }),
      );
      const dense = "dense";
      const found = await timings(context, [
        candidate(context, dense, denseProduct, { tokens: rows, inner, outer }),
        ...cases.map((one) => candidate(context, named(one.load), groupedProduct, one)),
      ]);
      const [denseTiming, ...groupedTimings] = [first(found), ...found.slice(1)];
      const amount = 2 * rows * inner * outer * giga;
      const entries = found.map((timing): Entry => ({ name: timing.name, timing }));
      yield {
        case: "grouped",
        title: `${what} of layer ${name}: ${rows} rows over ${experts} experts, ${inner} to ${outer}, f32, against one dense product`,
        unit: "GFLOP/s",
        amounts: everyone(amount, entries),
        entries,
        figures: groupedTimings.map((timing) => ({
          label: `${timing.name} : dense`,
          value: speedup(timing, denseTiming),
          ...goalOf(context, { least: 0.6 }),
        })),
      };
    }
  }
}

/** Bandwidth of one against another's, pair by pair. */
const share = (timing: Timing, bytes: number, reference: Timing, referenceBytes: number): Summary =>
  summarise(
    timing.samples.map((seconds, i) => bytes / seconds / (referenceBytes / (reference.samples[i] ?? Number.NaN))),
  );

/** Ours beside the copy kernel, in pairs, because each holds large weights of its own. */
async function* besideCopy(
  context: Context,
  work: readonly { readonly name: string; readonly goal?: Goal; open(): Promise<Workload> }[],
  table: Pick<Table, "case" | "title">,
): AsyncGenerator<Table> {
  const entries: Entry[] = [];
  const figures: Figure[] = [];
  const amounts: Record<string, number> = {};
  for (const { name, goal, open } of work) {
    const workload = await open();
    const contender = queued(name, workload, context.queue);
    try {
      const copy = await context.copy(workload.bytes);
      try {
        const [own, reference] = (await measure([contender, copy], context.measuring)) as [Timing, Timing];
        if (entries.length === 0) entries.push({ name: copy.name, timing: reference });
        amounts[copy.name] ??= copy.bytes * giga;
        amounts[name] = workload.bytes * giga;
        entries.push({ name, timing: own });
        const value = share(own, workload.bytes, reference, copy.bytes);
        figures.push({ label: `${name} : ${copy.name}`, value, ...goalOf(context, goal) });
      } finally {
        await copy.dispose?.();
      }
    } finally {
      await contender.dispose?.();
    }
  }
  yield { ...table, unit: "GB/s", amounts, entries, figures };
}

/** Some of the product's elements against their definition: no figure of a wrong result. @throws Error when they differ. */
async function checkDecode(one: DecodeCase, workload: Workload): Promise<void> {
  const y = workload.run();
  const found = await y.data();
  y.dispose();
  const data = decodeData(one);
  const rows = [0, 1, Math.floor(one.outer / 2), one.outer - 1].filter((row) => row < one.outer);
  const error = relativeError(
    rows.map((row) => found[row] ?? Number.NaN),
    rows.map((row) => decodeRow(one, data, row)),
  );
  if (!(error <= 1e-3))
    throw new Error(
      `the one-token product with ${one.weights} weights is wrong, relative error ${error.toExponential(1)}`,
    );
}

async function* decode(context: Context): AsyncGenerator<Table> {
  const { bytes, inner } = context.sizes.decode;
  // fp8 has no kernel on GPUs: core's composite would be timed.
  const formats = weightFormats.filter((weights) => weights !== "fp8");
  const cases = formats.map((weights) => decodeCase(weights, inner, bytes));
  yield* besideCopy(
    context,
    cases.map((one) => ({
      name: `${one.weights} weights`,
      goal: { least: 0.7 },
      async open() {
        const workload = decodeProduct.setup(context.engine, one);
        try {
          await checkDecode(one, workload);
        } catch (error) {
          workload.dispose();
          throw error;
        }
        return workload;
      },
    })),
    {
      case: "decode",
      title:
        `one token, ${inner} to as many outputs as make ${Math.round(bytes / 1e6)} MB of weights: ` +
        "bytes of weights, packed, scales included; each in turn with a copy of as many bytes",
    },
  );
  const steps = (["A", "B"] as const).map((name): LayerCase => {
    const size = context.sizes.layers[name];
    return { layer: name, ...size, tokens: Math.floor(size.experts / size.k) };
  });
  for (const one of steps) {
    yield* besideCopy(
      context,
      [{ name: `layer ${one.layer}`, open: async () => decodeLayer.setup(context.engine, one) }],
      {
        case: "decode",
        title: `${layerTitle(one)}, f32: ${tokensOf(one.tokens)} one after another, every expert once: bytes of their weights`,
      },
    );
  }
}

/** What --case names. */
export const cases: Readonly<Record<string, Case>> = { "moe-a": layer("A"), "moe-b": layer("B"), grouped, decode };
