// What a case says in its config reaches the routers: other values give other numbers, unknown ones are refused in words.
import { describe, expect, it } from "vitest";
import { families } from "./families/index.ts";
import {
  type Family,
  flat,
  float64,
  given,
  readVectors,
  type Values,
  type VectorCase,
  type Vectors,
} from "./vectors.ts";

function first(file: string): { readonly vectors: Vectors; readonly one: VectorCase; readonly run: Family } {
  const vectors = readVectors(file);
  const [one, run] = [vectors.cases[0], families[vectors.family]];
  if (!one || !run) throw new Error(`${file} has no case or no family`);
  return { vectors, one, run };
}
/** What the family of a file finds for its first case with another config, and another id where one is given. */
async function found(
  file: string,
  config: Readonly<Record<string, number | string>>,
  { id, expected }: Partial<VectorCase> = {},
): Promise<Readonly<Record<string, Values>>> {
  const { one, run } = first(file);
  const other = {
    ...one,
    config: { ...one.config, ...config },
    ...(id ? { id } : {}),
    ...(expected ? { expected } : {}),
  };
  return run(other, float64());
}
const numbers = (of: Readonly<Record<string, Values>>, name: string): number[] => flat(given(of, name));
const number = (of: Readonly<Record<string, Values>>, name: string): number => numbers(of, name)[0] ?? Number.NaN;

describe("a config entry that nobody knows or that contradicts the inputs is refused:", () => {
  it.each([
    ["capacity", "softmax", "never", "known are before_topk, after_topk"],
    ["capacity", "drop_policy", "luck", "it has probs, position"],
    ["dynmole", "entropy_type", "shannon", "known are renyi, tsallis"],
    ["smear", "activation", "sine", "known are silu, relu, gelu"],
    ["smear", "routing_input", "maximum over sequence", "known are mean over sequence"],
    ["moe-ffd", "padding", "valid", "known are same"],
    ["soft-moe", "expert", "sin(x @ W_e)", 'no activation "sin"'],
    ["thor", "expert", "relu(x + W_e)", 'known are such as "tanh(x @ W_e)" and "x @ W_e"'],
    ["dispatch", "expert", "x", "known are scale_e * x"],
    ["lora-experts", "rank", 7, "rank = 7, but its inputs have 2"],
    ["moge", "width", 5, "width = 5, but its inputs have 4"],
    ["shared-experts", "shared", 2, "shared = 2, but its inputs have 1"],
    ["base", "tokens_per_expert", 3, "tokens_per_expert = 3, but its inputs have 2"],
    ["main-graph-of-tokens", "mixSpace", "weights", "known are prob, logit"],
    ["main-null-experts", "M", 5, "M = 5, but its inputs have 4"],
  ])("%s, %s = %s", async (file, name, value, message) => {
    await expect(found(file, { [name]: value })).rejects.toThrow(message);
  });
  it("hash without a number of experts", async () => {
    await expect(found("hash", {}, { id: "hash" })).rejects.toThrow('put "experts" into its config, or E4 into its id');
  });
});

describe("a config entry is used:", () => {
  it("the experts of hash, from the config or the id", async () => {
    for (const more of [await found("hash", { experts: 7 }), await found("hash", {}, { id: "hash_V12_E7" })]) {
      expect(numbers(more, "balanced_load")).toHaveLength(7);
      expect(Math.max(...numbers(more, "random_hash"))).toBeGreaterThan(3);
    }
  });
  it("the epsilon of GShard's weights and of MoEC's ratio", async () => {
    const sums = async (eps: number): Promise<number> => {
      const of = await found("gshard", { eps });
      return number(of, "g1") + number(of, "g2");
    };
    // (g1 + g2) / (g1 + g2 + eps): 1 / sum - 1 grows with eps.
    expect((1 / (await sums(0.2)) - 1) / (1 / (await sums(0.1)) - 1)).toBeCloseTo(2, 8);
    const of = await found("moec", { eps: 0.5, mu: 3 });
    expect(number(of, "ratio_loss")).toBeCloseTo((3 * number(of, "c_intra")) / (number(of, "c_inter") + 0.5), 12);
  });
  it("the epsilon and the tolerance of Sinkhorn, which may take more than the usual ten iterations", async () => {
    const [eps, tol] = [1e-10, 1e-8];
    const of = await found("sinkhorn", { eps, tol });
    const a = (given(first("sinkhorn").one.inputs, "logits") as readonly Values[]).map((row) =>
      flat(row).map(Math.exp),
    );
    const [tokens, experts] = [a.length, a[0]?.length ?? 0];
    let [d0, d1] = [new Array<number>(tokens).fill(0), new Array<number>(experts).fill(1)];
    let [change, iterations] = [1, 0];
    for (; change > tol; iterations++) {
      d0 = a.map((row) => 1 / tokens / (row.reduce((total, x, e) => total + x * (d1[e] ?? 0), 0) + eps));
      const next = d1.map(
        (_, e) => 1 / experts / (a.reduce((total, row, t) => total + (row[e] ?? 0) * (d0[t] ?? 0), 0) + eps),
      );
      change = next.reduce((total, x, e) => total + Math.abs(x - (d1[e] ?? 0)), 0) / experts;
      d1 = next;
    }
    expect(iterations).toBeGreaterThan(10);
    expect(number(of, "iterations")).toBe(iterations);
    const plan = a.flatMap((row, t) => row.map((x, e) => x * (d0[t] ?? 0) * (d1[e] ?? 0)));
    numbers(of, "plan").forEach((x, i) => {
      expect(x).toBeCloseTo(plan[i] ?? Number.NaN, 10);
    });
  });
  it("the rule for the second expert, from the name of what is expected", async () => {
    const of = await found("gshard", {}, { expected: { "threshold0.3.kept": 0, "none.send_second": 0 } });
    expect(numbers(of, "none.send_second").every((sent) => sent === 0)).toBe(true);
    expect(numbers(of, "threshold0.3.send_second")).toEqual(numbers(of, "g2").map((g) => Number(g > 0.3)));
    await expect(found("gshard", {}, { expected: { "luck.kept": 0 } })).rejects.toThrow('"luck"');
  });
  it("the experts that MoEC closes, also unevenly", async () => {
    const { one, run } = first("moec");
    const of = await run({ ...one, inputs: { ...one.inputs, dropped: [0, 1, 1, 0, 0, 1] } }, float64());
    numbers(of, "masked_softmax").forEach((p, i) => {
      expect(p === 0).toBe([0, 1, 1, 0, 0, 1][i % 6] === 1);
    });
    expect(number(of, "c_intra")).toBeCloseTo(number(one.expected, "c_intra"), 12);
  });
});
