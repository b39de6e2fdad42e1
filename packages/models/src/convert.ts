// Rewriting a checkpoint without running it: another float type, other shards, the other layout of experts (Node only). Nothing larger
// than a piece of a tensor is in memory, what needs no change is copied byte for byte, and a certificate that is worked out
// from the written files says where every byte of every tensor went.
import { CheckpointError, type Json } from "@switchyard/core";
import { indexName, readCheckpoint } from "./checkpoint.ts";
import { type ConvertCertificate, checkFiles, compareTensors, filesOf } from "./conversion/compare.ts";
import { advancing, belongs, copied, otherFiles, rewriting } from "./conversion/folder.ts";
import { type ConvertOptions, type Origin, pieceSize, stage } from "./conversion/origin.ts";
import { bytesOf, type Draft, keepers, type Plan, planned } from "./conversion/plan.ts";
import { converted } from "./conversion/values.ts";
import { type FileToSave, type FolderFiles, saveFiles } from "./files.ts";
import { setTopLevel } from "./json-edit.ts";
import { encodeSafetensors, readExactly, type TensorSource } from "./safetensors.ts";
import { jsonFile } from "./save-checkpoint.ts";

/** The bytes of a draft, piece by piece. */
async function* draftBytes(
  { dtype, parts }: Draft,
  { checkpoint }: Origin,
  saturate: boolean,
): AsyncGenerator<Uint8Array, void, undefined> {
  for (const { tensor, from, to } of parts) {
    for (let at = from; at < to; at += pieceSize) {
      const bytes = await checkpoint.read(tensor.name, [at, Math.min(to, at + pieceSize)]);
      yield tensor.dtype === dtype ? bytes : converted(bytes, { tensor, to: dtype, saturate });
    }
  }
}

/**
 * Converts a checkpoint folder into another one: float type, size of shards, layout of experts; whatever is not asked to change
 * keeps its bytes, and where nothing changes every file is a copy. Tokenizer and other files come along; folders and links
 * out of the folder do not. Tensors are read and written in pieces of 8 MiB. Before the new files count, every byte of
 * every tensor is compared with the source; the target holds all of the new checkpoint or what it held before, also when
 * the process is killed (see `saveFiles`). Values are rounded to nearest, ties to even.
 *
 * Throws UnsupportedError for a target inside the source or not empty, for a family with one layout of experts, for quantised
 * experts whose layout should change, and for values beyond the float type; CheckpointError for a damaged source, and where
 * files cannot be read or written; the signal's reason when aborted (the target is then as it was).
 *
 * @example
 * const { totals } = await convertCheckpoint("mixtral", "mixtral-bf16", { dtype: "bf16", shardBytes: 2e9 });
 */
export async function convertCheckpoint(
  source: string,
  target: string,
  options: ConvertOptions = {},
): Promise<ConvertCertificate> {
  return rewriting({ source, target, act: "convert" }, options, (origin) => {
    const plan = planned(origin, options);
    return write({ origin, plan, target, saturate: options.saturate ?? false }, options);
  });
}

async function write(
  { origin, plan, target, saturate }: { origin: Origin; plan: Plan; target: string; saturate: boolean },
  options: ConvertOptions,
): Promise<ConvertCertificate> {
  const { files } = origin;
  const { copies, leftOut } = await otherFiles(origin, plan, "converted");
  const toSave: FileToSave[] = [];
  const copyNames = new Set([...plan.weights.filter((name) => !plan.written.has(name)), ...copies]);
  const sizes = new Map<string, number>();
  for (const name of [...origin.weights.keys(), ...copies, "config.json"]) {
    const file = await files.open(name);
    sizes.set(name, file?.size ?? 0);
    await file?.close();
  }
  const rewritten = [...plan.written.values()].flatMap(({ drafts }) => drafts);
  const copying = [...copyNames].reduce((sum, name) => sum + (sizes.get(name) ?? 0), 0);
  const advance = stage(
    "writing",
    rewritten.reduce((sum, draft) => sum + bytesOf(draft), copying),
    options,
  );
  for (const name of plan.weights) {
    const fresh = plan.written.get(name);
    if (!fresh) {
      toSave.push({ name, content: () => advancing(copied(files.open, name), advance) });
      continue;
    }
    const tensors = fresh.drafts.map((draft): TensorSource => {
      const { name: tensor, dtype, shape } = draft;
      const bytes = () => advancing(draftBytes(draft, origin, saturate), advance);
      return { name: tensor, dtype, shape, bytes };
    });
    toSave.push({ name, content: () => encodeSafetensors(tensors, fresh.metadata) });
  }
  for (const name of copies) toSave.push({ name, content: () => advancing(copied(files.open, name), advance) });
  if (plan.index !== undefined && plan.index !== false) toSave.push(jsonFile(indexName, plan.index));
  const config = await readText(files, "config.json");
  const edited = plan.configType === undefined ? config : withType(config, plan.configType, origin.checkpoint.config);
  if (edited === config) copyNames.add("config.json");
  const configFile = { name: "config.json", content: () => [new TextEncoder().encode(edited)] };
  toSave.push(
    edited === config ? { name: "config.json", content: () => copied(files.open, "config.json") } : configFile,
  );

  let compared: Pick<ConvertCertificate, "tensors" | "values" | "totals"> | undefined;
  let checked: Omit<ConvertCertificate["files"], "leftOut"> | undefined;
  await saveFiles(target, toSave, {
    last: "config.json",
    isStale: belongs,
    async verify(open) {
      const output = await readCheckpoint(open, target);
      try {
        compared = await compareTensors(origin, output, await filesOf(open, target), options);
      } finally {
        await output.close();
      }
      const read = [...sizes.keys()].filter(
        (name) => copyNames.has(name) || origin.weights.has(name) || name === "config.json",
      );
      checked = await checkFiles({ read, written: toSave.map(({ name }) => name), copyNames, files, open }, options);
    },
  });
  if (!compared || !checked) throw new CheckpointError(`${target} was written, but not compared`);
  const keep = keepers(origin.tensors);
  return {
    schema: "switchyard/convert/1",
    ...{ source: origin.folder, target },
    changed: plan.changed,
    totals: compared.totals,
    values: compared.values,
    tensors: compared.tensors,
    kept:
      options.dtype === undefined
        ? []
        : origin.tensors.flatMap((tensor) => {
            const reason = keep(tensor);
            const { name, dtype } = tensor;
            return reason === undefined ? [] : [{ name, dtype, reason }];
          }),
    dropped: [],
    files: { ...checked, leftOut },
  };
}

async function readText({ open }: FolderFiles, name: string): Promise<string> {
  const file = await open(name);
  if (!file) throw new CheckpointError(`${name} is not there any more`);
  try {
    return new TextDecoder().decode(await readExactly(file, 0, file.size));
  } finally {
    await file.close();
  }
}

/** Names the float type in the keys that are there: `torch_dtype` up to Transformers 4, `dtype` later. */
function withType(text: string, type: string, config: { readonly [key: string]: Json }): string {
  const keys = ["torch_dtype", "dtype"].filter((key) => Object.hasOwn(config, key));
  let result = text;
  for (const key of keys.length > 0 ? keys : ["torch_dtype"]) result = setTopLevel(result, key, type);
  return result;
}
