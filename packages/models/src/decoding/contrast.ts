// Self-contrast decoding (SCMoE, 2405.14507, section 3.2), one step of it: what the strong routing says, away from what the weak one says,
// among the tokens that the strong one finds plausible. With a smaller model in the weak place it is contrastive decoding (2210.15097).
//   z_s, z_w divided by their temperatures; valid: z_s >= ln(alpha) + max z_s; z = (1 + beta) z_s - beta z_w, -Infinity elsewhere
import { ShapeError } from "@switchyard/core";
import { highest, sameLength } from "./distributions.ts";

export interface ContrastOptions {
  /** Tokens less probable than alpha times the most probable one are out; 0..1, default 0.1. At 1 only the most probable is left. */
  readonly alpha?: number;
  /** How far to move away from the weak logits, from 0; default 0.5. The paper searches 0.1 to 0.9. */
  readonly beta?: number;
  /** What the logits are divided by first; default 1 both. */
  readonly temperatures?: { readonly strong?: number; readonly weak?: number };
}

export interface Contrasted {
  /** Logits, -Infinity for tokens that are not plausible: take the largest, or sample from their softmax without a further temperature. */
  readonly logits: Float64Array;
  /** Strong logits below this, divided by their temperature, are out. */
  readonly cutoff: number;
}

/**
 * Strong against weak logits of one position, both `[vocabulary]`. Strong ones may be -Infinity (masked tokens).
 * Throws ShapeError for lengths that differ, options out of range and logits that are no numbers.
 */
export function contrast(
  strong: ArrayLike<number>,
  weak: ArrayLike<number>,
  { alpha = 0.1, beta = 0.5, temperatures = {} }: ContrastOptions = {},
): Contrasted {
  sameLength("contrast", strong, weak);
  if (!(alpha >= 0 && alpha <= 1)) throw new ShapeError(`contrast: alpha is ${alpha}; expected a share, 0 to 1`);
  if (!(beta >= 0 && Number.isFinite(beta)))
    throw new ShapeError(`contrast: beta is ${beta}; expected a number from 0`);
  const scaled = (logits: ArrayLike<number>, which: "strong" | "weak"): Float64Array => {
    const { [which]: temperature = 1 } = temperatures;
    if (!(temperature > 0 && Number.isFinite(temperature))) {
      throw new ShapeError(`contrast: the ${which} temperature is ${temperature}; expected a number above 0`);
    }
    const values = new Float64Array(logits);
    if (temperature !== 1) for (let i = 0; i < values.length; i++) values[i] = (values[i] as number) / temperature;
    return values;
  };
  const [zs, zw] = [scaled(strong, "strong"), scaled(weak, "weak")];
  const cutoff = Math.log(alpha) + highest("contrast", zs);
  const logits = new Float64Array(zs.length).fill(Number.NEGATIVE_INFINITY);
  for (let i = 0; i < zs.length; i++) {
    const z = zs[i] as number;
    if (z < cutoff || z === Number.NEGATIVE_INFINITY) continue;
    const away = zw[i] as number;
    if (!Number.isFinite(away))
      throw new ShapeError(`contrast: the weak logit of token ${i} is ${away}; expected a number`);
    logits[i] = (1 + beta) * z - beta * away;
  }
  return { logits, cutoff };
}
