// Every strategy by its name.
import { beam } from "./beam.ts";
import { contrastive } from "./contrastive.ts";
import { contrastiveSearch } from "./contrastive-search.ts";
import { doLa } from "./do-la.ts";
import { dynamicRouting } from "./dynamic-routing.ts";
import { ensembleRouting } from "./ensemble-routing.ts";
import { greedy } from "./greedy.ts";
import { sample } from "./sample.ts";
import { selfConsistency } from "./self-consistency.ts";
import { selfContrast } from "./self-contrast.ts";

/**
 * The factories of all strategies, for programs in which a name chooses one. All but `contrastive` (its amateur) and `selfConsistency` (how to find
 * the answer) can be called without options.
 */
export const decodingStrategies = {
  greedy,
  sample,
  beam,
  selfContrast,
  contrastive,
  contrastiveSearch,
  doLa,
  dynamicRouting,
  ensembleRouting,
  selfConsistency,
} as const;

export type DecodingStrategyName = keyof typeof decodingStrategies;
