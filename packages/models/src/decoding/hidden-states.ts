// Hidden states that a pass shows, held until they are read. Private.
import { alias, slice, type Tensor } from "@switchyard/core";
import type { Watch } from "../model.ts";

/** Which of the tensors `[batch, sequence, width]` to hold: their name, and their layer. */
export type Wanted = (what: Parameters<Watch>[0], layer: number) => boolean;

/** Collects during passes; whoever makes it disposes it. */
export class HiddenStates {
  readonly #wanted: Wanted;
  readonly #positions: "all" | "last";
  #held: { readonly key: string; readonly layer: number; readonly x: Tensor }[] = [];

  /** `positions`: all that are new, or the last of each row, of the last pass. */
  constructor(wanted: Wanted, positions: "all" | "last") {
    this.#wanted = wanted;
    this.#positions = positions;
  }

  readonly watch: Watch = (what, x, layer) => {
    if (!this.#wanted(what, layer)) return;
    const [batch = 0, sequence = 0, width = 0] = x.shape;
    const key = `${what} ${layer}`;
    if (this.#positions === "all") {
      this.#held.push({ key, layer, x: alias(x) });
      return;
    }
    const kept: Tensor[] = [];
    x.engine.scope(() => {
      kept.push(alias(slice(x, [0, sequence - 1, 0], [batch, 1, width])));
    });
    const [last] = kept;
    for (const old of this.#held) if (old.key === key) old.x.dispose();
    this.#held = this.#held.filter((old) => old.key !== key);
    if (last) this.#held.push({ key, layer, x: last });
  };

  /** What is held, in the order in which it came; it belongs to this object until `dispose`. */
  get tensors(): readonly { readonly layer: number; readonly x: Tensor }[] {
    return this.#held;
  }

  dispose(): void {
    for (const { x } of this.#held) x.dispose();
    this.#held = [];
  }
}
