// Where samples begin. That they know their experts is tested with the comparison.
import { expect, test } from "vitest";
import { promptFrom } from "./samples.ts";

test("prompts are the first words of a line that has enough of them", () => {
  const of = (text: string): string => promptFrom(Buffer.from(text));
  expect(of("ing of the sea\nCall me Ishmael. Some years ago—never mind how long")).toBe(
    "Call me Ishmael. Some years ago—never",
  );
  expect(of("end */\n */\n\n/**\n\nreadonly length: number;\n")).toBe("readonly length: number;");
  expect(of("half a line\ninterface\nSea<T> {")).toBe("interface\nSea<T> {");
  expect(of("one line without a break in it")).toBe("one line without a break in it");
  expect(of(`short\n${"nospace".repeat(20)}`)).toHaveLength(80);
  expect(of("")).toBe("");
});
