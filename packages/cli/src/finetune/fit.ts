// Whether a checkpoint can be fine-tuned as it was asked, from the headers of its files: before anything large is read.
import { totalmem } from "node:os";
import { UnsupportedError } from "@switchyard/core";
import { type CheckpointSummary, showBytes } from "@switchyard/models";
import type { TuningPart } from "@switchyard/models/tuning";
import type { Asked } from "./settings.ts";

const partNames: Readonly<Record<TuningPart, CheckpointSummary["parts"][number]["name"]>> = {
  experts: "experts",
  shared: "shared experts",
  dense: "dense",
  attention: "attention",
  router: "routers",
  embed: "embedding",
  head: "head",
  norms: "norms",
};

/** Types in which any value can be written back. */
const plain: readonly string[] = ["F64", "F32", "F16", "BF16"];

/** A heap of 32 bits holds 4 GiB, and a pass needs some of it. */
const wasmHeap = 3.5e9;

/**
 * Throws UnsupportedError where the device cannot hold what training needs: of a trained parameter its value, gradient and two moments, of
 * any other its value; f32, but with --lora as stored.
 */
export function checkFit({ parts, parameters, bytes }: CheckpointSummary, asked: Asked): void {
  const { backend = "wasm", lora, source = "the model" } = asked;
  if (backend !== "wasm" && backend !== "cpu") return;
  const some = asked.esft !== undefined || asked.experts !== undefined;
  const experts = parts.find(({ name }) => name === "experts")?.parameters ?? 0;
  const trained = some ? experts : parameters.total;
  const needed = lora ? bytes : 4 * parameters.total + 12 * trained;
  const most = backend === "wasm" ? Math.min(wasmHeap, totalmem()) : totalmem();
  if (needed <= most) return;
  const where = backend === "wasm" && most === wasmHeap ? "the heap of the wasm backend" : "this machine";
  const what = lora
    ? "its weights as they are stored"
    : `16 bytes for each of ${(trained / 1e6).toFixed(0)} million trained parameters${some ? ", 4 for each other" : ""}`;
  const instead = lora
    ? "use --backend webgpu on a large device"
    : "train low-rank matrices (--lora attention), or use --backend webgpu on a large device";
  throw new UnsupportedError(
    `fine-tuning ${source} needs ${showBytes(needed)} (${what}), and ${where} has ${showBytes(most)}; ${instead}, or a smaller model`,
  );
}

/** Throws UnsupportedError where a part that is trained is stored in a type that trained values cannot be written back to. */
export function checkTypes(
  { parts }: Pick<CheckpointSummary, "parts">,
  trained: readonly TuningPart[],
  source: string,
): void {
  for (const part of trained) {
    const found = parts.find(({ name }) => name === partNames[part]);
    const odd = found?.types.find((type) => !plain.includes(type));
    if (found === undefined || odd === undefined) continue;
    const others = (Object.keys(partNames) as TuningPart[]).filter((other) =>
      parts.some(({ name, types }) => name === partNames[other] && types.every((type) => plain.includes(type))),
    );
    const lora = others.filter((other) => other !== "norms");
    const instead =
      lora.length === 0 ? "Take the unquantised checkpoint" : `Train other parts: --lora ${lora.join(",")}`;
    throw new UnsupportedError(
      `the ${found.name} of ${source} are quantised (${found.types.join(", ")}), and what is trained could not be saved in that form. ${instead}`,
    );
  }
}
