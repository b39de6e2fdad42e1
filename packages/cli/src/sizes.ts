// Model sizes and how each is trained. Data only: what a size costs and reaches is said in the README.

/** A model and its training, without the router. */
export interface Size {
  /** Entries of the BPE vocabulary. */
  readonly vocabulary: number;
  readonly width: number;
  readonly layers: number;
  readonly heads: number;
  readonly kvHeads: number;
  /** One matrix for input and output embeddings. */
  readonly tieEmbeddings: boolean;
  /** Experts per layer at two experts per token; other routers get as many as keep the active parameters equal. */
  readonly experts: number;
  readonly expertWidth: number;
  /** Sequences per step, and tokens in one. */
  readonly rows: number;
  readonly length: number;
  readonly learningRate: number;
  readonly weightDecay: number;
  /** Share of the steps in which the learning rate rises. */
  readonly warmUp: number;
}

export const sizes = {
  tiny: {
    vocabulary: 512,
    width: 32,
    layers: 2,
    heads: 2,
    kvHeads: 1,
    tieEmbeddings: true,
    experts: 4,
    expertWidth: 32,
    rows: 6,
    length: 32,
    learningRate: 0.01,
    weightDecay: 0.1,
    warmUp: 0.05,
  },
  small: {
    vocabulary: 4096,
    width: 128,
    layers: 4,
    heads: 4,
    kvHeads: 2,
    tieEmbeddings: true,
    experts: 8,
    expertWidth: 128,
    rows: 6,
    length: 128,
    learningRate: 0.003,
    weightDecay: 0.1,
    warmUp: 0.05,
  },
  base: {
    vocabulary: 4096,
    width: 256,
    layers: 6,
    heads: 8,
    kvHeads: 4,
    tieEmbeddings: true,
    experts: 16,
    expertWidth: 256,
    rows: 12,
    length: 256,
    learningRate: 0.002,
    weightDecay: 0.1,
    warmUp: 0.05,
  },
} as const satisfies Readonly<Record<string, Size>>;

export type SizeName = keyof typeof sizes;
