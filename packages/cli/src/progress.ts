// How far a job is: a bar on a terminal, a line at every tenth elsewhere. Goes to standard error.
import { SingleBar } from "cli-progress";
import { clock, type Streams } from "./terminal.ts";

export interface ProgressBar {
  /** `done` of `total` of what `title` names; `figures` stand behind. */
  update(title: string, done: number, total: number, figures?: string): void;
  /** Leaves the terminal as a shell expects it. */
  end(): void;
}

/** Shows nothing where a job ends within `patience` milliseconds (default 500). */
export function progressBar(streams: Streams, { patience = 500 } = {}): ProgressBar {
  let bar: SingleBar | undefined;
  let title = "";
  let started = performance.now();
  /** Done before it was shown for the first time: a job may go on where an earlier one ended. */
  let first = 0;
  let tenth = -1;
  const end = (): void => {
    bar?.stop();
    bar = undefined;
  };
  return {
    update(name, done, total, figures = "") {
      const now = performance.now();
      if (name !== title) {
        end();
        [title, started, first, tenth] = [name, now, done, -1];
      }
      const seconds = (now - started) / 1000;
      if (1000 * seconds < patience || total === 0) return;
      const share = done / total;
      const left = done > first ? `${clock((seconds / (done - first)) * (total - done))} left` : "";
      const text = [figures, left].filter((part) => part !== "").join("  ");
      if (streams.terminal === undefined) {
        const reached = Math.floor(10 * share);
        if (reached > tenth) streams.error(`${name}  ${Math.floor(100 * share)} %  ${text}\n`);
        tenth = reached;
        return;
      }
      if (bar === undefined) {
        bar = new SingleBar({
          format: `${name} {bar} {percentage} %  {text}`,
          stream: streams.terminal,
          barCompleteChar: "█",
          barIncompleteChar: "░",
          barsize: 20,
          hideCursor: true,
          fps: 5,
          gracefulExit: false,
        });
        bar.start(total, done, { text });
        return;
      }
      bar.update(done, { text });
    },
    end,
  };
}
