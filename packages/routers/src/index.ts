// The public surface of @switchyard/routers. Every router also has a subpath of its own, with its card.
export { type ExpertChoiceOptions, expertChoice } from "./expert-choice.ts";
export type { RouterCard } from "./parts.ts";
export { type ReMoEOptions, reMoE } from "./re-moe.ts";
export { type SwitchOptions, switchRouter } from "./switch-router.ts";
export { type TopKOptions, type TopKOrder, topK } from "./top-k.ts";
