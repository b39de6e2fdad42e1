// The public surface of @switchyard/models/tuning: training what was loaded, and saving it in its own layout.
export type { TunedTensor } from "./compare.ts";
export { type ChooseExpertsOptions, chooseExperts, onlyExperts, trainsExperts } from "./experts.ts";
export { type LoraOptions, mergedLora, withLora } from "./lora.ts";
export { isLora, layerOf, matrixPath, partOf, type TuningPart, tuningParts } from "./parts.ts";
export { type SaveTunedOptions, saveTuned, type TunedCertificate, type TunedProgress } from "./save-tuned.ts";
export { changedParameters, type TuningOptions, tuned, tuningTask } from "./task.ts";
