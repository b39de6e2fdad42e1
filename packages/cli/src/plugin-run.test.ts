// A run with a router of somebody else's: trained from its file, interrupted, resumed from another folder, its model loaded, and what is said when
// the file has changed or is not passed.
import { copyFileSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, relative } from "node:path";
import { fileURLToPath } from "node:url";
import { parseResults } from "@switchyard/bench";
import { engine } from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import { asTransformer, loadModel } from "@switchyard/models";
import { afterAll, beforeAll, expect, test } from "vitest";
import { main } from "./main.ts";
import { routersFrom } from "./routers.ts";

const example = fileURLToPath(new URL("../../../apps/router-plugin/src/", import.meta.url));
const root = mkdtempSync(join(tmpdir(), "switchyard-plugin-run-"));
const router = join(root, "mine.ts");
afterAll(() => rmSync(root, { recursive: true }));
beforeAll(() => {
  copyFileSync(join(example, "tempered.ts"), router);
  const words = ["one", "fish", "two", "red", "blue", "old", "new", "the", "has", "a", "little", "star"];
  const line = (i: number): string =>
    Array.from({ length: 9 }, (_, j) => words[(i * 7 + j * j * (1 + (i % 5))) % 12]).join(" ");
  writeFileSync(join(root, "text.txt"), Array.from({ length: 400 }, (_, i) => `${line(i)}.`).join("\n"));
});

async function run(args: readonly string[], stopAt?: RegExp): Promise<{ code: number; out: string; error: string }> {
  const control = new AbortController();
  let [out, error] = ["", ""];
  const code = await main(args, {
    signal: control.signal,
    streams: {
      out: (text) => {
        out += text;
      },
      error: (text) => {
        error += text;
        if (stopAt?.test(text)) control.abort();
      },
    },
  });
  return { code, out, error };
}
const folder = (name: string): string => join(root, "runs", name);
const loss = (name: string): readonly number[] =>
  parseResults(readFileSync(join(folder(name), "results.json"), "utf8")).runs[0]?.training.bitsPerByte ?? [];

test("trains, resumes with the same numbers, and its model loads with the plugin only", async () => {
  const label = "mine.ts:k=2:zLoss=0+capacity:factor=1.5";
  const named = (path: string): string => `${path}:k=2:zLoss=0+capacity:factor=1.5`;
  const basic = ["--size", "tiny", "--threads", "1", "--steps", "8", "--out", join(root, "runs")];
  const relativePath = `./${relative(process.cwd(), router)}`;
  const whole = await run([
    "train",
    join(root, "text.txt"),
    ...basic,
    "--name",
    "whole",
    "--router",
    named(relativePath),
  ]);
  expect([whole.code, whole.error.includes("switchyard:")]).toEqual([0, false]);
  expect(whole.out).toContain(label);
  expect(loss("whole")).toHaveLength(8);
  expect(loss("whole").at(-1)).toBeLessThan(loss("whole")[0] ?? 0);

  const cut = ["--name", "cut", "--router", named(relativePath)];
  expect((await run(["train", join(root, "text.txt"), ...basic, ...cut], /step 3\//)).code).toBe(130);
  const settings = JSON.parse(readFileSync(join(folder("cut"), "run.json"), "utf8"));
  expect(settings.settings.routers).toEqual([named(router)]);
  expect(Object.keys(settings.plugins)).toEqual([label]);

  // Changed in between: refused; as it was: the same numbers.
  const content = readFileSync(router, "utf8");
  writeFileSync(router, `${content}// another\n`);
  const changed = await run(["train", "--resume", folder("cut")]);
  expect(changed.code).toBe(1);
  expect(changed.error).toContain(`--resume: the file of router "${label}" has changed since this run was started`);
  writeFileSync(router, content);
  expect((await run(["train", "--resume", folder("cut")])).code).toBe(0);
  expect(loss("cut")).toEqual(loss("whole"));
  const model = join(folder("whole"), "mine.ts_k=2_zLoss=0_capacity_factor=1.5-seed1");
  const weights = readFileSync(join(model, "model.safetensors"));
  expect(
    readFileSync(join(folder("cut"), "mine.ts_k=2_zLoss=0_capacity_factor=1.5-seed1", "model.safetensors")).equals(
      weights,
    ),
  ).toBe(true);

  const host = engine(cpu());
  const routers = (await routersFrom([named(router)])).map(({ plugin }) => plugin);
  const loaded = await loadModel(model, { engine: host, routers });
  expect(asTransformer(loaded.model).config.router.name).toBe("tempered+capacity");
  await loaded.close();
  await expect(loadModel(model, { engine: host })).rejects.toThrow(
    /the checkpoint needs the router tempered\+capacity\(.*"name":"tempered".*\); passed: none/,
  );
  const other = (await routersFrom([`${router}:k=2:zLoss=0+capacity:factor=2`])).map(({ plugin }) => plugin);
  await expect(loadModel(model, { engine: host, routers: other })).rejects.toThrow(
    /Pass the same options, or set otherOptions/,
  );

  rmSync(router);
  const gone = await run(["train", "--resume", folder("cut")]);
  expect([gone.code, gone.error]).toEqual([1, expect.stringContaining(`there is no file ${router}`)]);
}, 120_000);
