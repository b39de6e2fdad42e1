// What a measured case is told as: rates per contender and figures with their goals, as text and as rows of a Markdown table.
import type { Entry, Summary } from "./harness.ts";

export interface Goal {
  readonly least?: number;
  readonly most?: number;
}

/** One line under a table: a ratio or a share, with its spread, and what it should be. */
export interface Figure {
  readonly label: string;
  readonly value: Summary;
  /** The same in CPU time. */
  readonly cpu?: Summary;
  readonly goal?: Goal;
}

export interface Table {
  readonly case: string;
  readonly title: string;
  /** Threads of everyone; missing where the work is not the processor's. */
  readonly threads?: number;
  /** What an entry's time becomes: `amount` per run in `unit` per second. */
  readonly unit: "GFLOP/s" | "GB/s" | "tokens/s";
  readonly amounts: Readonly<Record<string, number>>;
  readonly entries: readonly Entry[];
  readonly figures: readonly Figure[];
}

const significant = (x: number): string => {
  if (!Number.isFinite(x)) return String(x);
  const digits = Math.max(0, 2 - Math.floor(Math.log10(Math.abs(x) || 1)));
  return x.toFixed(Math.min(digits, 4));
};

const spread = ({ median, min, max }: Summary): string =>
  `${significant(median)} (${significant(min)} to ${significant(max)})`;

const wanted = ({ least, most }: Goal): string =>
  [least !== undefined && `at least ${least}`, most !== undefined && `at most ${most}`].filter(Boolean).join(", ");

/** Whether the median meets the goal; undefined where there is none. */
export const reached = ({ value, goal }: Figure): boolean | undefined =>
  goal &&
  value.median >= (goal.least ?? Number.NEGATIVE_INFINITY) &&
  value.median <= (goal.most ?? Number.POSITIVE_INFINITY);

const rate = ({ amounts }: Table, { name, timing }: Entry): string =>
  timing ? significant((amounts[name] ?? Number.NaN) / timing.wall.median) : "-";

const milliseconds = ({ median, min, max, count }: Summary): Summary => ({
  median: 1000 * median,
  min: 1000 * min,
  max: 1000 * max,
  count,
});

const columns = (rows: readonly (readonly string[])[]): string[] => {
  const widths = (rows[0] ?? []).map((_, i) => Math.max(...rows.map((row) => (row[i] ?? "").length)));
  return rows.map((row) =>
    `  ${row.map((cell, i) => (i === 0 || i === row.length - 1 ? cell.padEnd(widths[i] ?? 0) : cell.padStart(widths[i] ?? 0))).join("  ")}`.trimEnd(),
  );
};

/** Rates and times per contender, then the ratios with their goals. `used`: the threads of those that have fewer than asked for. */
export function tableText(table: Table, used: Readonly<Record<string, number>> = {}): string {
  const { title, threads, unit, entries, figures } = table;
  const onDevice = entries.some(({ timing }) => timing?.device !== undefined);
  const rows = entries.map((entry) => {
    const { name, timing, error, failed, note = "" } = entry;
    const own = used[name] ?? threads;
    const label = own === threads ? name : `${name} (${own} thread${own === 1 ? "" : "s"})`;
    const none = onDevice ? ["-", "-", "-", "-", "-"] : ["-", "-", "-", "-"];
    if (failed !== undefined || timing === undefined) return [label, ...none, failed ?? "not measured"];
    return [
      label,
      rate(table, entry),
      spread(milliseconds(timing.wall)),
      ...(onDevice ? [timing.device ? significant(1000 * timing.device.median) : "-"] : []),
      timing.cpu ? significant(timing.cpu.median / timing.wall.median) : "-",
      error === undefined ? "-" : error.toExponential(1),
      note,
    ];
  });
  const device = onDevice ? ["device ms"] : [];
  const lines = columns([["", unit, "ms: median (min to max)", ...device, "CPUs busy", "error", ""], ...rows]);
  for (const figure of figures) {
    const verdict = reached(figure);
    const goal = figure.goal ? `   goal ${wanted(figure.goal)}: ${verdict ? "reached" : "missed"}` : "";
    const cpu = figure.cpu ? `, in CPU time ${significant(figure.cpu.median)}` : "";
    lines.push(`  ${figure.label} = ${spread(figure.value)}${cpu}${goal}`);
  }
  const on = threads === undefined ? "" : `, ${threads} thread${threads > 1 ? "s" : ""}`;
  return [`${title}${on}`, ...lines].join("\n");
}

/** The tables as one of Markdown: rates of every contender, reasons of those without, and the figures with their goals. */
export function markdownTable(tables: readonly Table[]): string {
  const row = (cells: readonly string[]): string =>
    `| ${cells.map((cell) => cell.replaceAll("|", "\\|")).join(" | ")} |`;
  const lines = tables.map((table) => {
    const rates = table.entries.map((entry) =>
      entry.timing ? `${entry.name} ${rate(table, entry)}` : `${entry.name}: ${entry.failed ?? "not measured"}`,
    );
    const figures = table.figures.map((figure) => {
      const goal = figure.goal ? `, goal ${wanted(figure.goal)} ${reached(figure) ? "reached" : "missed"}` : "";
      return `${figure.label} ${spread(figure.value)}${goal}`;
    });
    return row([table.title, `${rates.join("; ")} (${table.unit})`, figures.join("; ")]);
  });
  return [row(["case", "rates", "ratios and shares"]), "| --- | --- | --- |", ...lines].join("\n");
}

/** The names of a command line's list, or all of the known ones; "none" is none. @throws Error naming an unknown one. */
export function chosen(option: string, value: string | undefined, known: readonly string[]): readonly string[] {
  if (value === undefined) return known;
  if (value === "none") return [];
  const names = value.split(",").map((name) => name.trim());
  const unknown = names.find((name) => !known.includes(name));
  if (unknown !== undefined) throw new Error(`--${option}: unknown "${unknown}"; known are ${known.join(", ")}`);
  return names;
}
