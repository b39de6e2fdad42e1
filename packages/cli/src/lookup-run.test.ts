// Routers whose table follows the token ids, trained from the command line without telling them the vocabulary: the counts
// are those of the training text, and the saved model holds what its table was made from. Beside them RMoE and DA-MoE.
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseResults } from "@switchyard/bench";
import { engine, leaves } from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import { asTransformer, loadModel } from "@switchyard/models";
import { afterAll, expect, test } from "vitest";
import { main } from "./main.ts";
import { routersFrom } from "./routers.ts";

const root = mkdtempSync(join(tmpdir(), "switchyard-lookup-run-"));
afterAll(() => rmSync(root, { recursive: true }));

test("train takes hash, balanced too, maskMoE, rMoE and daMoE; their models load", async () => {
  const words = ["one", "fish", "two", "red", "blue", "old", "new", "the", "has", "a", "little", "star"];
  const line = (i: number): string =>
    Array.from({ length: 9 }, (_, j) => words[(i * 7 + j * j * (1 + (i % 5))) % 12]).join(" ");
  const text = Array.from({ length: 300 }, (_, i) => `${line(i)}.`).join("\n");
  writeFileSync(join(root, "text.txt"), text);
  const labels = ["hash", "hash:table=balanced", "maskMoE", "rMoE", "daMoE"];
  let error = "";
  const code = await main(
    [
      ...["train", join(root, "text.txt"), "--size", "tiny", "--threads", "1", "--steps", "3"],
      ...["--out", join(root, "runs"), "--name", "tables", "--router", labels.join(",")],
    ],
    {
      signal: new AbortController().signal,
      streams: {
        out: () => undefined,
        error: (part) => {
          error += part;
        },
      },
    },
  );
  expect(code, error).toBe(0);
  const folder = join(root, "runs", "tables");
  const { runs } = parseResults(readFileSync(join(folder, "results.json"), "utf8"));
  expect(runs.map(({ router }) => router)).toEqual(labels);
  const plugins = (await routersFrom(labels)).map(({ plugin }) => plugin);
  for (const { router, model, training } of runs) {
    expect(training.bitsPerByte.every(Number.isFinite), router).toBe(true);
    const on = engine(cpu());
    const { model: loaded, close } = await loadModel(join(folder, model ?? ""), { engine: on, routers: plugins });
    const { tokenCounts, vocabulary } = asTransformer(loaded).config;
    const tables = loaded.buffers.flatMap((tree) => leaves(tree).map(([, { shape }]) => shape[0]));
    await close();
    if (router === "rMoE" || router === "daMoE") {
      expect(tables).toEqual([]);
      continue;
    }
    expect(new Set(tables), router).toEqual(new Set([vocabulary]));
    // Nearly all of the text is trained on, and a token is at most a few bytes long.
    const total = tokenCounts?.reduce((sum, count) => sum + count, 0) ?? 0;
    expect(total).toBeGreaterThan(text.length / 12);
    expect(total).toBeLessThanOrEqual(text.length + 1);
  }
}, 120_000);
