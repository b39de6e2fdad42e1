// `switchyard cache-sim`: what a cache of experts would hold and read in the runs that a routing trace recorded.
import { CheckpointError, UnsupportedError } from "@switchyard/core";
import {
  type CachePolicy,
  type CacheResult,
  cachePolicies,
  expertRequests,
  fileSource,
  readTrace,
  simulateCache,
  type TraceChunk,
} from "@switchyard/models";
import { type ArgsDef, defineCommand } from "citty";
import { byteSize, count, exactly, readArguments, shownBytes, table } from "./arguments.ts";
import type { Streams } from "./terminal.ts";
import { usageText } from "./usage.ts";

const cacheArgs = {
  "experts-per-layer": {
    type: "string",
    description: "Experts that each layer may keep, several sizes separated by commas (default: 1, 2, 4, ... and all)",
    valueHint: "N,...",
  },
  memory: {
    type: "string",
    description: "Memory of one cache for all layers instead, such as 512MB or 3GB, several separated by commas",
    valueHint: "SIZE,...",
  },
  "expert-bytes": {
    type: "string",
    description: "Bytes of one expert, such as 17MB, where the trace does not say it",
    valueHint: "SIZE",
  },
  policy: {
    type: "string",
    description: `${cachePolicies.join(", ")}, separated by commas (default: all)`,
    valueHint: "NAME,...",
  },
  json: { type: "boolean", description: "Print everything, per layer too, as JSON" },
} as const satisfies ArgsDef;

const cacheCommand = defineCommand({
  meta: {
    name: "switchyard cache-sim",
    description: "Predict hit rate and bytes read of a cache of experts from a routing trace",
  },
  args: { trace: { type: "positional", description: "A routing trace", required: true }, ...cacheArgs },
});

const example = `
EXAMPLE

  switchyard cache-sim run.trace --experts-per-layer 4,8,16 --policy lru,belady
  switchyard cache-sim run.trace --memory 2GB,3GB --expert-bytes 17MB --json
`;

function policiesOf(names: readonly string[] | undefined): readonly CachePolicy[] {
  return (names ?? cachePolicies).map((name) => {
    const found = cachePolicies.find((one) => one === name);
    if (found) return found;
    throw new UnsupportedError(`--policy takes ${cachePolicies.join(", ")}, found ${JSON.stringify(name)}`);
  });
}

const countOf = (part: string): number => {
  if (/^\d+$/.test(part) && Number.isSafeInteger(Number(part))) return Number(part);
  throw new UnsupportedError(`--experts-per-layer takes whole numbers from 0, found ${JSON.stringify(part)}`);
};

const numbersOf = ({ capacity, total }: CacheResult): string[] => [
  `${capacity}`,
  `${(100 * total.hitRate).toFixed(1)} %`,
  `${total.misses}`,
  `${total.prefetches}`,
  total.bytesRead === null ? "unknown" : shownBytes(total.bytesRead),
];

/** Runs the command. Answers the exit code. @throws UnsupportedError, CheckpointError, ShapeError for what a user can mend. */
export async function cacheSim(rest: readonly string[], streams: Streams): Promise<number> {
  if (rest.includes("--help") || rest.includes("-h")) {
    streams.out(`${await usageText(cacheCommand)}\n${example}`);
    return 0;
  }
  const given = readArguments("cache-sim", cacheArgs, rest);
  const [path = ""] = exactly(1, given, "cache-sim takes one routing trace", "switchyard cache-sim run.trace");
  const [perLayer, memory] = [given.list("experts-per-layer"), given.list("memory")];
  if (perLayer !== undefined && memory !== undefined) {
    throw new UnsupportedError("--experts-per-layer and --memory exclude each other; leave one of them out");
  }
  const policies = policiesOf(given.list("policy"));
  const expertBytes = given.bytes("expert-bytes");
  const asked = perLayer?.map(countOf);
  const memories = memory?.map((part) => byteSize("memory", part));

  const source = await fileSource(path);
  if (!source) throw new CheckpointError(`cannot read ${path}: there is no such file`);
  try {
    const trace = await readTrace(source);
    const { header } = trace;
    let tokens = 0;
    async function* counted(): AsyncGenerator<TraceChunk, void, undefined> {
      for await (const chunk of trace) {
        tokens += chunk.tokens;
        yield chunk;
      }
    }
    const requests = await expertRequests(header, counted());
    const most = header.layers.reduce((largest, { experts }) => Math.max(largest, experts), 0);
    const doubled: number[] = [];
    for (let size = 1; size < most; size *= 2) doubled.push(size);
    const sizes =
      memories?.map((one) => ({ memory: one })) ??
      (asked ?? [...doubled, most]).map((one) => ({ expertsPerLayer: one }));
    const layers = header.layers.map((layer) => (expertBytes === undefined ? layer : { ...layer, expertBytes }));
    const results = sizes.flatMap((size) =>
      policies.map((policy) => ({ size, ...simulateCache(layers, requests, { policy, size }) })),
    );
    if (given.flag("json")) {
      const named = header.layers.map(({ index, name, experts }) => ({ index, ...(name ? { name } : {}), experts }));
      streams.out(
        `${JSON.stringify({ schema: "switchyard/cache-sim/1", model: header.model.name, tokens, layers: named, results })}\n`,
      );
      return 0;
    }
    const unit = memories ? "experts in all" : "experts per layer";
    const head = ["policy", unit, "hit rate", "misses", "loaded ahead", "read"];
    const rows = results.map((result) => [result.policy, ...numbersOf(result)]);
    const asks = results[0]?.total.requests ?? 0;
    streams.out(
      `${header.model.name}: ${count(tokens, "token")}, ${count(header.layers.length, "layer")} of up to ` +
        `${count(most, "expert")}, ${count(asks, "request")}\n\n`,
    );
    streams.out(`${table([head, ...rows])}\n`);
    if (results.some(({ total }) => total.bytesRead === null)) {
      streams.error("The trace does not say how large an expert is; --expert-bytes does.\n");
    }
    return 0;
  } finally {
    await source.close();
  }
}
