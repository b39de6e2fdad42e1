// What a person sees while it runs: a bar per run on a terminal, a line now and then elsewhere. Everything goes to standard error.
import type { Progress, RunResult } from "@switchyard/bench";
import { SingleBar } from "cli-progress";

/** Where text goes; tests pass their own. */
export interface Streams {
  out(text: string): void;
  error(text: string): void;
  /** A terminal that can redraw a line. */
  readonly terminal?: NodeJS.WritableStream;
}

export const processStreams = (): Streams => ({
  out: (text) => void process.stdout.write(text),
  error: (text) => void process.stderr.write(text),
  ...(process.stderr.isTTY ? { terminal: process.stderr } : {}),
});

export function clock(seconds: number): string {
  const whole = Math.max(0, Math.round(seconds));
  const minutes = Math.floor(whole / 60);
  return minutes === 0 ? `${whole}s` : `${minutes}m ${String(whole % 60).padStart(2, "0")}s`;
}

export interface Display {
  note(text: string): void;
  step(progress: Progress): void;
  run(result: RunResult): void;
  /** Leaves the terminal as a shell expects it. */
  end(): void;
}

const numbers = ({ loss, tokensPerSecond, secondsLeft }: Progress): string =>
  `loss ${loss.toFixed(3)}  ${Math.round(tokensPerSecond)} tokens/s  ${clock(secondsLeft)} left`;

/** Bars on a terminal, lines at every tenth of a run elsewhere. */
export function display(streams: Streams): Display {
  let bar: SingleBar | undefined;
  let shown = "";
  const end = (): void => {
    bar?.stop();
    bar = undefined;
  };
  const titleOf = ({ router, seed, run, runs }: Progress): string => `${run + 1}/${runs} ${router} seed ${seed}`;
  return {
    note(text) {
      end();
      streams.error(`${text}\n`);
    },
    step(progress) {
      const title = titleOf(progress);
      if (streams.terminal === undefined) {
        const tenth = Math.floor((10 * progress.step) / progress.steps);
        const key = `${title} ${tenth}`;
        if (key !== shown) streams.error(`${title}  step ${progress.step}/${progress.steps}  ${numbers(progress)}\n`);
        shown = key;
        return;
      }
      if (bar === undefined || shown !== title) {
        end();
        bar = new SingleBar({
          format: `${title} {bar} {value}/{total}  {numbers}`,
          stream: streams.terminal,
          barCompleteChar: "█",
          barIncompleteChar: "░",
          barsize: 20,
          hideCursor: true,
          fps: 5,
          gracefulExit: false, // Ctrl-C is ours: it saves first
        });
        bar.start(progress.steps, progress.step, { numbers: numbers(progress) });
        shown = title;
        return;
      }
      bar.update(progress.step, { numbers: numbers(progress) });
    },
    run(result) {
      end();
      const last = result.checkpoints.at(-1);
      streams.error(
        `  ${result.router} seed ${result.seed}: ${last?.bitsPerByte.toFixed(3)} bits/byte held out, ` +
          `${Math.round(result.tokensPerSecond)} tokens/s, saved in ${result.model}\n` +
          (result.untraced === undefined ? "" : `  no routing traces of ${result.router}: ${result.untraced}\n`),
      );
    },
    end,
  };
}
