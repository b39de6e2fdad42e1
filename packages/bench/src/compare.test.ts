// A model small enough to check by hand (embedding, a top-2 router that scales nothing, an output matrix) trains on made-up text.
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, relative } from "node:path";
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
  mean,
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
  type ProbeRouting,
  prepare,
  type SnapshotFiles,
  type Subject,
} from "./experiment.ts";
import type { RunResult } from "./results.ts";
import { measureSpeed } from "./speed.ts";
import { tracePath } from "./traces.ts";

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
  merged = false,
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
            plan: merged
              ? { kind: "merge", groups: host.tensor(new Int32Array(tokens), [tokens]), coefficients: [meanOf(scores)] }
              : { kind: "sparse", experts: chosen, weights },
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

/** One group's share of each expert, `[1, experts]`. */
const meanOf = (scores: Tensor): Tensor => reshape(mean(softmax(scores), [0]), [1, experts]);

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

/** Where every token went, in the run's order; one file per checkpoint. */
function traceStore(folder: string) {
  const written = new Map<string, ProbeRouting>();
  const write = async (path: string, routing: ProbeRouting): Promise<void> => {
    const name = relative(folder, path).replaceAll("\\", "/");
    writeFileSync(path, JSON.stringify([...(routing.layers[0]?.ids ?? [])]));
    written.set(name, routing);
  };
  return { written, traces: { write } };
}

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

describe("routing traces", async () => {
  const whole = setup("traced", 23);
  const { written, traces } = traceStore(whole.folder);
  const { runs } = await compareRouters({ ...whole.options, traces }, whole.prepared);
  const probe = whole.prepared.heldOut.probe;

  test("one per checkpoint and run, named in the record, beside nothing else", () => {
    const named = runs.flatMap(({ checkpoints }) => checkpoints.map(({ trace }) => trace));
    expect(named.slice(0, 3)).toEqual(["0000", "0006", "0012"].map((n) => `traces/top_k=1-seed3/step-${n}.trace`));
    expect(new Set(named).size).toBe(4 * 5);
    expect([...written.keys()]).toEqual(named);
    expect(readdirSync(whole.folder)).toEqual(["traces"]);
    expect(readdirSync(join(whole.folder, "traces", "top_k=2-seed4"))).toHaveLength(5);
    expect(runs.every((run) => run.untraced === undefined)).toBe(true);
  });

  test("holds every counted token of the probe once, with its place, in batches that were computed together", () => {
    const routing = written.get("traces/top_k=2-seed3/step-0012.trace");
    if (routing === undefined) throw new Error("a trace");
    expect(routing).toMatchObject({
      router: "top:k=2",
      seed: 3,
      step: 12,
      totalSteps: 23,
      domains: ["abcdefgh", "stuvwxyz"],
    });
    const expected: number[][] = [];
    let [batchNumber, windows] = [0, 0];
    for (const list of probe) {
      for (const { shape, ids, labels } of list) {
        for (let at = 0; at < ids.length; at++) {
          const [row, position] = [Math.floor(at / shape[1]), at % shape[1]];
          if ((labels[at] ?? -1) >= 0) expected.push([windows + row, batchNumber, position, ids[at] ?? -1]);
        }
        batchNumber++;
        windows += shape[0];
      }
    }
    const found = Array.from(routing.token, (token, i) => [
      routing.window[i],
      routing.batch[i],
      routing.position[i],
      token,
    ]);
    expect(found).toEqual(expected);
    expect(routing.windows).toEqual(
      probe.flatMap((list, domain) => list.flatMap(({ shape }) => Array(shape[0]).fill(domain))),
    );
  });

  test("its loads, domain by domain, are those of the record", () => {
    for (const { checkpoints } of runs) {
      for (const { trace, layers } of checkpoints) {
        const routing = written.get(trace ?? "");
        const [own] = routing?.layers ?? [];
        if (routing === undefined || own === undefined) throw new Error("a trace");
        expect(own.probabilities).toHaveLength(routing.token.length * experts);
        for (const [domain, load] of (layers[0]?.load ?? []).entries()) {
          const counts = new Float64Array(experts);
          let all = 0;
          for (let token = 0; token < routing.token.length; token++) {
            if (routing.windows[routing.window[token] ?? -1] !== domain) continue;
            for (let slot = 0; slot < own.slots; slot++) {
              const id = own.ids[token * own.slots + slot] ?? -1;
              counts[id] = (counts[id] ?? 0) + 1;
              all++;
            }
          }
          for (const [expert, share] of load.entries()) expect((counts[expert] ?? 0) / all).toBeCloseTo(share, 4);
        }
      }
    }
  });

  test("interrupted and resumed, the files are the same", async () => {
    const { options, prepared, folder } = setup("traced-again", 23);
    const again = traceStore(folder);
    let steps = 0;
    let done: readonly RunResult[] = [];
    for (const stop of [6, 30, 60, Number.POSITIVE_INFINITY]) {
      const control = new AbortController();
      const onStep = (): void => void (++steps === stop && control.abort());
      done = (
        await compareRouters({ ...options, traces: again.traces, done, signal: control.signal, onStep }, prepared)
      ).runs;
    }
    expect(timeless(done)).toEqual(timeless(runs));
    expect(readdirSync(folder, { recursive: true }).sort()).toEqual(
      readdirSync(whole.folder, { recursive: true }).sort(),
    );
    for (const [name, routing] of written) expect(again.written.get(name)).toEqual(routing);
  });

  test("a router whose plans name no experts of a token has none, and says why", async () => {
    const { host, options, prepared, folder } = setup("merged", 4);
    const store = traceStore(folder);
    const merged: Contender = {
      name: "merged",
      experts,
      expertWidth: width,
      subject: (seed, batch) => subjectOn(host, 1, seed, batch, [], true),
    };
    const [run] = (
      await compareRouters({ ...options, contenders: [merged], seeds: [3], traces: store.traces }, prepared)
    ).runs;
    expect(run?.untraced).toContain('a plan of kind "merge"');
    expect(run?.checkpoints.every((one) => !("trace" in one))).toBe(true);
    expect([store.written.size, readdirSync(folder)]).toEqual([0, []]);
  });

  test("a file that cannot be written ends the run with the writer's error", async () => {
    const { options, prepared } = setup("full", 4);
    const write = async (): Promise<void> => {
      throw new CheckpointError("the disk is full");
    };
    await expect(compareRouters({ ...options, traces: { write } }, prepared)).rejects.toThrow("the disk is full");
  });
});

test("traces sort by step, whatever the number of steps", () => {
  expect(tracePath("topK-seed1", 40, 400)).toBe("traces/topK-seed1/step-0040.trace");
  expect(tracePath("topK-seed1", 40, 123_456)).toBe("traces/topK-seed1/step-000040.trace");
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
