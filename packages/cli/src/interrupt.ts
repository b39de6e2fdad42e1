// Ctrl-C while a command runs: the first ends it in good order, the second at once.
import type { CommandLine } from "./main.ts";

/**
 * Runs `act` with a signal that aborts at Ctrl-C or with the caller's own signal. `note` is called at the first Ctrl-C, to say what
 * happens now.
 */
export async function interruptible<T>(
  { signal }: Pick<CommandLine, "signal">,
  note: () => void,
  act: (signal: AbortSignal) => Promise<T>,
): Promise<T> {
  const control = new AbortController();
  const interrupt = (): void => {
    if (control.signal.aborted) process.exit(130);
    control.abort();
    note();
  };
  const forward = (): void => control.abort();
  process.on("SIGINT", interrupt);
  signal?.addEventListener("abort", forward);
  if (signal?.aborted) forward();
  try {
    return await act(control.signal);
  } finally {
    process.off("SIGINT", interrupt);
    signal?.removeEventListener("abort", forward);
  }
}
