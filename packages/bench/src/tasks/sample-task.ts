// What a task of classified samples is: a generator of host data, without a model.

/** Samples to train with, or never seen in training. */
export type Split = "training" | "held-out";

export interface Samples {
  readonly count: number;
  /** `[count, tokens, features]`. */
  readonly features: Float32Array;
  /** `[count]`, the class of each sample. */
  readonly labels: Int32Array;
  /** `[count, tokens]`, 1 = this token is not there, its features are 0. */
  readonly missing?: Float32Array;
}

export interface SampleTask {
  readonly name: string;
  readonly classes: number;
  /** Tokens of a sample. */
  readonly tokens: number;
  /** Numbers that stand for one token. */
  readonly features: number;
  /** Whether the tokens of a sample are its modalities, in order. */
  readonly modalities?: boolean;
  /** The tokens are patches of an image, by rows: [height, width]. */
  readonly grid?: readonly [number, number];
  /** The same split, index and count give the same samples. */
  samples(split: Split, index: number, count: number): Samples;
}
