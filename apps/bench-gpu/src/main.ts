// `npm run bench:gpu`: our WebGPU kernels on the device that is found, against the peers on the same device, measured in turn in one
// run. Timings of a busy machine mean little: close everything else first.
import { readFileSync } from "node:fs";
import { arch, cpus, platform } from "node:os";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { chosen, type Table, tableText } from "@switchyard/bench/kernels";
import { engine } from "@switchyard/core";
import { webgpu } from "@switchyard/kernels/webgpu";
import { copyKernel } from "./copy.ts";
import { findDevice } from "./device.ts";
import { gpujs } from "./peers/gpujs.ts";
import type { Peer, PeerSource } from "./peers/peer.ts";
import { tfjs } from "./peers/tfjs.ts";
import { queueOf } from "./queue.ts";
import { type Report, reasonToLeave, writeReadme } from "./readme.ts";
import { type Context, cases, quick, type Sizes, sizes } from "./suite.ts";

const sources: readonly PeerSource[] = [tfjs, gpujs];
const readme = fileURLToPath(new URL("../../../packages/kernels/README.md", import.meta.url));

const usage = `npm run bench:gpu -- [options]
  --case a,b   only these cases: ${Object.keys(cases).join(", ")}
  --peer a,b   only these peers: ${sources.map(({ name }) => name).join(", ")}; "none" for none
  --full       full sizes on a driver that computes on the processor, too (an hour rather than minutes)
  --quick      few and short samples, few sizes: to see that it runs
  --json       one JSON document on standard output; progress goes to standard error
A whole run on a GPU writes its figures into packages/kernels/README.md.`;

const options = {
  case: { type: "string" },
  peer: { type: "string" },
  full: { type: "boolean", default: false },
  quick: { type: "boolean", default: false },
  json: { type: "boolean", default: false },
  help: { type: "boolean", default: false },
} as const;

/** Opens the peers; one that cannot be used is told in one line. */
async function openPeers(
  names: readonly string[],
  software: boolean,
  say: (line: string) => void,
): Promise<readonly Peer[]> {
  const peers: Peer[] = [];
  for (const source of sources.filter(({ name }) => names.includes(name))) {
    try {
      const peer = await source.open({ software });
      say(`  ${peer.name} ${peer.version}`);
      peers.push(peer);
    } catch (error) {
      say(`  ${source.name}: left out, ${(error as Error).message.split("\n")[0]}`);
    }
  }
  return peers;
}

function chosenSizes(software: boolean, full: boolean, few: boolean): Sizes {
  const whole = software ? (full ? sizes.patient : sizes.small) : sizes.full;
  return few ? quick(whole) : whole;
}

const versionOf = (name: string): string =>
  (JSON.parse(readFileSync(fileURLToPath(import.meta.resolve(`${name}/package.json`)), "utf8")) as { version: string })
    .version;

async function main(): Promise<void> {
  const { values } = parseArgs({ options });
  if (values.help) return console.log(usage);
  const names = chosen("case", values.case, Object.keys(cases));
  const peerNames = chosen(
    "peer",
    values.peer,
    sources.map(({ name }) => name),
  );
  const say = (line: string): void => (values.json ? console.error(line) : console.log(line));
  const started = performance.now();

  const { device, info } = await findDevice(say);
  const backend = await webgpu({ device });
  const queue = queueOf(device, () => backend.flush());
  const host = { cpu: cpus()[0]?.model.trim() ?? "unknown CPU", platform: `${platform()} ${arch()}` };
  const { software } = info;
  const clock = queue.stopwatch
    ? "Times are wall clock over many queued runs with one wait at the end, submissions included; device ms are the device's own clock (timestamp-query) over the same runs."
    : "Times are wall clock over many queued runs with one wait at the end, submissions included; the device has no clock (timestamp-query).";
  say(
    `${info.name} (${info.vendor} ${info.architecture}), ${software ? "a driver that computes on the processor" : "a GPU"}`,
  );
  say(
    `  limits: ${Object.entries(info.limits)
      .map(([name, value]) => `${name} ${value}`)
      .join(", ")}`,
  );
  say(`  features: ${info.features.join(", ") || "none"}`);
  say(`  ${host.cpu}, ${host.platform}, Node ${process.versions.node}, webgpu ${versionOf("webgpu")}`);
  say(`${clock}\nA ratio above 1 means that ours is faster; medians of paired samples, with extremes.`);
  if (software && !values.full)
    say(
      "Layers, rows and weights are much smaller than on a GPU; --full takes the full ones. Nothing is judged by its goal here.",
    );
  const peers = await openPeers(peerNames, software, say);

  const context: Context = {
    engine: engine(backend),
    queue,
    peers,
    sizes: chosenSizes(software, values.full, values.quick),
    measuring:
      software || values.quick ? { repetitions: 3, minimumSeconds: 0.05 } : { repetitions: 7, minimumSeconds: 0.3 },
    judged: !software,
    copy: (bytes) => copyKernel(device, bytes, queue),
  };
  const tables: Table[] = [];
  for (const name of names) {
    for await (const table of cases[name]?.(context) ?? []) {
      tables.push(table);
      say(`\n${tableText(table)}`);
    }
  }
  const report: Report = {
    device: info,
    date: new Date().toISOString(),
    host,
    versions: {
      Node: process.versions.node,
      webgpu: versionOf("webgpu"),
      ...Object.fromEntries(peers.map(({ name, version }) => [name, version])),
    },
    clock,
    tables,
  };
  say(`\nMeasured in ${((performance.now() - started) / 1000).toFixed(0)} s.`);
  const whole = !values.quick && values.case === undefined && values.peer === undefined;
  const reason = reasonToLeave({ software, whole });
  if (reason === undefined) writeReadme(readme, report);
  say(reason === undefined ? `Written into ${readme}` : `Not written into the README of packages/kernels: ${reason}.`);
  if (values.json)
    await new Promise((written) => process.stdout.write(`${JSON.stringify(report, null, 2)}\n`, written));
}

main().then(
  () => process.exit(0), // devices keep the process alive
  (error: Error) => {
    console.error(`bench:gpu: ${error.message}`);
    process.exit(1);
  },
);
