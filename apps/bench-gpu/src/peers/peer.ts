// What a peer must be able to do: the same layer on the same device, handed back as contenders for the harness.
import type { Contender, LayerCase } from "@switchyard/bench/kernels";

export interface Peer {
  readonly name: string;
  readonly version: string;
  layer(one: LayerCase): Promise<Contender>;
  /** Forward and backward, with the outputs of our `moeLayerGradients`; missing: it has no gradients. */
  gradients?(one: LayerCase): Promise<Contender>;
}

export interface PeerSource {
  readonly name: string;
  /** @throws Error that says why it cannot be measured here. */
  open(on: PeerOptions): Promise<Peer>;
}

export interface PeerOptions {
  /** The device computes on the processor. */
  readonly software: boolean;
}

/** Opens the way that is fastest here, of several that give the same; those that fail are left out while one works. */
export async function fastest(ways: readonly (() => Promise<Contender>)[]): Promise<Contender> {
  const [only, ...others] = ways;
  if (only && others.length === 0) return only();
  let best: { readonly contender: Contender; readonly seconds: number } | undefined;
  let failure: unknown;
  for (const open of ways) {
    let contender: Contender | undefined;
    try {
      contender = await open();
      await contender.run(); // compiles
      const start = performance.now();
      await contender.run();
      const seconds = performance.now() - start;
      if (!best || seconds < best.seconds) {
        await best?.contender.dispose?.();
        best = { contender, seconds };
        continue;
      }
    } catch (error) {
      failure = error;
    }
    await contender?.dispose?.();
  }
  if (!best) throw failure;
  return best.contender;
}
