// Which architecture a checkpoint is of, and what it says about it: one place for loading, inspecting and rewriting.
import { CheckpointError } from "@switchyard/core";
import { checkDescription } from "../load.ts";
import type { Architecture, Checkpoint } from "../model.ts";
import type { Description } from "../source.ts";
import type { DescribedArchitecture } from "./architecture.ts";
import { architectures as builtIn } from "./families.ts";
import { type SwitchyardOptions, switchyard } from "./switchyard.ts";

/** What a checkpoint may be of beside the built-in families. */
export interface KnownArchitectures<A extends Architecture = Architecture> extends Partial<SwitchyardOptions> {
  /** Asked before the built-in ones. */
  readonly architectures?: readonly A[];
}

/** The architecture of a checkpoint's `model_type`; throws CheckpointError that lists those that are known. */
export function findArchitecture<A extends Architecture>(
  { config }: Pick<Checkpoint, "config">,
  { architectures = [], routers = [], otherOptions = false }: KnownArchitectures<A>,
  where = "the checkpoint",
): A | DescribedArchitecture {
  const known = [...architectures, ...builtIn, switchyard({ routers, otherOptions })];
  const found = known.find(({ modelTypes }) => modelTypes.some((name) => name === config.model_type));
  if (found) return found;
  const names = known.flatMap(({ modelTypes }) => modelTypes).join(", ");
  throw new CheckpointError(
    `${where}: model_type is ${JSON.stringify(config.model_type ?? null)}; this version loads ${names}`,
  );
}

/**
 * What a checkpoint holds, checked against the headers of its files. Throws CheckpointError for an unknown family, and where
 * config.json and tensors do not fit together.
 */
export function describeCheckpoint(
  checkpoint: Checkpoint,
  known: KnownArchitectures<DescribedArchitecture>,
  where?: string,
): Description {
  const description = findArchitecture(checkpoint, known, where).describe(checkpoint);
  // In our own layout tensors are named as parameters are, so that a source for each is there by itself.
  if (checkpoint.config.model_type !== "switchyard") checkDescription(checkpoint, description);
  return description;
}
