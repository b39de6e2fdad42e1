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
import { type ArgsDef, defineCommand, parseArgs, renderUsage } from "citty";
import type { Streams } from "./terminal.ts";

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

const units: ReadonlyMap<string, number> = new Map([
  ["", 1],
  ["B", 1],
  ["KB", 1e3],
  ["MB", 1e6],
  ["GB", 1e9],
  ["KIB", 2 ** 10],
  ["MIB", 2 ** 20],
  ["GIB", 2 ** 30],
]);

function bytesOf(option: string, text: string): number {
  const [, number, unit = ""] = /^(\d+(?:\.\d+)?)\s*([a-zA-Z]*)$/.exec(text.trim()) ?? [];
  const factor = units.get(unit.toUpperCase());
  const bytes = number === undefined || factor === undefined ? Number.NaN : Math.floor(Number(number) * factor);
  if (Number.isSafeInteger(bytes)) return bytes;
  throw new UnsupportedError(`--${option} takes a size such as 512MB, 3GB or 2GiB, found ${JSON.stringify(text)}`);
}

const partsOf = (text: string): string[] => text.split(",").map((part) => part.trim());

function policiesOf(text: string | undefined): readonly CachePolicy[] {
  if (text === undefined) return cachePolicies;
  return partsOf(text).map((name) => {
    const found = cachePolicies.find((one) => one === name);
    if (found) return found;
    throw new UnsupportedError(`--policy takes ${cachePolicies.join(", ")}, found ${JSON.stringify(name)}`);
  });
}

function countsOf(text: string): number[] {
  return partsOf(text).map((part) => {
    if (/^\d+$/.test(part) && Number.isSafeInteger(Number(part))) return Number(part);
    throw new UnsupportedError(`--experts-per-layer takes whole numbers from 0, found ${JSON.stringify(part)}`);
  });
}

const scaled = (bytes: number | null): string => {
  if (bytes === null) return "unknown";
  const [unit, size] = bytes >= 1e9 ? ["GB", 1e9] : bytes >= 1e6 ? ["MB", 1e6] : bytes >= 1e3 ? ["kB", 1e3] : ["B", 1];
  return `${(bytes / (size as number)).toFixed(size === 1 ? 0 : 2)} ${unit}`;
};

/** Columns of text, the first to the left, the others to the right. */
function table(rows: readonly (readonly string[])[]): string {
  const widths = (rows[0] ?? []).map((_, i) => Math.max(...rows.map((row) => row[i]?.length ?? 0)));
  const line = (row: readonly string[]): string =>
    row.map((cell, i) => (i === 0 ? cell.padEnd(widths[i] ?? 0) : cell.padStart(widths[i] ?? 0))).join("  ");
  return rows.map(line).join("\n");
}

const numbersOf = ({ capacity, total }: CacheResult): string[] => [
  `${capacity}`,
  `${(100 * total.hitRate).toFixed(1)} %`,
  `${total.misses}`,
  `${total.prefetches}`,
  scaled(total.bytesRead),
];

/** Runs the command. Answers the exit code. @throws UnsupportedError, CheckpointError, ShapeError for what a user can mend. */
export async function cacheSim(rest: readonly string[], streams: Streams): Promise<number> {
  if (rest.includes("--help") || rest.includes("-h")) {
    streams.out(`${await renderUsage(cacheCommand)}\n${example}`);
    return 0;
  }
  const { _: paths, ...all } = parseArgs<typeof cacheArgs>([...rest], cacheArgs);
  const given: Readonly<Record<string, unknown>> = all;
  // citty gives every option a second name in camel case.
  const names = Object.keys(cacheArgs);
  const camel = names.map((name) => name.replace(/-(\w)/g, (_, letter: string) => letter.toUpperCase()));
  const unknown = Object.keys(given).find((name) => !names.includes(name) && !camel.includes(name));
  if (unknown !== undefined) {
    throw new UnsupportedError(
      `unknown option --${unknown}; the options are ${names.map((name) => `--${name}`).join(", ")}`,
    );
  }
  const option = (name: keyof typeof cacheArgs): string | undefined => {
    const value = given[name];
    if (value === undefined || (typeof value === "string" && value !== "")) return value;
    throw new UnsupportedError(`--${name} takes a value; see switchyard cache-sim --help`);
  };
  const [path, ...more] = paths;
  if (path === undefined || more.length > 0) {
    throw new UnsupportedError(
      `cache-sim takes one routing trace, found ${paths.length}: switchyard cache-sim run.trace`,
    );
  }
  const [perLayer, memory, expertSize] = [option("experts-per-layer"), option("memory"), option("expert-bytes")];
  if (perLayer !== undefined && memory !== undefined) {
    throw new UnsupportedError("--experts-per-layer and --memory exclude each other; leave one of them out");
  }
  const policies = policiesOf(option("policy"));
  const expertBytes = expertSize === undefined ? undefined : bytesOf("expert-bytes", expertSize);
  const asked = perLayer === undefined ? undefined : countsOf(perLayer);
  const memories = memory === undefined ? undefined : partsOf(memory).map((part) => bytesOf("memory", part));

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
    if (given.json) {
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
      `${header.model.name}: ${tokens} tokens, ${header.layers.length} layers of up to ${most} experts, ${asks} requests\n\n`,
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
