// Runs a command as a user would, and keeps what it wrote.
import { main } from "./main.ts";

export interface Ran {
  readonly code: number;
  readonly out: string;
  readonly error: string;
}

/** `stopAt` presses Ctrl-C when what is written matches. */
export async function runCommand(args: readonly string[], stopAt?: RegExp): Promise<Ran> {
  let out = "";
  let error = "";
  let pressed = false;
  const stop = (text: string): void => {
    // The second Ctrl-C would end the process.
    if (pressed || !stopAt?.test(text)) return;
    pressed = true;
    process.emit("SIGINT");
  };
  const streams = {
    out(text: string) {
      out += text;
      stop(text);
    },
    error(text: string) {
      error += text;
      stop(text);
    },
  };
  const code = await main(args, { streams });
  return { code, out, error };
}
