// A model small enough to check by hand (embedding, a top-2 router that scales nothing, an output matrix) trains on made-up text.
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { deserialize, serialize } from "node:v8";
import {
  addRows,
  CheckpointError,
  crossEntropy,
  div,
  type Engine,
  embedding,
  engine,
  gatherLast,
  leaves,
  less,
  linear,
  mul,
  random,
  reshape,
  softmax,
  sum,
  type Tensor,
  type Tree,
  topkIndices,
} from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import { adamw, constantRate, type Task } from "@switchyard/core/train";
import { afterAll, describe, expect, test } from "vitest";
import type { TokenBatch } from "./batches.ts";
import { checkpointSteps, compareRouters, modelFolder } from "./compare.ts";
import { hostRandom, splitCorpora } from "./corpus.ts";
import {
  type Codec,
  type ComparisonOptions,
  type Contender,
  prepare,
  type SnapshotFiles,
  type Subject,
} from "./experiment.ts";
import type { RunResult } from "./results.ts";
import { measureSpeed } from "./speed.ts";

const root = mkdtempSync(join(tmpdir(), "switchyard-compare-"));
afterAll(() => rmSync(root, { recursive: true }));

const vocabulary = 97; // byte b is id (b mod 96) + 1; 0 is the separator
const codec: Codec = {
  vocabulary,
  separator: 0,
  encode: (text) => Int32Array.from(Buffer.from(text), (byte) => (byte % 96) + 1),
  bytes: (ids) => Uint8Array.from(ids, (id) => (id === 0 ? 32 : ((id - 1 + 64) % 96) + 32)),
};
const width = 6;
const experts = 5;

function subjectOn(
  host: Engine,
  k: number,
  seed: number,
  batch: (index: number) => TokenBatch,
  saved: string[],
): Subject {
  const draw = random(host, seed).at("init");
  const tensor = (name: string, shape: number[]): Tensor =>
    host.tensor(
      Float32Array.from(
        draw.at(name).host(
          "normal",
          shape.reduce((a, b) => a * b),
        ),
        (x) => 0.3 * x,
      ),
      shape,
    );
  const params = {
    table: tensor("table", [vocabulary, width]),
    gate: tensor("gate", [experts, width]),
    out: tensor("out", [vocabulary, width]),
  };
  const task: Task<TokenBatch> = {
    params,
    routers: [
      { params: {}, buffers: {}, route: () => ({ plan: { kind: "dense", weights: params.gate }, losses: {} }) },
    ],
    batch,
    forward(tree, _, { ids, labels }) {
      const { table, gate, out } = tree as typeof params;
      const tokens = ids.length;
      const hidden = embedding(table, host.tensor(ids, [tokens]));
      const scores = linear(hidden, gate);
      const chosen = topkIndices(scores, k); // [tokens, k]
      const weights = gatherLast(softmax(scores), chosen);
      const scaled = mul(hidden, reshape(sum(weights, [-1]), [tokens, 1]));
      const targets = host.tensor(labels, [tokens]);
      const { losses } = crossEntropy(linear(scaled, out), targets);
      const counted = sum(less(host.tensor(Int32Array.of(-1), []), targets));
      const ones = host.tensor(new Float32Array(tokens * k).fill(1), [tokens * k]);
      return {
        loss: div(sum(losses), counted),
        logits: scores,
        layers: [
          {
            plan: { kind: "sparse", experts: chosen, weights },
            probabilities: softmax(scores),
            losses: {},
            metrics: { load: addRows(ones, reshape(chosen, [tokens * k]), experts) },
          },
        ],
      };
    },
    info: ({ labels }) => ({ tokens: labels.filter((label) => label >= 0).length }),
  };
  return {
    task,
    parameters: { total: 2 * vocabulary * width + experts * width, active: 2 * vocabulary * width },
    generate: async (_params, _buffers, _prompt, count, start) =>
      Int32Array.from({ length: count }, (_, i) => 1 + ((start + 7 * i) % 90)),
    save: async (tree: Tree, _buffers, folder) => void saved.push(`${folder} ${leaves(tree).length}`),
  };
}

function text(seed: number, letters: string): string {
  const next = hostRandom(seed);
  const words = Array.from({ length: 40 }, () =>
    Array.from({ length: 2 + Math.floor(4 * next()) }, () => letters[Math.floor(next() * letters.length)]).join(""),
  );
  return Array.from({ length: 900 }, () => words[Math.floor(words.length * next() ** 2)]).join(" ");
}

const domains = splitCorpora(
  ["abcdefgh", "stuvwxyz"].map((letters, i) => ({ name: letters, texts: [Buffer.from(text(i, letters))], skipped: 0 })),
  { seed: 1, block: 600 },
);

const training = {
  rows: 4,
  length: 11,
  clip: 1,
  optimiser: () => adamw({ learningRate: 0.05 }),
  schedule: () => constantRate(),
};

/** The least that keeps a snapshot in a file and notices when it is not one. */
const snapshots: SnapshotFiles = {
  async write(path, snapshot) {
    writeFileSync(path, serialize(snapshot));
  },
  async read(path) {
    try {
      return deserialize(readFileSync(path));
    } catch (cause) {
      throw new CheckpointError(`${path}: damaged`, { cause });
    }
  },
};

function setup(name: string, steps: number) {
  const host = engine(cpu());
  const saved: string[] = [];
  const contenders: Contender[] = [1, 2].map((k) => ({
    name: `top:k=${k}`,
    experts,
    expertWidth: width,
    subject: (seed, batch) => subjectOn(host, k, seed, batch, saved),
  }));
  const folder = mkdtempSync(join(root, name));
  const options: ComparisonOptions = {
    engine: host,
    contenders,
    seeds: [3, 4],
    domains,
    codec,
    training,
    steps,
    checkpoints: 4,
    sampleTokens: 9,
    folder,
    snapshots,
  };
  return { host, saved, folder, options, prepared: prepare(domains, codec, training, 200) };
}

const timeless = (runs: readonly RunResult[]): unknown =>
  runs.map((run) => ({ ...run, seconds: 0, tokensPerSecond: 0 }));

describe("compareRouters", async () => {
  const whole = setup("whole", 23);
  const before = whole.host.live();
  const progress: string[] = [];
  const result = await compareRouters(
    {
      ...whole.options,
      onStep: ({ router, seed, run, step }) => void progress.push(`${run} ${router} ${seed} ${step}`),
    },
    whole.prepared,
  );

  test("every router trains with every seed, and leaves nothing on the engine", () => {
    expect(result.status).toBe("complete");
    expect(result.runs.map(({ router, seed }) => [router, seed])).toEqual([
      ["top:k=1", 3],
      ["top:k=1", 4],
      ["top:k=2", 3],
      ["top:k=2", 4],
    ]);
    expect(whole.host.live()).toBe(before);
    expect(progress).toHaveLength(4 * 23);
    expect(progress[24]).toBe("1 top:k=1 4 2");
    expect(whole.saved).toEqual(result.runs.map((run) => `${join(whole.folder, run.model)} 3`));
    expect(readdirSync(whole.folder)).toEqual([]);
  });

  test("loss starts near the uniform guess and falls", () => {
    for (const { training: curve, checkpoints } of result.runs) {
      expect(curve.bitsPerByte).toHaveLength(23);
      expect(checkpoints[0]?.bitsPerByte).toBeCloseTo(Math.log2(vocabulary), 0);
      expect(checkpoints.at(-1)?.bitsPerByte).toBeLessThan(5);
      expect(checkpoints.map(({ step }) => step)).toEqual([0, 6, 12, 17, 23]);
    }
  });

  test("the first record has no fluctuation, later ones do; k experts per token", () => {
    const [first, ...later] = result.runs[3]?.checkpoints ?? [];
    expect(first?.layers[0]).not.toHaveProperty("fluctuation");
    for (const { layers } of later) expect(layers[0]?.fluctuation).toBeGreaterThanOrEqual(0);
    expect(first?.layers[0]?.expertsPerToken).toBe(2);
    expect(first?.layers[0]?.load).toHaveLength(2);
  });

  test("the end says who meets whom and what noise changes", () => {
    for (const { final, router } of result.runs) {
      const [layer] = final.layers;
      expect(final.layers).toHaveLength(1);
      expect(layer?.together).toHaveLength(experts);
      // This router sees a token alone, so replaced neighbours cannot move it; a model that reads on would not do so.
      expect(layer?.noised).toEqual({ sets: 0, overlap: 0, firsts: 0 });
      expect(final.bitsPerByte.noised).toBeGreaterThan(final.bitsPerByte.clean);
      if (router === "top:k=1") expect(layer?.combinations).toBe(0);
      else expect(layer?.combinations).toBeGreaterThan(0);
    }
  });

  test("samples keep the prompt and know the experts of every token", () => {
    for (const run of result.runs) {
      expect(run.samples).toHaveLength(2);
      for (const sample of run.samples) {
        expect(sample.tokens).toHaveLength(codec.encode(sample.prompt).length + 9);
        expect(
          sample.tokens.every(({ layers }) => layers[0]?.experts.length === (run.router === "top:k=1" ? 1 : 2)),
        ).toBe(true);
        expect(sample.tokens.map(({ text: part }) => part).join("")).toBe(
          new TextDecoder().decode(codec.bytes(codec.encode(sample.prompt))) + sample.text,
        );
      }
    }
  });

  test("the same options give the same runs", async () => {
    const again = setup("again", 23);
    expect(timeless((await compareRouters(again.options, again.prepared)).runs)).toEqual(timeless(result.runs));
  });

  // Step counts over all runs at which the user presses Ctrl-C: in the first run, at a checkpoint, at a run's last step, later on.
  test.each([[[1]], [[6]], [[23]], [[9, 30, 31, 60]]])(
    "interrupted after steps %j and resumed, the runs are the same",
    async (stops) => {
      const { options, prepared, folder } = setup("stopped", 23);
      let steps = 0;
      let done: readonly RunResult[] = [];
      for (const stop of [...stops, Number.POSITIVE_INFINITY]) {
        const control = new AbortController();
        const { status, runs } = await compareRouters(
          { ...options, done, signal: control.signal, onStep: () => void (++steps === stop && control.abort()) },
          prepared,
        );
        done = runs;
        expect(status).toBe(stop === Number.POSITIVE_INFINITY ? "complete" : "interrupted");
      }
      expect(steps).toBe(4 * 23);
      expect(timeless(done)).toEqual(timeless(result.runs));
      expect(readdirSync(folder)).toEqual([]);
    },
  );

  test("the hooks of a contender are made anew for every run and asked in every step", async () => {
    const { options, prepared } = setup("hooks", 3);
    const asked: number[][] = [];
    const hooks = () => {
      const steps: number[] = [];
      asked.push(steps);
      return [
        { name: "counting", beforeStep: ({ step }: { readonly step: number }) => ({ counted: steps.push(step) }) },
      ];
    };
    const [contender] = options.contenders;
    if (contender === undefined) throw new Error("a contender");
    await compareRouters({ ...options, contenders: [{ ...contender, hooks }] }, prepared);
    expect(asked).toEqual([
      [0, 1, 2],
      [0, 1, 2],
    ]);
  });

  test("a damaged snapshot is refused before anything is trained", async () => {
    const { options, prepared, folder } = setup("damaged", 23);
    const control = new AbortController();
    await compareRouters({ ...options, signal: control.signal, onStep: () => control.abort() }, prepared);
    const [name = ""] = readdirSync(folder);
    writeFileSync(join(folder, name), "no snapshot");
    await expect(compareRouters(options, prepared)).rejects.toThrow(CheckpointError);
  });
});

test("bits per byte equal the sum written out token by token", async () => {
  const { host, options, prepared } = setup("oracle", 2);
  const [run] = (await compareRouters({ ...options, seeds: [3], sampleTokens: 0 }, prepared)).runs;
  // The same two steps again, then the loss of every held-out byte from the parameters alone.
  const subject = subjectOn(
    host,
    1,
    3,
    () => ({ shape: [0, 0], ids: new Int32Array(0), labels: new Int32Array(0) }),
    [],
  );
  const trained = await trainedParams(options, prepared);
  const [table, gate, out] = trained;
  if (table === undefined || gate === undefined || out === undefined) throw new Error("three parameters");
  const row = (matrix: Float64Array, i: number): number[] => [...matrix.subarray(i * width, (i + 1) * width)];
  const dot = (a: number[], b: number[]): number => a.reduce((total, x, i) => total + x * (b[i] ?? 0), 0);
  const perDomain = domains.map(({ validation }) => {
    let bits = 0;
    let bytes = 0;
    for (const block of validation) {
      let last = 0;
      for (const id of codec.encode(Buffer.from(block).toString())) {
        const hidden = row(table, last);
        const scores = Array.from({ length: experts }, (_, e) => dot(hidden, row(gate, e)));
        const total = scores.reduce((all, x) => all + Math.exp(x), 0);
        const weight = Math.exp(Math.max(...scores)) / total;
        const logits = Array.from({ length: vocabulary }, (_, o) => weight * dot(hidden, row(out, o)));
        const normal = logits.reduce((all, x) => all + Math.exp(x), 0);
        bits -= Math.log2(Math.exp(logits[id] ?? 0) / normal);
        bytes++;
        last = id;
      }
    }
    return bits / bytes;
  });
  const final = run?.checkpoints.at(-1);
  for (const [d, expected] of perDomain.entries()) expect(final?.perDomain[d]).toBeCloseTo(expected, 3);
  expect(final?.bitsPerByte).toBeCloseTo((perDomain[0] ?? 0) / 2 + (perDomain[1] ?? 0) / 2, 3);
  for (const [, tensor] of leaves(subject.task.params)) tensor.dispose();
});

async function trainedParams(
  options: ComparisonOptions,
  prepared: ReturnType<typeof prepare>,
): Promise<Float64Array[]> {
  let values: Float64Array[] = [];
  const [first] = options.contenders;
  if (first === undefined) throw new Error("a contender");
  const contender: Contender = {
    ...first,
    subject: (seed, batch) => ({
      ...first.subject(seed, batch),
      save: async (tree) => {
        const named = new Map(leaves(tree));
        const read = async (name: string) => Float64Array.from((await named.get(name)?.data()) ?? []);
        values = [await read("table"), await read("gate"), await read("out")];
      },
    }),
  };
  await compareRouters({ ...options, contenders: [contender], seeds: [3], sampleTokens: 0 }, prepared);
  return values;
}

test("speed is measured on throw-away models", async () => {
  const { host, options, prepared } = setup("speed", 5);
  const before = host.live();
  const speeds = await measureSpeed(options, prepared);
  expect(speeds).toHaveLength(2);
  for (const { step, evaluation, token } of speeds) {
    expect(token).toBeGreaterThan(0);
    expect(step).toBeGreaterThan(0);
    expect(evaluation).toBeGreaterThan(0);
  }
  expect(host.live()).toBe(before);
});

test("checkpoints are spread over the steps, the first and last included", () => {
  expect(checkpointSteps(100, 4)).toEqual([0, 25, 50, 75, 100]);
  expect(checkpointSteps(3, 8)).toEqual([0, 1, 2, 3]);
  expect(checkpointSteps(1, 1)).toEqual([0, 1]);
});

test("folders of models are names that every file system takes", () => {
  expect(modelFolder("topK:k=1:order=a/b", 7)).toBe("topK_k=1_order=a_b-seed7");
});
