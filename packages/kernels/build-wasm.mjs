// Compiles assembly/ twice (plain SIMD; relaxed SIMD with fused multiply-add) and writes both binaries, compressed, into
// src/wasm/binary.generated.ts. Does nothing when the sources, the compiler and this script are those of the last build.
import { createHash } from "node:crypto";
import { existsSync, readdirSync, readFileSync, renameSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { isMainThread, parentPort, Worker, workerData } from "node:worker_threads";
import { deflateRawSync } from "node:zlib";

const here = dirname(fileURLToPath(import.meta.url));
const target = join(here, "src", "wasm", "binary.generated.ts");
const folder = join(here, "assembly");
const sources = readdirSync(folder)
  .filter((name) => name.endsWith(".ts"))
  .sort();

const asc = (await import("assemblyscript/asc")).default;
if (isMainThread) await build();
else parentPort?.postMessage(await compile(workerData));

async function build() {
  const hash = createHash("sha256")
    .update(asc.version)
    .update(readFileSync(fileURLToPath(import.meta.url)));
  for (const name of sources) {
    hash.update(name).update(readFileSync(join(folder, name), "utf8").replaceAll("\r\n", "\n"));
  }
  const digest = hash.digest("hex").slice(0, 32);
  const first = existsSync(target) ? readFileSync(target, "utf8").split("\n", 1)[0] : "";
  if (first?.endsWith(digest)) {
    console.log("wasm: up to date");
    return;
  }
  const lines = [
    `// Made by build-wasm.mjs from assembly/; do not edit. ${digest}`,
    "/** The two builds: raw deflate in base64, and where in the binary the flag byte of the memory import stands. */",
    "export interface Binary {",
    "  readonly data: string;",
    "  readonly memoryFlag: number;",
    "}",
  ];
  const variants = ["relaxed", "plain"];
  const binaries = await Promise.all(variants.map(inThread));
  for (const [i, bytes] of binaries.entries()) {
    const data = deflateRawSync(bytes, { level: 9 }).toString("base64");
    lines.push(`export const ${variants[i]}: Binary = { memoryFlag: ${memoryFlag(bytes)}, data: "${data}" };`);
    console.log(`wasm: ${variants[i]} ${bytes.length} bytes, ${Math.round((data.length * 3) / 4)} compressed`);
  }
  writeFileSync(`${target}.part`, `${lines.join("\n")}\n`);
  renameSync(`${target}.part`, target);
}

/** The compiler keeps its thread busy for seconds: each variant gets one. @param {string} variant @returns {Promise<Uint8Array>} */
function inThread(variant) {
  return new Promise((resolve, reject) => {
    const worker = new Worker(new URL(import.meta.url), { workerData: variant });
    worker.once("message", resolve);
    worker.once("error", reject);
  });
}

/** @param {string} variant @returns {Promise<Uint8Array>} */
async function compile(variant) {
  let binary;
  const { error, stderr } = await asc.main(
    [
      "index.ts",
      "--outFile",
      "out.wasm",
      "-O3",
      "--noAssert",
      "--runtime",
      "stub",
      "--use",
      "abort=",
      "--importMemory",
      "--initialMemory",
      "1",
      "--maximumMemory",
      "65536",
      "--enable",
      variant === "relaxed" ? "simd,relaxed-simd" : "simd",
    ],
    {
      readFile: (name) => (sources.includes(name) ? readFileSync(join(folder, name), "utf8") : null),
      writeFile: (name, contents) => {
        if (name === "out.wasm") binary = contents;
      },
      listFiles: () => [],
    },
  );
  if (error || !binary)
    throw new Error(`assembly (${variant}): ${error?.message ?? "no output"}\n${stderr.toString()}`);
  const warnings = stderr.toString();
  if (warnings) console.warn(warnings);
  return binary;
}

/** Index of the limits flag of the import env.memory: 1 there means a private memory with a maximum, 3 a shared one. */
function memoryFlag(bytes) {
  const name = Buffer.from("\x03env\x06memory\x02", "latin1");
  const at = Buffer.from(bytes).indexOf(name) + name.length;
  if (at < name.length || bytes[at] !== 1) throw new Error("the import env.memory was not found in the binary");
  return at;
}
