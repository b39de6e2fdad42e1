// What engine decorators share: tensors that hold an inner tensor, and the members of Engine that only pass through.
import type { Spec, TypedArray } from "./backend.ts";
import { checkData, dtypeOf, type Engine } from "./engine.ts";
import { UnsupportedError } from "./errors.ts";
import { register, release, runScope } from "./scope.ts";
import { gone, Stored, show, type Tensor } from "./tensor.ts";

/** What a decorated tensor holds; a decorator may keep more beside the inner tensor. */
export interface Wrapped {
  readonly inner: Tensor;
}

export interface Decorator<C extends Wrapped> {
  /** The members of Engine but `run`. */
  readonly members: Omit<Engine, "run">;
  /** Makes a tensor of this level from an inner one; the new tensor takes the inner one over. */
  wrap(content: C): Tensor;
  /** This level's content of x; undefined when x lives on an inner engine. Throws for a stranger. */
  content(x: Tensor, op: string): C | undefined;
  /** The tensor one level in. */
  lower(x: Tensor, op: string): Tensor;
}

/** `self` is read late, so that it may be the object that spreads `members`. */
export function decorator<C extends Wrapped>(
  name: string,
  inner: Engine,
  self: () => Engine,
  make: (inner: Tensor) => C,
  free?: (content: C) => void,
): Decorator<C> {
  const device = {
    free(content: C): void {
      content.inner.dispose();
      free?.(content);
    },
    read: (x: Stored<C>): Promise<TypedArray> => x.storage.content.inner.data(),
  };
  const wrap = (content: C): Tensor => {
    release(content.inner);
    return register(inner.scopes, new Stored<C>(self(), content.inner, { count: 0, content }, device));
  };
  const content = (x: Tensor, op: string): C | undefined => {
    if (x.engine === self() && x instanceof Stored) {
      if (!x.alive) throw new Error(`${op}: ${gone(x)}`);
      return x.storage.content as C;
    }
    if (x.engine.level >= self().level || x.engine.root !== inner.root) {
      throw new UnsupportedError(
        `${op}: ${show(x)} belongs to engine ${x.engine.name}, another one than ${self().name}; use one engine for both`,
      );
    }
    return undefined;
  };
  return {
    wrap,
    content,
    lower: (x, op) => content(x, op)?.inner ?? x,
    members: {
      name: `${name}(${inner.name})`,
      level: inner.level + 1,
      root: inner.root,
      canBlock: inner.canBlock,
      scopes: inner.scopes,
      tensor(data, shape, dtype = dtypeOf(data)) {
        checkData(data, shape);
        return wrap(make(inner.tensor(data, shape, dtype)));
      },
      scope: (body) => runScope(inner.scopes, body) as never,
      read: (x) => inner.read(content(x, "read")?.inner ?? x),
      give(x) {
        content(x, "give");
        if (!(x instanceof Stored)) return x;
        const gift = register(inner.scopes, x.another());
        gift.given = true;
        x.dispose();
        return gift;
      },
      explain: (op, inputs: readonly Spec[], attrs) => inner.explain(op, inputs, attrs),
      live: () => inner.live(),
    },
  };
}

/** After an op ran: inputs that were given away are gone. */
export function consume(inputs: readonly Tensor[]): void {
  for (const x of inputs) if (x instanceof Stored && x.given) x.dispose();
}
