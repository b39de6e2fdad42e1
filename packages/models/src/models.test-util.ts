// What the tests of this package share: an engine, a plain top-k router, ids, and a transformer in naive float64 loops.
import { type Engine, engine, leaves, linear, random, softmaxTopk, type Tensor, type Tree } from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import type { RouterPlugin } from "@switchyard/core/moe";
import { loadModel, type OpenOptions } from "./pretrained.ts";
import { asTransformer, transformer } from "./transformer.ts";
import type { TransformerConfig } from "./transformer-config.ts";

export const makeEngine = (precision: 32 | 64 = 32): Engine => engine(cpu({ precision }));

/** Softmax over all experts, the k largest, renormalised; `spread` sharpens the choice so that tests route unevenly. */
export function plainTopK(k: number, spread = 1): RouterPlugin {
  return {
    name: "plainTopK",
    causal: { training: true, evaluation: true },
    needs: [],
    plans: ["sparse"],
    options: { k },
    expertsPerToken: k,
    init: ({ engine: on, experts, width, random: draw }) => ({
      params: {
        weight: on.tensor(
          draw.host("normal", experts * width).map((x) => x * spread),
          [experts, width],
        ),
      },
      buffers: {},
      route: (params, { hidden }) => {
        const { weight } = params as { weight: Tensor };
        const { weights, ids } = softmaxTopk(linear(hidden, weight), { k, order: "softmax-topk-renormalise" });
        return { plan: { kind: "sparse", experts: ids, weights }, losses: {} };
      },
    }),
  };
}

export const smallConfig: TransformerConfig = {
  vocabulary: 13,
  width: 8,
  layers: 2,
  heads: 4,
  kvHeads: 2,
  headSize: 6,
  experts: 5,
  hidden: 7,
  router: plainTopK(2),
  context: 12,
};

/** A model whose parameters are large enough that every part of it matters in the logits. */
export function loudModel(on: Engine, config: TransformerConfig) {
  const model = transformer(on, config, random(on, 3));
  for (const [, leaf] of leaves(model.params)) leaf.dispose();
  const draw = random(on, 5);
  const params = rebuild(model.params, (path, x) => {
    const base = path.endsWith("orm") ? 1 : 0;
    const scale = path.endsWith("orm") ? 0.3 : 0.5;
    return on.tensor(
      draw
        .at(path)
        .host("normal", x.size)
        .map((v) => base + scale * v),
      x.shape,
    );
  });
  return model.with({ params });
}

function rebuild(tree: Tree, make: (path: string, x: Tensor) => Tensor): Tree {
  const made = new Map(leaves(tree).map(([path, x]) => [path, make(path, x)]));
  const visit = (node: Tree, path: string): Tree => {
    const known = made.get(path);
    if (known) return known;
    if (Array.isArray(node)) return node.map((child: Tree, i) => visit(child, path ? `${path}.${i}` : `${i}`));
    return Object.fromEntries(
      Object.entries(node as { [key: string]: Tree }).map(([key, child]) => [
        key,
        visit(child, path ? `${path}.${key}` : key),
      ]),
    );
  };
  return visit(tree, "");
}

export const readAll = async (params: Tree): Promise<Map<string, number[]>> =>
  new Map(
    await Promise.all(
      leaves(params).map(async ([path, x]) => [path, Array.from(await x.data())] as [string, number[]]),
    ),
  );

/** Logits [sequence][vocabulary] of one sequence, written from the equations, sharing no code with the package. */
export function naiveForward(
  config: TransformerConfig,
  p: Map<string, number[]>,
  ids: readonly number[],
  k: number,
): number[][] {
  const { width, layers, heads, experts, hidden, vocabulary, ropeTheta = 10000, normEps = 1e-5 } = config;
  const kvHeads = config.kvHeads ?? heads;
  const d = config.headSize ?? width / heads;
  const get = (path: string): number[] => p.get(path) ?? [];
  const times = (w: number[], x: number[], rows: number, from = 0): number[] =>
    Array.from({ length: rows }, (_, r) => x.reduce((sum, v, c) => sum + v * (w[from + r * x.length + c] ?? 0), 0));
  const norm = (x: number[], w: number[]): number[] => {
    const scale = 1 / Math.sqrt(x.reduce((sum, v) => sum + v * v, 0) / x.length + normEps);
    return x.map((v, i) => v * scale * (w[i] ?? 0));
  };
  const heads2 = (x: number[]): number[][] =>
    Array.from({ length: x.length / d }, (_, h) => x.slice(h * d, (h + 1) * d));
  const turn = (x: number[], position: number): number[] =>
    x.map((v, i) => {
      const j = i % (d / 2);
      const angle = position * ropeTheta ** ((-2 * j) / d);
      const other = i < d / 2 ? -(x[i + d / 2] ?? 0) : (x[i - d / 2] ?? 0);
      return v * Math.cos(angle) + other * Math.sin(angle);
    });
  const clip = (x: number[]): number[] => {
    const c = config.clipQkv ?? Infinity;
    return x.map((v) => Math.min(Math.max(v, -c), c));
  };
  const expert = (x: number[], gateUp: number[], down: number[], e: number, size: number): number[] => {
    const both = times(gateUp, x, 2 * size, e * 2 * size * width);
    const inner = both.slice(0, size).map((g, i) => (g / (1 + Math.exp(-g))) * (both[size + i] ?? 0));
    return times(down, inner, width, e * width * size);
  };
  let xs = ids.map((id) => get("embed").slice(id * width, (id + 1) * width));
  for (let layer = 0; layer < layers; layer++) {
    const at = (name: string): number[] => get(`layers.${layer}.${name}`);
    const projected = xs.map((x, position) => {
      const y = norm(x, at("attentionNorm"));
      const make = (name: string, count: number): number[][] => {
        let z = times(at(`attention.${name}`), y, count * d);
        const scale = at(`attention.${name}Norm`);
        if (config.qkNorm === "projection" && name !== "v") z = norm(z, scale);
        z = clip(z);
        let list = heads2(z);
        if (config.qkNorm === "head" && name !== "v") list = list.map((h) => norm(h, scale));
        return name === "v" ? list : list.map((h) => turn(h, position));
      };
      return { q: make("q", heads), k: make("k", kvHeads), v: make("v", kvHeads) };
    });
    xs = xs.map((x, i) => {
      const all = Array.from({ length: heads }, (_, h) => {
        const shared = Math.floor(h / (heads / kvHeads));
        const q = projected[i]?.q[h] ?? [];
        const seen = projected.slice(0, i + 1);
        const scores = seen.map(
          ({ k: keys }) => q.reduce((sum, v, c) => sum + v * (keys[shared]?.[c] ?? 0), 0) / Math.sqrt(d),
        );
        const top = Math.max(...scores);
        const e = scores.map((s) => Math.exp(s - top));
        const total = e.reduce((a, b) => a + b, 0);
        return q.map((_, c) => seen.reduce((sum, { v }, j) => sum + ((e[j] ?? 0) / total) * (v[shared]?.[c] ?? 0), 0));
      }).flat();
      const residual = times(at("attention.o"), all, width).map((v, c) => v + (x[c] ?? 0));
      const y = norm(residual, at("moeNorm"));
      const scores = times(at("moe.router.weight"), y, experts);
      const chosen = [...scores.keys()].sort((a, b) => (scores[b] ?? 0) - (scores[a] ?? 0) || a - b).slice(0, k);
      const e = chosen.map((id) => Math.exp((scores[id] ?? 0) - Math.max(...scores)));
      const total = e.reduce((a, b) => a + b, 0);
      const out = [...residual];
      for (const [slot, id] of chosen.entries()) {
        const part = expert(y, at("moe.experts.gateUp"), at("moe.experts.down"), id, hidden);
        for (const [c, v] of part.entries()) out[c] = (out[c] ?? 0) + ((e[slot] ?? 0) / total) * v;
      }
      if (config.sharedExperts) {
        const size = config.sharedExperts * hidden;
        const part = expert(y, at("moe.shared.0.experts.gateUp"), at("moe.shared.0.experts.down"), 0, size);
        for (const [c, v] of part.entries()) out[c] = (out[c] ?? 0) + v;
      }
      return out;
    });
  }
  const head = get(config.tieEmbeddings ? "embed" : "head");
  return xs.map((x) => times(head, norm(x, get("norm")), vocabulary));
}

/** `loadModel` of what was saved by `saveModel`: models with a config. */
export async function loadSaved(folder: string, options: OpenOptions) {
  const loaded = await loadModel(folder, options);
  return { ...loaded, model: asTransformer(loaded.model) };
}
