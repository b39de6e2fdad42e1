// The model as one request sees it: its passes take turns with those of others, and what its routers decide is counted, and kept where
// the request wants to see it.
import { setImmediate as soon } from "node:timers/promises";
import { UnsupportedError } from "@switchyard/core";
import type { Plan, Routed } from "@switchyard/core/moe";
import type { LanguageModel, RoutingPlace, RoutingTrace } from "@switchyard/models";
import type { Turns } from "./turns.ts";

/** What one router chose for one token, the heaviest expert first. */
export interface ChosenExperts {
  readonly layer: number;
  readonly part: RoutingPlace["part"];
  readonly experts: readonly number[];
  readonly weights: readonly number[];
}

/** How many tokens every expert got, one list per router. */
export class ExpertLoad {
  readonly routing: readonly RoutingPlace[];
  readonly tokens: readonly Float64Array[];

  constructor(routing: readonly RoutingPlace[]) {
    this.routing = routing;
    this.tokens = routing.map(({ experts }) => new Float64Array(experts));
  }

  add(place: number, expert: number): void {
    const counts = this.tokens[place];
    // Ids beyond the experts are null experts, which compute nothing.
    if (counts && expert >= 0 && expert < counts.length) counts[expert] = (counts[expert] ?? 0) + 1;
  }

  /** The busiest expert's tokens over the mean of all: 1 is balanced; 0 before the first token. */
  busiest(place: number): number {
    const counts = this.tokens[place] ?? new Float64Array(0);
    const sum = counts.reduce((total, n) => total + n, 0);
    return sum === 0 ? 0 : (Math.max(...counts) * counts.length) / sum;
  }
}

/** `see` gets every choice: token, expert, weight. Tensors are read at once, as they are gone after the pass. */
async function choices(plan: Plan, see: (token: number, expert: number, weight: number) => void): Promise<void> {
  switch (plan.kind) {
    case "sparse": {
      const k = plan.experts.shape[1] ?? 1;
      const [experts, weights] = await Promise.all([plan.experts.data(), plan.weights.data()]);
      experts.forEach((expert, i) => {
        if (Number(expert) >= 0) see(Math.floor(i / k), Number(expert), Number(weights[i]));
      });
      return;
    }
    case "dense": {
      const count = plan.weights.shape[1] ?? 1;
      (await plan.weights.data()).forEach((weight, i) => {
        if (Number(weight) !== 0) see(Math.floor(i / count), i % count, Number(weight));
      });
      return;
    }
    case "expert-choice": {
      const capacity = plan.tokens.shape[1] ?? 1;
      const [tokens, weights] = await Promise.all([plan.tokens.data(), plan.weights.data()]);
      tokens.forEach((token, i) => {
        if (Number(token) >= 0) see(Number(token), Math.floor(i / capacity), Number(weights[i]));
      });
      return;
    }
    case "slots":
    case "merge":
      throw new UnsupportedError(
        `routing: a plan of kind "${plan.kind}" does not give tokens to experts; ask without routing`,
      );
    default:
      return plan satisfies never;
  }
}

const namesExperts = ({ plan }: { readonly plan: Plan }): boolean => plan.kind !== "slots" && plan.kind !== "merge";

export interface ObservedOptions {
  readonly passes: Turns;
  readonly signal: AbortSignal;
  readonly load: ExpertLoad;
  /** Whether routing is kept for `routingAt`. */
  readonly keep: boolean;
  /** Is told of every pass; `past`: positions that were in the cache before it. */
  readonly passed: (pass: Pass) => void;
}

export interface Pass {
  readonly tokens: number;
  readonly seconds: number;
  readonly past: number;
}

export interface ObservedModel {
  readonly model: LanguageModel;
  /** What the routers chose for the last of so many tokens, in the first row: asked once. */
  routingAt(tokens: number): readonly ChosenExperts[] | undefined;
}

export function observed(model: LanguageModel, options: ObservedOptions): ObservedModel {
  const { passes, signal, load, keep, passed } = options;
  const kept = new Map<number, readonly ChosenExperts[]>();
  const step: LanguageModel["step"] = (ids, given = {}) =>
    passes.take(signal, async () => {
      // Backends on the processor never wait for anything: without this, nobody would be heard until all is done.
      await soon();
      signal.throwIfAborted();
      const started = performance.now();
      const [rows = 0, sequence = 0] = ids.shape;
      const past = given.cache?.length ?? 0;
      const chosen = new Map<number, { expert: number; weight: number }[]>();
      const reading: Promise<void>[] = [];
      const record = (place: number, routed: Routed): void => {
        const plans = [routed, ...(routed.more ?? [])];
        const mine: { expert: number; weight: number }[] = [];
        if (keep) chosen.set(place, mine);
        for (const one of keep ? plans : plans.filter(namesExperts)) {
          const done = choices(one.plan, (token, expert, weight) => {
            load.add(place, expert);
            if (token === sequence - 1) mine.push({ expert, weight });
          });
          // Its error is for the end of the pass; until then nobody waits for it.
          done.catch(() => undefined);
          reading.push(done);
        }
      };
      const trace: RoutingTrace = { metrics: false, record };
      const logits = await model.step(ids, { ...given, trace });
      try {
        await Promise.all(reading);
      } catch (error) {
        logits.dispose();
        throw error;
      }
      if (keep) {
        const found = [...chosen].map(([place, experts]): ChosenExperts => {
          experts.sort((a, b) => b.weight - a.weight);
          const { layer, part } = model.routing[place] ?? { layer: place, part: "feedForward" };
          return { layer, part, experts: experts.map((one) => one.expert), weights: experts.map((one) => one.weight) };
        });
        kept.set(given.cache?.length ?? sequence, found);
      }
      passed({ tokens: rows * sequence, seconds: (performance.now() - started) / 1000, past });
      return logits;
    });
  return {
    model: { ...model, step },
    routingAt(tokens) {
      const found = kept.get(tokens);
      kept.delete(tokens);
      return found;
    },
  };
}
