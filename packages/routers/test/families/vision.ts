// Vectors of the routers for several modalities and for images: FuseMoE, and the convolutions of MoE-FFD.
import { softmax, type Tensor, transpose } from "@switchyard/core";
import { type ConvolutionKind, convolve, effectiveKernel } from "@switchyard/core/experts";
import type { Routed } from "@switchyard/core/moe";
import { routerContext, routerInput } from "@switchyard/testing";
import { type FuseMoEOptions, fuseMoE, modalityMeans } from "../../src/fuse-moe.ts";
import {
  dense,
  type Family,
  flat,
  given,
  number,
  only,
  results,
  shapeOf,
  sparse,
  tensor,
  type Values,
} from "../vectors.ts";

/** Rows of a list of that many, in groups: [n * m, ...] -> [n, m, ...]. */
const grouped = (rows: readonly Values[], m: number): Values[] =>
  Array.from({ length: rows.length / m }, (_, i) => rows.slice(i * m, (i + 1) * m));

export const fuseMoEFamily: Family = async (one, on) => {
  const [x, missing, indicator] = [
    given(one.inputs, "x"),
    given(one.inputs, "missing"),
    given(one.inputs, "missing_indicator"),
  ];
  const [shared, own] = [given(one.inputs, "expert_centres_shared"), given(one.inputs, "expert_centres_per_modality")];
  const joint = given(one.inputs, "expert_centres_joint");
  const [samples = 0, modalities = 0] = shapeOf(x);
  const [experts = 0] = shapeOf(shared);
  const k = number(one, "k");
  const tokens = samples * modalities;
  // The tokens of a sample lie beside each other.
  const data = Float64Array.from(flat(x));
  const ids = (): Tensor =>
    on.tensor(
      Int32Array.from({ length: tokens }, (_, t) => t % modalities),
      [tokens],
    );
  const route = (centres: Values, more: Partial<FuseMoEOptions> = {}): Routed => {
    const side = more.design === "joint";
    const rows = side ? samples : tokens;
    const plugin = fuseMoE({ k, modalities, noise: false, ...more });
    const router = plugin.init(routerContext(on, { experts, width: data.length / rows }));
    return router.route(
      { centres: tensor(on, centres), indicator: tensor(on, indicator) },
      {
        ...routerInput(on, { hidden: on.tensor(data, [rows, data.length / rows]), training: true }),
        modalityIds: ids(),
        missing: on.tensor(Float64Array.from(flat(missing)), side ? [samples, modalities] : [tokens]),
      },
    );
  };
  // One router for all modalities is the same centres for each.
  const same = Array.from({ length: modalities }, () => shared);
  const loss = ({ losses }: Routed, name: string): Tensor => {
    const found = losses[name];
    if (!found) throw new Error(`no loss "${name}", there are ${Object.keys(losses).join(", ")}`);
    return found.value;
  };
  const rowsOf = ({ rows }: Routed): Tensor => {
    if (!rows) throw new Error("nothing was filled in");
    return rows;
  };
  const parts = (name: string, routed: Routed): [string, Tensor][] => [
    [`${name} ids`, sparse(routed).experts],
    [`${name} weights`, sparse(routed).weights],
  ];
  const found = await results(on, (): Record<string, Tensor> => {
    const [laplace, gaussian] = [route(same), route(same, { gate: "gaussian" })];
    const masks = Array.from({ length: modalities }, (_, m) =>
      on.tensor(
        Float64Array.from({ length: tokens }, (__, t) => Number(t % modalities === m)),
        [tokens],
      ),
    );
    const means = modalityMeans(softmax(laplace.logits as Tensor), masks);
    return {
      filled: rowsOf(laplace),
      laplace: laplace.logits as Tensor,
      gaussian: gaussian.logits as Tensor,
      means: means.means,
      regulariser: loss(laplace, "entropy"),
      ...Object.fromEntries([
        ...parts("laplace", laplace),
        ...parts("gaussian", gaussian),
        ...parts("own", route(own)),
        ...parts("joint", route(joint, { design: "joint" })),
        ...parts("farthest", route(same, { farthest: true })),
      ]),
    };
  });
  const gates = (name: string): Values[] =>
    dense(given(found, `${name} ids`), given(found, `${name} weights`), experts);
  const lines = (name: string): Values => grouped(given(found, name) as readonly Values[], modalities);
  return {
    filled: lines("filled"),
    laplace_logits: lines("laplace"),
    laplace_gates: grouped(gates("laplace"), modalities),
    gaussian_logits: lines("gaussian"),
    gaussian_gates: grouped(gates("gaussian"), modalities),
    modality_mean_probs: given(found, "means"),
    entropy_regulariser: given(found, "regulariser"),
    per_modality_gates: grouped(gates("own"), modalities),
    joint_gates: gates("joint"),
    repo_sign_quirk_gates: grouped(gates("farthest"), modalities),
  };
};

/** The names of the official code. */
const kinds: Readonly<Record<string, ConvolutionKind>> = {
  cv: "vanilla",
  cd: "central",
  ad: "angular",
  rd: "radial",
  scd: "second-order",
};

export const moeFFDFamily: Family = async (one, on) => {
  const [x, weight, bias] = [given(one.inputs, "x"), given(one.inputs, "weight"), given(one.inputs, "bias")];
  only(one, "padding", ["same"]);
  return results(on, () => {
    // The vectors have channels first.
    const images = transpose(tensor(on, x), [0, 2, 3, 1]); // [images, height, width, in]
    const made = Object.entries(kinds).flatMap(([name, kind]) => {
      const kernel = effectiveKernel(tensor(on, weight), kind);
      const output = transpose(convolve(images, kernel, tensor(on, bias)), [0, 3, 1, 2]);
      return [
        [`output.${name}`, output] as const,
        ...(name === "cv" ? [] : [[`effective_kernels.${name}`, kernel] as const]),
      ];
    });
    return Object.fromEntries(made);
  });
};

export const visionFamilies: Readonly<Record<string, Family>> = {
  fusemoe: fuseMoEFamily,
  moe_ffd: moeFFDFamily,
};
