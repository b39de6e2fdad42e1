// Every router of @switchyard/routers, with the options that make a layer of k experts per token.
import { UnsupportedError } from "@switchyard/core";
import type { RouterPlugin } from "@switchyard/core/moe";
import * as routers from "@switchyard/routers";

type Factory = (options: object) => RouterPlugin;

/** Options that a factory requires beside k, or that another name has for it. */
const special: Readonly<Record<string, (k: number) => object>> = {
  nullExperts: (k) => ({ k: 2 * k }), // half of them null
  adaMoE: (k) => ({ k: 2 * k }),
  hash: () => ({ vocabulary: 4096 }),
};

/** Name and router; one that does not know k is made without it, and one that allows fewer experts gets the most it allows. */
export function everyRouter(k: number): readonly (readonly [string, RouterPlugin])[] {
  return Object.entries(routers as Readonly<Record<string, unknown>>).flatMap(([name, value]) => {
    if (typeof value !== "function") return [];
    const make = value as Factory;
    const given = special[name]?.(k);
    for (const options of given ? [given] : [{ k }, { k: 2 }, {}]) {
      try {
        return [[name, make(options)] as const];
      } catch (error) {
        if (!(error instanceof Error)) throw error;
      }
    }
    throw new UnsupportedError(`router ${name}: bench:kernels does not know its options; add them to routers.ts`);
  });
}
