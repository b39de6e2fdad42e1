// The generated tables of the READMEs are up to date, and the generator notices when they are not.
import { expect, test } from "vitest";
import { filled, readmes } from "./tables.ts";

test.each(readmes())("the tables of $path are up to date (npm run tables writes them)", async (readme) => {
  expect(await filled(readme)).toBe(readme.text);
});

test("the tables of packages and routers are shown somewhere", () => {
  const shown = (name: string): boolean => readmes().some(({ text }) => text.includes(`<!-- table: ${name} -->`));
  expect(["packages", "routers"].filter((name) => !shown(name))).toEqual([]);
});

test("a table is written anew between its markers only", async () => {
  const text = "# A\n<!-- table: packages -->\nold\n<!-- end of table -->\nthe rest\n";
  const result = await filled({ path: "README.md", text });
  expect(result).toMatch(/^# A\n<!-- table: packages -->\n\| package \| what it does \|\n\| --- \| --- \|\n/);
  expect(result).toContain("| [`@switchyard/core`](packages/core) |");
  expect(result).toMatch(/\n<!-- end of table -->\nthe rest\n$/);
  expect(result).not.toContain("old");
});

test("an unknown or open table is an error", async () => {
  const one = (text: string) => filled({ path: "README.md", text });
  await expect(one("<!-- table: nothing -->\n<!-- end of table -->")).rejects.toThrow('no table "nothing"');
  await expect(one("<!-- table: packages -->\n")).rejects.toThrow("not closed");
});
