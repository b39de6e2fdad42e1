// Training on a task: what the model can do without its experts, with them, and what is refused.
import { type Engine, engine, full, linear, softmax, type Tree } from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import { glu, type RouterPlugin } from "@switchyard/core/moe";
import { describe, expect, test } from "vitest";
import { fusionTask } from "./fusion.ts";
import { patchesTask } from "./patches.ts";
import { type TrainedTask, trainTask } from "./train.ts";

/** Every expert for every token, by a learned softmax; factor 0: the experts give nothing. */
const everyExpert = (factor: number, more: Partial<RouterPlugin> = {}): RouterPlugin => ({
  name: "everyExpert",
  causal: { training: true, evaluation: true },
  needs: [],
  plans: ["dense"],
  init: ({ engine: on, experts, width, random }) => ({
    params: { weight: on.tensor(random.at("weight").host("normal", experts * width), [experts, width]) },
    buffers: {},
    route(params: Tree, { hidden }) {
      const { weight } = params as { weight: Parameters<typeof linear>[1] };
      const probabilities = softmax(linear(hidden, weight)); // [tokens, experts]
      const weights = factor === 0 ? full(hidden, probabilities.shape, 0) : probabilities;
      return { plan: { kind: "dense", weights }, probabilities, losses: {} };
    },
  }),
  ...more,
});

const run = (on: Engine, task: "fusion" | "patches", router: RouterPlugin, steps = 40): Promise<TrainedTask> =>
  trainTask({
    task: task === "fusion" ? fusionTask({ noise: 0 }) : patchesTask({ grid: [2, 2] }),
    router,
    engine: on,
    steps,
    experts: 2,
    batch: 24,
    learningRate: 0.02,
    heldOut: 300,
  });

describe("trainTask", () => {
  test.each(["fusion", "patches"] as const)(
    "%s: with its experts the model learns, without them it is no better than guessing",
    async (task) => {
      const on = engine(cpu());
      const learned = await run(on, task, everyExpert(1), task === "fusion" ? 150 : 40);
      const linearOnly = await run(on, task, everyExpert(0));
      expect(learned.losses.at(-1)).toBeLessThan(0.6 * (learned.losses[0] ?? 0));
      expect(learned.accuracy).toBeGreaterThan(0.7);
      expect(linearOnly.chance).toBe(task === "fusion" ? 1 / 5 : 1 / 4);
      const guessing = Math.log(1 / linearOnly.chance);
      expect(learned.heldOutLoss).toBeLessThan(0.6 * guessing);
      expect(linearOnly.heldOutLoss).toBeGreaterThan(0.98 * guessing);
      expect(learned.accuracy).toBeGreaterThan(linearOnly.accuracy + 0.2);
      expect(on.live()).toBe(0);
    },
  );

  test("the same options give the same numbers, and shares of samples add up", async () => {
    const on = engine(cpu());
    const [one, other] = [await run(on, "fusion", everyExpert(1), 3), await run(on, "fusion", everyExpert(1), 3)];
    expect(one).toEqual(other);
    expect(one.losses).toHaveLength(3);
    const { missing, complete } = one;
    expect(missing.samples + complete.samples).toBe(300);
    expect(missing.samples).toBeGreaterThan(50);
    const right = missing.samples * missing.accuracy + complete.samples * complete.accuracy;
    expect(right / 300).toBeCloseTo(one.accuracy, 9);
    const whole = await run(on, "patches", everyExpert(1), 1);
    expect(whole.missing).toEqual({ samples: 0, accuracy: 0 });
  });

  test("routers get modality ids and what is missing, shared experts are made, experts can be others", async () => {
    const on = engine(cpu());
    const seen: string[] = [];
    const plain = everyExpert(1);
    const router: RouterPlugin = {
      ...plain,
      needs: ["modalityIds"],
      sharedExperts: 1,
      init(context) {
        const made = plain.init(context);
        return {
          ...made,
          route(params, input) {
            seen.push(`${input.modalityIds?.shape} ${input.missing?.shape} ${context.experts}`);
            return made.route(params, input);
          },
        };
      },
    };
    await trainTask({
      task: fusionTask(),
      router,
      engine: on,
      steps: 1,
      batch: 2,
      heldOut: 4,
      makeExperts: ({ width, ...initial }) => glu({ count: 3, width, hidden: 2, ...initial }),
    });
    expect(seen).toEqual(["6 6 3", "12 12 3"]);
    expect(on.live()).toBe(0);
  });

  test("a router that needs what is not there is refused", async () => {
    const on = engine(cpu());
    const needy = (need: "attention" | "modalityIds"): RouterPlugin => everyExpert(1, { needs: [need] });
    await expect(run(on, "fusion", needy("attention"))).rejects.toThrow(
      'router everyExpert needs "attention", which the task "fusion" does not have',
    );
    await expect(run(on, "patches", needy("modalityIds"))).rejects.toThrow(
      'needs "modalityIds", which the task "patches"',
    );
    expect(on.live()).toBe(0);
  });
});
