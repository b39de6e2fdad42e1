// What is done on every page, in its worker or on its main thread, and once more in Node: plain functions over data.
import { engine, random } from "@switchyard/core";
import { adamw, trainer } from "@switchyard/core/train";
import { wasm } from "@switchyard/kernels/wasm";
import { languageModelTask, randomWindows, readSnapshot, transformer } from "@switchyard/models";
import { topK } from "@switchyard/routers/top-k";
import { backendCases } from "@switchyard/testing/backend-cases";

// How often this thread waited for others, and how often it took a piece of work that others could have taken.
const counts = { wait: 0, compareExchange: 0 };
for (const name of Object.keys(counts)) {
  const original = Atomics[name];
  Atomics[name] = (...args) => {
    counts[name]++;
    return original(...args);
  };
}

/** Runs `body` on a new backend; adds what the backend says about itself, and what is left on it. */
async function onBackend(threads, body) {
  const backend = await wasm({ threads });
  try {
    const on = engine(backend);
    const before = { ...counts };
    const used = backend.memory().used;
    const result = await body(on);
    return {
      ...result,
      threads: backend.threads,
      variant: backend.variant,
      note: backend.note,
      live: on.live(),
      leaked: backend.memory().used - used,
      waits: counts.wait - before.wait,
      pieces: counts.compareExchange - before.compareExchange,
    };
  } finally {
    backend.dispose();
  }
}

/** Every case of the backend suite. */
const cases = (threads) =>
  onBackend(threads, async (on) => {
    const failures = [];
    const all = backendCases();
    for (const one of all) {
      try {
        await one.run(on);
      } catch (error) {
        failures.push(`${one.name}: ${error.message}`);
      }
    }
    return { count: all.length, failures };
  });

/** Trains a small language model on a text that repeats itself: 6 letters out of 40, a new start at each window. */
const train = (threads, steps, onStep) =>
  onBackend(threads, async (on) => {
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
      totalSteps: steps,
    });
    const { loss } = await run.step();
    const live = on.live();
    onStep?.(0, loss);
    await run.run({ onStep: (report) => onStep?.(report.step, report.loss) });
    const grown = on.live() - live;
    const losses = run.history.map((report) => report.loss);
    const loads = run.history.at(-1)?.loads.map((load) => [...load]) ?? [];
    const { loss: evaluation } = await run.evaluate([data.batch(steps)]);
    run.dispose();
    return { losses, loads, evaluation, grown };
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

export const job = { cases, train, place, readFile };
