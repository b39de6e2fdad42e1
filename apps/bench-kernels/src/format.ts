// Tables of one measured case as text.
import type { Summary } from "@switchyard/bench/kernels";
import type { Figure, Goal, Table } from "./suite.ts";

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

const columns = (rows: readonly (readonly string[])[]): string[] => {
  const widths = (rows[0] ?? []).map((_, i) => Math.max(...rows.map((row) => (row[i] ?? "").length)));
  return rows.map((row) =>
    `  ${row.map((cell, i) => (i === 0 ? cell.padEnd(widths[i] ?? 0) : cell.padStart(widths[i] ?? 0))).join("  ")}`.trimEnd(),
  );
};

/** Rates and times per contender, then the ratios with their goals. `used`: the threads of those that have fewer than asked for. */
export function tableText(table: Table, used: Readonly<Record<string, number>> = {}): string {
  const { title, threads, unit, amounts, entries, figures } = table;
  const rows = entries.map(({ name, timing, error, failed }) => {
    const own = used[name] ?? threads;
    const label = own === threads ? name : `${name} (${own} thread${own > 1 ? "s" : ""})`;
    if (failed !== undefined || timing === undefined) return [label, "-", "-", "-", "-", failed ?? "not measured"];
    const milliseconds = (x: number): number => x * 1000;
    const wall: Summary = {
      ...timing.wall,
      median: milliseconds(timing.wall.median),
      min: milliseconds(timing.wall.min),
      max: milliseconds(timing.wall.max),
    };
    return [
      label,
      significant((amounts[name] ?? Number.NaN) / timing.wall.median),
      spread(wall),
      timing.cpu ? significant(timing.cpu.median / timing.wall.median) : "-",
      error === undefined ? "-" : error.toExponential(1),
      "",
    ];
  });
  const lines = columns([["", unit, "ms: median (min to max)", "CPUs busy", "error", ""], ...rows]);
  for (const figure of figures) {
    const verdict = reached(figure);
    const goal = figure.goal ? `   goal ${wanted(figure.goal)}: ${verdict ? "reached" : "missed"}` : "";
    const cpu = figure.cpu ? `, in CPU time ${significant(figure.cpu.median)}` : "";
    lines.push(`  ${figure.label} = ${spread(figure.value)}${cpu}${goal}`);
  }
  return [`${title}, ${threads} thread${threads > 1 ? "s" : ""}`, ...lines].join("\n");
}
