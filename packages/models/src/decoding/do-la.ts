// Decoding by contrasting layers (DoLa, 2309.03883): the last layer against the early one that disagrees with it most.
// Early layers are read through final norm and head (the paper's code leaves the norm out).
import { ShapeError, type Tensor } from "@switchyard/core";
import { logProbabilities } from "./distributions.ts";
import { HiddenStates } from "./hidden-states.ts";
import { jensenShannon } from "./jensen-shannon.ts";
import { Passes } from "./passes.ts";
import { picker, type SamplingOptions } from "./pick.ts";
import type { DecodingModel, DecodingStrategy } from "./strategy.ts";
import { tokenByToken } from "./token-by-token.ts";

/** Defaults of sampling: temperature 0 (the largest is taken), repetition penalty 1.2. */
export interface DoLaOptions extends SamplingOptions {
  /**
   * After how many layers the candidates are read, 0 being the embedding: even numbers of the lower half (default "low", for reasoning) or the
   * upper half ("high", for facts), or these. Of models with more than 40 layers the half is the 20 first or last.
   */
  readonly layers?: "low" | "high" | readonly number[];
  /** Tokens less probable than alpha times the most probable one are out; 0..1, default 0.1. */
  readonly alpha?: number;
}

/**
 * Each token from log p(last layer) - log p(early layer). Reported probabilities are those of the last layer. Throws ShapeError for options out of
 * range and layers that the model does not have.
 */
export function doLa({ layers = "low", alpha = 0.1, ...sampling }: DoLaOptions = {}): DecodingStrategy {
  const name = "doLa";
  if (!(alpha >= 0 && alpha <= 1)) throw new ShapeError(`${name}: alpha is ${alpha}; expected a share, 0 to 1`);
  const pick = picker(name, { temperature: 0, repetitionPenalty: 1.2, ...sampling });
  return {
    name,
    start(model, rows, decoding) {
      const early = candidates(model, layers);
      const passes = new Passes(
        model,
        rows.map(({ prompt }) => prompt),
        { name, ...decoding },
      );
      // "hidden" of layer i is what i + 1 layers gave.
      const wanted = (what: string, layer: number): boolean =>
        (what === "hidden" && early.includes(layer + 1)) || (what === "embed" && early.includes(0));
      const source = {
        get sequences() {
          return passes.sequences;
        },
        async advance(ids?: readonly number[]) {
          const hidden = new HiddenStates(wanted, "last");
          try {
            const last = await passes.advance(ids, hidden.watch);
            const bases: Float64Array[][] = [];
            for (const { x } of hidden.tensors) bases.push(await headOf(model, x));
            return last.map((logits, row) => ({
              logits,
              choice: contrastLayers(
                logits,
                bases.map((base) => base[row] as Float64Array),
                alpha,
              ),
            }));
          } finally {
            hidden.dispose();
          }
        },
        keep: (kept: readonly number[]) => passes.keep(kept),
        dispose: () => passes.dispose(),
      };
      return tokenByToken(rows, decoding, { source, pick });
    },
  };
}

/** Logits `[vocabulary]` per row of hidden states `[batch, 1, width]`. */
async function headOf(model: DecodingModel, hidden: Tensor): Promise<Float64Array[]> {
  const logits = model.head(hidden); // [batch, 1, vocabulary]
  try {
    const data = Float64Array.from(await logits.data());
    return Array.from({ length: hidden.shape[0] ?? 0 }, (_, row) =>
      data.slice(row * model.vocabulary, (row + 1) * model.vocabulary),
    );
  } finally {
    logits.dispose();
  }
}

/** log p of the last layer minus log p of the early one with the largest divergence from it, -Infinity for tokens that are not plausible. */
function contrastLayers(last: Float64Array, early: readonly Float64Array[], alpha: number): Float64Array {
  let base = early[0] as Float64Array;
  if (early.length > 1) {
    let most = Number.NEGATIVE_INFINITY;
    for (const candidate of early) {
      const divergence = jensenShannon(last, candidate);
      if (divergence <= most) continue;
      most = divergence;
      base = candidate;
    }
  }
  const [p, q] = [logProbabilities("doLa", last), logProbabilities("doLa", base)];
  const cutoff = Math.log(alpha) + p.reduce((top, x) => Math.max(top, x), Number.NEGATIVE_INFINITY);
  return p.map((x, i) =>
    x < cutoff || x === Number.NEGATIVE_INFINITY ? Number.NEGATIVE_INFINITY : x - (q[i] as number),
  );
}

/** After how many layers the candidates of a half are read, in a model of `layers`; `tied`: the head is the embedding. Exported for its test. */
export function earlyLayers(half: "low" | "high", { layers, tied }: { layers: number; tied: boolean }): number[] {
  const middle = Math.floor(layers / 2);
  const deep = layers > 40;
  // With a tied head the embedding only says the token that went in.
  const first = tied ? Math.min(2, middle) : 0;
  const [from, to] =
    half === "low" ? [first, deep ? 20 : middle] : [Math.max(first, deep ? layers - 20 : middle), layers];
  const even = Array.from({ length: Math.max(to - from, 0) }, (_, i) => from + i).filter((layer) => layer % 2 === 0);
  return even.length > 0 ? even : [Math.min(Math.max(from, to - 1), layers - 1)];
}

function candidates(model: DecodingModel, layers: "low" | "high" | readonly number[]): readonly number[] {
  const all = model.layers;
  if (typeof layers === "string") return earlyLayers(layers, { layers: all, tied: !("head" in model.params) });
  const wrong = layers.find((layer) => !Number.isInteger(layer) || layer < 0 || layer >= all);
  if (wrong === undefined && layers.length > 0) return layers;
  throw new ShapeError(
    `doLa: layers are [${layers}]; expected some of 0 (the embedding) to ${all - 1}, for a model of ${all} layers`,
  );
}
