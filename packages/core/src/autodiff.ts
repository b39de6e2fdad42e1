// Reverse-mode differentiation as a decorator of `run`: it records a graph of ops and walks it back. Decorators nest, so
// gradients of gradients are autodiff(autodiff(engine)).

import { consume, type Decorator, decorator, type Wrapped } from "./decorator.ts";
import type { Engine } from "./engine.ts";
import { alias } from "./engine.ts";
import { ShapeError, UnsupportedError } from "./errors.ts";
import { at, type Op, run1 } from "./op.ts";
import { add, mul, stopGradient } from "./ops/elementwise.ts";
import { sum } from "./ops/reduce.ts";
import { full } from "./ops/shape.ts";
import { register, release, runScope } from "./scope.ts";
import { leaves, mapTree, Stored, show, type Tensor, type Tree } from "./tensor.ts";

/** One recorded op. It keeps its inputs and results alive until no tensor that depends on it is left. */
interface Node {
  readonly id: number;
  // biome-ignore lint/suspicious/noExplicitAny: the graph holds ops of every attribute type
  readonly op: Op<any>;
  readonly attrs: unknown;
  readonly inputs: readonly Tensor[];
  readonly results: readonly Tensor[];
  users: number;
}
interface Recorded extends Wrapped {
  readonly node?: Node;
  readonly result: number;
  /** Whether a gradient can flow into it. */
  readonly tracked: boolean;
}

const decorators = new WeakMap<Engine, Decorator<Recorded>>();

/** An engine that records what it runs, so that `grad` can differentiate it. Tensors made on it, and `watch`ed ones, are leaves. */
export function autodiff(inner: Engine): Engine {
  let ids = 0;
  const drain: Node[] = [];
  let draining = false;
  // Iterative: a recursive release of a long chain would overflow the stack.
  const drop = (node: Node): void => {
    if (--node.users > 0) return;
    drain.push(node);
    if (draining) return;
    draining = true;
    for (let next = drain.pop(); next; next = drain.pop()) {
      for (const x of next.inputs) x.dispose();
      for (const y of next.results) y.dispose();
    }
    draining = false;
  };

  const level = decorator<Recorded>(
    "autodiff",
    inner,
    () => self,
    (x) => ({ inner: x, result: 0, tracked: x.dtype === "f32" }),
    (content) => content.node && drop(content.node),
  );

  const self: Engine = {
    ...level.members,
    run(op, inputs, attrs) {
      const contents = inputs.map((x) => level.content(x, op.name));
      const lowered = inputs.map((x, i) => contents[i]?.inner ?? x);
      const tracked = contents.some((content) => content?.tracked);
      let results: readonly Tensor[];
      if (tracked && op.vjp === undefined && op.fallback) {
        const composite = op.fallback;
        const plain = inputs.map((x) => (x instanceof Stored && x.given ? x.another() : x));
        results = runScope(inner.scopes, () => composite(plain, attrs)).map((y) =>
          plain.some((x) => x === y) ? aliasInScope(y) : y,
        );
        plain.forEach((x, i) => {
          if (x !== inputs[i]) x.dispose();
        });
      } else {
        const ys = inner.run(op, lowered, attrs);
        const recorded = tracked && op.vjp !== undefined && ys.some((y) => y.dtype === "f32");
        if (!recorded) {
          results = ys.map((y) => level.wrap({ inner: aliasIfInput(y, lowered), result: 0, tracked: false }));
        } else {
          const node: Node = {
            id: ids++,
            op,
            attrs,
            inputs: inputs.map((x) => release(alias(x))),
            results: ys.map((y) => release(alias(y))),
            users: ys.length,
          };
          results = ys.map((y, result) =>
            level.wrap({ inner: aliasIfInput(y, lowered), node, result, tracked: y.dtype === "f32" }),
          );
        }
      }
      consume(inputs);
      return results;
    },
  };
  decorators.set(self, level);
  return self;
}

const aliasInScope = (x: Tensor): Tensor => {
  const y = alias(x);
  return y instanceof Stored ? register(x.engine.scopes, y) : y;
};
const aliasIfInput = (y: Tensor, inputs: readonly Tensor[]): Tensor => (inputs.includes(y) ? alias(y) : y);

/** Leaves on the autodiff engine `on` that share the storage of an inner engine's tensors: the parameters of one step. */
export function watch<T extends Tree>(on: Engine, tree: T): T {
  const level = levelOf(on, "watch");
  return mapTree(tree, (x) =>
    level.wrap({ inner: alias(level.lower(x, "watch")), result: 0, tracked: x.dtype === "f32" }),
  );
}

/** The tensors one engine further in (values without their history), sharing storage. */
export function lower<T extends Tree>(tree: T): T {
  return mapTree(tree, (x) => aliasInScope(decorators.get(x.engine)?.lower(x, "lower") ?? x));
}

function levelOf(on: Engine, what: string): Decorator<Recorded> {
  const level = decorators.get(on);
  if (!level) throw new UnsupportedError(`${what}: ${on.name} does not record gradients; make it autodiff(${on.name})`);
  return level;
}

/**
 * Gradients of a scalar with respect to every leaf of `params`, as tensors of the inner engine (a zero tensor where the loss
 * does not depend on a leaf). `params` must live on the loss's engine. Throws ShapeError when the loss is not one number.
 */
export function grad<P extends Tree>(loss: Tensor, params: P): P {
  const level = levelOf(loss.engine, "grad");
  if (loss.size !== 1)
    throw new ShapeError(`grad: the loss must be one number, it is ${show(loss)}; sum or average it first`);
  const scopes = loss.engine.scopes;
  const contentOf = (x: Tensor): Recorded | undefined => level.content(x, "grad");

  const targets = new Set<Recorded>();
  for (const [path, leaf] of leaves(params)) {
    const content = contentOf(leaf);
    if (!content) {
      throw new UnsupportedError(
        `grad: parameter "${path}" lives on ${leaf.engine.name}, not on ${loss.engine.name}; watch() it first`,
      );
    }
    targets.add(content);
  }

  const targetNodes = new Set([...targets].map((content) => content.node));

  // Nodes between the loss and the parameters, in the order they ran.
  const reachable = new Map<number, Node>();
  const open: Recorded[] = [];
  const root = contentOf(loss);
  if (root) open.push(root);
  for (let content = open.pop(); content; content = open.pop()) {
    const node = content.node;
    if (!node || reachable.has(node.id)) continue;
    reachable.set(node.id, node);
    for (const x of node.inputs) {
      const below = contentOf(x);
      if (below) open.push(below);
    }
  }
  const nodes = [...reachable.values()].sort((a, b) => a.id - b.id);
  const needed = new Set<Node>();
  const needs = (x: Tensor): boolean => {
    const content = contentOf(x);
    return (
      content?.tracked === true && (targets.has(content) || (content.node !== undefined && needed.has(content.node)))
    );
  };
  for (const node of nodes) if (node.inputs.some(needs)) needed.add(node);

  // Keyed by (node, result) for results of ops, by content for leaves; entries belong to no scope.
  const ofNode = new Map<Node, (Tensor | undefined)[]>();
  const ofLeaf = new Map<Recorded, Tensor>();
  const slot = (content: Recorded): { get(): Tensor | undefined; set(x: Tensor): void } => {
    const node = content.node;
    if (!node) return { get: () => ofLeaf.get(content), set: (x) => void ofLeaf.set(content, x) };
    const list = ofNode.get(node) ?? [];
    ofNode.set(node, list);
    return {
      get: () => list[content.result],
      set: (x) => {
        list[content.result] = x;
      },
    };
  };
  const accumulate = (content: Recorded, gradient: Tensor): void => {
    const entry = slot(content);
    const before = entry.get();
    if (!before) {
      entry.set(gradient);
      return;
    }
    const sum = release(add(before.engine.give(before), gradient));
    gradient.dispose();
    entry.set(sum);
  };

  return runScope(scopes, () => {
    try {
      if (root) accumulate(root, release(full(level.lower(loss, "grad"), loss.shape, 1)));
      for (const node of nodes.reverse()) {
        const dys = ofNode.get(node);
        if (!dys || !needed.has(node)) continue;
        const wanted = node.inputs.map(needs);
        const vjp = node.op.vjp;
        if (!vjp) continue;
        const gradients = runScope(scopes, () =>
          vjp(
            node.results.map((_, i) => dys[i]),
            node.inputs.map((x) => level.lower(x, node.op.name)),
            node.results,
            node.attrs,
            wanted,
          ).map((dx, i) => (dx && wanted[i] ? alias(dx) : undefined)),
        );
        gradients.forEach((dx, i) => {
          const content = dx && contentOf(at(node.inputs, i));
          if (!content) return;
          if (dx.size !== content.inner.size) {
            throw new ShapeError(`gradient of ${node.op.name}, input ${i}: ${show(dx)} for ${show(content.inner)}`);
          }
          accumulate(content, dx);
        });
        // A parameter may itself be the result of an op; its gradient is still wanted below.
        dys.forEach((dy, i) => {
          if (dy && !(targetNodes.has(node) && [...targets].some((t) => t.node === node && t.result === i))) {
            dy.dispose();
            dys[i] = undefined;
          }
        });
      }
      return mapTree(params, (leaf) => {
        const content = contentOf(leaf);
        const found = content && slot(content).get();
        return found ? aliasInScope(found) : full(level.lower(leaf, "grad"), leaf.shape, 0);
      });
    } finally {
      for (const list of ofNode.values()) for (const x of list) x?.dispose();
      for (const x of ofLeaf.values()) x.dispose();
    }
  });
}

/**
 * Value and gradients of `f` at `params`, which live on any engine: `f` gets them as leaves of an autodiff engine around it and returns
 * the loss and, beside it, anything else wanted from the forward pass. Everything else is freed.
 */
export function valueAndGrad<P extends Tree, A extends Tree>(
  f: (params: P) => readonly [loss: Tensor, aux: A],
  params: P,
): { readonly value: Tensor; readonly aux: A; readonly grads: P } {
  const inner = leaves(params)[0]?.[1].engine;
  if (!inner) throw new ShapeError("valueAndGrad: params has no tensors");
  return inner.scope(() => {
    const watched = watch(autodiff(inner), params);
    const [loss, aux] = f(watched);
    return { value: lower(loss), aux: lower(aux), grads: grad(loss, watched) };
  });
}

/** An op with a gradient of your own: `forward` gives the value, `backward` the gradients of the inputs. */
export function customGrad(
  inputs: readonly Tensor[],
  forward: (...inputs: Tensor[]) => Tensor,
  backward: (dy: Tensor, inputs: readonly Tensor[], y: Tensor) => readonly (Tensor | undefined)[],
): Tensor {
  const op: Op = {
    name: "customGrad",
    shapes: () => [],
    fallback: (xs) => [forward(...xs)],
    vjp: ([dy], xs, [y]) => (dy && y ? backward(dy, xs, y) : []),
  };
  let top = at(inputs, 0).engine;
  for (const x of inputs) if (x.engine.level > top.level) top = x.engine;
  return at(top.run(op, inputs, {}), 0);
}

/**
 * `f` of the inputs, whose intermediate tensors are not kept for the gradient: `f` runs once more on the way back (1604.06174). It must
 * depend on tensors that are trained through its inputs only; gradients flow into all of them that are f32.
 */
export function recomputed(inputs: readonly Tensor[], f: (...inputs: Tensor[]) => Tensor): Tensor {
  const op: Op = {
    name: "recomputed",
    shapes: () => [],
    fallback: (xs) => [f(...xs)],
    vjp: (dys, xs) => vjpOfFallback(op, dys, xs, {}),
  };
  return run1(op, inputs, {});
}

/** The value of `value` with the gradient of `surrogate` (VQ, rounding, hard choices). Both have one shape. */
export function straightThrough(value: Tensor, surrogate: Tensor): Tensor {
  if (value.shape.join() !== surrogate.shape.join()) {
    throw new ShapeError(`straightThrough: ${show(value)} and ${show(surrogate)} differ`);
  }
  return customGrad(
    [stopGradient(value), surrogate],
    (x) => x,
    (dy) => [undefined, dy],
  );
}

/** Gradients of an op through its fallback, for vjps that meet a rare case their own formula leaves out. */
export function vjpOfFallback<A>(
  op: Op<A>,
  dys: readonly (Tensor | undefined)[],
  inputs: readonly Tensor[],
  attrs: A,
): readonly (Tensor | undefined)[] {
  const composite = op.fallback;
  if (!composite) throw new UnsupportedError(`${op.name}: no fallback to differentiate`);
  let top = at(inputs, 0).engine;
  for (const x of inputs) if (x.engine.level > top.level) top = x.engine;
  const outer = autodiff(top);
  return runScope(top.scopes, () => {
    const watched = inputs.map((x) => (x.dtype === "f32" ? watch(outer, x) : x));
    let total: Tensor | undefined;
    composite(watched, attrs).forEach((y, i) => {
      const dy = dys[i];
      if (!dy) return;
      const part = sum(mul(y, dy));
      total = total ? add(total, part) : part;
    });
    if (!total) return inputs.map(() => undefined);
    const gradients = grad(
      total,
      watched.filter((x) => x.engine === outer),
    );
    let next = 0;
    return watched.map((x) => (x.engine === outer ? gradients[next++] : undefined));
  });
}
