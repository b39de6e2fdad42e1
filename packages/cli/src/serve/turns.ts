// Who may go next: places that are given out in the order of asking. The server uses it twice: requests wait for one of a few places,
// and the forward passes of those that have one take turns on the engine.

export interface Turns {
  readonly running: number;
  readonly waiting: number;
  /**
   * Runs `act` once a place is free; whoever asked first goes first. Throws the signal's reason when aborted while it waits, and what
   * `act` throws.
   */
  take<T>(signal: AbortSignal | undefined, act: () => Promise<T>): Promise<T>;
}

export function turns(places: number): Turns {
  const queue: (() => void)[] = [];
  let running = 0;
  const place = (signal: AbortSignal | undefined): Promise<void> => {
    signal?.throwIfAborted();
    if (running < places) {
      running++;
      return Promise.resolve();
    }
    return new Promise((resolve, reject) => {
      const leave = (): void => {
        queue.splice(queue.indexOf(go), 1);
        reject(signal?.reason);
      };
      // The place is handed on as it is: nobody who asks meanwhile can take it.
      const go = (): void => {
        signal?.removeEventListener("abort", leave);
        resolve();
      };
      signal?.addEventListener("abort", leave, { once: true });
      queue.push(go);
    });
  };
  return {
    get running() {
      return running;
    },
    get waiting() {
      return queue.length;
    },
    async take(signal, act) {
      await place(signal);
      try {
        signal?.throwIfAborted();
        return await act();
      } finally {
        const next = queue.shift();
        if (next) next();
        else running--;
      }
    },
  };
}
