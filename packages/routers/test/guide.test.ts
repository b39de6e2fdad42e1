import { readFileSync } from "node:fs";
import { expect, it } from "vitest";

const read = (path: string): string => readFileSync(new URL(path, import.meta.url), "utf8").replaceAll("\r\n", "\n");

// The files in guide/ are type-checked and run like any others; the guide must show them as they are.
it.each(["loss-free.ts", "loss-free.test.ts"])("the guide shows %s as it is tested", (name) => {
  const guide = read("../../../docs/guides/write-a-router.md");
  const shown = [...guide.matchAll(/^`([a-z.-]+)`[^\n]*:\n\n```ts\n(.*?)^```/gms)].map(([, file, code]) => [
    file,
    code,
  ]);
  expect(Object.fromEntries(shown)[name]).toBe(read(`guide/${name}`));
});
