import { PassThrough } from "node:stream";
import { expect, it } from "vitest";
import { quietPipe } from "./pipe.ts";

it("ends quietly when the reader of the output has gone, and lets other errors through", () => {
  const output = new PassThrough();
  let exits = 0;
  quietPipe(output, () => {
    exits++;
  });
  output.emit("error", Object.assign(new Error("write EPIPE"), { code: "EPIPE" }));
  expect(exits).toBe(1);
  const full = Object.assign(new Error("no space left"), { code: "ENOSPC" });
  expect(() => output.emit("error", full)).toThrow(full);
  expect(exits).toBe(1);
});
