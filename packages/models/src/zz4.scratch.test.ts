import { cpSync, existsSync, mkdtempSync, readdirSync, readFileSync, writeFileSync, truncateSync, statSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { engine } from "@switchyard/core";
import { wasm } from "@switchyard/kernels/wasm";
import { expect, it } from "vitest";
import { loadModel } from "./pretrained.ts";
import { openCheckpoint } from "./checkpoint.ts";
import { planMemory } from "./memory.ts";
import { mixtral } from "./architectures/mixtral.ts";
import { generate, generateBatch } from "./generate.ts";
import * as M from "./index.ts";
const fix = new URL("../test/fixtures/mixtral", import.meta.url).pathname;
const backend = await wasm({ threads: 1 });
const on = engine(backend);
const c0 = await openCheckpoint(fix);
const plan = planMemory(on, c0, mixtral.describe(c0)); await c0.close();
const prompt = [1, 2, 3, 4];
const strategies = (m: any): any[] => [undefined, M.greedy(), M.beam({ width: 3 }), M.selfContrast(), M.contrastive({ amateur: m }), M.contrastiveSearch(), M.doLa(), M.dynamicRouting(), M.ensembleRouting(), M.selfConsistency({ answer: (s) => s.ids.join(), samples: 3 })];
const all = async (m: any, o: any) => { const r: number[] = []; for await (const t of generate(m, { prompt, maxNew: 6, ...o })) r.push(t.id); return r.join(); };
for (const memory of [undefined, plan.least, plan.least + 2 * plan.expertBytes])
it(`strategies concurrently, ${memory}`, async () => {
  for (const streaming of (memory ? ["lru", "lfu", "prefetch"] : ["lru"]) as any[]) {
  const l = await loadModel(fix, { engine: on, ...(memory ? { memory, streaming } : {}) });
  const live = on.live();
  const seq: string[] = [];
  for (const s of strategies(l.model)) seq.push(await all(l.model, s ? { strategy: s } : { temperature: 0.9, topK: 20, topP: 0.95, minP: 0.01, repetitionPenalty: 1.1 }));
  expect(on.live()).toBe(live);
  const par = await Promise.all(strategies(l.model).map((s) => all(l.model, s ? { strategy: s } : { temperature: 0.9, topK: 20, topP: 0.95, minP: 0.01, repetitionPenalty: 1.1 })));
  expect(par).toEqual(seq);
  expect(on.live()).toBe(live);
  // abort at each
  for (const s of strategies(l.model)) {
    for (const after of [0, 1, 3]) {
      const ac = new AbortController();
      let n = 0; if (after === 0) ac.abort(new Error("stop!"));
      let msg = "none";
      try { for await (const _ of generate(l.model, { prompt, maxNew: 6, ...(s ? { strategy: s } : {}), signal: ac.signal, prefillChunk: 1 })) { if (++n === after) ac.abort(new Error("stop!")); } } catch (e) { msg = (e as Error).message; }
      if (msg !== "stop!") console.log("ZZ abort", s?.name, after, msg, n);
      if (on.live() !== live) console.log("ZZ abort leak", s?.name, after, on.live() - live);
    }
    let n = 0;
    for await (const _ of generateBatch(l.model, { prompts: [prompt, [7], [7]], maxNew: 6, ...(s ? { strategy: s } : {}) })) { if (++n === 2) break; }
    if (on.live() !== live) console.log("ZZ break leak", s?.name, on.live() - live);
    // return in flight
    const g = generate(l.model, { prompt, maxNew: 6, ...(s ? { strategy: s } : {}) });
    const p = g.next(); const r = g.return("maxNew" as any);
    await p.catch((e) => console.log("ZZ inflight", e.message)); await r;
    if (on.live() !== live) console.log("ZZ inflight leak", s?.name, on.live() - live);
    // context full
    const full = Array.from({ length: l.model.context - 2 }, (_, i) => i % 50);
    try { let k = 0; for await (const _ of generate(l.model, { prompt: full, ...(s ? { strategy: s } : {}) })) k++; if (k !== 3) console.log("ZZ full", s?.name, k); } catch (e) { console.log("ZZ full", s?.name, (e as Error).message); }
    // vocabulary-all stop
  }
  // close during
  const g = generate(l.model, { prompt, maxNew: 50 });
  await g.next();
  const pending = g.next();
  await l.close();
  await pending.then(() => console.log("ZZ pending ok"), (e) => console.log("ZZ pending:", e.name, e.message.slice(0, 100)));
  await g.next().catch((e) => console.log("ZZ next:", e.name, e.message.slice(0, 100)));
  await g.return("maxNew" as any);
  if (on.live() !== 0) console.log("ZZ close leak", on.live());
  await l.close();
  }
}, 120000);
it("cut file", async () => {
  for (const memory of [plan.least]) {
  const dir = mkdtempSync(join(tmpdir(), "cut-")); cpSync(fix, dir, { recursive: true });
  const f = readdirSync(dir).filter((x) => x.endsWith(".safetensors") && !x.startsWith("golden"));
  const l = await loadModel(dir, { engine: on, memory });
  const live = on.live();
  const good = await all(l.model, { temperature: 0 });
  const copy = f.map((x) => readFileSync(join(dir, x)));
  for (const x of f) truncateSync(join(dir, x), statSync(join(dir, x)).size >> 1);
  for (let i = 0; i < 4; i++) await all(l.model, { temperature: 0, prompt: [i * 9 + 1, 3, 99, 200, 41] }).then((x) => console.log("ZZ cut: worked", x), (e) => console.log("ZZ cut", e.name, e.message, on.live() - live));
  f.forEach((x, i) => writeFileSync(join(dir, x), copy[i]!));
  expect(await all(l.model, { temperature: 0 })).toBe(good);
  expect(on.live()).toBe(live);
  await l.close();
  expect(on.live()).toBe(0);
  }
}, 60000);
