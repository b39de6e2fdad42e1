// Whether a strategy that routes otherwise has routers that let it. Private.
import { UnsupportedError } from "@switchyard/core";
import type { RoutingOverride } from "@switchyard/core/moe";
import type { DecodingModel } from "./strategy.ts";

/**
 * Throws UnsupportedError for a model without routers, or with one that takes no overrides in a layer where there are some. Models that do not show
 * their routers find that out in the first pass.
 */
export function requireRouting(
  name: string,
  model: DecodingModel,
  overrides: readonly (RoutingOverride | undefined)[],
) {
  const refuse = (why: string): never => {
    throw new UnsupportedError(`${name}: it changes how tokens are routed, and ${why}; use greedy, sample or beam`);
  };
  if (model.routing.length === 0) refuse("this model has no router");
  for (const [place, { layer, part }] of model.routing.entries()) {
    const concerned = overrides.some(
      (one) => one && (one.layers?.includes(layer) ?? true) && (one.parts ?? ["feedForward"]).includes(part),
    );
    const router = model.routers?.[place];
    if (!concerned || !router || router.overrides) continue;
    refuse(
      `the router of layer ${layer}${part === "attention" ? " in attention" : ""} takes no overrides: it does not choose experts token by token in the order of its scores`,
    );
  }
}
