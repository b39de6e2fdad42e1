// The records of a Mixture-of-Experts layer: what routers, experts, wrappers and training hooks hand to each other.
// Plain data and interfaces only; the functions over them are dispatch.ts, layer.ts, capacity.ts, losses.ts and metrics.ts.
import type { Engine } from "../engine.ts";
import type { Json } from "../json.ts";
import type { Random } from "../random.ts";
import type { Tensor, Tree } from "../tensor.ts";

/**
 * Every token names its experts. `experts` i32 and `weights` are `[tokens, k]`; -1 = empty slot, id >= count = null expert,
 * both are dropped. Weights may be negative, and a token may have no expert at all.
 */
export interface SparsePlan {
  readonly kind: "sparse";
  readonly experts: Tensor;
  readonly weights: Tensor;
  /** Static limit on the filled slots (Expert Race: tokens * k), for devices that cannot read counts; default tokens * k. */
  readonly bound?: number;
}

/** Every expert sees every token: `weights [tokens, experts]`. */
export interface DensePlan {
  readonly kind: "dense";
  readonly weights: Tensor;
}

/** Every expert names its tokens: `tokens` i32 and `weights` are `[experts, capacity]`; -1 = empty slot. */
export interface ExpertChoicePlan {
  readonly kind: "expert-choice";
  readonly tokens: Tensor;
  readonly weights: Tensor;
}

/** Soft MoE (2308.00951), per sample: `dispatch` and `combine` are `[batch, sequence, experts * slots]`, expert-major. */
export interface SlotsPlan {
  readonly kind: "slots";
  readonly dispatch: Tensor;
  readonly combine: Tensor;
}

/**
 * One pass through an expert whose parameters are a mixture (SMEAR, muMoE): `groups` i32 `[tokens]` names the mixture of each token
 * (-1 = none, output zero), `coefficients` holds one `[groups, experts]` per expert mode.
 */
export interface MergePlan {
  readonly kind: "merge";
  readonly groups: Tensor;
  readonly coefficients: readonly Tensor[];
}

/** What a router decided, in one of five kinds. Tensors stay on the device; nothing here is ever read by the host. */
export type Plan = SparsePlan | DensePlan | ExpertChoicePlan | SlotsPlan | MergePlan;

/** What a router needs beyond the hidden states; whoever calls it supplies these or refuses with the reason. */
export type Need =
  | "tokenIds"
  | "modalityIds"
  | "attention"
  | "everyExpert"
  | "carry"
  | "mixedExperts"
  | "target"
  | "host";

/**
 * Replaces how one row of the batch is routed, without touching weights; in evaluation only. What is absent stays as the router has
 * it, its normalisation always. Experts are ranked as the router chooses them. Weights of what is left are not raised for what is masked, unless
 * the router divides them by their sum.
 */
export interface RoutingOverride {
  /** Experts per token. With `threshold`: at most. */
  readonly k?: number;
  /** Places in the falling order, from 0: the strong pass of a top-2 model is [0, 1], its rank-2 pass [1]. Alone or with `masked`. */
  readonly ranks?: readonly number[];
  /** 0..1: the fewest experts whose probabilities sum to more than this, divided by their sum whatever the router does. */
  readonly threshold?: number;
  /**
   * Experts drawn uniformly instead of the best, `k` of them (default 1), their weights divided by their sum whatever the router does. The
   * number is the seed: layer and position, counted with padding, say the rest, so that a cached pass draws what a whole one does.
   */
  readonly random?: number;
  /** Never chosen; the ranks close up. */
  readonly masked?: readonly number[];
  /** Always chosen, among the k. */
  readonly forced?: readonly number[];
  /** Layers it applies to; absent: all. */
  readonly layers?: readonly number[];
  /** Which routers of a layer it applies to, where attention has one too (mixture of attention heads); absent: the feed-forward one. */
  readonly parts?: readonly RoutedPart[];
}

/** The half of a layer that a router stands in. */
export type RoutedPart = "attention" | "feedForward";

/** How the flat tokens of a layer lie in batch and sequence. */
export interface Layout {
  readonly batch: number;
  readonly sequence: number;
  /** Tokens already in the cache. */
  readonly past: number;
  /** `[batch, past + sequence]`, 1 = real token. */
  readonly mask?: Tensor;
  /** i32 `[tokens]`: sample (image, document) of each token. */
  readonly samples?: Tensor;
}

/** Everything a router may look at in one call. What is costly or rare is lazy. */
export interface RouterInput {
  /** `[tokens, width]`, tokens = batch * sequence. */
  readonly hidden: Tensor;
  readonly layout: Layout;
  readonly training: boolean;
  readonly step: number;
  readonly totalSteps?: number;
  readonly pass: number;
  readonly layer: number;
  readonly layers: number;
  /** Where in the layer the router stands; absent: in the feed-forward part. */
  readonly part?: RoutedPart;
  readonly random: Random;
  readonly buffers: Tree;
  readonly tokenIds?: Tensor;
  readonly modalityIds?: Tensor;
  readonly missing?: Tensor;
  readonly target?: Tensor;
  /** Lazy: `[batch, heads, sequence, past + sequence]`. */
  attention?(): Tensor;
  /** Lazy and costly: `[tokens, experts, width]`; `moe()` supplies it. */
  everyExpert?(): Tensor;
  /** From the router of the previous MoE layer, same forward pass. */
  readonly carry?: Tree;
  /** From the same router at earlier positions; leaves `[batch, position, ...]`. */
  readonly cache?: Tree;
  /** Per row of the batch. Only for routers with `overrides`. */
  readonly override?: readonly (RoutingOverride | undefined)[];
  /** `[experts (+ nulls)]`: tokens of each expert per token in the whole global batch, where the balance loss should use it. */
  readonly globalLoad?: Tensor;
  readonly schedule?: Readonly<Record<string, number | boolean>>;
}

/** A loss term and the weight it enters the total with. */
export interface Loss {
  readonly value: Tensor;
  readonly weight: number;
}

/** What `route` returns: plain data, nothing is stored in the router. */
export interface Routed {
  readonly plan: Plan;
  /** `[tokens, experts (+ nulls)]`. */
  readonly logits?: Tensor;
  /** `[tokens, experts (+ nulls)]`. */
  readonly probabilities?: Tensor;
  readonly losses: Readonly<Record<string, Loss>>;
  readonly carry?: Tree;
  readonly cache?: Tree;
  /** `[tokens, width]`: what the experts see, where it is not hidden (FuseMoE, VQMoE). */
  readonly rows?: Tensor;
  /** Further paths, summed (VQMoE's discrete path). */
  readonly more?: readonly { readonly plan: Plan; readonly rows?: Tensor }[];
  /** `[tokens, experts, width]`, already computed by the router (CompeteSMoE). */
  readonly expertOutputs?: Tensor;
  readonly metrics?: Readonly<Record<string, Tensor>>;
}

/** What a plugin knows when it makes the router of one layer. */
export interface RouterContext {
  readonly engine: Engine;
  readonly width: number;
  readonly experts: number;
  readonly heads?: number;
  readonly layer: number;
  readonly layers: number;
  readonly random: Random;
  /** Number of token ids, where the model has any. */
  readonly vocabulary?: number;
  /** Occurrences of each token id in the corpus, `[vocabulary]`: for tables that a router makes before training. */
  readonly tokenCounts?: Float64Array;
  /** One per model, whichever layer asks first makes it: RMoE's GRU, ReMoE's lambda. */
  shared<T>(key: string, make: () => T): T;
}

/** One layer's statistics of one optimiser step, on the host. */
export interface StepStatistics {
  readonly step: number;
  readonly totalSteps?: number;
  readonly tokens: number;
  /** Real experts, then null ones; the whole global batch. */
  readonly load: Float64Array;
  /** The router's own metrics, fetched in the step's one transfer. */
  readonly metrics: Readonly<Record<string, Float64Array>>;
}

/** The router of one layer. */
export interface Router {
  /** Trained; saved with the checkpoint. */
  readonly params: Tree;
  /** Not trained by gradient; saved with the checkpoint. */
  readonly buffers: Tree;
  route(params: Tree, input: RouterInput): Routed;
  /** Whether its decisions obey `input.override` (by `overridePlan`); absent: whoever asks for an override is refused. */
  readonly overrides?: true;
  /** The two halves of route, where a router has them: wrappers (noise, null experts) stand between. */
  score?(params: Tree, input: RouterInput): Tensor;
  select?(scores: Tensor, input: RouterInput): Routed;
  /**
   * All MoE layers at once, after the optimiser step; returns this layer's new buffers (DeepSeek bias, ReMoE lambda,
   * Race threshold), computed from the current ones: the router itself keeps no state, or a resumed run would
   * differ.
   */
  afterStep?(layers: readonly StepStatistics[], buffers: Tree): Tree;
}

/**
 * What a router lets wrappers build on:
 * - "scores": it has the halves `score` and `select`;
 * - "logits", "probabilities": every decision carries them, the latter with rows that sum to 1;
 * - "choices": `plan.experts` names what each token chose by these probabilities whatever other sequences do, nothing
 *   dropped and nothing evened out: what a balance loss counts.
 */
export type Gift = "scores" | "logits" | "probabilities" | "choices";

/** What `topK({ k: 2 })` returns: options are bound, sizes are not known yet. */
export interface RouterPlugin {
  readonly name: string;
  /** Whether a token's route depends on earlier tokens only; may differ between training and evaluation (Expert Race). */
  readonly causal: { readonly training: boolean; readonly evaluation: boolean };
  readonly needs: readonly Need[];
  readonly plans: readonly Plan["kind"][];
  /** Whether all tokens of a row of the batch go to the same experts, as experts that see whole images need it. */
  readonly perSample?: boolean;
  /** What wrappers may build on; absent: nothing, and they refuse. */
  readonly gives?: readonly Gift[];
  /** Experts that every token goes through beside the routed ones; whoever builds the layer makes them. Default 0. */
  readonly sharedExperts?: number;
  /**
   * What the plugin was made with, every default filled in: saved with a checkpoint and compared when one is loaded. The
   * weight of a balance loss is called `balance`, that of a z-loss `zLoss`.
   */
  readonly options?: { readonly [name: string]: Json };
  /** Experts that a token uses on average (k, or ReMoE's target): for counting active parameters. */
  readonly expertsPerToken?: number;
  init(context: RouterContext): Router;
}

/** A plan as the grouped kernels take it: rows sorted by expert (stable), all three i32. */
export interface Dispatch {
  /** `[bound]`: the token of each row, -1 beyond the last filled one. */
  readonly rows: Tensor;
  /** `[bound]`: the flat index of the row's weight in the plan, -1 beyond the last filled one. */
  readonly slots: Tensor;
  /** `[experts]`: ends[e] closes e's block. */
  readonly ends: Tensor;
}

/** Is told the inputs of every expert matrix: parameter name, rows `[n, in]` sorted by expert, ends `[experts]`. */
export type Observe = (parameter: string, rows: Tensor, ends: Tensor) => void;

/** A set of experts of equal shape. Parameters are an argument, so that they can be mixed, streamed or watched. */
export interface Experts {
  readonly count: number;
  /** Leaves `[experts, ...]`; shared cores or latents under `shared`. */
  readonly params: Tree;
  /** Whether they look at neighbours: only routers with `perSample` go with them. */
  readonly spatial?: boolean;
  /** rows `[n, width]` sorted by expert -> output `[n, width']`; rows beyond the last block give zeros. */
  apply(
    params: Tree,
    rows: Tensor,
    ends: Tensor,
    layout: Layout,
    observe?: Observe,
  ): { readonly output: Tensor; readonly losses?: Routed["losses"] };
  /** hidden `[tokens, width]` through the mixture of each token's group (SMEAR; muMoE without building the mixed matrix). */
  mixed?(params: Tree, hidden: Tensor, plan: MergePlan, layout: Layout): Tensor;
  /** The whole sparse path (dispatch, experts, combine) as one op, where these experts are what that op computes. */
  fused?(params: Tree, hidden: Tensor, plan: SparsePlan): Tensor;
  /**
   * Experts that do not stay in memory: what `apply` gives, bit for bit, loading in between. Called outside any scope; the result is
   * the caller's. `apply` of such experts throws UnsupportedError.
   */
  stream?(rows: Tensor, ends: Tensor): Promise<Tensor>;
}

/** Experts that run on every token; `gate [1, width]` multiplies their output by sigmoid(hidden gateᵀ) (Qwen2-MoE). */
export interface SharedExperts {
  readonly experts: Experts;
  readonly gate?: Tensor;
}

export interface MoELayer {
  readonly router: Router;
  readonly experts: Experts;
  readonly shared?: readonly SharedExperts[];
}

/** What a hook knows about the current step. */
export interface StepInfo {
  readonly step: number;
  readonly totalSteps?: number;
  readonly labels?: Tensor;
  readonly mask?: Tensor;
  /** In `loss` and `combine`: what the routers of each layer were given as `RouterInput.globalLoad`. */
  readonly globalLoad?: readonly Tensor[];
}

/** One forward pass of a step, for hooks that compare several (THOR). */
export interface Pass {
  readonly loss: Tensor;
  readonly logits: Tensor;
  readonly layers: readonly Routed[];
}

/** Per model, optional: what a method does to training outside its router. */
export interface TrainingHook {
  readonly name: string;
  /** Forward passes of the same batch per step (THOR: 2). */
  readonly passes?: number;
  /**
   * Saved with the training run. A hook replaces it when it changes and reads it anew each time; the trainer frees
   * the old one, and sets it on resuming.
   */
  state?: Tree;
  /** Handed to routers as `input.schedule`. */
  beforeStep?(info: StepInfo): Readonly<Record<string, number | boolean>>;
  /** Inputs of every expert matrix: OMoE, ESFT. */
  observe?(parameter: string, layer: number, rows: Tensor, ends: Tensor): void;
  /** Losses over all layers at once: the Hugging Face Mixtral form, DynMoLE. */
  loss?(layers: readonly Routed[], info: StepInfo): Tensor;
  combine?(passes: readonly Pass[], info: StepInfo): Tensor;
  /** OMoE, MPOE. */
  transformGradient?(parameter: string, gradient: Tensor, info: StepInfo): Tensor;
  /** 0/1 mask of the trained entries; false: frozen, moments and decay included (ESFT). */
  updateMask?(parameter: string): Tensor | false | undefined;
}
