// What happens when the reader of our output goes away.
import type { Writable } from "node:stream";

/** A reader that has seen enough, such as `head`, ends the program quietly; other errors of the stream are thrown as they are. */
export function quietPipe(output: Pick<Writable, "on">, exit: () => void): void {
  output.on("error", (error: NodeJS.ErrnoException) => {
    if (error.code !== "EPIPE") throw error;
    exit();
  });
}
