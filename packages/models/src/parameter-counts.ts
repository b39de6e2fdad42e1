// Counting parameters without making any: routers are set up on a backend that knows shapes only.
import { type Backend, engine, leaves, random } from "@switchyard/core";
import { completeConfig, parameterShapes, type TransformerConfig, vocabularyOf } from "./transformer-config.ts";

export interface ParameterCounts {
  readonly total: number;
  /** What one token is multiplied with: of the routed experts, only those it uses. */
  readonly active: number;
  /** The part of `total` in routed experts. */
  readonly experts: number;
  /** The part of `total` in routers. */
  readonly routers: number;
}

/** A backend without numbers: every kernel gives handles, nothing is computed. */
function shapesOnly(): Backend<object> {
  return {
    name: "shapes",
    kernels: new Proxy({} as Backend<object>["kernels"], {
      get: () => (_: unknown, results: unknown[]) => results.map(() => ({})),
    }),
    upload: () => ({}),
    download: () => Promise.reject(new Error("a backend that knows shapes only has no numbers to read")),
    free: () => undefined,
  };
}

/**
 * Parameters of a model, in all and active per token. A token uses `expertsPerToken` experts: what the router says,
 * unless given here; where neither does, every expert counts as active.
 */
export function parameterCounts(
  config: TransformerConfig,
  options: { readonly expertsPerToken?: number } = {},
): ParameterCounts {
  const complete = completeConfig(config);
  const { router, width, experts: count, heads, layers } = complete;
  const sizes = [...parameterShapes(config)].map(([path, shape]) => [path, shape.reduce((n, d) => n * d, 1)] as const);
  const sum = (wanted: (path: string) => boolean): number =>
    sizes.reduce((total, [path, size]) => (wanted(path) ? total + size : total), 0);
  const experts = sum((path) => path.includes(".moe.experts."));
  const host = engine(shapesOnly());
  const shared = new Map<string, unknown>();
  const params = Array.from(
    { length: layers },
    (_, layer) =>
      router.init({
        engine: host,
        width,
        experts: count,
        heads,
        layer,
        layers,
        ...vocabularyOf(complete),
        random: random(host, 0),
        shared: <T>(key: string, make: () => T): T => {
          if (!shared.has(key)) shared.set(key, make());
          return shared.get(key) as T;
        },
      }).params,
  );
  // One tensor in several layers counts once.
  const routers = [...new Set(leaves(params).map(([, x]) => x))].reduce((total, { size }) => total + size, 0);
  const total = sum(() => true) + routers;
  const used = Math.min(options.expertsPerToken ?? router.expertsPerToken ?? count, count);
  return { total, active: total - experts * (1 - used / count), experts, routers };
}
