// What --help prints: the options of a command in a terminal of 80 columns, without colours, so that it also reads well in a file.
import { stripVTControlCharacters } from "node:util";
import { type ArgsDef, type CommandDef, renderUsage } from "citty";

const columns = 80;

/** Words in lines of 80 columns; all lines but the first begin with `indent` spaces, the first stands behind `head`. */
export function wrapped(head: string, text: string, indent: number): string {
  const lines = [head.padEnd(indent)];
  for (const word of text.split(/\s+/).filter((part) => part !== "")) {
    const line = lines.at(-1) ?? "";
    const gap = line.length > indent && !line.endsWith(" ") ? " " : "";
    if (line.trim() === "" || line.length + gap.length + word.length <= columns)
      lines[lines.length - 1] = line + gap + word;
    else lines.push(" ".repeat(indent) + word);
  }
  return lines.map((line) => line.trimEnd()).join("\n");
}

/** The description, arguments and options of a command. */
export async function usageText<T extends ArgsDef>(command: CommandDef<T>): Promise<string> {
  const lines = stripVTControlCharacters(await renderUsage(command)).split("\n");
  // Name and description of arguments and options stand in two columns, four spaces apart.
  const parts = lines.map((line) => /^ {2,}(\S+(?: -\S+)*) {4,}(\S.*)$/.exec(line.trimEnd()));
  const indent = 4 + parts.reduce((widest, part) => Math.max(widest, part?.[1]?.length ?? 0), 0);
  return lines
    .map((line, i) => {
      const [, name, description] = parts[i] ?? [];
      if (name !== undefined && description !== undefined) return wrapped(`  ${name}`, description, indent);
      return wrapped("", line, 0);
    })
    .join("\n");
}
