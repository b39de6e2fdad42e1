// The public surface of @switchyard/core/train: optimisers, schedules, the trainer.
export { type AdamwOptions, adamw, type Optimiser, type SgdOptions, sgd, type UpdateInfo } from "./optim.ts";
export { constantRate, cosineDecay, linearDecay, type Schedule, warmUp, wsd } from "./schedule.ts";
export type { SnapshotArray, TrainerSnapshot } from "./snapshot.ts";
export {
  type BatchInfo,
  type Evaluation,
  type PassInfo,
  type RunOptions,
  type StepReport,
  type Task,
  type Trainer,
  type TrainerOptions,
  trainer,
} from "./trainer.ts";
