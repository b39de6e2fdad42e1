// llama.cpp through node-llama-cpp: a Mixtral of such layers with as little attention as it allows, reading a prompt; and models from
// files, making text. It computes no feed-forward of the last layer where nobody asks for logits, so the first has one layer more
// than is counted.
import { mkdtemp, rm } from "node:fs/promises";
import { availableParallelism, tmpdir } from "node:os";
import { join } from "node:path";
import { type Contender, type LayerCase, layerData, noise } from "@switchyard/bench/kernels";
import { type GgufTensor, writeGguf } from "../gguf.ts";
import type { PeerSource } from "./peer.ts";

interface Sequence {
  clearHistory(): Promise<void>;
  evaluate(tokens: readonly number[], options: object): AsyncGenerator<number>;
  controlledEvaluate(
    tokens: readonly (number | readonly [number, object])[],
  ): Promise<readonly ({ readonly next: { readonly probabilities?: ReadonlyMap<number, number> } } | undefined)[]>;
  evaluateWithoutGeneratingNewTokens(tokens: readonly number[]): Promise<void>;
}
interface Disposable {
  dispose(): Promise<void>;
}
interface Context extends Disposable {
  getSequence(): Sequence;
}
interface LlamaModel extends Disposable {
  createContext(options: object): Promise<Context>;
}
interface Llama {
  loadModel(options: object): Promise<LlamaModel>;
}
interface NodeLlamaCpp {
  getLlama(options: object): Promise<Llama>;
}

const name = "node-llama-cpp";
const systems: Readonly<Record<string, string>> = { linux: "linux", darwin: "mac", win32: "win" };
const binary = `@node-llama-cpp/${systems[process.platform]}-${process.arch}${process.platform === "darwin" && process.arch === "arm64" ? "-metal" : ""}`;
const vocabulary = 259;

async function write(path: string, one: LayerCase, depth: number): Promise<void> {
  const { experts, width, hidden, k } = one;
  const d = 32;
  const { gateUp, down } = layerData({ ...one, tokens: 0 });
  const gate = new Float32Array(experts * hidden * width);
  const up = new Float32Array(experts * hidden * width);
  const half = hidden * width;
  for (let e = 0; e < experts; e++) {
    gate.set(gateUp.subarray(2 * e * half, (2 * e + 1) * half), e * half);
    up.set(gateUp.subarray((2 * e + 1) * half, (2 * e + 2) * half), e * half);
  }
  const ones = new Float32Array(width).fill(1);
  const small = (n: number, seed: number): Float32Array => noise(n, seed, 0.05);
  const tensors: GgufTensor[] = [
    { name: "token_embd.weight", shape: [vocabulary, width], data: noise(vocabulary * width, 20) },
    { name: "output_norm.weight", shape: [width], data: ones },
    { name: "output.weight", shape: [vocabulary, width], data: small(vocabulary * width, 21) },
  ];
  for (let layer = 0; layer < depth; layer++) {
    const tensor = (key: string, shape: readonly number[], data: Float32Array): void => {
      tensors.push({ name: `blk.${layer}.${key}.weight`, shape, data });
    };
    tensor("attn_norm", [width], ones);
    for (const key of ["attn_q", "attn_k", "attn_v"]) tensor(key, [d, width], small(d * width, 22 + layer));
    tensor("attn_output", [width, d], small(d * width, 30 + layer));
    tensor("ffn_norm", [width], ones);
    tensor("ffn_gate_inp", [experts, width], small(experts * width, 40 + layer));
    tensor("ffn_gate_exps", [experts, hidden, width], gate);
    tensor("ffn_up_exps", [experts, hidden, width], up);
    tensor("ffn_down_exps", [experts, width, hidden], down);
  }
  const byteTokens = Array.from({ length: 256 }, (_, i) => `<0x${i.toString(16).toUpperCase().padStart(2, "0")}>`);
  const keys = {
    "general.architecture": "llama",
    "llama.block_count": depth,
    "llama.context_length": 8192,
    "llama.embedding_length": width,
    "llama.feed_forward_length": hidden,
    "llama.attention.head_count": 1,
    "llama.attention.head_count_kv": 1,
    "llama.attention.key_length": d,
    "llama.attention.value_length": d,
    "llama.attention.layer_norm_rms_epsilon": { float: 1e-6 },
    "llama.rope.dimension_count": d,
    "llama.expert_count": experts,
    "llama.expert_used_count": k,
    "llama.vocab_size": vocabulary,
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", ...byteTokens],
    "tokenizer.ggml.token_type": [2, 3, 3, ...byteTokens.map(() => 6)], // unknown, control, byte
  };
  await writeGguf(path, keys, tensors);
}

/** `count` greedy tokens. */
async function greedyTokens(sequence: Sequence, prompt: readonly number[], count: number): Promise<number[]> {
  await sequence.clearHistory();
  const ids: number[] = [];
  if (count === 0) return ids;
  for await (const id of sequence.evaluate(prompt, { temperature: 0, yieldEogToken: true })) {
    ids.push(id);
    if (ids.length === count) break;
  }
  return ids;
}

/** Natural logarithms of the probabilities after a prompt, by id. */
async function said(sequence: Sequence, prompt: readonly number[]): Promise<Float64Array> {
  await sequence.clearHistory();
  const uncut = { temperature: 1, topK: 0, topP: 1, minP: 0 };
  const last = prompt.at(-1) ?? 0;
  const results = await sequence.controlledEvaluate([
    ...prompt.slice(0, -1),
    [last, { generateNext: { probabilities: true, options: uncut } }],
  ]);
  const probabilities = results.at(-1)?.next.probabilities;
  if (!probabilities) throw new Error("it tells no probabilities");
  const logs = new Float64Array(probabilities.size);
  for (const [id, p] of probabilities) logs[id] = Math.log(p);
  return logs;
}

export const llama: PeerSource = {
  name,
  packages: { [name]: "^3.22.1", [binary]: "^3.22.1" },
  async open({ threads, load, version }) {
    const { getLlama } = (await load(name)) as NodeLlamaCpp;
    const host = await getLlama({
      gpu: false,
      build: "never",
      logLevel: "error",
      maxThreads: Math.max(threads, availableParallelism()), // contexts say how many they use
      progressLogs: false,
    });
    return {
      name,
      version: version(name),
      threads,
      async stack(one, depth): Promise<Contender> {
        const folder = await mkdtemp(join(tmpdir(), "switchyard-llama-"));
        const path = join(folder, "model.gguf");
        await write(path, one, depth + 1);
        const model = await host.loadModel({ modelPath: path, gpuLayers: 0 });
        const context = await model.createContext({
          contextSize: one.tokens + 16,
          batchSize: one.tokens,
          threads: { ideal: threads, min: threads },
        });
        const sequence = context.getSequence();
        const prompt = Array.from({ length: one.tokens }, (_, i) => 3 + ((i * 37) % 256));
        return {
          name,
          async run() {
            await sequence.clearHistory();
            await sequence.evaluateWithoutGeneratingNewTokens(prompt);
          },
          async dispose() {
            await context.dispose();
            await model.dispose();
            await rm(folder, { recursive: true, force: true });
          },
        };
      },
      async generation({ prompt, tokens, gguf, threads: count, checked }): Promise<Contender> {
        const model = await host.loadModel({ modelPath: gguf, gpuLayers: 0 });
        const length = prompt.length + Math.max(tokens, checked) + 16;
        const open = (options: object): Promise<Context> =>
          model.createContext({
            contextSize: length,
            batchSize: length,
            threads: { ideal: count, min: count },
            ...options,
          });
        const context = await open({});
        const timed = context.getSequence();
        return {
          name,
          run: () => greedyTokens(timed, prompt, tokens),
          // As it comes it rounds keys, values and what flash attention multiplies to f16, and near ties turn: checked is its exact way.
          async output() {
            const exact = await open({
              flashAttention: false,
              experimentalKvCacheKeyType: "F32",
              experimentalKvCacheValueType: "F32",
            });
            try {
              const sequence = exact.getSequence();
              const logs = await said(sequence, prompt);
              return checked > 0 ? [logs, await greedyTokens(sequence, prompt, checked)] : [logs];
            } finally {
              await exact.dispose();
            }
          },
          async dispose() {
            await context.dispose();
            await model.dispose();
          },
        };
      },
    };
  },
};
