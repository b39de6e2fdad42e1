// Measures things against each other: in turn, in one run, with the spread. Knows nothing about what it measures.
// Wall-clock figures of a loaded machine mislead, so CPU time is taken too where the host can tell it.
import { type Engine, slice, type Tensor } from "@switchyard/core";

/** One workload. `run` is called many times; its result is what is synchronised on and compared. */
export interface Benchmark<C> {
  readonly name: string;
  readonly cases: readonly C[];
  /** `flops` and `bytes` (read and written at least once) are per run. */
  setup(engine: Engine, one: C): Workload;
}

export interface Workload {
  /** Enqueues the work once. The result belongs to the caller; temporaries are gone when it returns. */
  run(): Tensor;
  /** What is compared with other contenders, where the result of `run` is only a part of it. */
  outputs?(): readonly Tensor[];
  readonly flops: number;
  readonly bytes: number;
  /** Frees what `setup` made. */
  dispose(): void;
}

/** Anything that can be timed: one of our engines with a workload, or another library doing the same work. */
export interface Contender {
  readonly name: string;
  /** Does the work once and returns when it is done (not when it is enqueued). */
  run(): unknown | Promise<unknown>;
  /**
   * Does the work that often and waits once, at the end: for devices with a queue, where the way there and back may take
   * longer than the work. Answers a reader of the device's own clock (seconds for all the runs) where there is one.
   */
  many?(runs: number): Promise<DeviceTime | undefined>;
  /** The result, or each of several, for checking that all contenders compute the same. */
  output?(): Promise<ArrayLike<number> | readonly ArrayLike<number>[]>;
  /** How it goes about it, where there was a choice. */
  readonly note?: string;
  /** It works in another process: our clock sees none of its CPU time. */
  readonly outside?: boolean;
  dispose?(): void | Promise<void>;
}

/** Reads seconds by the device's clock; called when the host's clock has been stopped. */
export type DeviceTime = () => Promise<number>;

export interface Summary {
  readonly median: number;
  readonly min: number;
  readonly max: number;
  readonly count: number;
}

export interface Timing {
  readonly name: string;
  /** Seconds per run, one entry per repetition, in the order they were taken. */
  readonly samples: readonly number[];
  readonly wall: Summary;
  /** CPU seconds per run over all threads, alike; absent where the host cannot tell (browsers, other processes). */
  readonly cpuSamples?: readonly number[];
  readonly cpu?: Summary;
  /** Seconds per run by the device's own clock, where it has one. */
  readonly device?: Summary;
  /** Runs averaged into one sample. */
  readonly runs: number;
}

/** Seconds. `cpu` counts all threads of the process. */
export interface Clock {
  now(): number;
  cpu(): number | undefined;
}

export interface MeasureOptions {
  /** Samples per contender; default 7. */
  readonly repetitions?: number;
  /** A sample repeats the run until it lasts about this long; default 0.2 s. */
  readonly minimumSeconds?: number;
  /** Idle time before each sample, so that spinning threads of the contender before go to sleep; default 0.02 s. */
  readonly pauseSeconds?: number;
  readonly clock?: Clock;
}

/** Median, minimum and maximum. @throws RangeError without samples. */
export function summarise(samples: readonly number[]): Summary {
  if (samples.length === 0) throw new RangeError("summarise: there are no samples");
  const sorted = samples.toSorted((a, b) => a - b);
  const at = (i: number): number => sorted[i] as number;
  const middle = (sorted.length - 1) / 2;
  return {
    median: (at(Math.floor(middle)) + at(Math.ceil(middle))) / 2,
    min: at(0),
    max: at(sorted.length - 1),
    count: sorted.length,
  };
}

export const hostClock: Clock = {
  now: () => performance.now() / 1000,
  cpu() {
    const usage = globalThis.process?.cpuUsage?.();
    return usage && (usage.user + usage.system) / 1e6;
  },
};

const sleep = (seconds: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, seconds * 1000));

/**
 * Times the contenders in turn: every repetition takes one sample of each, and the order rotates, so that a machine that
 * slows down or a neighbour that leaves a hot cache behind touches all of them alike.
 */
export async function measure(
  contenders: readonly Contender[],
  { repetitions = 7, minimumSeconds = 0.2, pauseSeconds = 0.02, clock = hostClock }: MeasureOptions = {},
): Promise<readonly Timing[]> {
  const entries: { contender: Contender; runs: number; wall: number[]; cpu: number[]; device: number[] }[] = [];
  for (const contender of contenders) {
    // Engines compile better what has run for a while; packing and growing memory happen here too.
    const warm = clock.now() + minimumSeconds;
    do await contender.run();
    while (clock.now() < warm);
    const runs = await runsPerSample(contender, minimumSeconds, clock);
    entries.push({ contender, runs, wall: [], cpu: [], device: [] });
  }
  for (let repetition = 0; repetition < repetitions; repetition++) {
    for (let turn = 0; turn < entries.length; turn++) {
      const entry = entries[(turn + repetition) % entries.length];
      if (entry === undefined) continue;
      if (pauseSeconds > 0) await sleep(pauseSeconds);
      const cpu = clock.cpu();
      const start = clock.now();
      const deviceTime = await perform(entry.contender, entry.runs);
      entry.wall.push((clock.now() - start) / entry.runs);
      const cpuEnd = clock.cpu();
      if (cpu !== undefined && cpuEnd !== undefined && !entry.contender.outside)
        entry.cpu.push((cpuEnd - cpu) / entry.runs);
      if (deviceTime) entry.device.push((await deviceTime()) / entry.runs);
    }
  }
  return entries.map(({ contender, runs, wall, cpu, device }) => ({
    name: contender.name,
    samples: wall,
    wall: summarise(wall),
    ...(cpu.length > 0 && { cpuSamples: cpu, cpu: summarise(cpu) }),
    ...(device.length > 0 && { device: summarise(device) }),
    runs,
  }));
}

async function perform(contender: Contender, runs: number): Promise<DeviceTime | undefined> {
  if (contender.many) return contender.many(runs);
  for (let run = 0; run < runs; run++) await contender.run();
  return undefined;
}

/** How many runs last about `seconds`. One run of a queue is mostly waiting: what it costs shows only in a row of them. */
async function runsPerSample(contender: Contender, seconds: number, clock: Clock): Promise<number> {
  let runs = 1;
  for (;;) {
    const start = clock.now();
    await perform(contender, runs);
    const each = Math.max(clock.now() - start, 1e-7) / runs;
    const wanted = Math.max(1, Math.round(seconds / each));
    if (!contender.many || wanted <= 2 * runs) return wanted;
    runs = Math.min(wanted, 8 * runs);
  }
}

/** How many times faster `ours` is than `peer`: above 1 we win. Paired by repetition, so slow drifts cancel. */
export function speedup(ours: Timing, peer: Timing): Summary {
  return paired(ours, peer, ({ samples }) => samples);
}

/** The same in CPU seconds, which a busy machine disturbs less; undefined where one of the two has none. */
export function cpuSpeedup(ours: Timing, peer: Timing): Summary | undefined {
  return ours.cpuSamples && peer.cpuSamples ? paired(ours, peer, ({ cpuSamples = [] }) => cpuSamples) : undefined;
}

function paired(ours: Timing, peer: Timing, of: (timing: Timing) => readonly number[]): Summary {
  const [own, other] = [of(ours), of(peer)];
  if (own.length !== other.length) {
    throw new RangeError(
      `speedup: ${ours.name} has ${own.length} samples, ${peer.name} has ${other.length}; measure them together`,
    );
  }
  return summarise(own.map((seconds, i) => (other[i] as number) / seconds));
}

/** |found - expected| over the largest |expected|; NaN or another length is an infinite error. */
export function relativeError(found: ArrayLike<number>, expected: ArrayLike<number>): number {
  if (found.length !== expected.length) return Number.POSITIVE_INFINITY;
  let worst = 0;
  let scale = 0;
  for (let i = 0; i < expected.length; i++) {
    const difference = Math.abs((found[i] as number) - (expected[i] as number));
    if (Number.isNaN(difference)) return Number.POSITIVE_INFINITY;
    worst = Math.max(worst, difference);
    scale = Math.max(scale, Math.abs(expected[i] as number));
  }
  return worst === 0 ? 0 : worst / scale;
}

type Output = ArrayLike<number> | readonly ArrayLike<number>[];

const parts = (output: Output): readonly ArrayLike<number>[] =>
  Array.isArray(output) && typeof output[0] === "object" ? output : [output as ArrayLike<number>];

/** The worst relative error among the parts, each against its own largest value. */
function worstError(found: Output, expected: Output): number {
  const [left, right] = [parts(found), parts(expected)];
  if (left.length !== right.length) return Number.POSITIVE_INFINITY;
  return Math.max(0, ...left.map((part, i) => relativeError(part, right[i] ?? [])));
}

/** Waits until `x` is computed by reading one element of it (all of it would time the copy). */
export async function synchronise(x: Tensor): Promise<void> {
  if (x.size === 0) return;
  const corner = slice(
    x,
    x.shape.map(() => 0),
    x.shape.map(() => 1),
  );
  await corner.data();
  corner.dispose();
}

/** A workload on one of our engines, as a contender. */
export function contender(name: string, workload: Workload): Contender {
  return {
    name,
    async run() {
      const y = workload.run();
      await synchronise(y);
      y.dispose();
    },
    async output() {
      const ys = workload.outputs?.() ?? [workload.run()];
      const data = [];
      for (const y of ys) {
        data.push(await y.data());
        y.dispose();
      }
      return data;
    },
    dispose: () => workload.dispose(),
  };
}

/** The queue of a device on which work goes on after a run has returned. */
export interface Queue {
  /** Sends what was enqueued so far. */
  flush(): void;
  /** Starts the device's own clock behind everything that was sent; missing where it has none. */
  stopwatch?(): Stopwatch;
}
export interface Stopwatch {
  /** Notes the time behind everything that was sent until now. */
  stop(): void;
  readonly seconds: DeviceTime;
}

/** Runs between two flushes: few enough to keep the device busy from the start, enough to spare it small submissions. */
const runsPerFlush = 8;

/** A workload on an engine with a queue, as a contender that sends many runs and waits once. */
export function queued(name: string, workload: Workload, queue: Queue): Contender {
  return {
    ...contender(name, workload),
    async many(runs) {
      const watch = queue.stopwatch?.();
      let last: Tensor | undefined;
      for (let run = 0; run < runs; run++) {
        last?.dispose();
        last = workload.run();
        if (run % runsPerFlush === 0) queue.flush();
      }
      queue.flush();
      watch?.stop();
      if (last) {
        await synchronise(last);
        last.dispose();
      }
      return watch?.seconds;
    },
  };
}

/** A contender that is not set up yet: setting up may fail, and may take much memory. */
export interface Candidate {
  readonly name: string;
  open(): Contender | Promise<Contender>;
}

export interface Entry {
  readonly name: string;
  readonly timing?: Timing;
  /** Relative error against the first of ours. */
  readonly error?: number;
  /** How it went about it, where there was a choice. */
  readonly note?: string;
  /** Why there is no timing. */
  readonly failed?: string;
}

export interface Ratio {
  readonly ours: string;
  readonly peer: string;
  /** Above 1 we are faster. */
  readonly speedup: Summary;
  readonly cpuSpeedup?: Summary;
}

export interface Comparison {
  readonly entries: readonly Entry[];
  readonly ratios: readonly Ratio[];
}

export interface CompareOptions extends MeasureOptions {
  /** A contender whose result is further off than this is not timed; default 1e-3. */
  readonly tolerance?: number;
}

const reason = (error: unknown): string =>
  (error instanceof Error ? error.message : String(error)).split("\n")[0] ?? "";

/**
 * Sets all candidates up, checks that their results agree with the first of ours, and measures them in turn. A peer that fails or
 * disagrees is reported in its entry and the rest goes on; an error of ours is thrown.
 */
export async function compare(
  ours: readonly Candidate[],
  peers: readonly Candidate[],
  { tolerance = 1e-3, ...options }: CompareOptions = {},
): Promise<Comparison> {
  const failures = new Map<string, string>();
  const errors = new Map<string, number>();
  const ready: Contender[] = [];
  let expected: Output | undefined;
  try {
    for (const candidate of [...ours, ...peers]) {
      try {
        const one = await candidate.open();
        ready.push(one);
        const found = await one.output?.();
        expected ??= found;
        if (found === undefined || expected === undefined) continue;
        const error = worstError(found, expected);
        if (!(error <= tolerance)) throw new RangeError(`its result differs, relative error ${error.toExponential(1)}`);
        errors.set(candidate.name, error);
      } catch (error) {
        if (ours.includes(candidate)) throw error;
        failures.set(candidate.name, reason(error));
      }
    }
    const timings = await measure(
      ready.filter(({ name }) => !failures.has(name)),
      options,
    );
    const timingOf = (name: string): Timing | undefined => timings.find((timing) => timing.name === name);
    const entries = [...ours, ...peers].map(({ name }): Entry => {
      const timing = timingOf(name);
      const error = errors.get(name);
      const failed = failures.get(name);
      const note = ready.find((one) => one.name === name)?.note;
      return {
        name,
        ...(timing && { timing }),
        ...(error !== undefined && { error }),
        ...(note !== undefined && { note }),
        ...(failed !== undefined && { failed }),
      };
    });
    const ratios = ours.flatMap((own) =>
      peers.flatMap((peer): Ratio[] => {
        const [a, b] = [timingOf(own.name), timingOf(peer.name)];
        if (!a || !b) return [];
        const cpu = cpuSpeedup(a, b);
        return [{ ours: own.name, peer: peer.name, speedup: speedup(a, b), ...(cpu && { cpuSpeedup: cpu }) }];
      }),
    );
    return { entries, ratios };
  } finally {
    for (const one of ready) await one.dispose?.();
  }
}
