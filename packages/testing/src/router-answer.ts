// What a router decided, read to the host and looked at: by name, as a matrix of weights, for being well formed, for
// being the same.
import { alias, leaves, type Tensor, type Tree } from "@switchyard/core";
import type { Plan, Routed } from "@switchyard/core/moe";
import { assertClose, coordinates, type HostArray } from "./arrays.ts";
import { download } from "./cases/case.ts";

/** Plan, losses, logits, probabilities, metrics, each under a name such as "plan sparse weights" or "loss balance". */
export type Answer = ReadonlyMap<string, HostArray>;

/** What the weights of one token (of one expert, for expert-choice plans) obey, as the router documents it. */
export type WeightRule =
  | "sum to 1"
  | "sum to at most 1"
  | "not negative"
  | "any"
  | ((weights: readonly number[]) => boolean);

/** The tensors of a decision, by name, so that they leave the scope together. */
export function collect(routed: Routed): Map<string, Tensor> {
  const found = new Map<string, Tensor>();
  const { plan, logits, probabilities, losses, metrics = {} } = routed;
  const put = (name: string, x: Tensor | undefined): void => {
    if (x !== undefined) found.set(name, x);
  };
  const planned = (prefix: string, one: Plan): void => {
    switch (one.kind) {
      case "sparse":
        put(`${prefix}sparse experts`, one.experts);
        put(`${prefix}sparse weights`, one.weights);
        break;
      case "dense":
        put(`${prefix}dense weights`, one.weights);
        break;
      case "expert-choice":
        put(`${prefix}expert-choice tokens`, one.tokens);
        put(`${prefix}expert-choice weights`, one.weights);
        break;
      case "slots":
        put(`${prefix}slots dispatch`, one.dispatch);
        put(`${prefix}slots combine`, one.combine);
        break;
      case "merge":
        put(`${prefix}merge groups`, one.groups);
        one.coefficients.forEach((x, i) => {
          put(`${prefix}merge coefficients ${i}`, x);
        });
        break;
      default:
        one satisfies never;
    }
  };
  planned("plan ", plan);
  for (const [i, path] of (routed.more ?? []).entries()) planned(`more ${i} `, path.plan);
  put("logits", logits);
  put("probabilities", probabilities);
  put("rows", routed.rows);
  for (const [name, loss] of Object.entries(losses)) put(`loss ${name}`, loss.value);
  for (const [name, x] of Object.entries(metrics)) put(`metric ${name}`, x);
  return found;
}

/**
 * References to the tensors of a decision that outlive the scope. A decision may hold what others own, such as a buffer
 * shown as a metric:
 * freeing a reference leaves that alone.
 */
export const answerOf = (routed: Routed): ReadonlyMap<string, Tensor> =>
  new Map([...collect(routed)].map(([name, x]) => [name, alias(x)]));

/** Reads and frees. */
export async function read(tensors: ReadonlyMap<string, Tensor>): Promise<Answer> {
  try {
    return new Map(await Promise.all([...tensors].map(async ([name, x]) => [name, await download(x)] as const)));
  } finally {
    for (const x of tensors.values()) x.dispose();
  }
}
/** The leaves of a tree by path, left alive. */
export async function readTree(tree: Tree, prefix: string): Promise<Answer> {
  return new Map(
    await Promise.all(leaves(tree).map(async ([path, x]) => [`${prefix}.${path}`, await download(x)] as const)),
  );
}

// ---------------------------------------------------------------- looking at an answer
/** One entry of an answer. */
export const array = (answer: Answer, name: string): HostArray => {
  const x = answer.get(name);
  if (x === undefined) throw new Error(`the answer has no ${name}; it has ${[...answer.keys()].join(", ")}`);
  return x;
};
const kinds: readonly Plan["kind"][] = ["sparse", "dense", "expert-choice", "slots", "merge"];
/** The kind of the main plan. */
export function kindOf(answer: Answer): Plan["kind"] {
  const found = kinds.find((kind) => [...answer.keys()].some((name) => name.startsWith(`plan ${kind} `)));
  if (found === undefined) throw new Error(`route gave no plan: ${[...answer.keys()].join(", ")}`);
  return found;
}

/**
 * The plan as a matrix of weights, [tokens, experts] (slots: dispatch and combine, merge: the coefficients of each
 * token).
 * `hits`: 1 where a token meets an expert, whatever the weight; null experts count for nobody.
 */
export function assignments(answer: Answer, tokens: number, experts: number, hits = false): HostArray {
  const kind = kindOf(answer);
  const at = (x: HostArray, i: number): number => x.data[i] ?? 0;
  const matrix = (columns: number, fill: (data: Float64Array) => void): HostArray => {
    const data = new Float64Array(tokens * columns);
    fill(data);
    return { shape: [tokens, columns], data };
  };
  switch (kind) {
    case "sparse": {
      const [ids, weights] = [array(answer, "plan sparse experts"), array(answer, "plan sparse weights")];
      const k = ids.shape[1] ?? 1;
      return matrix(experts, (data) => {
        ids.data.forEach((e, i) => {
          if (e < 0 || e >= experts) return;
          const to = Math.floor(i / k) * experts + e;
          data[to] = hits ? 1 : (data[to] ?? 0) + at(weights, i);
        });
      });
    }
    case "dense": {
      const weights = array(answer, "plan dense weights");
      // A dense plan runs every expert; what counts is where it is not zero.
      return matrix(experts, (data) => {
        for (let i = 0; i < data.length; i++) data[i] = hits ? Number(at(weights, i) !== 0) : at(weights, i);
      });
    }
    case "expert-choice": {
      const [ids, weights] = [array(answer, "plan expert-choice tokens"), array(answer, "plan expert-choice weights")];
      const capacity = ids.shape[1] ?? 1;
      return matrix(experts, (data) => {
        ids.data.forEach((token, i) => {
          if (token < 0 || token >= tokens) return;
          const to = token * experts + Math.floor(i / capacity);
          data[to] = hits ? 1 : (data[to] ?? 0) + at(weights, i);
        });
      });
    }
    case "slots": {
      const [dispatch, combine] = [array(answer, "plan slots dispatch"), array(answer, "plan slots combine")];
      const slots = dispatch.shape[2] ?? 0;
      // Interleaved, so that the columns of one expert stay together.
      return matrix(2 * slots, (data) => {
        for (let i = 0; i < tokens * slots; i++) {
          data[2 * i] = at(dispatch, i);
          data[2 * i + 1] = at(combine, i);
        }
      });
    }
    case "merge": {
      const [groups, coefficients] = [array(answer, "plan merge groups"), array(answer, "plan merge coefficients 0")];
      return matrix(experts, (data) => {
        for (let i = 0; i < data.length; i++) {
          const group = at(groups, Math.floor(i / experts));
          if (group >= 0) data[i] = at(coefficients, group * experts + (i % experts));
        }
      });
    }
    default:
      return kind satisfies never;
  }
}

/**
 * Throws unless shapes fit, numbers are finite, ids are in range and none is used twice, empty slots weigh nothing,
 * losses are one number.
 */
export function checkForm(
  answer: Answer,
  {
    experts,
    tokens,
    plans,
  }: { readonly experts: number; readonly tokens: number; readonly plans: readonly Plan["kind"][] },
): void {
  const expectShape = (name: string, shape: readonly (number | undefined)[]): HostArray => {
    const x = array(answer, name);
    if (x.shape.length !== shape.length || shape.some((n, i) => n !== undefined && n !== x.shape[i]))
      throw new Error(`${name} is [${x.shape.join(", ")}], expected [${shape.map((n) => n ?? "any").join(", ")}]`);
    return x;
  };
  for (const [name, x] of answer) {
    if (!x.data.every(Number.isFinite)) {
      const i = x.data.findIndex((value) => !Number.isFinite(value));
      // Masked experts have logits of -inf; anything else must be a number.
      if (name !== "logits" || x.data[i] !== Number.NEGATIVE_INFINITY)
        throw new Error(`${name}, entry [${coordinates(i, x.shape).join(", ")}], is ${x.data[i]}`);
    }
    if (name.startsWith("loss ") && x.shape.length !== 0)
      throw new Error(`${name} is [${x.shape.join(", ")}], expected one number, []`);
  }
  for (const name of ["logits", "probabilities"]) {
    const x = answer.get(name);
    if (x && (x.shape.length !== 2 || x.shape[0] !== tokens || (x.shape[1] ?? 0) < experts))
      throw new Error(`${name} is [${x.shape.join(", ")}], expected [${tokens}, at least ${experts}]`);
  }
  const kind = kindOf(answer);
  const nulls = ((answer.get("probabilities") ?? answer.get("logits"))?.shape[1] ?? experts) - experts;
  switch (kind) {
    case "sparse": {
      const ids = expectShape("plan sparse experts", [tokens, undefined]);
      const weights = expectShape("plan sparse weights", ids.shape);
      checkIds(ids, experts + nulls, `experts 0..${experts - 1}`);
      checkEmpty(ids, weights);
      checkDistinct(ids, experts, "token", "expert");
      break;
    }
    case "dense":
      expectShape("plan dense weights", [tokens, experts]);
      break;
    case "expert-choice": {
      const ids = expectShape("plan expert-choice tokens", [experts, undefined]);
      const weights = expectShape("plan expert-choice weights", ids.shape);
      checkIds(ids, tokens, `tokens 0..${tokens - 1}`);
      checkEmpty(ids, weights);
      checkDistinct(ids, tokens, "expert", "token");
      break;
    }
    case "slots": {
      const dispatch = expectShape("plan slots dispatch", [undefined, undefined, undefined]);
      expectShape("plan slots combine", dispatch.shape);
      if ((dispatch.shape[0] ?? 0) * (dispatch.shape[1] ?? 0) !== tokens || (dispatch.shape[2] ?? 0) % experts !== 0)
        throw new Error(`slots plan [${dispatch.shape.join(", ")}] for ${tokens} tokens and ${experts} experts`);
      break;
    }
    case "merge": {
      const groups = expectShape("plan merge groups", [tokens]);
      const coefficients = expectShape("plan merge coefficients 0", [undefined, experts]);
      checkIds(groups, coefficients.shape[0] ?? 0, `groups 0..${(coefficients.shape[0] ?? 0) - 1}`);
      break;
    }
    default:
      kind satisfies never;
  }
  if (!plans.includes(kind)) throw new Error(`a "${kind}" plan, the plugin declares ${plans.join(", ")}`);
}
function checkIds(ids: HostArray, count: number, what: string): void {
  if (!(ids.data instanceof Int32Array)) throw new Error("ids must be i32");
  const i = ids.data.findIndex((id) => id < -1 || id >= count);
  if (i >= 0)
    throw new Error(`id ${ids.data[i]} at [${coordinates(i, ids.shape).join(", ")}] is neither -1 nor one of ${what}`);
}
function checkEmpty(ids: HostArray, weights: HostArray): void {
  const i = ids.data.findIndex((id, slot) => id === -1 && weights.data[slot] !== 0);
  if (i >= 0)
    throw new Error(
      `the empty slot [${coordinates(i, ids.shape).join(", ")}] has weight ${weights.data[i]}, expected 0`,
    );
}
function checkDistinct(ids: HostArray, below: number, owner: string, chosen: string): void {
  const [rows = 0, k = 0] = ids.shape;
  for (let row = 0; row < rows; row++) {
    const own = [...ids.data.subarray(row * k, (row + 1) * k)].filter((id) => id >= 0 && id < below);
    if (new Set(own).size !== own.length)
      throw new Error(`${owner} ${row} has one ${chosen} twice: [${own.join(", ")}]`);
  }
}

/** The weights that belong together by row of the plan, empty slots left out. */
export function weightRows(answer: Answer): number[][] {
  const kind = kindOf(answer);
  const rows = (x: HostArray, keep: (i: number) => boolean): number[][] => {
    const width = x.shape.at(-1) ?? 1;
    return Array.from({ length: width === 0 ? 0 : x.data.length / width }, (_, row) =>
      [...x.data.subarray(row * width, (row + 1) * width)].filter((_, j) => keep(row * width + j)),
    );
  };
  if (kind === "sparse") {
    const ids = array(answer, "plan sparse experts");
    return rows(array(answer, "plan sparse weights"), (i) => (ids.data[i] ?? -1) >= 0);
  }
  if (kind === "expert-choice") {
    const ids = array(answer, "plan expert-choice tokens");
    return rows(array(answer, "plan expert-choice weights"), (i) => (ids.data[i] ?? -1) >= 0);
  }
  const name = { dense: "plan dense weights", slots: "plan slots combine", merge: "plan merge coefficients 0" }[kind];
  return rows(array(answer, name), () => true);
}
/** Whether the weights of one row keep the rule. */
export function obeys(rule: WeightRule, weights: readonly number[]): boolean {
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  const positive = weights.every((weight) => weight >= 0);
  switch (rule) {
    case "sum to 1":
      return positive && Math.abs(total - 1) < 1e-5;
    case "sum to at most 1":
      return positive && total < 1 + 1e-5;
    case "not negative":
      return positive;
    case "any":
      return true;
    default:
      return rule(weights);
  }
}

/** Throws where two answers differ at all. */
export function sameBits(a: Answer, b: Answer, what: string): void {
  for (const [name, x] of a) assertClose(`${what}: ${name}`, array(b, name), x, { absolute: 0, relative: 0 });
  for (const name of b.keys()) array(a, name);
}
/** The same for plans and losses only: logits of padding may differ. */
export function samePlanAndLosses(a: Answer, b: Answer, what: string): void {
  const kept = (answer: Answer): Answer =>
    new Map(
      [...answer].filter(([name]) => name.startsWith("plan ") || name.startsWith("more ") || name.startsWith("loss ")),
    );
  sameBits(kept(a), kept(b), what);
}

/** x with every axis of `count` entries reordered (or only axis `only`): entry e moves to order[e]. */
export function permuted(x: HostArray, count: number, order: readonly number[], only?: number): HostArray {
  const data = x.data.slice();
  for (let i = 0; i < data.length; i++) {
    const index = coordinates(i, x.shape).map((position, axis) => {
      const moves = only === undefined ? x.shape[axis] === count : axis === only;
      return moves ? (order[position] ?? 0) : position;
    });
    data[index.reduce((flat, position, axis) => flat * (x.shape[axis] ?? 1) + position, 0)] = x.data[i] ?? 0;
  }
  return { shape: x.shape, data };
}
