import { autodiff, dispose, grad, leaves, mul, sum, type Tensor, type Tree, watch } from "@switchyard/core";
import type { Routed, RouterInput } from "@switchyard/core/moe";
import { generator, routerContext, routerInput, testRouter, uniform } from "@switchyard/testing";
import { describe, expect, it } from "vitest";
import { rMoEFamily } from "../test/families/lookup.ts";
import { float64, readVectors, sparse, tensor, unmet } from "../test/vectors.ts";
import { leaf } from "./parts.ts";
import { type RMoEOptions, rMoE } from "./r-moe.ts";

testRouter({ plugin: ({ k = 2 }) => rMoE({ k, size: 4 }), weights: "sum to 1" });
testRouter({
  plugin: ({ k = 2 }) => rMoE({ k, size: 3, cell: "rnn", renormalize: false, zLoss: 0.01 }),
  weights: "sum to at most 1",
});
// With a state handed on from a layer before, and zeros where the first layer would make them.
testRouter({
  plugin: ({ k = 1 }) => rMoE({ k, size: 4 }),
  weights: "sum to 1",
  input: ({ hidden, layout: { sequence, past } }) => {
    const [tokens = 0] = hidden.shape;
    const rows = Array.from({ length: tokens }, (_, t) => {
      const [row, position] = [Math.floor(t / Math.max(sequence, 1)), past + (t % Math.max(sequence, 1))];
      return [...uniform(generator(`state ${row} ${position}`), [4], -1, 1).data];
    });
    return { carry: { state: hidden.engine.tensor(Float64Array.from(rows.flat()), [tokens, 4]) } };
  },
});

describe("rMoE meets its vectors", () => {
  const { cases, tolerance } = readVectors("rmoe");
  it.each(cases.map((one) => [one.id, one] as const))("%s", async (_, one) => {
    expect(await unmet(rMoEFamily, one, tolerance)).toEqual([]);
  });
});

describe.each(["gru", "rnn"] as const)("rMoE across layers, cell %s", (cell) => {
  const on = float64();
  const options: RMoEOptions = { k: 2, size: 3, cell };
  const hidden = [0, 1, 2].map((layer) => uniform(generator(`across ${layer}`), [4, 5], -1, 1));
  /** Three layers of one model. */
  const make = () => {
    const shared = new Map<string, unknown>();
    const share = <T>(key: string, build: () => T): T => {
      if (!shared.has(key)) shared.set(key, build());
      return shared.get(key) as T;
    };
    return [0, 1, 2].map((layer) =>
      rMoE(options).init(
        routerContext(on, {
          layer,
          layers: 3,
          experts: 4,
          width: 5,
          seed: layer + 1,
          shared: share,
        }),
      ),
    );
  };
  const run = (routers: ReturnType<typeof make>, params: readonly Tree[]): Routed[] => {
    let carry: Tree | undefined;
    return routers.map((router, layer) => {
      const x = hidden[layer];
      const input: RouterInput = routerInput(on, { hidden: on.tensor(x?.data ?? new Float64Array(), x?.shape ?? []) });
      const routed = router.route(params[layer] ?? {}, { ...input, ...(carry ? { carry } : {}) });
      carry = routed.carry;
      return routed;
    });
  };

  it("the cell is one set of tensors, projection and weight are each layer's own", () => {
    const [a, b, c] = make().map(({ params }) => new Map(leaves(params)));
    for (const [path, x] of a ?? []) {
      const same = path.startsWith("cell.");
      expect(b?.get(path) === x, path).toBe(same);
      expect(c?.get(path) === x, path).toBe(same);
    }
    expect([...(a?.keys() ?? [])].filter((path) => path.startsWith("cell."))).toHaveLength(cell === "gru" ? 4 : 3);
  });
  it("the gradient of the last layer reaches every layer before it and the cell", async () => {
    const routers = make();
    // Large enough that every gate matters.
    const distinct = [...new Set(routers.flatMap(({ params }) => leaves(params).map(([, x]) => x)))];
    const start = await Promise.all(
      distinct.map(async (x, i) => {
        const { data } = uniform(generator(`values ${cell} ${i}`), [x.size], -1, 1);
        return { shape: x.shape, data };
      }),
    );
    const place = (values: readonly Tensor[]): Tree[] => {
      const at = (x: Tensor): Tensor => values[distinct.indexOf(x)] as Tensor;
      const swap = (tree: Tree): Tree =>
        "dtype" in tree
          ? at(tree as Tensor)
          : Object.fromEntries(Object.entries(tree).map(([key, child]) => [key, swap(child as Tree)]));
      return routers.map(({ params }) => swap(params));
    };
    const upload = (values: typeof start): Tensor[] => values.map(({ data, shape }) => on.tensor(data, shape));
    const last = (values: readonly Tensor[]): Tensor =>
      sum(mul(run(routers, place(values))[2]?.logits as Tensor, tensor(on, [1, -2, 3, 0.5])));
    const slopes = on.scope(() => {
      const watched = watch(autodiff(on), upload(start));
      return grad(last(watched), watched);
    });
    const reached = new Set<string>();
    const paths = new Map(routers.flatMap(({ params }, l) => leaves(params).map(([path, x]) => [x, `${l}.${path}`])));
    for (const [i, x] of distinct.entries()) {
      const found = [...((await slopes[i]?.data()) ?? [])];
      for (let j = 0; j < found.length; j++) {
        const value = async (by: number): Promise<number> => {
          const moved = start.map((one, n) => {
            const data = Float64Array.from(one.data);
            if (n === i) data[j] = (data[j] ?? 0) + by;
            return { ...one, data };
          });
          const y = on.scope(() => last(upload(moved)));
          const [result = Number.NaN] = await y.data();
          y.dispose();
          return result;
        };
        const numeric = ((await value(1e-5)) - (await value(-1e-5))) / 2e-5;
        expect(Math.abs((found[j] ?? Number.NaN) - numeric), `${paths.get(x)} ${j}`).toBeLessThan(
          1e-7 * (1 + Math.abs(numeric)),
        );
        if (numeric !== 0) reached.add(paths.get(x) ?? "");
      }
    }
    // Only what the first two layers choose experts with has no part in the third one's decision.
    expect([...paths.values()].filter((path) => !reached.has(path)).sort()).toEqual(["0.weight", "1.weight"]);
    dispose(slopes);
  });
  it("a layer without the state of the one before decides something else", async () => {
    const routers = make();
    const { carried, alone } = on.scope(() => {
      const params = routers.map((router) => router.params);
      const x = hidden[2];
      const input = routerInput(on, { hidden: on.tensor(x?.data ?? new Float64Array(), x?.shape ?? []) });
      const last = routers[2]?.route(params[2] ?? {}, input);
      return { carried: run(routers, params)[2]?.logits as Tensor, alone: last?.logits as Tensor };
    });
    expect([...(await carried.data())]).not.toEqual([...(await alone.data())]);
    dispose([carried, alone, routers.map((router) => router.params)]);
  });
});

describe("rMoE", () => {
  const on = float64();
  it("refuses a state that is not its own, and options that make no sense", () => {
    on.scope(() => {
      const router = rMoE({ size: 3 }).init(routerContext(on));
      const input = routerInput(on, { hidden: tensor(on, [[1, 2, 3, 4, 5, 6]]) });
      const handed = (state: Tensor) => () => router.route(router.params, { ...input, carry: { state } });
      expect(handed(tensor(on, [[1, 2]]))).toThrow("handed on a state of [1,2], expected [1, 3]");
      const foreign = { ...input, carry: { other: tensor(on, [[1, 2, 3]]) } };
      expect(() => router.route(router.params, foreign)).toThrow("handed on no state, expected [1, 3]");
      expect(() => router.route(leaf(router.params, "weight"), input)).toThrow('no tensor "projection"');
      expect(sparse(router.route(router.params, input)).experts.shape).toEqual([1, 2]);
      return undefined;
    });
    expect(() => rMoE({ size: 0 })).toThrow("size = 0");
    expect(() => rMoE(JSON.parse('{ "cell": "lstm" }'))).toThrow('expected "gru" or "rnn"');
    expect(() => rMoE({ k: 6 }).init(routerContext(on))).toThrow("k = 6 of 5 experts");
    expect(rMoE().options).toEqual({ k: 2, size: 256, cell: "gru", renormalize: true, balance: 0.001, zLoss: 0 });
  });
});
