import {
  add,
  customGrad,
  less,
  linear,
  mul,
  recip,
  reshape,
  softmaxTopk,
  sum,
  type Tensor,
  type Tree,
  where,
} from "@switchyard/core";
import {
  applyCapacity,
  maskPlan,
  overridePlan,
  type Routed,
  type Router,
  type RouterContext,
  type RouterInput,
  type RouterPlugin,
  switchBalance,
  tokenMask,
} from "@switchyard/core/moe";
import { describe, expect, it } from "vitest";
import { routerCases } from "./router-cases.ts";
import { testRouter } from "./test-router.ts";

const leaf = (tree: Tree, name: string): Tensor => (tree as Readonly<Record<string, Tensor>>)[name] as Tensor;

/** Top-k as plainly as it can be said, with the places where a router goes wrong left open. */
interface Faults {
  readonly name?: string;
  readonly plugin?: Partial<RouterPlugin>;
  readonly router?: (router: Router, context: RouterContext) => Router;
  readonly causal?: RouterPlugin["causal"];
  readonly change?: (routed: Routed, input: RouterInput, params: Tree) => Routed;
  readonly logits?: (logits: Tensor, input: RouterInput) => Tensor;
  readonly unmasked?: boolean;
  readonly weight?: (weight: Tensor, context: RouterContext) => Tensor;
  readonly afterStep?: NonNullable<Router["afterStep"]>;
  readonly buffers?: (context: RouterContext) => Tree;
}
function plain(k: number, faults: Faults = {}): RouterPlugin {
  return {
    name: faults.name ?? "plain",
    causal: faults.causal ?? { training: true, evaluation: true },
    needs: [],
    plans: ["sparse"],
    ...faults.plugin,
    init(context) {
      const weight = context.random.at("weight").normal([context.experts, context.width]);
      const made: Router = {
        params: { weight: faults.weight?.(weight, context) ?? weight },
        buffers: faults.buffers?.(context) ?? {
          seen: context.engine.tensor(new Float32Array(context.experts), [context.experts]),
        },
        route(params, input) {
          const scored = linear(input.hidden, leaf(params, "weight"));
          const logits = faults.logits?.(scored, input) ?? scored;
          const { weights, ids, probabilities } = softmaxTopk(logits, { k, order: "softmax-topk-renormalise" });
          const mask = faults.unmasked ? undefined : tokenMask(input.layout);
          const plan = { kind: "sparse", experts: ids, weights } as const;
          const balance = switchBalance({ probabilities, experts: ids, ...(mask ? { mask } : {}) });
          const routed: Routed = {
            plan: mask ? maskPlan(plan, mask) : plan,
            logits,
            probabilities,
            losses: { balance: { value: balance, weight: 0.01 } },
          };
          return faults.change?.(routed, input, params) ?? routed;
        },
        afterStep:
          faults.afterStep ??
          ((layers, buffers) => ({
            seen: add(
              leaf(buffers, "seen"),
              context.engine.tensor(layers[0]?.load ?? new Float64Array(), [context.experts]),
            ),
          })),
      };
      return faults.router?.(made, context) ?? made;
    },
  };
}

/** Right halves, and what wrappers may build on. */
const halves: Faults = {
  plugin: {
    gives: ["scores", "logits", "probabilities", "choices"],
    options: { balance: 0.01 },
  },
  router: (router) => ({
    ...router,
    score: (params, { hidden }) => linear(hidden, leaf(params, "weight")),
    // The plain router asks its parameters for the scores: here they are the scores themselves.
    select(scores, input) {
      const identity = scores.engine.root.tensor(
        Float64Array.from({ length: (scores.shape[1] ?? 0) ** 2 }, (_, i) =>
          Number(i % ((scores.shape[1] ?? 0) + 1) === 0),
        ),
        [scores.shape[1] ?? 0, scores.shape[1] ?? 0],
      );
      return router.route({ weight: identity }, { ...input, hidden: scores });
    },
  }),
};

testRouter({
  plugin: ({ k = 2 }) => plain(k),
  weights: "sum to 1",
});
testRouter({
  plugin: ({ k = 2 }) => plain(k, { name: "plain-in-halves", ...halves }),
  weights: "sum to 1",
});

describe("the router suite can fail", () => {
  const failures = async (faults: Faults): Promise<string> => {
    const failed: string[] = [];
    for (const one of routerCases({ plugin: ({ k = 2 }) => plain(k, faults), weights: "sum to 1" })) {
      if (one.reason !== undefined) continue;
      await one.run().catch((error: Error) => failed.push(`${one.name}: ${error.message}`));
    }
    return failed.join("\n");
  };
  const sparse = (routed: Routed): { experts: Tensor; weights: Tensor } => {
    if (routed.plan.kind !== "sparse") throw new Error("a sparse plan");
    return routed.plan;
  };
  const planOf = (routed: Routed, change: { experts?: Tensor; weights?: Tensor }): Routed => ({
    ...routed,
    plan: { kind: "sparse", ...sparse(routed), ...change },
  });

  it("but not on a right router", async () => {
    expect(await failures({ name: "fine" })).toBe("");
  });
  it("an id out of range", async () => {
    const found = await failures({ change: (r) => planOf(r, { experts: add(sparse(r).experts, 1) }) });
    expect(found).toMatch(/well formed: id 5 at \[.*\] is neither -1 nor one of experts 0..4/);
  });
  it("weights that do not sum to 1", async () => {
    const found = await failures({ change: (r) => planOf(r, { weights: mul(sparse(r).weights, 1.01) }) });
    expect(found).toMatch(/weights obey the documented rule: weights \[.*\] of row 0 do not sum to 1/);
  });
  it("an undeclared plan kind", async () => {
    const found = await failures({
      change: (r) => ({ ...r, plan: { kind: "dense", weights: r.probabilities as Tensor } }),
    });
    expect(found).toMatch(/declares sparse/);
  });
  it("noise in evaluation", async () => {
    const noisy = (x: Tensor, { random }: RouterInput): Tensor => add(x, random.at("noise").normal(x.shape));
    expect(await failures({ logits: noisy })).toMatch(/evaluation does not depend on seed or step/);
  });
  it("randomness of its own", async () => {
    let calls = 0;
    const drifting = (x: Tensor): Tensor => mul(x, 1 + 0.01 * calls++);
    expect(await failures({ logits: drifting })).toMatch(/the same seed gives/);
  });
  it("experts that are not alike", async () => {
    const first = (x: Tensor): Tensor =>
      add(x, x.engine.root.tensor(Float32Array.of(1, 0, 0, 0, 0).slice(0, x.shape[1]), [x.shape[1] ?? 0]));
    expect(await failures({ logits: first })).toMatch(/permuting the experts/);
  });
  it("padding that is routed and counted", async () => {
    const found = await failures({ unmasked: true });
    expect(found).toMatch(/padding gets no expert/);
    expect(found).toMatch(/what stands in padding changes nothing/);
    expect(found).toMatch(/nothing but padding/);
  });
  it("a look ahead", async () => {
    // The mean of the whole batch knows the future.
    const ahead = (x: Tensor): Tensor => (x.size === 0 ? x : add(x, reshape(sum(x, [0]), [1, x.shape[1] ?? 0])));
    const found = await failures({ logits: ahead });
    expect(found).toMatch(
      /training: never looks ahead: changing tokens from 1 on in row 0 changed the weight of token 0/,
    );
    expect(found).toMatch(/decoding token by token/);
  });
  it("a look ahead that shows in experts of weight 0 only", async () => {
    const seen = (r: Routed, { hidden }: RouterInput): Routed => {
      const first = reshape(sum(hidden), [1, 1]);
      return planOf(r, { experts: where(less(0, first), sparse(r).experts, -1), weights: mul(sparse(r).weights, 0) });
    };
    expect(await failures({ change: seen })).toMatch(/never looks ahead: .* changed whether token \d meets an expert/);
  });
  it("a gradient that is not the derivative", async () => {
    const wrong = (x: Tensor): Tensor =>
      customGrad(
        [x],
        (y) => mul(y, 1),
        (dy) => [mul(dy, 2)],
      );
    expect(await failures({ logits: wrong })).toMatch(/autodiff gives .*, central differences give/);
  });
  it("a gradient that is cut", async () => {
    const cut = (x: Tensor): Tensor =>
      customGrad(
        [x],
        (y) => mul(y, 1),
        () => [],
      );
    expect(await failures({ logits: cut })).toMatch(/gradients of weights and losses/);
  });
  it("a leak", async () => {
    const keep = (weight: Tensor, { engine, experts }: RouterContext): Tensor => {
      engine.tensor(new Float32Array(experts), [experts]);
      return weight;
    };
    expect(await failures({ weight: keep })).toMatch(/1 handles were left alive/);
  });
  it("buffers that change their shape, or turn into NaN", async () => {
    const found = await failures({ afterStep: (_, buffers) => ({ seen: sum(leaf(buffers, "seen")) }) });
    expect(found).toMatch(/buffers survive a step: after a step: buffers.seen changed its shape/);
    expect(await failures({ afterStep: (_, b) => ({ seen: mul(leaf(b, "seen"), Number.NaN) }) })).toMatch(
      /seen is \[NaN/,
    );
  });
  it("a capacity that lets later rows take the places of earlier ones", async () => {
    const drop = (r: Routed): Routed => {
      const count = r.probabilities?.shape[1] ?? 1;
      const { plan } = applyCapacity(
        { kind: "sparse", ...sparse(r) },
        { experts: count, policy: "probability", factor: 0.5 },
      );
      return { ...r, plan };
    };
    expect(await failures({ change: drop })).toMatch(/never looks ahead/);
  });
  it("trouble with no tokens", async () => {
    const divide = (r: Routed, { hidden }: RouterInput): Routed => ({
      ...r,
      losses: { mean: { value: mul(sum(r.probabilities as Tensor), 1 / (hidden.shape[0] ?? 0)), weight: 1 } },
    });
    expect(await failures({ change: divide })).toMatch(/no tokens: loss mean, entry \[\], is NaN/);
  });
  it("a plugin that does not describe itself", async () => {
    const found = async (plugin: Partial<RouterPlugin>): Promise<string> => failures({ plugin });
    expect(await found({ options: { k: Number.NaN } })).toMatch(/describes itself: options must be plain data/);
    expect(await found({ expertsPerToken: 0 })).toMatch(/describes itself: expertsPerToken is 0/);
    expect(await found({ name: "a router" })).toMatch(/describes itself: its name must be a word/);
  });
  it("samples whose tokens go apart", async () => {
    expect(await failures({ plugin: { perSample: true } })).toMatch(
      /training: all tokens of a sample go to the same experts: token \d of row 0 and the first one of it meet other experts/,
    );
  });
  it("overrides that are declared and ignored, or applied to every row", async () => {
    const declared = (change?: Faults["change"]): Promise<string> =>
      failures({ router: (router) => ({ ...router, overrides: true }), ...(change ? { change } : {}) });
    expect(await declared()).toMatch(
      /routing overrides are obeyed, row by row: token 7 asked for rank 1 without expert 0, and got \[\d, \d\] of 5/,
    );
    const obey = (routed: Routed, input: RouterInput): Routed => {
      const logits = routed.logits as Tensor;
      const own = { kind: "sparse", ...sparse(routed) } as const;
      return {
        ...routed,
        plan: overridePlan(own, input, () => ({ order: logits, logWeights: logits, normalised: true })),
      };
    };
    const toAll = (input: RouterInput): RouterInput =>
      input.override ? { ...input, override: input.override.map(() => input.override?.at(-1)) } : input;
    expect(await declared((routed, input) => obey(routed, toAll(input)))).toMatch(
      /token 0 has no override, and its experts changed from \[\d,\d\] to \[\d\]/,
    );
    expect(await declared(obey)).toBe("");
  });
  it("halves that are not the whole", async () => {
    const broken: Faults = {
      router: (router, context) => {
        const right = halves.router?.(router, context) ?? router;
        return { ...right, score: (params, { hidden }) => mul(linear(hidden, leaf(params, "weight")), 2) };
      },
    };
    expect(await failures(broken)).toMatch(/score, then select, is route: .*select\(score\)/);
  });
  it("a declaration of what wrappers build on that is not true", async () => {
    const declared = async (gives: RouterPlugin["gives"], more: Faults = {}): Promise<string> =>
      failures({ ...halves, ...more, plugin: { ...halves.plugin, ...more.plugin, gives: gives ?? [] } });
    expect(await declared([])).toMatch(
      /what wrappers build on is there: the router has score and select, so gives must list "scores"/,
    );
    expect(await failures({ plugin: { gives: ["scores"] } })).toMatch(
      /gives lists "scores", and the router lacks score/,
    );
    const without = ({ logits: _, probabilities: __, ...rest }: Routed): Routed => rest;
    expect(await declared(["scores", "logits"], { change: without })).toMatch(
      /gives lists "logits", and there are none in training/,
    );
    expect(await declared(["scores", "probabilities"], { change: without })).toMatch(
      /"probabilities", and there are none/,
    );
    const doubled = (r: Routed): Routed => ({ ...r, probabilities: mul(r.probabilities as Tensor, 2) });
    expect(await declared(["scores", "probabilities"], { change: doubled })).toMatch(/of token 0 do not sum to 1/);
    expect(await declared(["scores"], { plugin: { options: {} } })).toMatch(
      /there is a loss "balance", so options.balance must be its weight; found undefined/,
    );
    const full = (r: Routed): Routed => ({
      ...r,
      plan: applyCapacity({ kind: "sparse", ...sparse(r) }, { experts: 5, policy: "position", factor: 0.5 }).plan,
    });
    expect(await declared(["scores", "choices"], { change: full })).toMatch(
      /gives lists "choices", but another sequence in row 0 changed an expert of token/,
    );
  });
  it("a state that no file holds", async () => {
    // A router that counts its steps beside its buffers.
    const counting: Faults = {
      router(router, { engine }) {
        let steps = 0;
        return {
          ...router,
          route(params, input) {
            const routed = router.route(params, input);
            return {
              ...routed,
              losses: { ...routed.losses, steps: { value: engine.tensor(Float64Array.of(steps), []), weight: 1 } },
            };
          },
          afterStep(layers, buffers) {
            steps++;
            return router.afterStep?.(layers, buffers) ?? buffers;
          },
        };
      },
    };
    expect(await failures(counting)).toMatch(
      /survive save and load: a router made anew, with what was saved: training: loss steps/,
    );
    // One that computes with the parameters that it was made with.
    const own: Faults = {
      router: (router) => ({ ...router, route: (_, input) => router.route(router.params, input) }),
    };
    expect(await failures(own)).toMatch(/survive save and load: a router made anew/);
    const twice: Faults = {
      router(router, { engine }) {
        const zero = (): Tensor => engine.tensor(new Float64Array(1), [1]);
        return { ...router, params: { weight: leaf(router.params, "weight"), "a.b": zero(), a: { b: zero() } } };
      },
    };
    expect(await failures(twice)).toMatch(/survive save and load: two parameters have the path "a.b"/);
  });
  it("parameters that route changes", async () => {
    const scaling: Faults = {
      router(router) {
        let calls = 0;
        // The tree of parameters shows another tensor after the first call.
        const tree = router.params as { weight: Tensor };
        return {
          ...router,
          route(params, input) {
            if (calls++ === 0)
              tree.weight = input.hidden.engine.root.tensor(
                new Float64Array(tree.weight.size).fill(3),
                tree.weight.shape,
              );
            return router.route(params, input);
          },
        };
      },
    };
    expect(await failures(scaling)).toMatch(/route leaves parameters and buffers as they were/);
  });
  it("a mask of ones that is not the same as none", async () => {
    const shy = (x: Tensor, { layout }: RouterInput): Tensor => (layout.mask ? mul(x, 1.5) : x);
    const found = await failures({ logits: shy });
    expect(found).toMatch(/training: a mask without padding changes nothing/);
    expect(found).toMatch(/a padded sequence equals the sequence alone/);
  });
  it("a choice that follows the place in the row, padding at the left included", async () => {
    const placed = (x: Tensor, { layout }: RouterInput): Tensor => {
      const [tokens = 0, experts = 0] = x.shape;
      const at = (i: number): number => layout.past + (Math.floor(i / experts) % layout.sequence);
      const bonus = Float64Array.from({ length: tokens * experts }, (_, i) =>
        i % experts === at(i) % experts ? 1 : 0,
      );
      return add(x, x.engine.root.tensor(bonus, [tokens, experts]));
    };
    // With padding at the right every token keeps its place.
    expect(await failures({ logits: placed })).toMatch(/a padded sequence equals the sequence alone/);
  });
  it("a layer that adds up something else", async () => {
    const rescaled: Faults = {
      change: (r, { everyExpert }) => ({ ...r, ...(everyExpert ? { expertOutputs: mul(everyExpert(), 2) } : {}) }),
    };
    expect(await failures(rescaled)).toMatch(/a layer with this router adds up its experts: output/);
  });
  it("sizes that it cannot take: one token, one expert, all experts, rows of zeros", async () => {
    const unless = (wrong: (logits: Tensor, ids: Tensor) => boolean, faults: Faults = {}): Promise<string> =>
      failures({
        change: (r) =>
          wrong(r.logits as Tensor, sparse(r).experts) ? planOf(r, { weights: mul(sparse(r).weights, Number.NaN) }) : r,
        ...faults,
      });
    expect(await unless((logits) => logits.shape[0] === 1)).toMatch(/^one token: /m);
    expect(await unless((logits) => logits.shape[1] === 1)).toMatch(/^one expert: /m);
    expect(await unless((logits, ids) => logits.shape[1] === 3 && ids.shape[1] === 3)).toMatch(/^k = all experts: /m);
    const divided = (x: Tensor, { hidden }: RouterInput): Tensor => {
      const length = reshape(sum(mul(hidden, hidden), [1]), [hidden.shape[0] ?? 0, 1]);
      return mul(x, mul(length, recip(length)));
    };
    expect(await failures({ logits: divided })).toMatch(/^hidden states of zero: /m);
  });
  it("an expert chosen twice, and a weight in an empty slot", async () => {
    const twice = (r: Routed): Routed => planOf(r, { experts: mul(sparse(r).experts, 0) });
    expect(await failures({ change: twice })).toMatch(/token 0 has one expert twice: \[0, 0\]/);
    const empty = (r: Routed): Routed => planOf(r, { experts: add(mul(sparse(r).experts, 0), -1) });
    expect(await failures({ change: empty })).toMatch(/the empty slot \[0, 0\] has weight/);
  });
});
