// Whole models that make text: ours from a Hugging Face checkpoint against llama.cpp from a GGUF file with the same numbers, prompts and
// single tokens, f32 and int8, on one thread and on more. And where our time goes.
import { mkdtemp, rm } from "node:fs/promises";
import { availableParallelism, tmpdir } from "node:os";
import { join } from "node:path";
import {
  type Candidate,
  type Contender,
  compare,
  type Figure,
  type Goal,
  summarise,
  type Table,
  type Timing,
} from "@switchyard/bench/kernels";
import { type Backend, type Engine, engine, type Spec } from "@switchyard/core";
import { type Variant, wasm } from "@switchyard/kernels/wasm";
import {
  type DecodingStrategy,
  generate,
  greedy,
  type LanguageModel,
  loadModel,
  selfContrast,
} from "@switchyard/models";
import type { GenerationCase } from "./peers/peer.ts";
import type { Context } from "./suite.ts";
import { type ModelSizes, type Twins, type Weights, writeTwins } from "./twins.ts";

const large: ModelSizes = {
  layers: 8,
  width: 768,
  heads: 12,
  kvHeads: 4,
  headSize: 64,
  experts: 16,
  k: 2,
  hidden: 512,
  vocabulary: 8192,
  context: 1024,
};
const small: ModelSizes = { ...large, layers: 2, experts: 4 };

/** How far log probabilities may differ, relative to the largest. In int8, llama.cpp rounds activations to eight bits, too, and ours stay f32. */
const tolerances: Readonly<Record<Weights, number>> = { f32: 1e-3, int8: 0.1 };
/** Greedy tokens that must be the same; none in int8, where near ties of that size turn. */
const checked: Readonly<Record<Weights, number>> = { f32: 16, int8: 0 };

const promptOf = (length: number, { vocabulary }: ModelSizes): number[] =>
  Array.from({ length }, (_, i) => 300 + ((i * 37) % (vocabulary - 300)));

async function take(
  model: LanguageModel,
  { prompt, tokens: maxNew }: Pick<GenerationCase, "prompt" | "tokens">,
  strategy: DecodingStrategy,
): Promise<number[]> {
  const ids: number[] = [];
  for await (const { id } of generate(model, { prompt, maxNew, strategy })) ids.push(id);
  return ids;
}

/** Natural logarithms of probabilities after a prompt, `[vocabulary]`. */
async function said(model: LanguageModel, prompt: readonly number[]): Promise<Float64Array> {
  const ids = model.engine.tensor(Int32Array.from(prompt), [1, prompt.length]);
  const logits = await model.step(ids);
  try {
    const z = Float64Array.from(await logits.data());
    const top = z.reduce((most, x) => Math.max(most, x), Number.NEGATIVE_INFINITY);
    const sum = top + Math.log(z.reduce((total, x) => total + Math.exp(x - top), 0));
    return z.map((x) => x - sum);
  } finally {
    logits.dispose();
    ids.dispose();
  }
}

function ours(name: string, model: LanguageModel, one: GenerationCase): Contender {
  return {
    name,
    run: () => take(model, one, greedy()),
    output: async () => [
      await said(model, one.prompt),
      ...(one.checked > 0 ? [await take(model, { ...one, tokens: one.checked }, greedy())] : []),
    ],
  };
}

/** Loads a model into an engine and frees it afterwards. */
async function withModel<R>(on: Engine, folder: string, body: (model: LanguageModel) => Promise<R>): Promise<R> {
  const loaded = await loadModel(folder, { engine: on });
  try {
    return await body(loaded.model);
  } finally {
    await loaded.close();
  }
}

interface Setting {
  readonly context: Context;
  readonly sizes: ModelSizes;
  readonly weights: Weights;
  readonly threads: number;
  readonly twins: Twins;
}

const title = ({ layers, width, experts, hidden, k, vocabulary }: ModelSizes, weights: Weights): string =>
  `Qwen3-MoE of random weights, ${layers} layers, width ${width}, ${experts} experts of ${hidden}, top-${k}, vocabulary ${vocabulary}, ${weights}`;

/** The aims are for f32: llama.cpp in int8 works on other numbers, with instructions that WebAssembly does not have. */
const aimed = (weights: Weights): { readonly goal?: Goal } => (weights === "f32" ? { goal: { least: 0.8 } } : {});

const contrasting = "switchyard, selfContrast";

/** Tokens after a prompt: `made` 1 measures the prompt, a prompt of one token what follows. */
async function against(
  { context, sizes, weights, threads, twins }: Setting,
  model: LanguageModel,
  { prompt: length, made }: { readonly prompt: number; readonly made: number },
): Promise<Table> {
  const decoding = made > 1;
  const one: GenerationCase = {
    prompt: promptOf(length, sizes),
    tokens: made,
    checked: checked[weights],
    gguf: twins.gguf,
    threads,
  };
  const own = `switchyard ${context.variants[0] ?? "relaxed"}`;
  const peers = context.peers.flatMap(({ name: peer, generation }): Candidate[] => {
    if (!generation) return [];
    const name = `${peer} (GGUF)`; // not the peer's own name: that one stands for the threads it was opened with
    return [{ name, open: async () => ({ ...(await generation(one)), name }) }];
  });
  const weak: Candidate = {
    name: contrasting,
    open: () => ({ name: contrasting, run: () => take(model, one, selfContrast()) }),
  };
  const found = await compare(
    [{ name: own, open: () => ours(own, model, one) }],
    [...peers, ...(decoding ? [weak] : [])],
    {
      ...context.measuring,
      tolerance: tolerances[weights],
    },
  );
  const amount = decoding ? made : length;
  return {
    case: decoding ? "decode" : "prefill",
    title: `${title(sizes, weights)}: ${decoding ? `${made} tokens one by one` : `a prompt of ${length} tokens`}`,
    threads,
    unit: "tokens/s",
    amounts: Object.fromEntries(found.entries.map(({ name }) => [name, amount])),
    entries: found.entries,
    figures: found.ratios.map(({ peer, speedup, cpuSpeedup }): Figure => {
      const cpu = cpuSpeedup && { cpu: cpuSpeedup };
      if (peer === contrasting)
        return { label: "time of selfContrast : greedy", value: speedup, ...cpu, goal: { most: 1.7 } };
      return { label: `${own} : ${peer}`, value: speedup, ...cpu, ...aimed(weights) };
    }),
  };
}

// ---------------------------------------------------------------- where the time goes
const parts = ["experts", "router", "attention projections", "attention", "head", "norms and residuals"] as const;
type Part = (typeof parts)[number];

/** What an op of a pass belongs to; `width` and `vocabulary` tell products apart. */
function partOf(op: string, inputs: readonly Spec[], { vocabulary, experts }: ModelSizes): Part {
  if (/^(moeExperts|.*[gG]roupedMatmul|dispatch|combineRows|swiglu|silu)$/.test(op)) return "experts";
  if (op === "softmaxTopk") return "router";
  if (/^(attention|rope|concat)$/.test(op)) return "attention";
  if (!/[lL]inear$/.test(op)) return "norms and residuals";
  const [out] = inputs[1]?.shape ?? [];
  return out === vocabulary ? "head" : out === experts ? "router" : "attention projections";
}

/** The same backend, telling how long each of its kernels took. */
function withClock<H>(
  backend: Backend<H>,
  tell: (op: string, inputs: readonly Spec[], milliseconds: number) => void,
): Backend<H> {
  const kernels = Object.entries(backend.kernels).map(([op, kernel]): [string, typeof kernel] => {
    if (!kernel) return [op, kernel];
    const timed: typeof kernel = (inputs, results, attrs) => {
      const start = performance.now();
      const handles = kernel(inputs, results, attrs);
      tell(op, inputs, performance.now() - start);
      return handles;
    };
    return [op, Object.assign(timed, kernel)];
  });
  return { ...backend, kernels: { ...backend.kernels, ...Object.fromEntries(kernels) } };
}

/** Passes of `length` tokens after a few others, part by part. */
async function shares({ context, sizes, weights, threads, twins }: Setting, length: number): Promise<Table> {
  const variant: Variant = context.variants[0] ?? "relaxed";
  const backend = await wasm({ variant, threads });
  const spent = new Map<Part, number>();
  const clocked = withClock(backend, (op, inputs, ms) => {
    const part = partOf(op, inputs, sizes);
    spent.set(part, (spent.get(part) ?? 0) + ms);
  });
  const samples: { readonly seconds: number; readonly cpu: number; readonly shares: ReadonlyMap<Part, number> }[] = [];
  try {
    await withModel(engine(clocked), twins.checkpoint, async (model) => {
      const cache = model.newCache(1);
      const start = promptOf(16, sizes);
      const pass = async (ids: readonly number[]): Promise<void> => {
        const input = model.engine.tensor(Int32Array.from(ids), [1, ids.length]);
        const logits = await model.step(input, { cache });
        await logits.data();
        logits.dispose();
        input.dispose();
      };
      try {
        await pass(start);
        const count = length > 1 ? 10 : 60;
        const warm = count / 2;
        for (let i = 0; i < count + warm; i++) {
          spent.clear();
          const usage = process.cpuUsage();
          const begin = performance.now();
          await pass(promptOf(length, sizes).map((id) => (id + i * 101) % sizes.vocabulary));
          const wall = performance.now() - begin;
          const { user, system } = process.cpuUsage(usage);
          const each = new Map([...spent].map(([part, ms]) => [part, ms / wall]));
          if (i >= warm) samples.push({ seconds: wall / 1000, cpu: (user + system) / 1e6, shares: each });
          cache.truncate(length > 1 ? start.length : cache.length);
        }
      } finally {
        cache.dispose();
      }
    });
  } finally {
    backend.dispose();
  }
  const name = "one pass";
  const wall = samples.map(({ seconds }) => seconds);
  const cpu = samples.map((sample) => sample.cpu);
  const timing: Timing = {
    name,
    samples: wall,
    wall: summarise(wall),
    cpuSamples: cpu,
    cpu: summarise(cpu),
    runs: 1,
  };
  const share = (of: (shares: ReadonlyMap<Part, number>) => number) =>
    summarise(samples.map((sample) => of(sample.shares)));
  const total = (each: ReadonlyMap<Part, number>): number => [...each.values()].reduce((sum, x) => sum + x, 0);
  return {
    case: "where",
    title: `${title(sizes, weights)}: shares of a pass of ${length} token${length > 1 ? "s" : ""}`,
    threads,
    unit: "tokens/s",
    amounts: { [name]: length },
    entries: [{ name, timing }],
    figures: [
      ...parts.map((part) => ({ label: part, value: share((each) => each.get(part) ?? 0) })),
      { label: "JavaScript between kernels", value: share((each) => 1 - total(each)) },
    ],
  };
}

/** Prompts and single tokens in every combination of weights and threads, each with the shares of our time. */
export async function* generation(context: Context): AsyncGenerator<Table> {
  const sizes = context.quick ? small : large;
  const many = context.threads > 1 ? context.threads : Math.min(2, availableParallelism());
  const folder = await mkdtemp(join(tmpdir(), "switchyard-generation-"));
  try {
    const twins = await writeTwins(folder, sizes);
    for (const threads of new Set([1, many])) {
      for (const weights of ["f32", "int8"] as const) {
        const setting: Setting = { context, sizes, weights, threads, twins: twins[weights] };
        const on = await context.engine(context.variants[0] ?? "relaxed", threads);
        const tables = await withModel(on, twins[weights].checkpoint, async (model) => [
          await against(setting, model, { prompt: context.quick ? 64 : 256, made: 1 }),
          await against(setting, model, { prompt: 1, made: context.quick ? 8 : 64 }),
        ]);
        yield* tables;
        yield await shares(setting, context.quick ? 64 : 256);
        yield await shares(setting, 1);
      }
    }
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
}
