// Scopes free what was made inside them, except what they return. One stack of frames per backend, shared by its decorators.
import { type Frame, type Scoped, type Scopes, Stored } from "./tensor.ts";

/** Puts a new tensor under the care of the innermost open scope, if there is one. */
export function register<T extends Scoped>(scopes: Scopes, x: T): T {
  const frame = scopes.frames.at(-1);
  frame?.add(x);
  x.frame = frame;
  return x;
}

/** Takes a tensor out of its scope: whoever calls this must dispose it. */
export function release<T>(x: T): T {
  if (x instanceof Stored) {
    x.frame?.delete(x);
    x.frame = undefined;
  }
  return x;
}

export function runScope<R>(scopes: Scopes, body: () => R): R {
  const frame = new Set<Scoped>();
  scopes.frames.push(frame);
  let result: R;
  try {
    result = body();
    if (result instanceof Promise) throw new TypeError("scope: the body must be synchronous; await outside the scope");
  } catch (error) {
    scopes.frames.pop();
    for (const x of [...frame]) x.dispose();
    throw error;
  }
  scopes.frames.pop();
  keep(result, frame, scopes.frames.at(-1), new Set());
  // Each one leaves the frame as it goes, which walking a Set allows.
  for (const x of frame) x.dispose();
  return result;
}

/** Moves every tensor reachable from `value` through plain records, lists and maps out of `frame` into `parent`. */
function keep(value: unknown, frame: Frame, parent: Frame | undefined, seen: Set<object>): void {
  if (typeof value !== "object" || value === null || seen.has(value)) return;
  seen.add(value);
  if (value instanceof Stored) {
    if (frame.delete(value)) {
      value.frame = parent;
      parent?.add(value);
    }
  } else if (value instanceof Map) {
    for (const item of value.values()) keep(item, frame, parent, seen);
  } else if (Array.isArray(value)) {
    for (const item of value) keep(item, frame, parent, seen);
  } else if (isRecord(value)) {
    for (const item of Object.values(value)) keep(item, frame, parent, seen);
  }
}

const isRecord = (value: object): boolean => {
  const prototype = Object.getPrototypeOf(value);
  return prototype === Object.prototype || prototype === null;
};
