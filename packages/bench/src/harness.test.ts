// The harness under a clock of its own: what it reports must be what the clock says.
import { engine } from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import { describe, expect, it } from "vitest";
import {
  type Clock,
  type Contender,
  compare,
  contender,
  cpuSpeedup,
  measure,
  queued,
  relativeError,
  speedup,
  summarise,
} from "./harness.ts";

/** Time passes only when a contender works: `seconds(run)` wall and twice that on the CPU. */
const machine = () => {
  let now = 100;
  const order: string[] = [];
  const clock: Clock = { now: () => now, cpu: () => 2 * now };
  const worker = (name: string, seconds: (run: number) => number): Contender => {
    let run = 0;
    return {
      name,
      run() {
        order.push(name);
        now += seconds(run++);
      },
    };
  };
  return { clock, worker, order };
};

describe("summarise", () => {
  it("gives median, extremes and count", () => {
    expect(summarise([3, 1, 2])).toEqual({ median: 2, min: 1, max: 3, count: 3 });
    expect(summarise([4, 1, 2, 3])).toEqual({ median: 2.5, min: 1, max: 4, count: 4 });
    expect(() => summarise([])).toThrow("no samples");
  });
});

describe("measure", () => {
  it("averages a sample over enough runs, and reports wall and CPU time per run", async () => {
    const { clock, worker } = machine();
    const [fast, slow] = await measure([worker("fast", () => 0.25), worker("slow", () => 4)], {
      repetitions: 3,
      minimumSeconds: 1,
      pauseSeconds: 0,
      clock,
    });
    expect(fast).toMatchObject({ name: "fast", runs: 4, samples: [0.25, 0.25, 0.25], wall: { median: 0.25 } });
    expect(fast?.cpu).toEqual({ median: 0.5, min: 0.5, max: 0.5, count: 3 });
    expect(slow).toMatchObject({ runs: 1, wall: { median: 4, count: 3 } });
  });

  it("warms up outside the clock and takes turns in rotating order", async () => {
    const { clock, worker, order } = machine();
    const timings = await measure([worker("a", (run) => (run === 0 ? 1000 : 1)), worker("b", () => 1)], {
      repetitions: 3,
      minimumSeconds: 1,
      pauseSeconds: 0,
      clock,
    });
    expect(timings.map((t) => t.wall.max)).toEqual([1, 1]);
    expect(order.join("")).toBe("aabb" + "ab" + "ba" + "ab");
  });

  it("leaves CPU time out where the host cannot tell it", async () => {
    const { clock, worker } = machine();
    const [timing] = await measure([worker("a", () => 1)], {
      repetitions: 1,
      pauseSeconds: 0,
      clock: { now: clock.now, cpu: () => undefined },
    });
    expect(timing?.cpu).toBeUndefined();
    const outside = { ...worker("b", () => 1), outside: true };
    const [own, other] = await measure([worker("a", () => 1), outside], { repetitions: 1, pauseSeconds: 0, clock });
    expect(own?.cpu?.median).toBe(2);
    expect(other?.cpu).toBeUndefined();
    expect(own && other && cpuSpeedup(own, other)).toBeUndefined();
  });

  it("uses the host's clocks by default", async () => {
    const burn = () => {
      const end = performance.now() + 3;
      while (performance.now() < end);
    };
    const [timing] = await measure([{ name: "burn", run: burn }], { repetitions: 2, minimumSeconds: 0.006 });
    expect(timing?.wall.min).toBeGreaterThanOrEqual(0.0029);
    expect(timing?.cpu?.count).toBe(2);
  });
});

describe("a contender with a queue", () => {
  it("is timed over many runs with one wait, and its device's clock is read outside of ours", async () => {
    const { clock } = machine();
    let now = 0;
    const sent: number[] = [];
    const [timing] = await measure(
      [
        {
          name: "gpu",
          run() {
            now += 10.25; // 10 s there and back
          },
          async many(runs) {
            sent.push(runs);
            now += 10 + 0.25 * runs;
            return async () => {
              now += 1000;
              return 0.2 * runs;
            };
          },
        },
      ],
      { repetitions: 2, minimumSeconds: 50, pauseSeconds: 0, clock: { now: () => now, cpu: clock.cpu } },
    );
    // 1 run lasts 10.25 s, so 5 would do; 5 last 11.25 s, so 22; 22 last 15.5 s, so 71; 71 last 27.75 s, so 128 will do.
    expect(sent).toEqual([1, 5, 22, 71, 128, 128]);
    expect(timing?.runs).toBe(128);
    expect(timing?.wall.median).toBeCloseTo(10 / 128 + 0.25, 12);
    expect(timing?.device).toMatchObject({ count: 2 });
    expect(timing?.device?.median).toBeCloseTo(0.2, 12);
  });

  it("sends runs in batches, starts and stops the device's clock around them, and leaves nothing alive", async () => {
    const host = engine(cpu());
    const events: string[] = [];
    const one = queued(
      "cpu",
      {
        run() {
          events.push("run");
          return host.tensor(Float32Array.of(1), [1]);
        },
        flops: 0,
        bytes: 0,
        dispose: () => undefined,
      },
      {
        flush: () => void events.push("flush"),
        stopwatch() {
          events.push("start");
          return { stop: () => void events.push("stop"), seconds: async () => 3 };
        },
      },
    );
    const seconds = await one.many?.(10);
    const eight = new Array(8).fill("run");
    expect(events).toEqual(["start", "run", "flush", ...eight, "flush", "run", "flush", "stop"]);
    expect(await seconds?.()).toBe(3);
    expect(host.live()).toBe(0);
  });
});

describe("speedup", () => {
  it("pairs the samples, so a drift of the machine cancels", async () => {
    const { clock, worker } = machine();
    const options = { repetitions: 4, minimumSeconds: 0, pauseSeconds: 0, clock };
    const [ours, peer] = await measure(
      [worker("ours", (run) => 2 ** run), worker("peer", (run) => 3 * 2 ** run)],
      options,
    );
    if (ours === undefined || peer === undefined) throw new Error("two timings expected");
    expect(speedup(ours, peer)).toEqual({ median: 3, min: 3, max: 3, count: 4 });
    expect(speedup(peer, ours).median).toBeCloseTo(1 / 3, 12);
    expect(cpuSpeedup(ours, peer)).toEqual({ median: 3, min: 3, max: 3, count: 4 });
    expect(() => speedup(ours, { ...peer, samples: [1] })).toThrow("ours has 4 samples, peer has 1");
  });
});

describe("relativeError", () => {
  it("is relative to the largest expected value, and infinite for what cannot be compared", () => {
    expect(relativeError([1, 2.5], [1, 2])).toBe(0.25);
    expect(relativeError([0, 0], [0, 0])).toBe(0);
    expect(relativeError([1], [1, 2])).toBe(Number.POSITIVE_INFINITY);
    expect(relativeError([Number.NaN], [1])).toBe(Number.POSITIVE_INFINITY);
    expect(relativeError([1], [0])).toBe(Number.POSITIVE_INFINITY);
  });
});

describe("contender", () => {
  it("runs a workload on an engine, and leaves nothing alive", async () => {
    const host = engine(cpu());
    const x = host.tensor(Float32Array.of(1, 2, 3), [3]);
    let runs = 0;
    const one = contender("cpu", {
      run() {
        runs++;
        return host.tensor(Float32Array.of(runs, 7), [2]);
      },
      flops: 0,
      bytes: 0,
      dispose: () => x.dispose(),
    });
    await one.run();
    expect(host.live()).toBe(1);
    expect(await one.output?.()).toEqual([Float32Array.of(2, 7)]);
    await one.dispose?.();
    expect(host.live()).toBe(0);
  });
});

describe("compare", () => {
  const options = { repetitions: 2, minimumSeconds: 0, pauseSeconds: 0 };
  const candidates = () => {
    const { clock, worker } = machine();
    const disposed: string[] = [];
    const candidate = (name: string, seconds: number, output: number[]) => ({
      name,
      open: (): Contender => ({
        ...worker(name, () => seconds),
        output: async () => output,
        dispose: () => void disposed.push(name),
      }),
    });
    return { clock, candidate, disposed };
  };

  it("gives a speed-up for every pair, and the error against ours", async () => {
    const { clock, candidate, disposed } = candidates();
    const ours = [candidate("fast", 1, [1, 2]), candidate("slow", 2, [1, 2])];
    const { entries, ratios } = await compare(ours, [candidate("peer", 6, [1, 2.001])], { ...options, clock });
    expect(entries.map(({ name, error }) => [name, error?.toPrecision(3)])).toEqual([
      ["fast", "0.00"],
      ["slow", "0.00"],
      ["peer", "0.000500"],
    ]);
    expect(ratios.map(({ ours, peer, speedup }) => [ours, peer, speedup.median])).toEqual([
      ["fast", "peer", 6],
      ["slow", "peer", 3],
    ]);
    expect(disposed).toEqual(["fast", "slow", "peer"]);
  });

  it("reports a peer that fails or disagrees and goes on with the rest", async () => {
    const { clock, candidate, disposed } = candidates();
    const broken = {
      name: "broken",
      open: () => Promise.reject(new Error("no such device\nstack")),
    };
    const peers = [broken, candidate("wrong", 1, [1, 3]), candidate("right", 4, [1, 2])];
    const { entries, ratios } = await compare([candidate("ours", 1, [1, 2])], peers, { ...options, clock });
    expect(entries.map(({ failed }) => failed)).toEqual([
      undefined,
      "no such device",
      "its result differs, relative error 5.0e-1",
      undefined,
    ]);
    expect(ratios.map(({ peer }) => peer)).toEqual(["right"]);
    expect(disposed).toEqual(["ours", "wrong", "right"]);
  });

  it("compares several results each by its own scale, and tells how a peer went about it", async () => {
    const several = (name: string, small: number, note?: string) => ({
      name,
      open: (): Contender => ({
        name,
        run: () => undefined,
        output: async () => [[1e6, 2e6], [small]],
        ...(note !== undefined && { note }),
      }),
    });
    const { clock } = machine();
    const fewer = {
      name: "fewer",
      open: () => ({ name: "fewer", run: () => undefined, output: async () => [[1e6, 2e6]] }),
    };
    const peers = [several("off", 1.5), several("right", 1.0001, "in one go"), fewer];
    const { entries } = await compare([several("ours", 1)], peers, { ...options, clock });
    expect(entries.map(({ failed, error, note }) => [failed, error?.toFixed(5), note])).toEqual([
      [undefined, "0.00000", undefined],
      ["its result differs, relative error 5.0e-1", undefined, undefined],
      [undefined, "0.00010", "in one go"],
      ["its result differs, relative error Infinity", undefined, undefined],
    ]);
  });

  it("throws what goes wrong on our side, and still frees", async () => {
    const { clock, candidate, disposed } = candidates();
    const ours = [candidate("good", 1, [1]), candidate("bad", 1, [2])];
    await expect(compare(ours, [], { ...options, clock })).rejects.toThrow("its result differs");
    expect(disposed).toEqual(["good", "bad"]);
  });
});
