// Hash layers (2106.04426): a fixed table from token ids to experts, with nothing to learn and no loss.
//   y_t = E_h(x_t), h = table[id_t]                                              eq. 3
//   random: the hash of the id; balanced: frequent ids first, each to the expert with the fewest occurrences so far (section 3.2)
import { less, mul, reshape, ShapeError, takeRows, UnsupportedError, where } from "@switchyard/core";
import { maskPlan, type Routed, type RouterContext, type RouterInput, type RouterPlugin } from "@switchyard/core/moe";
import { balancedHash, randomHash, tokenIdsOf } from "./hash-parts.ts";
import { checkWord, leaf, maskOf, type RouterCard } from "./parts.ts";

export interface HashOptions {
  /** Default "random". "balanced" needs the token counts of the corpus in the router's context. */
  readonly table?: "random" | "balanced";
  /** Token ids that have an expert, 0..vocabulary - 1; default: the vocabulary of the model. */
  readonly vocabulary?: number;
  /** Of the random table, a whole number of 32 bits; default 0. */
  readonly seed?: number;
}

/**
 * Each token goes to the one expert of its id, with weight 1; ids outside the vocabulary to none. Params: none. Buffers:
 * `table` i32 `[vocabulary]`. `init` throws UnsupportedError without a vocabulary, or "balanced" without token counts,
 * ShapeError when both are there and differ. `route` throws UnsupportedError without token ids.
 *
 * @example hash({ vocabulary: 2048 })
 */
export function hash(options: HashOptions = {}): RouterPlugin {
  const { table = "random", vocabulary, seed = 0 } = options;
  checkWord("hash", "table", table, ["random", "balanced"]);
  if (!Number.isInteger(seed) || seed < 0 || seed >= 2 ** 32) {
    throw new ShapeError(`hash: seed = ${seed}; expected a whole number from 0 to ${2 ** 32 - 1}`);
  }
  if (vocabulary !== undefined && !(Number.isInteger(vocabulary) && vocabulary >= 1)) {
    throw new ShapeError(`hash: vocabulary = ${vocabulary}; expected a whole number from 1`);
  }

  const route = (_: unknown, input: RouterInput): Routed => {
    const tokenIds = tokenIdsOf("hash", input);
    const own = leaf(input.buffers, "table");
    const known = mul(less(-1, tokenIds), less(tokenIds, own.size)); // [tokens]
    const column = [tokenIds.size, 1];
    const experts = reshape(where(known, takeRows(own, tokenIds), -1), column);
    const plan = { kind: "sparse", experts, weights: reshape(known, column) } as const;
    const { mask } = maskOf(input);
    return { plan: mask ? maskPlan(plan, mask) : plan, losses: {} };
  };

  return {
    name: "hash",
    causal: { training: true, evaluation: true },
    needs: ["tokenIds"],
    plans: ["sparse"],
    gives: [],
    options: { table, vocabulary: vocabulary ?? null, seed },
    expertsPerToken: 1,
    init(context) {
      const entries = tableOf(context, { table, vocabulary, seed });
      return { params: {}, buffers: { table: context.engine.tensor(entries, [entries.length]) }, route };
    },
  };
}

function tableOf(
  { experts, layer, tokenCounts, vocabulary: known = tokenCounts?.length }: RouterContext,
  {
    table,
    vocabulary = known,
    seed,
  }: { readonly table: string; readonly vocabulary: number | undefined; readonly seed: number },
): Int32Array {
  if (vocabulary === undefined) {
    throw new UnsupportedError("hash: how many token ids there are is not known here; pass vocabulary, such as 2048");
  }
  if (table === "random") return randomHash(vocabulary, experts, { seed, layer });
  if (tokenCounts === undefined) {
    throw new UnsupportedError(
      'hash: table "balanced" needs the token counts of the corpus, and the context has none; use table "random"',
    );
  }
  if (tokenCounts.length !== vocabulary) {
    throw new ShapeError(
      `hash: vocabulary = ${vocabulary}, but the context has counts of ${tokenCounts.length} token ids; leave vocabulary out`,
    );
  }
  return balancedHash(tokenCounts, experts);
}

export const card: RouterCard = {
  name: "hash",
  title: "Hash layers: experts by token id",
  paper: "2106.04426",
  equations: "3, section 3.2",
  needs: ["tokenIds"],
  causal: "yes",
  plans: ["sparse"],
  params: "buffer table [vocabulary]",
  cost: "one table lookup",
  claim: "as good as or better than Switch and BASE routing, with nothing learned",
  ourChoices: [
    "a 32-bit hash that is the same on every machine, with the layer in its key: each layer has another random table",
    "the balanced table is the same in every layer",
    "one expert per token; the variants with several hashes are left out",
    "ids outside the vocabulary get no expert",
  ],
};
