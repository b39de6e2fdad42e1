// What is shown on a terminal and elsewhere.
import { PassThrough } from "node:stream";
import type { Progress } from "@switchyard/bench";
import { describe, expect, test } from "vitest";
import { clock, display } from "./terminal.ts";

const at = (step: number, more: Partial<Progress> = {}): Progress => ({
  ...{ router: "topK", seed: 1, run: 0, runs: 3, steps: 40, loss: 4.25, tokensPerSecond: 8123.4, secondsLeft: 62 },
  step,
  ...more,
});

function shown(terminal?: PassThrough) {
  let error = "";
  const streams = {
    out: () => undefined,
    error: (text: string) => {
      error += text;
    },
  };
  const screen = display(terminal === undefined ? streams : { ...streams, terminal });
  return { screen, text: () => error };
}

describe("display", () => {
  test("elsewhere: a line at the first step and at every tenth of a run", () => {
    const { screen, text } = shown();
    for (let step = 1; step <= 40; step++) screen.step(at(step));
    screen.step(at(1, { run: 1, router: "reMoE" }));
    const lines = text().trimEnd().split("\n");
    expect(lines).toHaveLength(12);
    expect(lines[0]).toBe("1/3 topK seed 1  step 1/40  loss 4.250  8123 tokens/s  1m 02s left");
    expect(lines[10]).toContain("step 40/40");
    expect(lines[11]).toContain("2/3 reMoE seed 1  step 1/40");
  });

  test("on a terminal: one bar per run, which ends before anything else is written", () => {
    const terminal = Object.assign(new PassThrough(), { isTTY: true, columns: 120 });
    const { screen, text } = shown(terminal);
    screen.step(at(1));
    screen.step(at(20));
    screen.step(at(1, { run: 1, router: "reMoE" }));
    screen.note("Finishing");
    screen.end();
    const drawn = String(terminal.read());
    expect(drawn).toContain("1/3 topK seed 1 ");
    expect(drawn).toContain("1/40  loss 4.250  8123 tokens/s  1m 02s left");
    expect(drawn).toContain("2/3 reMoE seed 1 ");
    expect(drawn.endsWith("\n") || drawn.includes("\u001b[?25h")).toBe(true); // the cursor is back
    expect(text()).toBe("Finishing\n");
  });
});

test.each([
  [0, "0s"],
  [59.4, "59s"],
  [59.6, "1m 00s"],
  [3725, "62m 05s"],
  [-1, "0s"],
])("clock(%d) is %s", (seconds, text) => expect(clock(seconds)).toBe(text));
