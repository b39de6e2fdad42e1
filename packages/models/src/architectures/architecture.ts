// What every architecture is: the names of `model_type` that it serves, and a function from config.json and the list of tensors to
// a description. Reading follows from that.
import { loadDescription } from "../load.ts";
import type { Architecture } from "../model.ts";
import type { CheckpointIndex, Description } from "../source.ts";

export interface DescribedArchitecture extends Architecture {
  /** Throws CheckpointError for a config that is damaged or asks for what this package cannot run; reads no weights. */
  describe(checkpoint: CheckpointIndex): Description;
}

/** An architecture from its description. */
export function architecture({
  modelTypes,
  describe,
}: Pick<DescribedArchitecture, "modelTypes" | "describe">): DescribedArchitecture {
  return {
    modelTypes,
    describe,
    read: (checkpoint, engine, options = {}) => loadDescription(checkpoint, engine, describe(checkpoint), options),
  };
}
