// Checkpoints and texts for fine-tuning: tiny models that the command trains itself, and what lies in their files.
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { openCheckpoint } from "@switchyard/models";
import { runCommand } from "../run.test-util.ts";

/** Sentences of a few words that follow each other in a fixed manner. */
export function prose(letters: string, sentences: number): string {
  let state = letters.length;
  const next = (n: number): number => {
    state = (state * 1_103_515_245 + 12_345) % 2 ** 31;
    return Math.floor((state / 2 ** 31) * n);
  };
  const words = Array.from({ length: 40 }, () =>
    Array.from({ length: 2 + next(5) }, () => letters[next(letters.length)]).join(""),
  );
  return Array.from(
    { length: sentences },
    () => `${Array.from({ length: 5 + next(6) }, () => words[next(40)]).join(" ")}.`,
  ).join("\n");
}

/** Trains a tiny model on a text with each router; answers their folders. */
export async function trainTiny(home: string, text: string, routers: readonly string[]): Promise<string[]> {
  const how = ["--size", "tiny", "--threads", "1", "--steps", "60", "--out", home, "--name", "run"];
  const { code, error } = await runCommand(["train", text, ...how, "--router", routers.join(",")]);
  if (code !== 0) throw new Error(error);
  return routers.map((router) => join(home, "run", `${router}-seed1`));
}

/** SHA-256 of the bytes of every tensor; of those that stack experts, of every expert: "name[3]". */
export async function sums(folder: string): Promise<Map<string, string>> {
  const checkpoint = await openCheckpoint(folder);
  try {
    const found = new Map<string, string>();
    for (const name of checkpoint.names) {
      const bytes = await checkpoint.read(name);
      const [count = 1, ...rest] = checkpoint.stored(name).shape;
      const parts = /\.experts\.\w+$/.test(name) && rest.length === 2 ? count : 1;
      for (let part = 0; part < parts; part++) {
        const size = bytes.length / parts;
        const sum = createHash("sha256")
          .update(bytes.subarray(part * size, (part + 1) * size))
          .digest("hex");
        found.set(parts === 1 ? name : `${name}[${part}]`, sum);
      }
    }
    return found;
  } finally {
    await checkpoint.close();
  }
}

/** Names of what differs between two checkpoints with the same tensors. */
export async function changes(before: string, after: string): Promise<string[]> {
  const [old, now] = [await sums(before), await sums(after)];
  if ([...old.keys()].join() !== [...now.keys()].join()) throw new Error("the tensors are others");
  return [...old].flatMap(([name, sum]) => (now.get(name) === sum ? [] : [name]));
}

export const weightsOf = (folder: string): Buffer => readFileSync(join(folder, "model.safetensors"));
