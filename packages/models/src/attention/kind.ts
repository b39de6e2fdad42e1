// What one kind of attention is to the decoder: the shapes of its parameters, and a function. Types only.
import type { Tensor, Tree } from "@switchyard/core";
import type { Layout, Routed, RouterInput } from "@switchyard/core/moe";

/** Cosines and sines, `[sequence, half]` or per row `[batch, sequence, half]`. */
export interface Turns {
  readonly cos: Tensor;
  readonly sin: Tensor;
}

export interface AttentionInput {
  /** `[batch, sequence, width]`, normalised. */
  readonly hidden: Tensor;
  /** Its `mask`, `[batch, past + sequence]`, hides padding. */
  readonly layout: Layout;
  readonly turns: Turns;
  /**
   * Appends keys and values `[batch, sequence, heads, size]` of the new positions to the cache and returns those of all
   * positions, `[batch, past + sequence, heads, size]`; without a cache it returns what came in.
   */
  remember(keys: Tensor, values: Tensor): { readonly keys: Tensor; readonly values: Tensor };
  /** Whether there is a cache: what is remembered will be read again for every token. */
  readonly cached: boolean;
  /** What a router inside attention is asked with (mixture of attention heads). `hidden` is `[batch * sequence, width]`. */
  routerInput(hidden: Tensor): RouterInput;
}

export interface Attended {
  /** `[batch, sequence, width]`, before it is added to the residual stream. */
  readonly output: Tensor;
  /** `[batch, heads, sequence, past + sequence]`, computed when asked for. */
  probabilities(): Tensor;
  /** What a router inside attention decided. */
  readonly routed?: Routed;
}

export interface AttentionModule {
  /** Shapes of its parameters by name, but those of a router. */
  readonly shapes: Readonly<Record<string, readonly number[]>>;
  run(params: Tree, input: AttentionInput): Attended;
}
