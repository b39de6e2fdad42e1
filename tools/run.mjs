// The one door to every job of this repository: node tools/run.mjs JOB [ARGUMENTS]; package.json gives each job a script.
// First the checkout is brought up to date (npm ci, then the builds, each only when something changed), then the job runs on
// Node 24. Plain JavaScript, because the Node that starts it may be 20.
import { build, turbo } from "./build.mjs";
import { run } from "./child.mjs";
import { install, node24 } from "./install.mjs";

const biome = "node_modules/@biomejs/biome/bin/biome";

/**
 * What each job runs on Node 24. `built`: the packages are built before.
 * @type {Record<string, { built?: boolean, turbo?: string[], script?: string[] }>}
 */
const jobs = {
  start: { built: true, script: ["apps/compare-routers/main.mjs"] },
  test: { script: ["tools/test.ts"] },
  build: { built: true },
  typecheck: { turbo: ["typecheck"] },
  lint: { script: [biome, "check", "."] },
  format: { script: [biome, "check", "--write", "."] },
  tables: { built: true, script: ["tools/tables.ts"] },
  vectors: { built: true, script: ["tools/vectors.ts"] },
  golden: { built: true, script: ["tools/golden.ts"] },
  "random-checkpoint": { built: true, script: ["tools/random-checkpoint.ts"] },
  fuzz: { built: true, script: ["tools/fuzz.ts"] },
  release: { built: true, script: ["tools/release.ts"] },
  "bench:kernels": { built: true, script: ["apps/bench-kernels/src/main.ts"] },
  "bench:gpu": { built: true, script: ["apps/bench-gpu/src/main.ts"] },
};

/** @param {string[]} parameters */
async function main([name = "", ...args]) {
  const job = jobs[name];
  if (!job) throw new Error(`no job "${name}"; the jobs are ${Object.keys(jobs).join(", ")}`);
  if (Number(process.versions.node.split(".")[0]) < 20)
    throw new Error(`Node 20 or newer is needed, this is ${process.version}`);
  await install();
  const node = node24();
  if (job.built) await build(node);
  if (job.turbo) return await turbo(node, [...job.turbo, ...args]);
  return job.script ? await run(node, [...job.script, ...args]) : 0;
}

main(process.argv.slice(2)).then(
  (code) => {
    process.exitCode = code;
  },
  (error) => {
    console.error(`switchyard: ${error.message}`);
    process.exitCode = 1;
  },
);
