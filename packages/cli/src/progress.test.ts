// What is shown while a job runs: nothing at first, then a bar on a terminal or a line at every tenth elsewhere.
import { PassThrough } from "node:stream";
import { expect, test, vi } from "vitest";
import { progressBar } from "./progress.ts";

function shown(terminal?: PassThrough) {
  let error = "";
  const streams = {
    out: () => undefined,
    error: (text: string) => {
      error += text;
    },
  };
  const bar = progressBar(terminal ? { ...streams, terminal } : streams, { patience: 100 });
  return { bar, lines: () => error.split("\n").filter((line) => line !== "") };
}

test("elsewhere: a line at every tenth, with the time that is left", () => {
  const now = vi.spyOn(performance, "now").mockReturnValue(0);
  const { bar, lines } = shown();
  for (let i = 0; i <= 100; i++) {
    now.mockReturnValue(50 * i);
    bar.update("Writing", i, 100, "2 GB");
  }
  // Nothing in the first tenth of a second.
  expect(lines()).toHaveLength(11);
  expect(lines()[0]).toBe("Writing  2 %  2 GB  5s left");
  expect(lines()[5]).toBe("Writing  50 %  2 GB  3s left");
  expect(lines()[10]).toBe("Writing  100 %  2 GB  0s left");
  bar.update("Comparing", 1, 100);
  now.mockReturnValue(5200);
  bar.update("Comparing", 50, 100);
  expect(lines().at(-1)).toBe("Comparing  50 %  0s left");
  bar.end();
  now.mockRestore();
});

test("a job that ends at once shows nothing, and one of nothing neither", () => {
  const { bar, lines } = shown();
  bar.update("Writing", 1, 2);
  bar.update("Nothing", 0, 0);
  bar.end();
  expect(lines()).toEqual([]);
});

test("on a terminal: a bar that leaves the cursor as it was", () => {
  const now = vi.spyOn(performance, "now").mockReturnValue(0);
  const terminal = Object.assign(new PassThrough(), { isTTY: true, columns: 100 });
  const { bar, lines } = shown(terminal);
  bar.update("Writing", 0, 10);
  now.mockReturnValue(1000);
  bar.update("Writing", 5, 10, "1 kB");
  bar.update("Writing", 10, 10, "1 kB");
  now.mockRestore();
  bar.end();
  const drawn = String(terminal.read());
  expect(drawn).toContain("Writing ");
  expect(drawn).toContain("50 %  1 kB  1s left");
  expect(drawn.endsWith("\n") || drawn.includes("\u001b[?25h")).toBe(true);
  expect(lines()).toEqual([]);
});
