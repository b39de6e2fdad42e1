import { add, customGrad, linear, mul, reshape, softmaxTopk, sum, type Tensor, type Tree } from "@switchyard/core";
import {
  applyCapacity,
  maskPlan,
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
    init(context) {
      const weight = context.random.at("weight").normal([context.experts, context.width]);
      return {
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
    },
  };
}

testRouter({
  plugin: ({ k = 2 }) => plain(k),
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
  it("an expert chosen twice, and a weight in an empty slot", async () => {
    const twice = (r: Routed): Routed => planOf(r, { experts: mul(sparse(r).experts, 0) });
    expect(await failures({ change: twice })).toMatch(/token 0 has one expert twice: \[0, 0\]/);
    const empty = (r: Routed): Routed => planOf(r, { experts: add(mul(sparse(r).experts, 0), -1) });
    expect(await failures({ change: empty })).toMatch(/the empty slot \[0, 0\] has weight/);
  });
});
