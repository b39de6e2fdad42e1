// npm run random-checkpoint -- CONFIG OUT [--dtype BF16] [--seed 0] [--scale 0.02] [--shard-size 5GB]: writes a checkpoint of random weights
// in the Hugging Face layout into the folder OUT, as CONFIG (a config.json of a family that Switchyard knows, or a folder with one)
// asks for it. The same options give the same bytes.
import { existsSync, readFileSync, statSync } from "node:fs";
import { join, resolve } from "node:path";
import { parseArgs } from "node:util";
import type { Json } from "@switchyard/core";
import {
  architectures,
  parseBytes,
  type RandomCheckpointOptions,
  randomCheckpoint,
  showBytes,
} from "@switchyard/models";

const usage = `npm run random-checkpoint -- CONFIG OUT [options]
  CONFIG            a config.json, or a folder with one
  OUT               the folder to write into
  --dtype NAME      F32, BF16 or F16 (default BF16); a quantization_config decides for the matrices
  --seed N          default 0
  --scale X         standard deviation of the weights, default 0.02
  --shard-size SIZE most bytes of one file, default 5GB`;

const options = {
  dtype: { type: "string" },
  seed: { type: "string" },
  scale: { type: "string" },
  "shard-size": { type: "string" },
  help: { type: "boolean", default: false },
} as const;

/** Writes what the arguments ask for, and says what it wrote in one line. Throws an Error that says what is wrong. */
export async function writeRandom(args: readonly string[], say: (line: string) => void): Promise<void> {
  const { values, positionals } = parseArgs({ args: [...args], options, allowPositionals: true });
  if (values.help) return say(usage);
  const [config, out, ...more] = positionals;
  if (config === undefined || out === undefined || more.length > 0) {
    throw new Error(`two arguments are needed, found ${positionals.length}\n${usage}`);
  }
  // npm starts scripts in the root; INIT_CWD is where it was called.
  const [from, to] = [config, out].map((one) => resolve(process.env.INIT_CWD ?? process.cwd(), one)) as [
    string,
    string,
  ];
  const path = statSync(from, { throwIfNoEntry: false })?.isDirectory() ? join(from, "config.json") : from;
  if (!existsSync(path)) throw new Error(`there is no ${path}; name a config.json, or a folder with one`);
  const content: { readonly [key: string]: Json } = JSON.parse(readFileSync(path, "utf8"));
  const architecture = architectures.find(({ modelTypes }) => modelTypes.some((one) => one === content.model_type));
  if (!architecture) {
    const known = architectures.flatMap(({ modelTypes }) => modelTypes).join(", ");
    throw new Error(`${path}: model_type is ${JSON.stringify(content.model_type ?? null)}; known are ${known}`);
  }
  const { dtype, seed, scale } = values;
  if (dtype !== undefined && dtype !== "F32" && dtype !== "BF16" && dtype !== "F16") {
    throw new Error(`--dtype must be F32, BF16 or F16, found ${dtype}`);
  }
  const given: RandomCheckpointOptions = {
    ...(dtype === undefined ? {} : { dtype }),
    ...(seed === undefined ? {} : { seed: Number(seed) }),
    ...(scale === undefined ? {} : { scale: Number(scale) }),
    ...(values["shard-size"] === undefined ? {} : { shardBytes: parseBytes(values["shard-size"]) }),
  };
  const { tensors, bytes, files } = await randomCheckpoint(to, { config: content, architecture }, given);
  say(`${out}: ${tensors} tensors, ${showBytes(bytes)} in ${files.length} file${files.length > 1 ? "s" : ""}`);
}

if (import.meta.main) {
  writeRandom(process.argv.slice(2), (line) => console.log(line)).catch((error: Error) => {
    console.error(`random-checkpoint: ${error.message}`);
    process.exitCode = 1;
  });
}
