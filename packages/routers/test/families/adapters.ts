// Vectors of adapters: low-rank experts on a frozen linear map, MoA's router.
import { less, reshape, sub, sumLast, type Tensor } from "@switchyard/core";
import { adaptedLinear, lora } from "@switchyard/core/experts";
import { routerContext, routerInput } from "@switchyard/testing";
import { type MoAOptions, moa, moaThreshold } from "../../src/moa.ts";
import { type Family, given, number, results, shapeOf, sized, sparse, tensor, type Values } from "../vectors.ts";

export const loraFamily: Family = (one, on) => {
  const read = (name: string): Values => given(one.inputs, name);
  const [out = 0, width = 0] = shapeOf(read("w_base"));
  const [tokens = 0, count = 0] = shapeOf(read("gates"));
  sized(one, "rank", shapeOf(read("A_shared"))[0] ?? 0);
  const sizes = { count, width, out, rank: number(one, "rank"), alpha: number(one, "alpha") };
  return results(on, () => {
    const input = (name: string): Tensor => tensor(on, read(name));
    const layer = (params: { readonly a: Tensor } | { readonly shared: { readonly a: Tensor } }): Tensor => {
      const given = { ...params, b: input("B") };
      const experts = lora({ ...sizes, sharedA: "shared" in params, params: given });
      const plan = { kind: "dense", weights: input("gates") } as const;
      const layout = { batch: 1, sequence: tokens, past: 0 };
      const base = { weight: input("w_base") };
      return adaptedLinear(input("x"), base, { experts, params: given, plan, layout }).output;
    };
    return { mole_output: layer({ a: input("A") }), hydra_output: layer({ shared: { a: input("A_shared") } }) };
  });
};

export const moaFamily: Family = async (one, on) => {
  const x = given(one.inputs, "x");
  const [batch = 0, sequence = 0, width = 0] = shapeOf(x);
  // A record: "w1", "b1", ...
  const weights = Object.fromEntries(Object.entries<Values>(given(one.inputs, "router") as readonly Values[]));
  const experts = shapeOf(given(weights, "b2"))[0] ?? 0;
  const most = number(one, "max_threshold");
  const found = await results(on, () => {
    const params = {
      ...Object.fromEntries(Object.entries(weights).map(([name, values]) => [name, tensor(on, values)])),
      threshold: tensor(on, given(one.inputs, "w_threshold")),
      thresholdBias: tensor(on, given(one.inputs, "b_threshold")),
    };
    const hidden = reshape(tensor(on, x), [batch * sequence, width]);
    const route = (options: MoAOptions) => {
      const plugin = moa({ hiddenPerExpert: number(one, "swi_x"), maxThreshold: most, ...options });
      const router = plugin.init(routerContext(on, { experts, width }));
      return router.route(params, routerInput(on, { hidden, batch }));
    };
    const nested = (y: Tensor): Tensor => reshape(y, [batch, sequence, y.shape[1] ?? 0]);
    const soft = route({ mode: "soft" });
    if (soft.plan.kind !== "dense") throw new Error(`found a plan of kind ${soft.plan.kind}`);
    const chosen = sparse(route({}));
    const constant = sparse(route({ threshold: most }));
    const selected = sub(1, less(chosen.experts, 0));
    return {
      logits: nested(soft.logits as Tensor),
      soft_weights: nested(soft.plan.weights),
      threshold: nested(moaThreshold(params, hidden, most)),
      selected: nested(selected),
      active_per_token: reshape(sumLast(selected), [batch, sequence]),
      sparse_weights: nested(chosen.weights),
      sparse_weights_constant_threshold: nested(constant.weights),
    };
  });
  return found;
};

export const adapterFamilies: Readonly<Record<string, Family>> = { lora_experts: loraFamily, moa: moaFamily };
