// OMoE (2310.09762): experts are kept apart by updating each one only in directions that the inputs of the others do not
// span. Per expert and weight matrix an orthogonal projector away from the inputs seen so far (OWM, 1810.01256):
//   P = I - A (AᵀA + αI)⁻¹ Aᵀ, kept by  κ = P x / (α + xᵀP x),  P ← P - κ (xᵀP),  x the mean routed input of a step
// accumulating phase: ordinary steps that update P; orthogonal phase: G_e ← G_e · mean_{j≠e} P_j  (G is [out, in]).
import { ShapeError, UnsupportedError } from "../../errors.ts";
import type { TrainingHook } from "../../moe/plan.ts";
import { add, div, maximum, mul, sqrt, square, sub, where } from "../../ops/elementwise.ts";
import { blockSizes, groupedOuter } from "../../ops/experts.ts";
import { matmul } from "../../ops/matmul.ts";
import { sum, sumLast } from "../../ops/reduce.ts";
import { takeRows, topkIndices } from "../../ops/rows.ts";
import { concat, full, hostConstant, reshape } from "../../ops/shape.ts";
import { show, type Tensor } from "../../tensor.ts";

export interface OmoeOptions {
  /** Steps of each accumulating phase, from 1; default 5. */
  readonly accumulating?: number;
  /** Steps of the orthogonal phase that follows, from 1; default 1. */
  readonly orthogonal?: number;
  /** α, above 0: the larger, the more a direction must be seen before it is closed; default 1e-3. */
  readonly alpha?: number;
  /**
   * Keeps at most this many directions per expert instead of a projector: memory experts * rank * in instead of
   * experts * in². Exact up to that many accumulating steps; then the weakest direction is dropped. Default: projectors.
   */
  readonly rank?: number;
  /** Which of the observed matrices; default all but those that experts share, which are no expert's own. */
  matches?(parameter: string): boolean;
}

/**
 * The hook of OMoE: works with any router, and with experts whose matrices are `[experts, out, in]` and observed (glu,
 * ffn). The task must hand `info.observe` on. The state holds what each matrix's projectors are, so a resumed run goes
 * on bit for bit. An expert without a token in a step keeps its projector; a single expert trains as usual.
 *
 * @throws ShapeError for options out of range, or when an observed matrix is not `[experts, out, in]`.
 * @throws UnsupportedError in the first orthogonal step when nothing was observed.
 * @example trainer(engine, task, { optimiser: adamw(), hooks: [omoe()] })
 */
export function omoe(options: OmoeOptions = {}): TrainingHook {
  const { accumulating = 5, orthogonal = 1, alpha = 1e-3, rank, matches = ownMatrix } = options;
  for (const [name, n] of Object.entries({ accumulating, orthogonal, rank: rank ?? 1 })) {
    if (!Number.isInteger(n) || n < 1) throw new ShapeError(`omoe: ${name} = ${n}; expected a whole number from 1`);
  }
  checkAlpha(alpha);

  let projecting = false;
  const stateOf = (): State => (hook.state ?? {}) as State;
  const hook: TrainingHook = {
    name: "omoe",
    beforeStep({ step }) {
      projecting = step % (accumulating + orthogonal) >= accumulating;
      const { known } = stateOf();
      if (projecting && known === undefined) {
        throw new UnsupportedError(
          `omoe: step ${step} opens the orthogonal phase, and no expert matrix was observed in the steps before; ` +
            "the task must pass info.observe to moe(), and `matches` must accept a matrix",
        );
      }
      // What a step observed and did not use, because the matrix is frozen, is not part of the next one.
      if (known) hook.state = { known };
      else delete hook.state;
      return {};
    },
    observe(parameter, _, rows, ends) {
      if (projecting || !matches(parameter)) return;
      const { known, seen = {} } = stateOf();
      const before = seen[parameter];
      const now = rows.engine.scope(() => {
        const ones = full(rows, [rows.shape[0] ?? 0, 1], 1);
        const found = { total: groupedOuter(ones, rows, ends), count: blockSizes(ends) };
        return before ? { total: add(before.total, found.total), count: add(before.count, found.count) } : found;
      });
      hook.state = { ...(known ? { known } : {}), seen: { ...seen, [parameter]: now } };
    },
    transformGradient(parameter, gradient) {
      const { known = {}, seen = {} } = stateOf();
      const own = known[parameter];
      if (projecting) {
        if (own === undefined) return gradient;
        return rank === undefined ? projectGradient(gradient, own) : projectByFactors(gradient, own);
      }
      const { [parameter]: found, ...others } = seen;
      if (found === undefined) return gradient;
      const updated = gradient.engine.scope(() => {
        const [experts = 0, , inner = 0] = found.total.shape;
        checkMatrix(parameter, gradient, experts, inner);
        const inputs = div(found.total, maximum(reshape(found.count, [experts, 1, 1]), 1)); // [experts, 1, in]
        if (rank === undefined) return updateProjectors(own ?? identities(gradient, experts, inner), inputs, alpha);
        return updateFactors(own ?? full(gradient, [experts, rank, inner], 0), inputs, alpha);
      });
      hook.state = {
        known: { ...known, [parameter]: updated },
        ...(Object.keys(others).length ? { seen: others } : {}),
      };
      return gradient;
    },
  };
  return hook;
}

const ownMatrix = (parameter: string): boolean => !parameter.split(".").includes("shared");

interface State {
  /** By parameter: projectors `[experts, in, in]`, or with `rank` their factors `[experts, rank, in]`. */
  readonly known?: { readonly [parameter: string]: Tensor };
  /** Within an accumulating step: sums of the inputs `[experts, 1, in]` and their numbers `[experts]`. */
  readonly seen?: { readonly [parameter: string]: { readonly total: Tensor; readonly count: Tensor } };
}

/**
 * Closes one direction per expert: `projectors [experts, in, in]`, `inputs [experts, 1, in]` -> projectors. An input of
 * zeros changes nothing. The result stays symmetric with eigenvalues in 0..1.
 */
export function updateProjectors(projectors: Tensor, inputs: Tensor, alpha: number): Tensor {
  checkAlpha(alpha);
  const px = matmul(inputs, projectors); // [experts, 1, in]: xᵀP = (P x)ᵀ
  const reach = add(sumLast(mul(px, inputs)), alpha); // [experts, 1, 1]
  return sub(projectors, matmul(div(px, reach), px, { transposeA: true }));
}

/** mean_{j≠e} P_j for every e: `[experts, in, in]`; of a single expert, which has no others, the identity. */
export function otherProjectors(projectors: Tensor): Tensor {
  const [experts = 0, inner = 0] = projectors.shape;
  if (experts < 2) return identities(projectors, experts, inner);
  return mul(sub(sum(projectors, [0]), projectors), 1 / (experts - 1));
}

/** G_e · mean_{j≠e} P_j: `gradient [experts, out, in]`, `projectors [experts, in, in]`. */
export function projectGradient(gradient: Tensor, projectors: Tensor): Tensor {
  checkMatrix("the gradient", gradient, projectors.shape[0] ?? 0, projectors.shape[2] ?? 0);
  return gradient.engine.scope(() => matmul(gradient, otherProjectors(projectors)));
}

/**
 * `updateProjectors` for P = I - FᵀF with `factors [experts, rank, in]`, zeros at first: the row P x / sqrt(α + xᵀP x)
 * joins, and the shortest of the rank + 1 rows goes. Dropping one leaves P between the exact projector and the identity.
 */
export function updateFactors(factors: Tensor, inputs: Tensor, alpha: number): Tensor {
  checkAlpha(alpha);
  const [experts = 0, rank = 0, inner = 0] = factors.shape;
  const px = sub(inputs, matmul(matmul(inputs, factors, { transposeB: true }), factors)); // [experts, 1, in]
  const joining = div(px, sqrt(add(sumLast(mul(px, inputs)), alpha)));
  const rows = concat([factors, joining], 1); // [experts, rank + 1, in]
  const lengths = reshape(sumLast(square(rows)), [experts, rank + 1]);
  const first = hostConstant(
    factors,
    Int32Array.from({ length: experts }, (_, e) => e * (rank + 1)),
    [experts, 1],
  );
  const kept = add(topkIndices(lengths, rank), first); // [experts, rank]
  return takeRows(reshape(rows, [experts * (rank + 1), inner]), kept);
}

/** `projectGradient` for P = I - FᵀF, without building any P: `factors [experts, rank, in]`. */
export function projectByFactors(gradient: Tensor, factors: Tensor): Tensor {
  const [experts = 0, rank = 0, inner = 0] = factors.shape;
  checkMatrix("the gradient", gradient, experts, inner);
  if (experts < 2) return gradient;
  const out = gradient.shape[1] ?? 0;
  return gradient.engine.scope(() => {
    const every = reshape(factors, [experts * rank, inner]);
    const along = matmul(reshape(gradient, [experts * out, inner]), every, { transposeB: true });
    const parts = reshape(along, [experts, out, experts, rank]);
    // [experts, 1, experts, 1]: 1 where the direction is another expert's
    const foreign = hostConstant(
      gradient,
      Float32Array.from({ length: experts * experts }, (_, i) => Number(Math.floor(i / experts) !== i % experts)),
      [experts, 1, experts, 1],
    );
    const kept = reshape(where(foreign, parts, 0), [experts * out, experts * rank]);
    return sub(gradient, mul(reshape(matmul(kept, every), gradient.shape), 1 / (experts - 1)));
  });
}

function identities(like: Tensor, experts: number, n: number): Tensor {
  const data = Float32Array.from({ length: experts * n * n }, (_, i) => Number((i % (n * n)) % (n + 1) === 0));
  return hostConstant(like, data, [experts, n, n]);
}

function checkAlpha(alpha: number): void {
  if (!(alpha > 0) || !Number.isFinite(alpha))
    throw new ShapeError(`omoe: alpha = ${alpha}; expected a finite number above 0`);
}

function checkMatrix(name: string, gradient: Tensor, experts: number, inner: number): void {
  const { shape } = gradient;
  if (shape.length === 3 && shape[0] === experts && shape[2] === inner) return;
  throw new ShapeError(
    `omoe: ${name} is ${show(gradient)}, its inputs are those of [${experts}, out, ${inner}]; ` +
      "leave it out with `matches`",
  );
}
