// What a peer must be able to do: the same work as our cases, handed back as contenders for the harness.
import type { Contender, LanguageModelCase, LayerCase, ProductCase } from "@switchyard/bench/kernels";

/** The most likely tokens after a prompt, one after the other with a cache. */
export interface GenerationCase {
  readonly prompt: readonly number[];
  readonly tokens: number;
  /** The model, as GGUF. */
  readonly gguf: string;
  readonly threads: number;
  /** How many greedy tokens `output` gives after the log probabilities `[vocabulary]` behind the prompt; 0: only those. */
  readonly checked: number;
}

export interface Peer {
  readonly name: string;
  readonly version: string;
  /** Threads it really uses, which may be fewer than asked for. */
  readonly threads: number;
  /** Missing: the peer has no such operation. */
  product?(one: ProductCase): Promise<Contender>;
  layer?(one: LayerCase): Promise<Contender>;
  /** A model that passes `one.tokens` tokens through `depth` such layers, without a result to compare. */
  stack?(one: LayerCase, depth: number): Promise<Contender>;
  generation?(one: GenerationCase): Promise<Contender>;
  training?(one: LanguageModelCase): Promise<Contender>;
  close?(): void | Promise<void>;
}

export interface PeerOptions {
  readonly threads: number;
  /** Imports an installed package, or one file of it. */
  load(specifier: string): Promise<unknown>;
  /** The installed version of a package. */
  version(name: string): string;
}

export interface PeerSource {
  readonly name: string;
  /** npm packages with the range to install; none for a peer that is not JavaScript. */
  readonly packages: Readonly<Record<string, string>>;
  open(options: PeerOptions): Promise<Peer>;
}
