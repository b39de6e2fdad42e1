// The public surface of @switchyard/core/wrappers: what may stand around any router.
export { type WithBalanceLossOptions, withBalanceLoss } from "./with-balance-loss.ts";
export { type WithCapacityOptions, withCapacity } from "./with-capacity.ts";
export { type WithJitterOptions, withJitter } from "./with-jitter.ts";
export { type WithNoiseOptions, withNoise } from "./with-noise.ts";
export { type WithNullExpertsOptions, withNullExperts } from "./with-null-experts.ts";
export { type WithSharedExpertsOptions, withSharedExperts } from "./with-shared-experts.ts";
export { type WithZLossOptions, withZLoss } from "./with-z-loss.ts";
