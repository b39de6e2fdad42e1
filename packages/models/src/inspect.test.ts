// What is said about the recorded checkpoints, without reading a weight: against the sizes of their files and counts by hand.
import { mkdtemp, readdir, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { engine, random } from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import { topK } from "@switchyard/routers/top-k";
import { describe, expect, it } from "vitest";
import { type OpenCheckpoint, openCheckpoint } from "./checkpoint.ts";
import { inspectCheckpoint } from "./inspect.ts";
import { parameterCounts } from "./parameter-counts.ts";
import { saveModel } from "./pretrained.ts";
import { transformer } from "./transformer.ts";

const fixture = (name: string): string => fileURLToPath(new URL(`../test/fixtures/${name}`, import.meta.url));
/** Reading weights fails. */
const closed = (checkpoint: OpenCheckpoint): OpenCheckpoint => ({
  ...checkpoint,
  read: () => Promise.reject(new Error("a weight was read")),
});

describe("inspectCheckpoint", () => {
  it.each([
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v3_fp8",
    "gpt_oss",
    "gpt_oss_mxfp4",
    "granitemoe",
    "phimoe",
    "jetmoe",
  ])("finds every part of %s", async (name) => {
    const checkpoint = await openCheckpoint(fixture(name));
    const found = inspectCheckpoint(closed(checkpoint));
    const stored = (pattern: RegExp, part: string): string[] =>
      checkpoint.names.some((one) => pattern.test(one)) ? [part] : [];
    expect(found.parts.map((part) => part.name)).toEqual([
      "embedding",
      "attention",
      "routers",
      "experts",
      ...stored(/shared_expert/, "shared experts"),
      ...stored(/layers\.\d+\.mlp\.up_proj/, "dense"),
      "norms",
      ...stored(/^lm_head/, "head"),
    ]);
    const files = (await readdir(fixture(name))).filter((file) => /^model.*\.safetensors$/.test(file));
    const sizes = files.map(async (file) => {
      const content = await readFile(join(fixture(name), file));
      return content.length - 8 - Number(content.readBigUInt64LE(0));
    });
    expect(found.bytes).toBe((await Promise.all(sizes)).reduce((sum, size) => sum + size, 0));
    expect(found.parts.reduce((sum, { bytes }) => sum + bytes, 0)).toBe(found.bytes);
    expect(found.parts.reduce((sum, { parameters }) => sum + parameters, 0)).toBe(found.parameters.total);
    expect(found.parameters.active).toBeLessThan(found.parameters.total);
    expect(found.groups.reduce((sum, { from, to }) => sum + to - from + 1, 0)).toBe(found.layers);
    await checkpoint.close();
  });

  it("counts what a token uses", async () => {
    const checkpoint = await openCheckpoint(fixture("mixtral"));
    const { parameters, parts, groups, width, layers, vocabulary, expertBytes } = inspectCheckpoint(checkpoint);
    const { num_local_experts: experts, num_experts_per_tok: k, intermediate_size: hidden } = checkpoint.config;
    const expert = 3 * width * Number(hidden);
    expect(parts.find(({ name }) => name === "experts")?.parameters).toBe(layers * Number(experts) * expert);
    expect(parameters.total - parameters.active).toBe(layers * (Number(experts) - Number(k)) * expert);
    expect(parts[0]).toEqual({
      name: "embedding",
      parameters: vocabulary * width,
      bytes: 4 * vocabulary * width,
      types: ["F32"],
    });
    expect(expertBytes).toBe(4 * expert);
    expect(groups[0]?.feedForward).toBe(`${k} of ${experts} experts of inner size ${hidden} by topK`);
    await checkpoint.close();
  });

  it("knows our own layout by its router, and says so without it", async () => {
    const folder = await mkdtemp(join(tmpdir(), "switchyard-inspect-"));
    const on = engine(cpu());
    const router = topK({ k: 2 });
    const sizes = { vocabulary: 20, width: 8, layers: 2, heads: 2, experts: 4, hidden: 8, context: 16, router };
    await saveModel(transformer(on, sizes, random(on, 1)), folder, { layout: "switchyard" });
    const checkpoint = await openCheckpoint(folder);
    const found = inspectCheckpoint(closed(checkpoint), { routers: [router] });
    const { total, active, routers } = parameterCounts(sizes);
    expect(found.parameters).toEqual({ total, active });
    expect(found.parts.find(({ name }) => name === "routers")?.parameters).toBe(routers);
    expect(() => inspectCheckpoint(checkpoint)).toThrow(/needs the router topK/);
    await checkpoint.close();
    await rm(folder, { recursive: true });
  });

  it("names the families it knows", async () => {
    const checkpoint = await openCheckpoint(fixture("mixtral"));
    const other = { ...checkpoint, config: { model_type: "whale" } };
    expect(() => inspectCheckpoint(other)).toThrow(/model_type is "whale"; this version loads mixtral, .*switchyard/);
    await checkpoint.close();
  });
});
