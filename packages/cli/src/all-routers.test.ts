// `switchyard train --router all`: every router that fits a language model learns from the command line, its saved model loads, and its
// routing traces say what the results say.
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseResults } from "@switchyard/bench";
import { engine } from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import { analyseTrace, fileSource, loadModel, readTrace } from "@switchyard/models";
import { afterAll, expect, test } from "vitest";
import { main } from "./main.ts";
import { causalRouters, routersFrom } from "./routers.ts";

const root = mkdtempSync(join(tmpdir(), "switchyard-all-"));
afterAll(() => rmSync(root, { recursive: true }));

test("every causal router trains, its loss falls, and its model loads", { timeout: 300_000 }, async () => {
  const names = causalRouters();
  expect(names.length).toBeGreaterThan(25);
  const words = "the whale swam under a ship and old men sang of rivers where no one had been".split(" ");
  const line = (i: number): string => Array.from({ length: 8 }, (_, j) => words[(i * 5 + j * j) % 16]).join(" ");
  writeFileSync(join(root, "text.txt"), Array.from({ length: 400 }, (_, i) => `${line(i)}.`).join("\n"));
  let out = "";
  let error = "";
  const streams = {
    out: (text: string) => {
      out += text;
    },
    error: (text: string) => {
      error += text;
    },
  };
  const args = ["--size", "tiny", "--steps", "12", "--threads", "1", "--router", "all", "--json"];
  const code = await main(["train", join(root, "text.txt"), "--out", root, "--name", "all", ...args], { streams });
  expect(code, error).toBe(0);

  const { runs } = parseResults(out);
  expect(runs.map(({ router }) => router)).toEqual(names);
  const host = engine(cpu());
  const routers = (await routersFrom(names)).map(({ plugin }) => plugin);
  for (const { router, checkpoints, model, untraced } of runs) {
    const [first, last] = [checkpoints[0]?.bitsPerByte ?? 0, checkpoints.at(-1)?.bitsPerByte ?? 0];
    expect(last, router).toBeLessThan(first - 0.15); // most fall by 0.5; the losses of moeFFD weigh 200
    const loaded = await loadModel(join(root, "all", model), { engine: host, routers });
    expect(loaded.model.layers, router).toBe(2);
    await loaded.close();
    expect(untraced, router).toBeUndefined();
    for (const { trace = "", layers } of checkpoints.slice(-1)) {
      const source = await fileSource(join(root, "all", trace));
      if (source === undefined) throw new Error(`${router} has no trace`);
      const analysis = await analyseTrace(await readTrace(source));
      await source.close();
      for (const [i, { load, expertsPerToken }] of layers.entries()) {
        const [found, [all = [] as readonly number[]] = []] = [analysis.layers[i], load];
        // The trace has both paths of VQ-MoE, the results follow the first.
        if (router === "vqMoE") expect(found?.expertsPerToken).toBeGreaterThan(expertsPerToken);
        else {
          expect(found?.expertsPerToken, router).toBeCloseTo(expertsPerToken, 3);
          const counts = found?.loadByLabel?.[0] ?? found?.load ?? [];
          const total = counts.reduce((sum, n) => sum + n, 0);
          for (const [e, share] of all.entries())
            expect((counts[e] ?? 0) / Math.max(1, total), router).toBeCloseTo(share, 4);
        }
      }
    }
  }
});
