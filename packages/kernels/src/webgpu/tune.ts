// The tuner: measures tiles on this device and says which to use for which shapes, as a table that `webgpu({ tiles })`
// takes. Tiles never change results (kernels/tiles.ts), so a table changes speed only; a tile that gives other bits
// here is refused all the same.
import { ShapeError } from "@switchyard/core";
import { createGpu, type OwnedGpu, type WebgpuHandle } from "./device.ts";
import { recordBlocks, recordOuter } from "./kernels/experts.ts";
import { type Matrix, oneMatrix, recordDense } from "./kernels/matmul.ts";
import type { Format } from "./kernels/operands.ts";
import { classKey, defaultTile, fits, type ShapeClass, tiles } from "./kernels/tiles.ts";
import { describe, type TileTable } from "./tuned.ts";

/** Several candidates for one piece of work, of which the first is the default. */
export interface Contest {
  readonly candidates: readonly string[];
  /** Milliseconds of one run. */
  measure(candidate: string): Promise<number>;
  /** Whether its results equal the default's. Asked before anything is measured, so it warms up, too. */
  agrees(candidate: string): Promise<boolean>;
  /** Runs of each candidate; default 7. */
  readonly rounds?: number;
  /** Share of the default's median by which a candidate must be faster; default 0.05. */
  readonly margin?: number;
}
export interface Outcome {
  readonly winner: string;
  /** Milliseconds of each candidate that agreed, in the first run; empty where none but the default did. */
  readonly medians: Readonly<Record<string, number>>;
}

const median = (list: readonly number[]): number => {
  const sorted = [...list].sort((a, b) => a - b);
  const [low, high] = [sorted[(sorted.length - 1) >> 1] ?? Number.NaN, sorted[sorted.length >> 1] ?? Number.NaN];
  return (low + high) / 2;
};

/**
 * The rule: the fastest candidate takes the default's place where its results were found equal and its median beats the
 * default's by the margin, both measured in the same run, taking turns; and again in a second run of the two alone, so
 * that no candidate is chosen for having been lucky among many. Else the default stays: a table is never worse than
 * none.
 */
export async function contest({ candidates, measure, agrees, rounds = 7, margin = 0.05 }: Contest): Promise<Outcome> {
  const [standard, ...others] = candidates;
  if (standard === undefined) throw new ShapeError("tune: a contest needs candidates, the default first");
  const running = [standard];
  for (const name of others) if (await agrees(name)) running.push(name);
  const run = async (names: readonly string[]): Promise<Record<string, number>> => {
    const times = new Map(names.map((name) => [name, [] as number[]]));
    for (const name of names) await measure(name);
    for (let round = 0; round < rounds; round++) {
      // Forwards and backwards in turn: whoever comes late in a round gains and loses alike by what changes meanwhile.
      const order = round % 2 === 0 ? names : [...names].reverse();
      for (const name of order) times.get(name)?.push(await measure(name));
    }
    return Object.fromEntries([...times].map(([name, list]) => [name, median(list)]));
  };
  const beats = (name: string, medians: Record<string, number>): boolean =>
    (medians[name] ?? Number.POSITIVE_INFINITY) < (medians[standard] ?? 0) * (1 - margin);

  if (running.length === 1) return { winner: standard, medians: {} };
  const medians = await run(running);
  const [best] = running.filter((name) => beats(name, medians)).sort((a, b) => (medians[a] ?? 0) - (medians[b] ?? 0));
  const confirmed = best !== undefined && beats(best, await run([standard, best]));
  return { winner: confirmed ? best : standard, medians };
}

export interface TuneProgress {
  readonly shape: ShapeClass;
  readonly outcome: Outcome;
  readonly done: number;
  readonly total: number;
}
export interface TuneOptions {
  /**
   * What to tune for; one of each class suffices. Default: products of transformers and experts, small ones on software
   * drivers.
   */
  readonly shapes?: readonly ShapeClass[];
  readonly onProgress?: (progress: TuneProgress) => void;
  readonly rounds?: number;
  readonly margin?: number;
  /** Milliseconds; for tests. */
  readonly clock?: () => number;
}

const weightFormats = ["f32", "bf16", "f16", "int8", "int4", "mxfp4"] as const satisfies readonly Format[];
function defaultShapes(software: boolean): ShapeClass[] {
  const dense = { kind: "dense", format: "f32", count: 1 } as const;
  const blocks = { kind: "blocks", layouts: "kk", count: 8 } as const;
  if (software) {
    return [
      { ...dense, layouts: "kk", m: 64, n: 256, k: 256 },
      { ...dense, layouts: "kr", m: 64, n: 256, k: 256 },
      { ...dense, layouts: "rr", m: 256, n: 256, k: 64 },
      { ...blocks, format: "f32", m: 16, n: 256, k: 64, count: 4 },
      { kind: "outer", layouts: "rr", format: "f32", m: 64, n: 64, k: 64, count: 4 },
    ];
  }
  const sides = [
    [1024, 1024],
    [4096, 1024],
  ] as const;
  return [64, 256, 1024].flatMap((m) => [
    ...sides.flatMap(([n, k]) => [
      ...weightFormats.map((format): ShapeClass => ({ ...dense, layouts: "kk", format, m, n, k })),
      { ...dense, layouts: "kr", m, n, k },
      { ...dense, layouts: "rr", m: n, n: k, k: m },
    ]),
    ...weightFormats.map((format): ShapeClass => ({ ...blocks, format, m, n: 2048, k: 1024 })),
    { ...blocks, layouts: "kr", format: "f32", m, n: 1024, k: 2048 },
    { kind: "outer", layouts: "rr", format: "f32", m: 1024, n: 1024, k: m, count: 8 },
  ]);
}

const bitsOf: { readonly [F in Format]: number } = { f32: 32, f16: 16, bf16: 16, int8: 8, int4: 4, mxfp4: 4 };
const GROUP = 32;
/** A run takes at least so many milliseconds, or so many repetitions. */
const LEAST = 10;
const MOST_REPEATS = 64;

/** The work of one class, on data of its own; `free` ends it. */
function workOf(gpu: OwnedGpu, shape: ShapeClass) {
  const { kind, layouts, format, m, n, k, count } = shape;
  const handles: WebgpuHandle[] = [];
  const keep = (handle: WebgpuHandle): WebgpuHandle => {
    handles.push(handle);
    return handle;
  };
  // Values between 1 and 2 (as bits: exponents of one), so that nothing is subnormal or overflows.
  const noise = (words: number, floats: boolean): WebgpuHandle => {
    let state = words;
    const data = new Int32Array(words).map(() => {
      state = (Math.imul(state, 1664525) + 1013904223) | 0;
      return floats ? 0x3f800000 | (state >>> 9) : (state & 0x007f007f) | 0x3f803f80;
    });
    return keep(gpu.upload(data, { shape: [words], dtype: "i32" }));
  };
  const matrix = (layout: string, lines: number, length: number, type: Format, matrices: number): Matrix => {
    const quantized = bitsOf[type] < 16;
    const lineBytes = (length * bitsOf[type]) / 8;
    const groups = length / GROUP;
    const words = Math.ceil((matrices * lines * lineBytes) / 4);
    const scaleBytes = type === "mxfp4" ? groups : 4 * groups;
    return {
      handle: noise(words, type === "f32"),
      layout: layout === "k" ? "k" : "r",
      format: type,
      length,
      lines,
      lineBytes,
      ...(quantized
        ? {
            quantized: {
              scales: {
                handle: noise(Math.ceil((matrices * lines * scaleBytes) / 4), type !== "mxfp4"),
                lineBytes: scaleBytes,
              },
              group: GROUP,
            },
          }
        : {}),
    };
  };
  const [layoutA = "k", layoutB = "k"] = layouts;
  const experts = kind === "dense" ? 1 : count;
  const rowsOfA = kind === "blocks" ? m * count : m;
  const inner = kind === "outer" ? k * count : k;
  const a = layoutA === "k" ? matrix("k", rowsOfA, inner, "f32", 1) : matrix("r", inner, rowsOfA, "f32", 1);
  const linesB = kind === "outer" ? inner : k;
  const b =
    layoutB === "k"
      ? matrix("k", n, k, format, kind === "dense" ? 1 : experts)
      : matrix("r", linesB, n, format, kind === "blocks" ? experts : 1);
  const rows = kind === "outer" ? experts * m : rowsOfA;
  const y = keep(gpu.alloc({ shape: [rows, n], dtype: "f32" }));
  const each = kind === "outer" ? k : m;
  const ends = keep(
    gpu.upload(
      Int32Array.from({ length: experts }, (_, e) => (e + 1) * each),
      { shape: [experts], dtype: "i32" },
    ),
  );

  const record = (tile: string): void => {
    const on = { ...gpu, tiles: { [classKey(shape)]: tile } };
    switch (kind) {
      case "dense":
        recordDense(on, { m, n, k, a, b, y, batch: oneMatrix, half: gpu.arithmetic === "f16" });
        return;
      case "blocks": {
        const product = { rows: a.handle, w: b, y, n, k, swiglu: false };
        recordBlocks(on, [product], { ends, rows: rowsOfA, experts, tail: true });
        return;
      }
      case "outer":
        recordOuter(on, a.handle, b.handle, { handle: ends, rows: inner }, { experts, m, n }, y);
        return;
      default:
        kind satisfies never;
    }
  };
  return {
    record,
    results: async () => new Uint32Array((await gpu.download({ shape: [rows, n], dtype: "f32", handle: y })).buffer),
    free(): void {
      for (const handle of handles) gpu.free(handle);
    },
  };
}

/**
 * Measures the tiles that fit a device on each of `shapes`. Returns a table with the classes where a tile beat the
 * default: plain JSON, for `webgpu({ tiles })`. Run it while nothing else uses the device; takes seconds per shape.
 * @example
 * const backend = await webgpu();
 * const tiles = await tune(backend);
 * const faster = await webgpu({ tiles });
 * @throws ShapeError where m or n of a shape is no multiple of 16, or k none of 32; DeviceError where the device fails
 * meanwhile.
 */
export async function tune(
  target: GPUDevice | { readonly device: GPUDevice },
  { shapes, onProgress, rounds, margin, clock = () => performance.now() }: TuneOptions = {},
): Promise<TileTable> {
  const device = "device" in target ? target.device : target;
  const gpu = createGpu(device, { idle: 0 });
  const finished = async (): Promise<void> => {
    gpu.flush();
    await device.queue.onSubmittedWorkDone();
    const failure = gpu.failure();
    if (failure) throw failure;
  };
  const table: Record<string, string> = {};
  const list = shapes ?? defaultShapes(gpu.software);
  const possible = tiles.filter((tile) => fits(tile, gpu.limits) && tile.staged !== gpu.software);
  let done = 0;
  for (const shape of list) {
    if ([shape.m, shape.n, shape.k].some((size) => size < 16 || size % 16 !== 0) || shape.k % GROUP !== 0) {
      throw new ShapeError(`tune: m and n must be multiples of 16 and k of ${GROUP}, found ${JSON.stringify(shape)}`);
    }
    const standard = defaultTile(gpu, shape).name;
    const work = workOf(gpu, shape);
    try {
      const timed = async (name: string, repeats: number): Promise<number> => {
        await finished();
        const start = clock();
        for (let i = 0; i < repeats; i++) work.record(name);
        await finished();
        return (clock() - start) / repeats;
      };
      work.record(standard);
      const expected = await work.results();
      const once = await timed(standard, 1);
      const repeats = Math.max(1, Math.min(MOST_REPEATS, Math.ceil(LEAST / Math.max(once, LEAST / MOST_REPEATS))));
      const outcome = await contest({
        candidates: [standard, ...possible.map(({ name }) => name).filter((name) => name !== standard)],
        measure: (name) => timed(name, repeats),
        async agrees(name) {
          work.record(name);
          const found = await work.results();
          return found.every((word, i) => word === expected[i]);
        },
        ...(rounds === undefined ? {} : { rounds }),
        ...(margin === undefined ? {} : { margin }),
      });
      if (outcome.winner !== standard) table[classKey(shape)] = outcome.winner;
      onProgress?.({ shape, outcome, done: ++done, total: list.length });
    } finally {
      work.free();
    }
  }
  gpu.dispose();
  return { [describe(device)]: table };
}
