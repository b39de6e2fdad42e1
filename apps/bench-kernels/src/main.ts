// `npm run bench:kernels`: our kernels against the peers, measured in turn in one run. Timings of a busy machine mean little: close
// everything else first.
import { arch, availableParallelism, cpus, platform } from "node:os";
import { parseArgs } from "node:util";
import { chosen, type Table, tableText } from "@switchyard/bench/kernels";
import { type Engine, engine } from "@switchyard/core";
import { wasm } from "@switchyard/kernels/wasm";
import { install, installedVersion, load } from "./install.ts";
import { jax } from "./peers/jax.ts";
import { llama } from "./peers/llama.ts";
import { onnxruntimeNode, onnxruntimeWeb } from "./peers/onnxruntime.ts";
import type { Peer, PeerSource } from "./peers/peer.ts";
import { tfjs } from "./peers/tfjs.ts";
import { torch } from "./peers/torch.ts";
import { type Context, cases, type Variant } from "./suite.ts";

const sources: readonly PeerSource[] = [onnxruntimeNode, onnxruntimeWeb, tfjs, jax, llama, torch];

const usage = `npm run bench:kernels -- [options]
  --case a,b      only these cases: ${Object.keys(cases).join(", ")}
  --peer a,b      only these peers: ${sources.map(({ name }) => name).join(", ")}; "none" for none
  --variant a,b   our builds: relaxed, plain (default both)
  --threads N     threads of everyone that can have more than one (default 1)
  --quick         few and short samples, small sizes: to see that it runs
  --json          one JSON document on standard output; progress goes to standard error`;

const options = {
  case: { type: "string" },
  peer: { type: "string" },
  variant: { type: "string" },
  threads: { type: "string", default: "1" },
  quick: { type: "boolean", default: false },
  json: { type: "boolean", default: false },
  help: { type: "boolean", default: false },
} as const;

/** Installs and opens the peers; one that cannot is told in one line. */
async function openPeers(
  names: readonly string[],
  threads: number,
  say: (line: string) => void,
): Promise<readonly Peer[]> {
  const peers: Peer[] = [];
  for (const source of sources.filter(({ name }) => names.includes(name))) {
    try {
      const problem = install(source.packages);
      if (problem !== undefined) throw new Error(problem);
      const peer = await source.open({ threads, load, version: installedVersion });
      say(`  ${peer.name} ${peer.version}, ${peer.threads} thread${peer.threads > 1 ? "s" : ""}`);
      peers.push(peer);
    } catch (error) {
      say(`  ${source.name}: left out, ${(error as Error).message.split("\n")[0]}`);
    }
  }
  return peers;
}

async function main(): Promise<void> {
  const { values } = parseArgs({ options });
  if (values.help) return console.log(usage);
  const threads = Number(values.threads);
  if (!Number.isInteger(threads) || threads < 1)
    throw new Error(`--threads must be a whole number from 1 up, found ${values.threads}`);
  const names = chosen("case", values.case, Object.keys(cases));
  const variants = chosen("variant", values.variant, ["relaxed", "plain"]) as readonly Variant[];
  const peerNames = chosen(
    "peer",
    values.peer,
    sources.map(({ name }) => name),
  );
  const say = (line: string): void => (values.json ? console.error(line) : console.log(line));

  const machine = {
    cpu: cpus()[0]?.model.trim() ?? "unknown CPU",
    processors: availableParallelism(),
    platform: `${platform()} ${arch()}`,
    node: process.versions.node,
    v8: process.versions.v8,
  };
  say(`${machine.cpu}, ${machine.processors} processors, ${machine.platform}, Node ${machine.node}, V8 ${machine.v8}`);
  say(
    `${threads} thread${threads > 1 ? "s" : ""}; a ratio above 1 means that ours is faster; medians of paired samples, with extremes`,
  );
  const peers = await openPeers(peerNames, threads, say);

  const engines = new Map<string, Engine>();
  const context: Context = {
    threads,
    quick: values.quick,
    variants,
    peers,
    measuring: values.quick ? { repetitions: 3, minimumSeconds: 0.05 } : { repetitions: 7, minimumSeconds: 0.3 },
    async engine(variant, count) {
      const key = `${variant} ${count}`;
      const open = engines.get(key) ?? engine(await wasm({ variant, threads: count }));
      engines.set(key, open);
      return open;
    },
  };
  const used = Object.fromEntries(peers.map((peer) => [peer.name, peer.threads]));
  const tables: Table[] = [];
  for (const name of names) {
    for await (const table of cases[name]?.(context) ?? []) {
      tables.push(table);
      say(`\n${tableText(table, used)}`);
    }
  }
  if (values.json) {
    const versions = peers.map(({ name, version, threads: used }) => ({ name, version, threads: used }));
    const report = { machine, threads, quick: values.quick, date: new Date().toISOString(), peers: versions, tables };
    await new Promise((written) => process.stdout.write(`${JSON.stringify(report, null, 2)}\n`, written));
  }
}

main().then(
  () => process.exit(0), // peers leave threads behind
  (error: Error) => {
    console.error(`bench:kernels: ${error.message}`);
    process.exit(1);
  },
);
