// Our own layout, model_type "switchyard": any router, with its options, parameters and buffers. Only Switchyard loads
// it.
import {
  CheckpointError,
  dispose,
  type Engine,
  type Json,
  leaves,
  mapTree,
  random,
  type Tensor,
  type Tree,
} from "@switchyard/core";
import type { RouterPlugin } from "@switchyard/core/moe";
import { isRecord } from "../checkpoint.ts";
import { ConfigReader } from "../config-reader.ts";
import type { Checkpoint } from "../model.ts";
import type { TensorSource } from "../safetensors.ts";
import type { CheckpointIndex, Description, Source } from "../source.ts";
import { buildTransformer, type Transformer, type TransformerArchitecture } from "../transformer.ts";
import { blueprintOf, type CompleteConfig, completeConfig, parameterShapes } from "../transformer-config.ts";
import {
  type CheckpointContent,
  checkAllUsed,
  checkCounts,
  checkMemory,
  expectShape,
  readTensor,
  stored,
} from "../weights.ts";
import type { DescribedArchitecture } from "./architecture.ts";

const format = 1;

/** config.json and tensors ("params.<path>", "buffers.<layer>.<path>") of any transformer. */
export function writeSwitchyard(model: Transformer): CheckpointContent {
  const { router, clipQkv, tokenCounts, ...sizes } = model.config;
  const seen = new Set<Tensor>();
  // A tensor that several layers share is written once, under its first path.
  const all = (prefix: string, tree: Tree): TensorSource[] =>
    leaves(tree).flatMap(([path, x]) => {
      if (seen.has(x)) return [];
      seen.add(x);
      return [stored(`${prefix}.${path}`, x)];
    });
  return {
    config: {
      model_type: "switchyard",
      format,
      ...sizes,
      clipQkv: clipQkv ?? null,
      router: { name: router.name, options: router.options ?? null },
    },
    tensors: [
      ...all("params", model.params),
      ...all("buffers", model.buffers),
      ...(tokenCounts && router.needs.includes("tokenIds") ? [countsSource(tokenCounts)] : []),
    ],
  };
}

/** Token counts, exact: what a router's table is made from. */
const countsName = "tokenCounts";
const countsSource = (counts: Float64Array): TensorSource => ({
  name: countsName,
  dtype: "F64",
  shape: [counts.length],
  bytes: () => new Uint8Array(counts.buffer, counts.byteOffset, counts.byteLength),
});

async function readCounts(checkpoint: Checkpoint, vocabulary: number): Promise<Float64Array> {
  expectShape(checkpoint, countsName, [vocabulary]);
  const { dtype } = checkpoint.stored(countsName);
  if (dtype !== "F64") throw new CheckpointError(`tensor "${countsName}" is ${dtype}, expected F64`);
  return new Float64Array((await checkpoint.read(countsName)).slice().buffer);
}

export interface SwitchyardOptions {
  /** The routers that may occur, with their options: `[topK({ k: 2 }), reMoE({ k: 2 })]`. */
  readonly routers: readonly RouterPlugin[];
  /** Accepts a router of the same name with other options (another balance weight, for example); default false. */
  readonly otherOptions?: boolean;
}

/** Reads `model_type: "switchyard"` with the routers given. */
export function switchyard(options: SwitchyardOptions): TransformerArchitecture & DescribedArchitecture {
  return {
    modelTypes: ["switchyard"],
    describe: (checkpoint) => describeSwitchyard(checkpoint, options),
    read: (checkpoint, engine, { memory } = {}) => read(checkpoint, engine, options, memory),
  };
}

function findRouter(saved: ConfigReader, { routers, otherOptions = false }: SwitchyardOptions): RouterPlugin {
  const name = saved.string("name");
  const options = saved.get("options");
  const asked = `${name}(${options === undefined ? "" : JSON.stringify(options)})`;
  const named = routers.filter((router) => router.name === name);
  const fits = named.find((router) => same(router.options, options)) ?? (otherOptions ? named[0] : undefined);
  if (fits) return fits;
  const passed =
    routers.map((router) => `${router.name}(${JSON.stringify(router.options ?? {})})`).join(", ") || "none";
  throw new CheckpointError(
    named.length
      ? `the checkpoint was saved with ${asked}; passed: ${passed}. Pass the same options, or set otherOptions: true`
      : `the checkpoint needs the router ${asked}; passed: ${passed}. Pass it in routers: [${name}({ ... })]`,
  );
}

/** Equal as JSON, whatever the order of keys. */
function same(a: Json | undefined, b: Json | undefined): boolean {
  if (isRecord(a) && isRecord(b)) {
    const keys = new Set([...Object.keys(a), ...Object.keys(b)]);
    return [...keys].every((key) => same(a[key], b[key]));
  }
  return JSON.stringify(a ?? null) === JSON.stringify(b ?? null);
}

function readConfig(checkpoint: Pick<Checkpoint, "config">, options: SwitchyardOptions): CompleteConfig {
  const config = new ConfigReader(checkpoint.config);
  const found = config.whole("format");
  if (found !== format) {
    throw new CheckpointError(
      `config.json: format is ${found}, this version reads ${format}; update @switchyard/models`,
    );
  }
  const router = config.get("router");
  if (!isRecord(router)) throw new CheckpointError("config.json: router is missing");
  const qkNorm = config.get("qkNorm") ?? false;
  if (qkNorm !== false && qkNorm !== "head" && qkNorm !== "projection") {
    throw new CheckpointError(
      `config.json: qkNorm is ${JSON.stringify(qkNorm)}, expected false, "head" or "projection"`,
    );
  }
  return completeConfig({
    vocabulary: config.whole("vocabulary"),
    width: config.whole("width"),
    layers: config.whole("layers"),
    heads: config.whole("heads"),
    kvHeads: config.whole("kvHeads"),
    headSize: config.whole("headSize"),
    experts: config.whole("experts"),
    hidden: config.whole("hidden"),
    context: config.whole("context"),
    ropeTheta: config.number("ropeTheta"),
    normEps: config.number("normEps"),
    qkNorm,
    clipQkv: config.get("clipQkv") === undefined ? undefined : config.number("clipQkv"),
    tieEmbeddings: config.boolean("tieEmbeddings"),
    sharedExperts: config.whole("sharedExperts", 0, 0),
    allowNonCausal: config.boolean("allowNonCausal", false),
    router: findRouter(new ConfigReader(router, "config.json: router"), options),
  });
}

/** What a checkpoint in our own layout holds: its tensors are named as its parameters are. */
function describeSwitchyard(checkpoint: CheckpointIndex, options: SwitchyardOptions): Description {
  const config = readConfig(checkpoint, options);
  checkCounts(checkpoint, { layers: config.layers });
  const blueprint = blueprintOf(config);
  const sources = checkpoint.names.flatMap((name): [string, Source][] => {
    const [, layer, buffer] = /^buffers\.(\d+)\.(.+)$/.exec(name) ?? [];
    if (layer === undefined && !name.startsWith("params.")) return [];
    const path = layer === undefined ? name.slice("params.".length) : `layers.${layer}.moe.buffers.${buffer}`;
    const { shape } = checkpoint.stored(name);
    return [[path, { kind: "whole", shape, pieces: [{ name, shape }] }]];
  });
  return { blueprint, sources: new Map(sources) };
}

async function read(
  checkpoint: Checkpoint,
  engine: Engine,
  options: SwitchyardOptions,
  memory: number | undefined,
): Promise<Transformer> {
  const sizes = readConfig(checkpoint, options);
  checkCounts(checkpoint, { layers: sizes.layers });
  const counts = checkpoint.names.includes(countsName) ? await readCounts(checkpoint, sizes.vocabulary) : undefined;
  const config: CompleteConfig = { ...sizes, tokenCounts: counts };
  const shapes = parameterShapes(config);
  checkMemory(shapes.values(), memory);
  const names = new Set(checkpoint.names);
  const used = new Set<string>(counts ? [countsName] : []);
  const loaded: Tensor[] = [];
  let fresh: Transformer | undefined;
  const load = async (name: string, shape: readonly number[]): Promise<Tensor> => {
    const x = await readTensor(engine, checkpoint, name, shape);
    loaded.push(x);
    used.add(name);
    return x;
  };
  try {
    const parameters = new Map<string, Tensor>();
    for (const [path, shape] of shapes) parameters.set(path, await load(`params.${path}`, shape));
    fresh = buildTransformer(engine, config, {
      random: random(engine, 0),
      parameter: (path) => parameters.get(path) as Tensor,
    });
    // Routers made their own tensors: each is replaced by what was saved, and one that layers share stays shared.
    const replacements = new Map<Tensor, Tensor>();
    const byPath = new Map<string, Tensor>();
    const replace = async (prefix: string, tree: Tree): Promise<void> => {
      for (const [path, x] of leaves(tree)) {
        const name = `${prefix}.${path}`;
        if (parameters.get(path) === x) continue;
        const shared = replacements.get(x);
        const replacement = shared && !names.has(name) ? shared : await load(name, x.shape);
        if (!shared) replacements.set(x, replacement);
        byPath.set(name, replacement);
      }
    };
    await replace("params", fresh.params);
    await replace("buffers", fresh.buffers);
    checkAllUsed(checkpoint, used, () => false);
    const swap = <T extends Tree>(prefix: string, tree: T): T =>
      mapTree(tree, (x, path) => byPath.get(`${prefix}.${path}`) ?? x);
    const [params, buffers] = [swap("params", fresh.params), swap("buffers", fresh.buffers)];
    for (const x of replacements.keys()) x.dispose();
    return fresh.with({ params, buffers });
  } catch (error) {
    for (const x of loaded) x.dispose();
    if (fresh) dispose([fresh.params, ...fresh.buffers]);
    throw error;
  }
}
