// A bound on the time of code that came with a file: a regular expression may go through all ways of matching a text, for years. Node only.
type Vm = typeof import("node:vm");

interface Sandbox {
  act?: (() => void) | undefined;
}

let ready:
  | { readonly script: InstanceType<Vm["Script"]>; readonly context: ReturnType<Vm["createContext"]> & Sandbox }
  | undefined;

/** The engine's own watch, which also ends what runs inside a regular expression. Undefined outside Node, and before 22.3. */
function watched(): typeof ready {
  if (ready) return ready;
  const vm = globalThis.process?.getBuiltinModule?.("node:vm");
  if (!vm) return undefined;
  const sandbox: Sandbox = {};
  ready = { script: new vm.Script("act()"), context: vm.createContext(sandbox) };
  return ready;
}

/**
 * What `act` gives, which must not be a promise. Where it has not ended after so many milliseconds it is cut off, and `late` makes the
 * error that is thrown. In browsers there is no such bound.
 */
export function withinTime<T>(milliseconds: number, act: () => T, late: () => Error): T {
  const watch = watched();
  if (!watch) return act();
  const { script, context } = watch;
  const found: T[] = [];
  context.act = () => {
    found.push(act());
  };
  try {
    script.runInContext(context, { timeout: milliseconds });
  } catch (error) {
    // It may be an error of the context, whose class is another one.
    const isObject = typeof error === "object" && error !== null;
    if (isObject && "code" in error && error.code === "ERR_SCRIPT_EXECUTION_TIMEOUT") throw late();
    throw error;
  } finally {
    context.act = undefined;
  }
  return found[0] as T;
}
