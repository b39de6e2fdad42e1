// A page's calls into a dedicated worker, where the engine lives: a page's main thread must not wait for other threads, a
// worker may. Both ends: `runInWorker` in the page, `exposeInWorker` in the worker. Data crosses, tensors do not.
import { CheckpointError, MissingPackageError, ShapeError, UnsupportedError } from "@switchyard/core";

/** What a worker offers: arguments and results are data that can be copied; an argument may also be a callback. */
// `never[]`: every function is one of these, whatever its parameters.
export type WorkerFunctions = { readonly [name: string]: (...args: never[]) => unknown };

export interface WorkerCalls<F extends WorkerFunctions> {
  /**
   * Calls a function of the worker. Functions among the arguments are called back in the page as the worker calls them
   * (progress); what they return does not reach the worker. Rejects with the worker's error.
   */
  call<N extends keyof F & string>(name: N, ...args: Parameters<F[N]>): Promise<Awaited<ReturnType<F[N]>>>;
  /** Stops the worker at once; calls that are still open reject. */
  end(): void;
}

/** The part of a Worker that is used; a MessagePort has the first two as well. */
interface End {
  postMessage(message: unknown): void;
  addEventListener(type: "message", listener: (event: { readonly data: Message }) => void): void;
}
interface WorkerEnd extends End {
  addEventListener(type: "message", listener: (event: { readonly data: Message }) => void): void;
  addEventListener(type: "error" | "messageerror", listener: (event: { readonly message?: string }) => void): void;
  terminate(): void;
}

interface Failure {
  readonly name: string;
  readonly message: string;
  readonly stack?: string | undefined;
}
/** `callbacks`: the places of the arguments that are functions. */
type Message =
  | { readonly kind: "ready"; readonly names: readonly string[] }
  | {
      readonly kind: "call";
      readonly id: number;
      readonly name: string;
      readonly args: readonly unknown[];
      readonly callbacks: readonly number[];
    }
  | { readonly kind: "callback"; readonly id: number; readonly place: number; readonly args: readonly unknown[] }
  | { readonly kind: "result"; readonly id: number; readonly value: unknown }
  | { readonly kind: "failure"; readonly id: number; readonly error: Failure };

const classes = { ShapeError, UnsupportedError, CheckpointError, MissingPackageError };
const isBranded = (name: string): name is keyof typeof classes => Object.hasOwn(classes, name);

function revive({ name, message, stack }: Failure): Error {
  const error = isBranded(name) ? new classes[name](message) : Object.assign(new Error(message), { name });
  return stack === undefined ? error : Object.assign(error, { stack });
}

const unloadable =
  "its module, or one that it imports, could not be loaded (a page's import map does not reach a worker: bundle it, or import by URL)";

const isCallback = (x: unknown): x is (...args: unknown[]) => void => typeof x === "function";

/**
 * Calls into a module that runs in a dedicated worker and ends with `exposeInWorker(...)`. The `new Worker(new URL(...))`
 * stays in your code, because that is the form that bundlers look for.
 *
 * @example
 * import type { Job } from "./job.ts"; // export type Job = typeof job; exposeInWorker(job);
 * const job = runInWorker<Job>(new Worker(new URL("./job.ts", import.meta.url), { type: "module" }));
 * await job.call("train", 100, (loss) => console.log(loss));
 */
export function runInWorker<F extends WorkerFunctions>(worker: WorkerEnd): WorkerCalls<F> {
  interface Call {
    readonly args: readonly unknown[];
    resolve(value: unknown): void;
    reject(error: Error): void;
  }
  const open = new Map<number, Call>();
  let calls = 0;
  let over: Error | undefined;
  // A message sent before the worker listens could be lost: calls wait for its first one.
  let ready: (names: readonly string[]) => void;
  const started = new Promise<readonly string[]>((resolve) => {
    ready = resolve;
  });
  const close = (error: Error): void => {
    over ??= error;
    worker.terminate();
    for (const call of open.values()) call.reject(over);
    open.clear();
  };

  worker.addEventListener("message", ({ data }) => {
    switch (data.kind) {
      case "ready":
        return ready(data.names);
      case "callback": {
        const callback = open.get(data.id)?.args[data.place];
        if (isCallback(callback)) callback(...data.args);
        return;
      }
      case "result":
        open.get(data.id)?.resolve(data.value);
        open.delete(data.id);
        return;
      case "failure":
        open.get(data.id)?.reject(revive(data.error));
        open.delete(data.id);
        return;
      case "call":
        return;
      default:
        return data satisfies never;
    }
  });
  worker.addEventListener("error", ({ message }) => {
    close(new UnsupportedError(`runInWorker: the worker failed: ${message || unloadable}`));
  });
  worker.addEventListener("messageerror", () => {
    close(new UnsupportedError("runInWorker: a message of the worker could not be read"));
  });

  return {
    call<N extends keyof F & string>(name: N, ...args: Parameters<F[N]>) {
      return new Promise<Awaited<ReturnType<F[N]>>>((resolve, reject) => {
        if (over) return reject(over);
        const id = ++calls;
        open.set(id, { args, resolve: resolve as (value: unknown) => void, reject });
        started
          .then((names) => {
            if (!open.has(id)) return;
            if (!names.includes(name)) {
              throw new UnsupportedError(
                `runInWorker: the worker has no function "${name}"; it has ${names.join(", ")}`,
              );
            }
            const callbacks = args.flatMap((arg, place) => (isCallback(arg) ? [place] : []));
            const data = args.map((arg) => (isCallback(arg) ? undefined : arg));
            worker.postMessage({ kind: "call", id, name, args: data, callbacks } satisfies Message);
          })
          .catch((error: unknown) => {
            open.delete(id);
            reject(uncopied(`an argument of ${name}()`, error));
          });
      });
    },
    end: () => close(new UnsupportedError("runInWorker: the worker was ended")),
  };
}

/**
 * Offers functions to the page that started this worker; see `runInWorker`. Call it once, when the functions can be called.
 * @throws UnsupportedError on a page's main thread.
 */
export function exposeInWorker(functions: WorkerFunctions, page: End = globalThis): void {
  if (page === globalThis && typeof document !== "undefined") {
    throw new UnsupportedError("exposeInWorker: this is a page's main thread; start this module with new Worker(...)");
  }
  page.addEventListener("message", async ({ data }) => {
    if (data.kind !== "call") return;
    const { id, name, callbacks } = data;
    try {
      const args = data.args.map((arg, place) =>
        callbacks.includes(place)
          ? (...args: unknown[]) => post({ kind: "callback", id, place, args }, `what ${name}() called back with`)
          : arg,
      );
      const value = await functions[name]?.(...(args as never[]));
      post({ kind: "result", id, value }, `the result of ${name}()`);
    } catch (thrown) {
      const error = thrown instanceof Error ? thrown : new Error(String(thrown));
      page.postMessage({
        kind: "failure",
        id,
        error: { name: error.name, message: error.message, stack: error.stack },
      });
    }
  });
  const post = (message: Message, what: string): void => {
    try {
      page.postMessage(message);
    } catch (error) {
      throw uncopied(what, error);
    }
  };
  page.postMessage({ kind: "ready", names: Object.keys(functions) } satisfies Message);
}

function uncopied(what: string, error: unknown): Error {
  if (error instanceof Error && error.name !== "DataCloneError") return error;
  return new UnsupportedError(
    `runInWorker: ${what} cannot cross between page and worker; tensors stay in the worker, send what data() gives`,
    { cause: error },
  );
}
