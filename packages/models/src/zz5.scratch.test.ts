import { engine } from "@switchyard/core";
import { wasm } from "@switchyard/kernels/wasm";
import { expect, it } from "vitest";
import { loadModel } from "./pretrained.ts";
import { generate } from "./generate.ts";
import { architectures } from "./architectures/families.ts";
import { checkDescription } from "./load.ts";
import { planMemory } from "./memory.ts";
import { streamedLayers } from "./streamed-experts.ts";
import * as M from "./index.ts";
const fix = (n: string) => new URL(`../test/fixtures/${n}`, import.meta.url).pathname;
const backend = await wasm({ threads: 1 });
const on = engine(backend);
it("options", async () => {
  const l = await loadModel(fix("olmoe"), { engine: on });
  const live = on.live();
  const tryIt = async (o: any) => {
    let msg = "";
    const ids: number[] = [];
    try { for await (const t of generate(l.model, { prompt: [1, 2, 3], maxNew: 3, temperature: 0, ...o })) ids.push(t.id); msg = "ok " + ids.join(); } catch (e) { msg = `${(e as Error).name}: ${(e as Error).message}`; }
    const s = JSON.stringify(o, (_, v) => typeof v === "number" && !Number.isFinite(v) ? String(v) : v);
    console.log("ZZ", s.slice(0, 90), "=>", msg.slice(0, 200), on.live() - live || "");
  };
  const E = (l.model.routing[0] as any).experts;
  console.log("ZZ experts", E, l.model.vocabulary, l.model.context);
  for (const seed of [NaN, -1, 1.5, 2 ** 53, Infinity]) await tryIt({ seed, temperature: 1 });
  for (const stop of [[-1], [1e9], [NaN], [1.5]]) await tryIt({ stop });
  for (const routing of [{ k: 0 }, { k: 1e9 }, { k: E }, { k: 1.5 }, { k: -1 }, { k: NaN }, { ranks: [] }, { ranks: [99] }, { ranks: [-1] }, { ranks: [0, 0] }, { ranks: [0.5] }, { threshold: 2 }, { threshold: -1 }, { threshold: 0 }, { threshold: 1 }, { threshold: NaN }, { layers: [99] , k: 1}, { layers: [-1], k: 1 }, { layers: [], k: 1 }, { forced: [99] }, { forced: [0, 0] }, { forced: [0] }, { masked: Array.from({ length: E }, (_, i) => i) }, { masked: [99] }, { masked: [0] }, { nonsense: 1 }, {}]) await tryIt({ routing });
  await tryIt({ prompt: [] }); await tryIt({ prompt: new Int32Array([1, 2]) }); await tryIt({ prompt: [1.5] }); await tryIt({ prompt: [1e9] }); await tryIt({ prompt: "x" });
  await tryIt({ maxNew: 0 }); await tryIt({ maxNew: Infinity, prompt: Array.from({ length: l.model.context - 1 }, () => 1) }); await tryIt({ topLogProbabilities: l.model.vocabulary }); await tryIt({ prefillChunk: 0 });
  await tryIt({ stop: ["a"] }); await tryIt({ temperature: -1 }); await tryIt({ temperature: 1e-310, seed: 1 }); await tryIt({ temperature: 1e300, seed: 1 }); await tryIt({ temperature: 1, topK: 1e9 }); await tryIt({ temperature: 1, topP: 1e-300 }); await tryIt({ temperature: 1, minP: 1 }); await tryIt({ repetitionPenalty: 1e308 }); await tryIt({ repetitionPenalty: 1e-308 });
  for (const f of [() => M.beam({ width: 1000 }), () => M.beam({ width: 0 }), () => M.beam({ lengthPenalty: NaN }), () => M.beam({ lengthPenalty: 1000 }), () => M.contrastiveSearch({ candidates: 1000 }), () => M.contrastiveSearch({ alpha: 2 }), () => M.selfContrast({ weakRank: 99 }), () => M.selfContrast({ weakRank: E }), () => M.selfContrast({ beta: 1e308 }), () => M.selfContrast({ alpha: 0 }), () => M.selfContrast({ alpha: 1 }), () => M.selfContrast({ temperatures: { strong: 1e-310 } }), () => M.doLa({ layers: [] }), () => M.doLa({ layers: [99] }), () => M.doLa({ layers: [0, 0] }), () => M.doLa({ alpha: 0 }), () => M.ensembleRouting({ k: 99 }), () => M.dynamicRouting({ threshold: 1 }), () => M.dynamicRouting({ k: 0 }), () => M.selfConsistency({ answer: () => undefined, samples: 2 }), () => M.selfConsistency({ answer: () => { throw new Error("mine"); }, samples: 2 })]) {
    let s: any; try { s = f(); } catch (e) { console.log("ZZ", String(f), (e as Error).message); continue; }
    console.log("ZZ strat", String(f)); await tryIt({ strategy: s, temperature: undefined });
  }
  await l.close();
});
it("sizes", async () => {
  const config: any = { model_type: "deepseek_v3", torch_dtype: "bfloat16", vocab_size: 129280, first_k_dense_replace: 3, num_nextn_predict_layers: 0, rope_scaling: null };
  for (const quant of [undefined, { quant_method: "fp8", fmt: "e4m3", weight_block_size: [128, 128], activation_scheme: "dynamic" }]) {
    const cfg = { ...config, ...(quant ? { quantization_config: quant } : {}) };
    const arch = architectures.find((a) => a.modelTypes.includes("deepseek_v3"))!;
    const dummy = { config: cfg, names: Array.from({ length: 100000 }, (_, i) => `x${i}`), stored: () => { throw new Error(); } } as any;
    const d = arch.describe(dummy);
    const shapes = new Map<string, any>();
    for (const s of d.sources.values()) {
      const ps = s.kind === "whole" ? s.pieces : Array.from({ length: s.shape[0]! }, (_, e) => s.expert(e)).flat();
      for (const p of ps) {
        const q = quant && p.shape.length === 2 && /proj/.test(p.name);
        shapes.set(p.name, { shape: p.shape, dtype: q ? "F8_E4M3" : "BF16", bytes: 0 });
        if (q) shapes.set(p.name + "_scale_inv", { shape: p.shape.map((x) => Math.ceil(x / 128)), dtype: "F32", bytes: 0 });
      }
    }
    const index: any = { config: cfg, names: [...shapes.keys()], stored: (n: string) => shapes.get(n)!, read: async () => new Uint8Array(), };
    let t = performance.now(); const lap = (w: string) => { console.log("ZZ time", quant ? "fp8" : "bf16", w, (performance.now() - t).toFixed(0)); t = performance.now(); };
    const d2 = arch.describe(index); lap("describe");
    checkDescription(index, d2); lap("check");
    streamedLayers(on, index, d2); lap("streamedLayers");
    try { console.log("ZZ", JSON.stringify(planMemory(on, index, d2, { memory: 1e11 }))); } catch (e) { console.log("ZZ", (e as Error).message); } lap("plan");
  }
}, 120000);
