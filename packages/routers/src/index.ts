// The public surface of @switchyard/routers. Every router also has a subpath of its own, with its card.
export { type AdaMoEOptions, adaMoE } from "./ada-moe.ts";
export { type AttentionAwareOptions, attentionAware } from "./attention-aware.ts";
export { type ExpertChoiceOptions, expertChoice } from "./expert-choice.ts";
export { type ExpertRaceOptions, expertRace, type RaceStrategy } from "./expert-race.ts";
export { type ExpressiveGate, type ExpressiveGatesOptions, expressiveGates } from "./expressive-gates.ts";
export { type NullExpertsOptions, nullExperts } from "./null-experts.ts";
export type { RouterCard } from "./parts.ts";
export { type ReMoEOptions, reMoE } from "./re-moe.ts";
export { type SimilarityAwareOptions, similarityAware } from "./similarity-aware.ts";
export { type SwitchOptions, switchRouter } from "./switch-router.ts";
export { type TopKOptions, type TopKOrder, topK } from "./top-k.ts";
