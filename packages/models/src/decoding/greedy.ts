// The most likely token each time.
import { type SampleOptions, sampling } from "./sample.ts";
import type { DecodingStrategy } from "./strategy.ts";

export type GreedyOptions = Omit<SampleOptions, "temperature" | "topK" | "topP" | "minP">;

/** Takes the most likely token, of equally likely ones the lowest id. Throws ShapeError for options out of range. */
export const greedy = (options: GreedyOptions = {}): DecodingStrategy =>
  sampling("greedy", { ...options, temperature: 0 });
