import { engine, random } from "@switchyard/core";
import { topK } from "@switchyard/routers/top-k";
import { transformer, generate } from "@switchyard/models";
import { wasm } from "@switchyard/kernels/wasm";
const backend = await wasm({ threads: 1 });
const e = engine(backend);
const model = transformer(e, { vocabulary: 8192, width: 512, layers: 8, heads: 8, kvHeads: 4, experts: 16, hidden: 512, router: topK({ k: 2 }), context: 1024, qkNorm: "projection" }, random(e, 1));
const active = 8*(512*512*2+512*256*2 + 2*3*512*512)+8192*512;
console.log("active MB", active*4/1e6);
const prompt = Array.from({length: 64}, (_, i) => i*7%8192);
for (let r=0;r<2;r++){
 let t0 = performance.now(), c0=process.cpuUsage(), n=0, first=0;
 for await (const t of generate(model, { prompt, maxNew: 65, temperature: 0 })) { if (n===0){ first = performance.now()-t0; t0=performance.now(); c0=process.cpuUsage();} n++; }
 const c=process.cpuUsage(c0);
 console.log("prefill ms", first.toFixed(1), "per token ms wall", ((performance.now()-t0)/64).toFixed(2), "cpu", ((c.user+c.system)/64000).toFixed(2));
}
process.exit(0);
