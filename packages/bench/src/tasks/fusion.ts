// Fusion: several modalities hold shares of a secret (Shamir 1979), the class. Any two of them tell it, one alone tells nothing; so
// it can be learned only by combining modalities, and still be told when one of three is missing.
import { ShapeError } from "@switchyard/core";
import { type Draws, draws } from "./draws.ts";
import type { SampleTask, Split } from "./sample-task.ts";

export interface FusionOptions {
  /** One token each; default 3. */
  readonly modalities?: number;
  /** A prime above `modalities`; default 5. */
  readonly classes?: number;
  /** Share of the samples that lack one modality, 0 to 1; above 0 for three modalities or more. Default 0.3. */
  readonly missing?: number;
  /** Numbers of each modality; default 6. */
  readonly features?: number;
  /** Standard deviation of what is added to every number; default 0.1. */
  readonly noise?: number;
  /** Default 0. */
  readonly seed?: number;
}

/**
 * Class c and a random r, both in 0..classes-1: modality m shows the symbol (c + (m + 1) r) mod classes, as a fixed random vector of its
 * own plus noise; where it is missing, zeros. Throws ShapeError for options that make the class a matter of chance.
 */
export function fusionTask(options: FusionOptions = {}): SampleTask {
  const { modalities = 3, classes = 5, missing = 0.3, features = 6, noise = 0.1, seed = 0 } = options;
  if (!Number.isInteger(modalities) || modalities < 2) {
    throw new ShapeError(`fusionTask: modalities = ${modalities}; expected a whole number from 2`);
  }
  if (!isPrime(classes) || classes <= modalities) {
    throw new ShapeError(`fusionTask: classes = ${classes}; expected a prime above the ${modalities} modalities`);
  }
  if (!(missing >= 0 && missing <= 1) || (missing > 0 && modalities < 3)) {
    throw new ShapeError(
      `fusionTask: missing = ${missing} with ${modalities} modalities; expected a share from 0 to 1, and 0 where two modalities ` +
        "are all there are, for one alone tells nothing",
    );
  }
  const codes = draws(seed, "codes");
  const signatures = Float64Array.from({ length: modalities * classes * features }, () => codes.normal());

  const one = (random: Draws): { label: number; values: number[]; gone: number } => {
    const label = random.below(classes);
    const gone = random.uniform() < missing ? random.below(modalities) : -1;
    const values: number[] = [];
    const secret = random.below(classes);
    for (let m = 0; m < modalities; m++) {
      const symbol = (label + (m + 1) * secret) % classes;
      for (let f = 0; f < features; f++) {
        const shown = (signatures[(m * classes + symbol) * features + f] ?? 0) + noise * random.normal();
        values.push(m === gone ? 0 : shown);
      }
    }
    return { label, values, gone };
  };

  return {
    name: "fusion",
    classes,
    tokens: modalities,
    features,
    modalities: true,
    samples(split: Split, index: number, count: number) {
      const random = draws(seed, `${split} ${index}`);
      const all = Array.from({ length: count }, () => one(random));
      return {
        count,
        features: Float32Array.from(all.flatMap(({ values }) => values)),
        labels: Int32Array.from(all, ({ label }) => label),
        missing: Float32Array.from(
          all.flatMap(({ gone }) => Array.from({ length: modalities }, (_, m) => Number(m === gone))),
        ),
      };
    },
  };
}

function isPrime(n: number): boolean {
  if (!Number.isInteger(n) || n < 2) return false;
  for (let d = 2; d * d <= n; d++) if (n % d === 0) return false;
  return true;
}
