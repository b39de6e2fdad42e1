// The public surface of @switchyard/core/train: optimisers, schedules, the trainer.
export {
  type EsftOptions,
  type EsftPart,
  type EsftScores,
  type EsftStatistics,
  type EsftStatisticsOptions,
  type ExpertConfig,
  esft,
  esftConfig,
  esftPart,
  esftStatistics,
  normaliseScores,
  readExpertConfig,
  selectExperts,
  writeExpertConfig,
} from "./hooks/esft.ts";
export { type GlobalBalanceOptions, globalBalance } from "./hooks/global-balance.ts";
export { type MpoeMaskOptions, mpoeMask } from "./hooks/mpoe-mask.ts";
export {
  type OmoeOptions,
  omoe,
  otherProjectors,
  projectByFactors,
  projectGradient,
  updateFactors,
  updateProjectors,
} from "./hooks/omoe.ts";
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
