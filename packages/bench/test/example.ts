// Results made by a small deterministic generator: three routers, curves that fall, routing that settles.
import { hostRandom } from "../src/corpus.ts";
import type { CheckpointRecord, Results, RunResult, Sample } from "../src/results.ts";
import { summarise } from "../src/summary.ts";

const text =
  "It was the whale, and the captain stood upon the deck; readonly length: number;\n/** The nation's trade has grown */ interface Sea <T & U>";

function sampleOf(random: () => number, layers: number, experts: number, k: number): Sample {
  const parts = text.match(/\s?[^\s]{1,4}/g) ?? [];
  return {
    prompt: "It was",
    text: text.slice(6),
    knownWords: 0.91,
    tokens: parts.map((part) => ({
      text: part,
      layers: Array.from({ length: layers }, () => {
        const weights = Array.from({ length: k }, () => random());
        const total = weights.reduce((a, b) => a + b, 0);
        const first = Math.floor(random() * experts);
        return { experts: weights.map((_, j) => (first + j) % experts), weights: weights.map((w) => w / total) };
      }),
    })),
  };
}

function runOf(router: string, seed: number, at: number, layers: number): RunResult {
  const random = hostRandom(at * 101 + seed);
  const experts = router === "switchRouter" ? 4 : 8;
  const steps = 400;
  const end = 2.3 + 0.06 * at + 0.02 * random();
  const loss = (step: number): number => end + 1.3 * Math.exp(-step / 70);
  const checkpoints = Array.from({ length: 9 }, (_, i): CheckpointRecord => {
    const step = i * 50;
    const rows = Array.from({ length: layers }, () =>
      [0, 1, 2].map((domain) => {
        const raw = Array.from({ length: experts }, (_, e) => 0.3 + random() + ((e + domain) % 3 === 0 ? i / 4 : 0));
        const total = raw.reduce((a, b) => a + b, 0);
        return raw.map((x) => x / total);
      }),
    );
    return {
      step,
      bitsPerByte: loss(step),
      perDomain: [loss(step) + 0.3, loss(step), loss(step) - 0.3],
      layers: rows.map((load) => ({
        load,
        entropy: 0.95 - 0.05 * i - 0.04 * at,
        imbalance: 1.2 + 0.1 * at + 0.3 * random(),
        dead: at === 1 && i > 6 ? 1 : 0,
        specialisation: 0.01 * i + 0.02 * random(),
        expertsPerToken: router === "switchRouter" ? 1 : 2,
        expertsByDomain: router === "reMoE" ? [1.6 + 0.2 * random(), 2, 2.3] : experts === 4 ? [1, 1, 1] : [2, 2, 2],
        ...(i === 0 ? {} : { fluctuation: 0.6 * Math.exp(-i / 4) + 0.1 * random() }),
      })),
    };
  });
  return {
    router,
    seed,
    experts,
    expertWidth: experts === 4 ? 256 : 128,
    parameters: { total: 2_310_000, active: 1_120_000 },
    steps,
    tokens: steps * 2048,
    seconds: 58.2,
    tokensPerSecond: 14_000 - 300 * at,
    training: {
      bitsPerByte: Array.from({ length: steps }, (_, step) => loss(step) - 0.05 + 0.2 * (random() - 0.5)),
      learningRate: Array.from({ length: steps }, (_, step) => 0.004 * Math.min(1, step / 20)),
    },
    checkpoints,
    final: {
      noise: 0.05,
      bitsPerByte: { clean: loss(steps), noised: loss(steps) + 0.2 },
      layers: Array.from({ length: layers }, () => ({
        together: Array.from({ length: experts }, (_, a) =>
          Array.from({ length: experts }, (__, b) => (a === b ? 1 : experts === 4 ? 0 : random() ** 3)),
        ),
        combinations: experts === 4 ? 0 : 0.6 + 0.1 * random(),
        noised: { sets: 0.12 + 0.02 * at, overlap: 0.07, firsts: 0.05 },
      })),
    },
    samples: [sampleOf(random, layers, experts, experts === 4 ? 1 : 2)],
    model: `${router}-seed${seed}`,
  };
}

export function exampleResults(seeds: readonly number[] = [1], layers = 4): Results {
  const routers = ["topK", "switchRouter", "reMoE"];
  const runs = routers.flatMap((router, at) => seeds.map((seed) => runOf(router, seed, at, layers)));
  return {
    schema: "switchyard/results/1",
    name: "example",
    created: "2026-01-02T03:04:05.000Z",
    complete: true,
    seconds: 181.5,
    versions: { node: "24.0.0", "@switchyard/bench": "0.1.0" },
    machine: { processor: "Example CPU", cores: 2, memoryGiB: 8, system: "linux x64" },
    settings: { size: "small", routers, seeds, steps: 400, batch: 16, learningRate: 0.004 },
    domains: [
      { name: "novel", files: 1, trainingBytes: 1_100_000, validationBytes: 100_000 },
      { name: "speeches", files: 229, trainingBytes: 1_380_000, validationBytes: 120_000 },
      { name: "code", files: 100, trainingBytes: 1_380_000, validationBytes: 120_000 },
    ],
    baselines: [
      { name: "order-2 byte model", order: 2, bitsPerByte: 2.76, perDomain: [3.07, 2.85, 2.36] },
      { name: "order-3 byte model", order: 3, bitsPerByte: 2.13, perDomain: [2.58, 2.22, 1.59] },
    ],
    runs,
    summary: summarise(runs),
  };
}
