// Both ends over a MessageChannel, which copies messages as a worker does; the real worker is in test/browser.
import { ShapeError, UnsupportedError } from "@switchyard/core";
import { describe, expect, it } from "vitest";
import { exposeInWorker, runInWorker, type WorkerCalls, type WorkerFunctions } from "./run-in-worker.ts";

const ignore = (): void => undefined;
/** Like a tensor: it has a method. */
const notData = { dispose: ignore };

const job = {
  add: (a: number, b: number): number => a + b,
  async double(x: Float32Array): Promise<Float32Array> {
    return x.map((v) => 2 * v);
  },
  count(to: number, onStep: (i: number, text: string) => void): string {
    for (let i = 0; i < to; i++) onStep(i, `step ${i}`);
    return "done";
  },
  refuse(): never {
    throw new ShapeError("sizes differ: [2] x [3]");
  },
  other: () => Promise.reject(new TypeError("no such thing")),
  text: () => Promise.reject("only text"),
  tensor: () => notData,
  callBackWithTensor: (on: (x: unknown) => void): void => on(notData),
  never: () => new Promise<void>(ignore),
  any: (x: unknown): string => typeof x,
};

/** Two ports as page and worker; `error` is what a worker's error event does. */
function connect(functions: WorkerFunctions | undefined = job) {
  const { port1, port2 } = new MessageChannel();
  const errors = new EventTarget();
  let ended = 0;
  const calls: WorkerCalls<typeof job> = runInWorker({
    postMessage: (message) => port1.postMessage(message),
    addEventListener: (type: string, listener: (event: never) => void) => {
      if (type === "message") {
        port1.onmessage = listener as (event: MessageEvent) => void;
      } else errors.addEventListener(type, listener as EventListener);
    },
    terminate: () => {
      ended++;
      port1.close();
    },
  });
  const start = (): void => {
    exposeInWorker(functions, {
      postMessage: (message) => port2.postMessage(message),
      addEventListener: (_, listener) => {
        port2.onmessage = listener;
      },
    });
  };
  return { calls, start, fail: (event: Event) => errors.dispatchEvent(event), ended: () => ended };
}

describe("runInWorker", () => {
  it("calls functions, also before the worker listens", async () => {
    const { calls, start } = connect();
    const early = calls.call("add", 2, 3);
    start();
    expect(await early).toBe(5);
    expect(await calls.call("double", Float32Array.of(1, -2))).toEqual(Float32Array.of(2, -4));
    const many = await Promise.all(Array.from({ length: 20 }, (_, i) => calls.call("add", i, 1)));
    expect(many).toEqual(Array.from({ length: 20 }, (_, i) => i + 1));
    calls.end();
  });

  it("calls back in order, before the result", async () => {
    const { calls, start } = connect();
    start();
    const seen: unknown[] = [];
    expect(await calls.call("count", 3, (i, text) => seen.push([i, text]))).toBe("done");
    expect(seen).toEqual([
      [0, "step 0"],
      [1, "step 1"],
      [2, "step 2"],
    ]);
    calls.end();
  });

  it("rejects with the worker's error and its class", async () => {
    const { calls, start } = connect();
    start();
    const refused = await calls.call("refuse").catch((error: unknown) => error);
    expect(ShapeError.isInstance(refused)).toBe(true);
    expect(refused).toMatchObject({ message: "sizes differ: [2] x [3]", stack: expect.stringContaining("refuse") });
    await expect(calls.call("other")).rejects.toMatchObject({ name: "TypeError", message: "no such thing" });
    await expect(calls.call("text")).rejects.toThrow("only text");
    expect(await calls.call("add", 1, 1)).toBe(2);
    calls.end();
  });

  it("says that tensors do not cross, in either direction", async () => {
    const { calls, start } = connect();
    start();
    await expect(calls.call("tensor")).rejects.toThrow(/the result of tensor\(\) cannot cross .* data\(\)/);
    await expect(calls.call("callBackWithTensor", ignore)).rejects.toThrow(/what callBackWithTensor\(\) called back/);
    await expect(calls.call("any", notData)).rejects.toThrow(/an argument of any\(\) cannot cross/);
    calls.end();
  });

  it("lists the functions when the name is none of them", async () => {
    const { calls, start } = connect({ one: () => 1, two: () => 2 });
    start();
    await expect(calls.call("add", 1, 2)).rejects.toThrow('no function "add"; it has one, two');
    calls.end();
  });

  it("rejects open and later calls when the worker fails or is ended", async () => {
    const first = connect();
    const waiting = first.calls.call("add", 1, 2);
    first.fail(Object.assign(new Event("error"), { message: "SyntaxError: job.js" }));
    await expect(waiting).rejects.toThrow(/the worker failed: SyntaxError: job.js/);
    await expect(first.calls.call("add", 1, 2)).rejects.toThrow(UnsupportedError);
    expect(first.ended()).toBe(1);

    const second = connect();
    second.start();
    const never = second.calls.call("never");
    expect(await second.calls.call("add", 1, 2)).toBe(3);
    second.calls.end();
    await expect(never).rejects.toThrow("the worker was ended");
  });
});
