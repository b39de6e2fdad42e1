// `switchyard convert`: another float type, other shards, the other layout of experts, and a certificate of what went where.
import { type ConvertCertificate, convertCheckpoint, floatTypes } from "@switchyard/models";
import { type ArgsDef, defineCommand } from "citty";
import { count, exactly, readArguments, shownBytes } from "./arguments.ts";
import { interruptible } from "./interrupt.ts";
import type { CommandLine } from "./main.ts";
import { progressBar } from "./progress.ts";
import type { Streams } from "./terminal.ts";
import { usageText } from "./usage.ts";

const convertArgs = {
  dtype: {
    type: "string",
    description: `Type of all plain floats: ${floatTypes.join(", ")} (default: as stored). Quantised weights stay as they are`,
    valueHint: "TYPE",
  },
  saturate: {
    type: "boolean",
    description: "Write the largest number of the type where a value is too large for it, instead of refusing",
  },
  "shard-size": {
    type: "string",
    description: "Most bytes of tensors in one file, such as 2GB (default: the files of the source)",
    valueHint: "SIZE",
  },
  experts: {
    type: "string",
    description: "fused: all experts of a layer in one tensor; separate: one tensor per expert (default: as stored)",
    valueHint: "LAYOUT",
  },
  replace: { type: "boolean", description: "Put the result in the place of the checkpoint that OUT holds" },
  "follow-links": { type: "boolean", description: "Read files that are links out of DIR" },
  json: { type: "boolean", description: "Print the whole certificate, with every tensor and checksum, as JSON" },
} as const satisfies ArgsDef;

const convertCommand = defineCommand({
  meta: { name: "switchyard convert", description: "Rewrite a checkpoint and certify that nothing was lost" },
  args: {
    dir: { type: "positional", description: "A checkpoint in the Hugging Face layout", required: true },
    out: { type: "positional", description: "A folder outside it, empty or absent", required: true },
    ...convertArgs,
  },
});

const example = `
EXAMPLE

  switchyard convert OLMoE-1B-7B olmoe-f16 --dtype f16 --shard-size 2GB
  switchyard convert mixtral mixtral-fused --experts fused --json > certificate.json

Where nothing is asked to change, every file of OUT is a byte-identical copy.
`;

/** Reasons with how many names have them, and a few of these. */
function grouped(list: readonly { readonly name: string; readonly reason: string }[]): string[] {
  const groups = new Map<string, string[]>();
  for (const { name, reason } of list) groups.set(reason, [...(groups.get(reason) ?? []), name]);
  return [...groups].map(([reason, names]) => {
    const more = names.length > 3 ? `, and ${names.length - 3} more (--json lists them)` : "";
    return `    ${names.slice(0, 3).join(", ")}${more}: ${reason}`;
  });
}

export function certificateText({ totals, values, kept, dropped, files, changed, target }: ConvertCertificate): string {
  const { source: from, target: to, same, converted, moved } = totals;
  const changes = [
    `${same} unchanged`,
    ...(converted ? [`${converted} in another type`] : []),
    ...(moved ? [`${moved} under another name`] : []),
  ].join(", ");
  const copies = files.target.filter(({ copied }) => copied).length;
  const { rounded, toZero, saturated } = values;
  const sums = files.target.map(({ name, bytes, sha256, copied }) => {
    return `    ${sha256}  ${name}  ${shownBytes(bytes)}${copied ? "  copy" : ""}`;
  });
  return `${[
    `${changed ? "Converted" : "Copied"} to ${target}`,
    "",
    `  source   ${count(from.tensors, "tensor")}, ${count(from.bytes, "byte")}: each byte found once in the target (${changes})`,
    `  target   ${count(to.tensors, "tensor")}, ${count(to.bytes, "byte")}: each byte from one place of the source`,
    ...(values.converted
      ? [
          `  values   ${values.converted} in another type, ${rounded} rounded, ${toZero} of them to zero, ${saturated} to the largest number`,
        ]
      : []),
    ...(kept.length ? [`  kept     ${count(kept.length, "tensor")} in the stored type:`, ...grouped(kept)] : []),
    dropped.length
      ? `  dropped  ${count(dropped.length, "tensor")}:\n${grouped(dropped).join("\n")}`
      : "  dropped  no tensor",
    ...(files.leftOut.length
      ? [`  left out ${count(files.leftOut.length, "entry", "entries")} of the folder:`, ...grouped(files.leftOut)]
      : []),
    `  files    ${files.target.length} written, ${copies} of them byte-identical copies; SHA-256:`,
    ...sums,
  ].join("\n")}\n`;
}

const stages = { writing: "Writing", comparing: "Comparing", checksums: "Checksums" } as const;

/** Runs the command. Answers the exit code. @throws UnsupportedError, CheckpointError for what a user can mend. */
export async function convert(rest: readonly string[], options: CommandLine, streams: Streams): Promise<number> {
  if (rest.includes("--help") || rest.includes("-h")) {
    streams.out(`${await usageText(convertCommand)}\n${example}`);
    return 0;
  }
  const given = readArguments("convert", convertArgs, rest);
  const [source = "", target = ""] = exactly(
    2,
    given,
    "convert takes a checkpoint folder and a folder to write to",
    "switchyard convert DIR OUT",
  );
  const dtype = given.choice("dtype", floatTypes);
  const experts = given.choice("experts", ["fused", "separate"]);
  const shardBytes = given.bytes("shard-size");
  const bar = progressBar(streams);
  return interruptible(
    options,
    () => {
      bar.end();
      streams.error("Stopping; what OUT held stays. Ctrl-C again ends at once.\n");
    },
    async (signal) => {
      try {
        const certificate = await convertCheckpoint(source, target, {
          ...(dtype ? { dtype } : {}),
          ...(experts ? { experts } : {}),
          ...(shardBytes === undefined ? {} : { shardBytes }),
          saturate: given.flag("saturate"),
          replace: given.flag("replace"),
          followLinks: given.flag("follow-links"),
          signal,
          onProgress: ({ stage, done, total }) => bar.update(stages[stage], done, total, shownBytes(total)),
        });
        bar.end();
        streams.out(given.flag("json") ? `${JSON.stringify(certificate)}\n` : certificateText(certificate));
        return 0;
      } catch (error) {
        if (!signal.aborted) throw error;
        streams.error("Stopped; nothing was changed.\n");
        return 130;
      } finally {
        bar.end();
      }
    },
  );
}
