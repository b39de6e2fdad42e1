// The public surface of @switchyard/bench/tasks: small tasks that are no text, for routers that do not fit a language model.
export { type FusionOptions, fusionTask } from "./fusion.ts";
export { type PatchesOptions, patchesTask } from "./patches.ts";
export type { Samples, SampleTask, Split } from "./sample-task.ts";
export { type Accuracy, type TrainedTask, type TrainTaskOptions, trainTask } from "./train.ts";
