// Finding leaves of parameter trees by path, and tensors in any plain record.
import { isTensor, ShapeError, type Tensor, type Tree } from "@switchyard/core";

/** The part of a tree at a path; throws ShapeError that names the path. */
export function branch(tree: Tree, ...path: readonly (string | number)[]): Tree {
  let at: Tree | undefined = tree;
  for (const key of path) {
    at = at === undefined || isTensor(at) || !Object.hasOwn(at, key) ? undefined : (at as { [key: string]: Tree })[key];
  }
  if (at === undefined) throw new ShapeError(`the parameters lack "${path.join(".")}"; are they of another model?`);
  return at;
}

/** The tensor at a path; throws ShapeError that names the path. */
export function leaf(tree: Tree, ...path: readonly (string | number)[]): Tensor {
  const found = branch(tree, ...path);
  if (!isTensor(found)) throw new ShapeError(`the parameters hold no tensor at "${path.join(".")}"`);
  return found;
}

/** Every tensor in a plain record (a Routed, for example), each once. */
export function tensorsIn(value: unknown, found: Set<Tensor> = new Set()): Set<Tensor> {
  if (isTensor(value)) found.add(value);
  else if (Array.isArray(value)) for (const item of value) tensorsIn(item, found);
  else if (typeof value === "object" && value !== null && Object.getPrototypeOf(value) === Object.prototype) {
    for (const item of Object.values(value)) tensorsIn(item, found);
  }
  return found;
}
