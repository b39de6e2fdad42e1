// MPOE (2203.01104, section 3.3): the central core of an operator gets the gradients of all experts of its layer and would be trained
// too much beside the auxiliary ones, so at each step its gradient is multiplied by a variable that is 0 with probability p, else 1.
import { ShapeError, UnsupportedError } from "../../errors.ts";
import type { TrainingHook } from "../../moe/plan.ts";
import { mul } from "../../ops/elementwise.ts";
import { random } from "../../random.ts";

export interface MpoeMaskOptions {
  /** p, the probability that a step leaves the central cores of a layer without gradient, 0..1; tuned in the paper; default 0.5 (our choice). */
  readonly probability?: number;
  /** Central cores are not trained at all, moments and decay included, as the released code offers; default false. */
  readonly frozen?: boolean;
  /** Of the draws; default 0. They depend on it, on the step and on the layer only, so a resumed run draws the same. */
  readonly seed?: number;
  /** The layer of a central core's path, undefined for any other parameter; default: what `mpo` calls `LAYER.shared.NAMECentral`. */
  layerOf?(parameter: string): string | undefined;
}

const layerOfCentral = (parameter: string): string | undefined => /^(.*?)\.?shared\.\w+Central$/.exec(parameter)?.[1];

/**
 * The gradient mask of MPOE, for any model with experts made by `mpo`. One draw per step and layer: the operators of a layer (up and
 * down) are masked together. A masked step still moves a core by the optimiser's moments and decay, as it would with a gradient of 0.
 *
 * @throws ShapeError for a probability outside 0..1.
 * @throws UnsupportedError in the second step of a model without a central core.
 * @example trainer(engine, task, { optimiser: adamw({ learningRate }), hooks: [mpoeMask({ probability: 0.3 })] })
 */
export function mpoeMask(options: MpoeMaskOptions = {}): TrainingHook {
  const { probability = 0.5, frozen = false, seed = 0, layerOf = layerOfCentral } = options;
  if (!(probability >= 0 && probability <= 1)) {
    throw new ShapeError(`mpoeMask: probability = ${probability}; expected a number from 0 to 1`);
  }
  const seen = { parameters: 0, central: 0 };
  const look = (parameter: string): string | undefined => {
    const layer = layerOf(parameter);
    seen.parameters++;
    if (layer !== undefined) seen.central++;
    return layer;
  };
  return {
    name: "mpoeMask",
    beforeStep() {
      if (seen.parameters > 0 && seen.central === 0) {
        throw new UnsupportedError(
          "mpoeMask: the model has no central core; make its experts with mpo(), or name the cores with layerOf",
        );
      }
      return {};
    },
    transformGradient(parameter, gradient, { step }) {
      const layer = look(parameter);
      if (layer === undefined) return gradient;
      const [draw = 0] = random(gradient.engine.root, seed).at("mpoeMask", step, layer).host("uniform", 1);
      // A product, so that a gradient that is not finite stays so and is reported.
      return draw < probability ? mul(gradient, 0) : gradient;
    },
    ...(frozen ? { updateMask: (parameter: string) => (look(parameter) === undefined ? undefined : false) } : {}),
  };
}
