// Shared experts beside a router (DeepSeekMoE 2401.06066, section 3.2): every token goes through them, whatever it decides.
import { ShapeError } from "../errors.ts";
import type { RouterPlugin } from "../moe/plan.ts";
import { wrap } from "./wrap.ts";

export interface WithSharedExpertsOptions {
  /** How many; default 1. */
  readonly count?: number;
}

/**
 * The router, asking for shared experts beside those it chooses from. It decides as before: whoever builds the layer makes them
 * (`transformer`, by `RouterPlugin.sharedExperts`), or passes them to `moeLayer` as `shared`, which refuses to do without.
 *
 * @example withSharedExperts(topK({ k: 2 }), { count: 1 })
 */
export function withSharedExperts(plugin: RouterPlugin, { count = 1 }: WithSharedExpertsOptions = {}): RouterPlugin {
  if (!Number.isInteger(count) || count < 1) {
    throw new ShapeError(`withSharedExperts: count = ${count}; expected a whole number from 1`);
  }
  return wrap(plugin, {
    name: "sharedExperts",
    options: { count },
    changes: { sharedExperts: (plugin.sharedExperts ?? 0) + count },
  });
}
