// Giving way to the event loop. On backends that finish at once every await settles as a microtask, and timers, signals and the page's own
// work would wait until a whole text is there.

/** Settles after what waits in the event loop had its turn; some microseconds where nothing waits. */
export function breathe(): Promise<void> {
  const { setImmediate } = globalThis as { setImmediate?: (done: () => void) => void };
  if (setImmediate) return new Promise((resolve) => setImmediate(resolve));
  // Not setTimeout: browsers stretch nested ones to 4 ms.
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(undefined);
  });
}
