// Vectors of the factorised experts: muMoE, MPOE, MoLAE.
import {
  concat,
  dispose,
  full,
  leaves,
  random,
  reshape,
  slice,
  type Tensor,
  type Tree,
  transpose,
} from "@switchyard/core";
import { type MpoOptions, molae, molaeToDense, mpo, mpoToDense, muMoEExperts } from "@switchyard/core/experts";
import { denseToMoLAE, denseToMpo, mpoParameterCount } from "@switchyard/core/factors";
import type { Experts } from "@switchyard/core/moe";
import { routerContext, routerInput } from "@switchyard/testing";
import { muMoE } from "../../src/mu-moe.ts";
import {
  type Family,
  flat,
  given,
  number,
  numberOr,
  results,
  shapeOf,
  tensor,
  turned,
  type Values,
  word,
} from "../vectors.ts";

const list = (values: Values): readonly Values[] => values as readonly Values[];
export const muMoEFamily: Family = async (one, on) => {
  const x = given(one.inputs, "x"); // [batch, sequence, width]
  const [batch = 0, sequence = 0, width = 0] = shapeOf(x);
  const tokens = batch * sequence;
  const coefficients = (name: string): Tensor => {
    const values = given(one.inputs, name);
    return reshape(tensor(on, values), [tokens, shapeOf(values).at(-1) ?? 0]);
  };
  const output = (experts: Experts, names: readonly string[]): Tensor => {
    const plan = {
      kind: "merge",
      groups: on.tensor(
        Int32Array.from({ length: tokens }, (_, t) => t),
        [tokens],
      ),
      coefficients: names.map(coefficients),
    } as const;
    const y = experts.mixed?.(experts.params, reshape(tensor(on, x), [tokens, width]), plan, {
      batch,
      sequence,
      past: 0,
    });
    if (!y) throw new Error("muMoE experts have no mixed");
    return reshape(y, [batch, sequence, y.shape[1] ?? 0]);
  };
  const biased = numberOr(one, "use_bias", 1) === 1;
  /** With bias the last input is the 1: rows [width + 1, ...] -> input and bias. */
  const halves = (core: Tensor): readonly [Tensor, Tensor] => {
    const [rows = 0, ...rest] = core.shape;
    if (rows !== width + Number(biased))
      throw new Error(`a factor has ${rows} rows for ${width} inputs ${biased ? "and a 1" : "without bias"}`);
    if (!biased) return [core, full(core, rest, 0)];
    const start = rest.map(() => 0);
    return [slice(core, [0, ...start], [width, ...rest]), reshape(slice(core, [width, ...start], [1, ...rest]), rest)];
  };
  const cp = (name: string): Tensor => {
    const factors = list(given(one.inputs, name)).map((values) => tensor(on, values));
    const modes = factors.slice(0, -2);
    const [input, out] = factors.slice(-2) as [Tensor, Tensor];
    const [linearInput, linearBias] = halves(input);
    const shared = { linearInput: transpose(linearInput), linearBias, linearOutput: out };
    const sizes = modes.map((mode) => mode.shape[0] ?? 0);
    const params: Tree =
      modes.length === 1
        ? { linear: modes[0] as Tensor, shared }
        : { shared: { ...shared, ...Object.fromEntries(modes.map((mode, i) => [`linearMode${i}`, mode])) } };
    const experts = muMoEExperts({
      count: sizes.reduce((a, b) => a * b, 1),
      modes: sizes,
      width,
      output: out.shape[0] ?? 0,
      rank: out.shape[1] ?? 0,
      params,
    });
    return output(experts, ["a", "a2"].slice(0, modes.length));
  };
  const tr = (): Tensor => {
    const [mode, input, out] = list(given(one.inputs, "tr_cores")).map((values) => tensor(on, values)) as [
      Tensor,
      Tensor,
      Tensor,
    ];
    const [linearInput, linearBias] = halves(transpose(input, [1, 0, 2])); // [width, q, r], [q, r]
    const linear = transpose(mode, [1, 0, 2]); // [experts, p, q]
    const linearOutput = transpose(out, [1, 2, 0]); // [out, p, r]
    const [count = 0, p = 0, q = 0] = linear.shape;
    const [width2 = 0, , r = 0] = linearOutput.shape;
    const shared = { linearInput: transpose(linearInput, [1, 2, 0]), linearBias, linearOutput };
    return output(
      muMoEExperts({
        count,
        width,
        output: width2,
        form: "tr",
        rank: [p, q, r],
        params: { linear, shared },
      }),
      ["a"],
    );
  };
  const gate = (norm: "batch" | "layer"): Tensor => {
    const w = given(one.inputs, "w_gate");
    const [, experts = 0] = shapeOf(w);
    const router = muMoE({ norm }).init(routerContext(on, { experts, width }));
    const hidden = reshape(tensor(on, x), [tokens, width]);
    const input = routerInput(on, { hidden, batch, training: true, buffers: router.buffers });
    const { plan } = router.route({ weight: tensor(on, turned(w)) }, input);
    const [a] = plan.kind === "merge" ? plan.coefficients : [];
    if (!a) throw new Error(`a merge plan was expected, found ${plan.kind}`);
    return reshape(a, [batch, sequence, experts]);
  };
  return results(on, () => ({
    cp_output: cp("cp_factors"),
    cp_hierarchy2_output: cp("cp2_factors"),
    tr_output: tr(),
    gate_entmax15_layernorm: gate("layer"),
    gate_entmax15_batchnorm_train: gate("batch"),
  }));
};

export const mpoeFamily: Family = async (one, on) => {
  const values = given(one.inputs, "matrix"); // [in, out]
  const [inputs = 0, outputs = 0] = shapeOf(values);
  const listOf = (name: string): number[] => flat(given<Values | string>(one.config, name) as Values);
  const [widthDims, hiddenDims] = [listOf("input_dims"), listOf("output_dims")];
  const form = { widthDims, hiddenDims, central: number(one, "central_index") };
  const bond = number(one, "bond");
  const dense = {
    up: on.tensor(Float64Array.from(turned(values).flat()), [1, outputs, inputs]),
    down: on.tensor(new Float64Array(inputs * outputs), [1, inputs, outputs]),
  };
  const full = await denseToMpo(dense, { ...form, count: 1 });
  const cut = await denseToMpo(dense, { ...form, bond, count: 1 });

  const auxiliary = list(given(one.inputs, "auxiliary")).map(list);
  const count = auxiliary.length;
  const central = given(one.inputs, "shared_central");
  const places = widthDims.map((_, k) => k).filter((k) => k !== form.central);
  // The bond of each cut is the right bond of the core before it.
  const bonds = widthDims.slice(1).map((_, k) => {
    const core = k === form.central ? central : auxiliary[0]?.[places.indexOf(k)];
    return shapeOf(core ?? [])[3] ?? 0;
  });
  const found = await results(on, () => {
    /** [experts, in, out] of the operator "up". */
    const matrices = (params: Tree, more: Pick<MpoOptions, "bond" | "count">): Tensor =>
      transpose(leafOf(mpoToDense(params, { ...form, ...more }), "up"));
    const truncated = reshape(matrices(cut.params, { bond, count: 1 }), [inputs, outputs]);
    const own = places.map((k, i): [string, Tensor] => {
      const cores = auxiliary.map((cores) => tensor(on, cores[i] ?? []));
      return [
        `up${k}`,
        concat(
          cores.map((core) => reshape(core, [1, ...core.shape])),
          0,
        ),
      ];
    });
    // The other operator only has to be there.
    const other = mpo({ ...form, bond: bonds, count, engine: on, random: random(on, 0) }).params;
    const shared = { downCentral: leafOf(other, "shared.downCentral"), upCentral: tensor(on, central) };
    return {
      truncated_reconstruction: truncated,
      reconstructed_experts: matrices(
        { ...(other as object), ...Object.fromEntries(own), shared },
        { bond: bonds, count },
      ),
    };
  });
  for (const tree of [dense, full.params, cut.params]) dispose(tree);
  const [up, whole] = [report(cut, "up"), report(full, "up")];
  const sizes = { inputDims: widthDims, outputDims: hiddenDims, bond: bonds, central: form.central, experts: count };
  const { unshared, shared } = mpoParameterCount(sizes);
  return {
    ...found,
    full_bond_dims: whole.bonds,
    full_rel_error: whole.relative,
    truncated_bond_dims: up.bonds,
    first_cut_singular_values: [...(up.singularValues[0] ?? [])],
    params_unshared: unshared,
    params_shared: shared,
  };
};

export const molaeFamily: Family = async (one, on) => {
  const at = (name: string): Tensor => tensor(on, given(one.inputs, name));
  const [group, latent] = [number(one, "group_size"), number(one, "latent")];
  if (word(one, "activation") !== "silu") throw new Error(`activation ${word(one, "activation")}`);
  const dense = { up: at("w_up"), down: at("w_down") };
  const made = await denseToMoLAE(dense, { group, latent });
  const found = await results(on, () => {
    const back = molaeToDense(made.params);
    const x = at("x"); // [tokens, width]
    const [tokens = 0, width = 0] = x.shape;
    const [count = 0, hidden = 0] = shapeOf(given(one.inputs, "A_up"));
    // One latent map of each kind for all experts.
    const map = (name: string): Tensor => reshape(at(name), [1, ...shapeOf(given(one.inputs, name))]);
    const params = {
      gate: at("A_gate"),
      up: at("A_up"),
      down: at("A_down"),
      shared: { gate: map("B_gate"), up: map("B_up"), down: map("B_down") },
    };
    const experts = molae({ count, width, hidden, latent, params });
    const all = concat(new Array<Tensor>(count).fill(x), 0); // every expert on every token
    const ends = on.tensor(
      Int32Array.from({ length: count }, (_, e) => (e + 1) * tokens),
      [count],
    );
    const { output } = experts.apply(params, all, ends, { batch: 1, sequence: count * tokens, past: 0 });
    return {
      up_reconstruction: leafOf(back, "up"),
      down_reconstruction: leafOf(back, "down"),
      expert_outputs: reshape(output, [count, tokens, width]),
    };
  });
  for (const tree of [dense, made.params]) dispose(tree);
  const [up, down] = [report(made, "up"), report(made, "down")];
  return {
    ...found,
    up_singular_values: up.singularValues.map((values) => [...values]),
    down_singular_values: down.singularValues.map((values) => [...values]),
    up_rel_error: up.relative,
    down_rel_error: down.relative,
  };
};

function report<E>(made: { readonly report: Readonly<Record<string, E>> }, name: string): E {
  const found = made.report[name];
  if (!found) throw new Error(`no report of ${name}`);
  return found;
}
function leafOf(tree: Tree, path: string): Tensor {
  const found = leaves(tree).find(([name]) => name === path)?.[1];
  if (!found) throw new Error(`no "${path}" among ${leaves(tree).map(([name]) => name)}`);
  return found;
}

export const factorisedFamilies: Readonly<Record<string, Family>> = {
  mumoe: muMoEFamily,
  mpoe: mpoeFamily,
  molae: molaeFamily,
};
