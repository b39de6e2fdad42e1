// What is done on every page, in its worker or on its main thread, and once more in Node: plain functions over data.
// A backend goes by name; `makers` says how each is made.
import { DeviceError, engine, random } from "@switchyard/core";
import { adamw, trainer } from "@switchyard/core/train";
import { languageModelTask, randomWindows, readSnapshot, transformer } from "@switchyard/models";
import { topK } from "@switchyard/routers/top-k";
import { backendCases } from "@switchyard/testing/backend-cases";
import { golden } from "./golden.js";

// How often this thread waited for others, and how often it took a piece of work that others could have taken.
const counts = { wait: 0, compareExchange: 0 };
for (const name of Object.keys(counts)) {
  const original = Atomics[name];
  Atomics[name] = (...args) => {
    counts[name]++;
    return original(...args);
  };
}

/** A small language model and a text that repeats itself: 6 letters out of 40, a new start at each window. */
function languageModel(on) {
  const router = topK({ k: 2 });
  const config = {
    vocabulary: 40,
    width: 48,
    layers: 2,
    heads: 4,
    kvHeads: 2,
    experts: 6,
    hidden: 40,
    router,
    context: 32,
  };
  const model = transformer(on, config, random(on, 1));
  const text = Int32Array.from({ length: 3000 }, (_, i) => (((i * i) % 7) * 5 + (i % 6)) % 40);
  const data = randomWindows(text, { batch: 8, sequence: 31, random: random(on, 2) });
  const run = trainer(on, languageModelTask(model, data), {
    optimiser: adamw({ learningRate: 5e-3 }),
    clip: 1,
    seed: 3,
  });
  return { run, data };
}

/** What a promise was rejected with, in words; undefined where it was not. */
const rejection = (promise) =>
  promise.then(
    () => undefined,
    (error) => ({ device: DeviceError.isInstance(error), message: `${error?.name}: ${error?.message}` }),
  );

/** The answer for what should have ended long ago. */
const patience = () =>
  new Promise((resolve) => {
    setTimeout(resolve, 60_000, { device: false, message: "after a minute it goes on as if nothing had happened" });
  });

/** Where this runs. */
const place = () => ({
  isolated: globalThis.crossOriginIsolated === true,
  page: typeof document !== "undefined",
});

/** What reading a file answers. */
const readFile = () =>
  readSnapshot("training.safetensors").then(
    () => "read",
    (error) => `${error.name}: ${error.message}`,
  );

/** `makers`: by name, functions that make a backend from the options of a call. */
export function makeJob(makers) {
  const open = (name, options) => {
    const make = makers[name];
    if (!make) throw new Error(`no backend "${name}" here; there are ${Object.keys(makers).join(", ")}`);
    return make(options);
  };

  /** Runs `body` on a new backend; adds what the backend says about itself, and what is left on it. */
  async function onBackend(name, options, body) {
    const backend = await open(name, options);
    try {
      const on = engine(backend);
      const before = { ...counts };
      const used = async () => (await backend.memory?.())?.used ?? 0;
      const usedBefore = await used();
      const started = performance.now();
      const result = await body(on);
      return {
        ...result,
        seconds: (performance.now() - started) / 1000,
        threads: backend.threads,
        variant: backend.variant,
        note: backend.note,
        description: backend.description,
        live: on.live(),
        leaked: (await used()) - usedBefore,
        waits: counts.wait - before.wait,
        pieces: counts.compareExchange - before.compareExchange,
      };
    } finally {
      await backend.dispose?.();
    }
  }

  /** The backend suite: every case, or each `every`-th. */
  const cases = (name, { every = 1, ...options } = {}) =>
    onBackend(name, options, async (on) => {
      const all = backendCases();
      const chosen = all.filter((_, i) => i % every === 0);
      const failures = [];
      for (const one of chosen) {
        try {
          await one.run(on);
        } catch (error) {
          failures.push(`${one.name}: ${error.message}`);
        }
      }
      return { count: chosen.length, of: all.length, failures };
    });

  /** Trains the small language model. */
  const train = (name, { steps, ...options }, onStep) =>
    onBackend(name, options, async (on) => {
      const { run, data } = languageModel(on);
      const { loss } = await run.step();
      const live = on.live();
      onStep?.(0, loss);
      await run.run({ until: steps, onStep: (report) => onStep?.(report.step, report.loss) });
      const grown = on.live() - live;
      const losses = run.history.map((report) => report.loss);
      const loads = run.history.at(-1)?.loads.map((load) => [...load]) ?? [];
      const { loss: evaluation } = await run.evaluate([data.batch(steps)]);
      run.dispose();
      return { losses, loads, evaluation, grown };
    });

  // A training whose device goes away: begun by one call, ended by another, so that something can happen in between.
  let interrupted;

  /** Trains until `until`, takes a snapshot, and goes on training; with `lose` the device goes away at once. */
  async function beginLosing(name, { steps, until, lose, ...options }) {
    const rejections = [];
    addEventListener("unhandledrejection", ({ reason }) => rejections.push(String(reason)));
    const backend = await open(name, options);
    const { run } = languageModel(engine(backend));
    await run.run({ until });
    const snapshot = await run.snapshot();
    const ended = rejection(run.run({ until: Number.MAX_SAFE_INTEGER }));
    if (lose && backend.lose) backend.lose();
    else if (lose) backend.device.destroy();
    interrupted = { steps, backend, run, snapshot, ended, rejections };
  }

  /** What the training ended with; then, where the backend can, a new device, where training goes on from the snapshot. */
  async function endLosing() {
    const { steps, backend, run, snapshot, ended, rejections } = interrupted;
    const error = await Promise.race([ended, patience()]);
    const again = await rejection(run.step());
    let losses;
    if (backend.recover) {
      const renewed = await backend.recover();
      const resumed = languageModel(engine(renewed)).run;
      resumed.restore(snapshot);
      await resumed.run({ until: steps });
      losses = resumed.history.map((report) => report.loss);
      resumed.dispose();
      renewed.dispose();
    }
    // Rejections are reported in a task of their own.
    await new Promise((resolve) => setTimeout(resolve, 50));
    return { error, again, losses, rejections };
  }

  /** Runs recorded checkpoints; see golden.js. */
  const checkpoints = (name, options, requests) => onBackend(name, options, (on) => golden(on, requests));

  return { cases, train, checkpoints, beginLosing, endLosing, place, readFile };
}
