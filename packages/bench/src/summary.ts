// From runs to the table: one row per router, means over seeds. What the command prints and what the report shows is the same text.
import { interval } from "./metrics.ts";
import type { Baseline, LayerRouting, OverSeeds, RunResult, SummaryRow } from "./results.ts";

const mean = (values: readonly number[]): number =>
  values.length === 0 ? 0 : values.reduce((sum, x) => sum + x, 0) / values.length;

/** Mean over the layers of the last checkpoint. */
function atTheEnd(run: RunResult, of: (layer: LayerRouting) => number | undefined): number {
  return mean((run.checkpoints.at(-1)?.layers ?? []).flatMap((layer) => of(layer) ?? []));
}

/** Absent where no token went to any expert: there is no load to balance. */
export const imbalanceOf = ({ imbalance }: LayerRouting): number | undefined =>
  imbalance === 0 ? undefined : imbalance;

/** Mean over layers and checkpoints: how much routing still moves between one checkpoint and the next. */
function fluctuation(run: RunResult): number {
  const all = run.checkpoints.flatMap(({ layers }) => layers.flatMap((layer) => layer.fluctuation ?? []));
  return mean(all);
}

/** One row per router, in the order of the runs. */
export function summarise(runs: readonly RunResult[]): readonly SummaryRow[] {
  const names = [...new Set(runs.map(({ router }) => router))];
  return names.map((router) => {
    const own = runs.filter((run) => run.router === router);
    const over = (of: (run: RunResult) => number): OverSeeds => interval(own.map(of));
    return {
      router,
      seeds: own.length,
      parameters: own[0]?.parameters ?? { total: 0, active: 0 },
      bitsPerByte: over((run) => run.checkpoints.at(-1)?.bitsPerByte ?? 0),
      tokensPerSecond: over((run) => run.tokensPerSecond),
      imbalance: over((run) => atTheEnd(run, imbalanceOf)),
      dead: over((run) => (run.checkpoints.at(-1)?.layers ?? []).reduce((sum, layer) => sum + layer.dead, 0)),
      entropy: over((run) => atTheEnd(run, (layer) => layer.entropy)),
      fluctuation: over(fluctuation),
      noised: over(({ final }) => mean(final.layers.map((layer) => layer.noised.sets))),
      specialisation: over((run) => atTheEnd(run, (layer) => layer.specialisation)),
    };
  });
}

/** "2.31" or, over seeds, "2.31 ± 0.04". */
export function overSeedsText({ mean: value, halfWidth }: OverSeeds, digits: number): string {
  return halfWidth === undefined ? value.toFixed(digits) : `${value.toFixed(digits)} ± ${halfWidth.toFixed(digits)}`;
}

/** 1234567 as "1.23M", 45600 as "45.6k". */
export function shortCount(x: number): string {
  if (x >= 999_500) return `${(x / 1e6).toPrecision(3)}M`;
  return x >= 1000 ? `${(x / 1e3).toPrecision(3)}k` : String(Math.round(x));
}

export interface Column {
  readonly title: string;
  /** One sentence for a reader who meets the number for the first time. */
  readonly meaning: string;
  text(row: SummaryRow): string;
}

/** The columns of the table, router names left out. */
export const columns: readonly Column[] = [
  {
    title: "bits/byte",
    meaning:
      "Held-out loss: bits the model needs per byte of text it has not seen, mean over the domains. Lower is better.",
    text: (row) => overSeedsText(row.bitsPerByte, 3),
  },
  {
    title: "tokens/s",
    meaning: "Training speed.",
    text: (row) => overSeedsText(row.tokensPerSecond, 0),
  },
  {
    title: "active / total",
    meaning: "Parameters that work on one token, and all parameters.",
    text: ({ parameters }) => `${shortCount(parameters.active)} / ${shortCount(parameters.total)}`,
  },
  {
    title: "busiest",
    meaning: "Load of the busiest expert over the mean load, mean over the layers: 1 is perfect balance.",
    text: (row) => overSeedsText(row.imbalance, 2),
  },
  {
    title: "dead",
    meaning: "Experts, over all layers, that no token of the probe chose.",
    text: (row) => overSeedsText(row.dead, Number.isInteger(row.dead.mean) && row.dead.halfWidth === undefined ? 0 : 1),
  },
  {
    title: "entropy",
    meaning: "How undecided the router is on a token: 0 certain, 1 all experts alike.",
    text: (row) => overSeedsText(row.entropy, 2),
  },
  {
    title: "fluctuation",
    meaning: "Share of tokens whose experts changed from one checkpoint to the next, mean over the training.",
    text: (row) => overSeedsText(row.fluctuation, 2),
  },
  {
    title: "under noise",
    meaning:
      "Share of tokens whose experts change when one in twenty of the tokens around them is replaced, mean over the layers.",
    text: (row) => overSeedsText(row.noised, 2),
  },
  {
    title: "specialisation",
    meaning: "How much the expert tells about the domain: normalised mutual information, 0 nothing, 1 everything.",
    text: (row) => overSeedsText(row.specialisation, 2),
  },
];

/** The table as text, the baselines below the routers. */
export function tableText(summary: readonly SummaryRow[], baselines: readonly Baseline[]): string {
  const lines = [
    ["router", ...columns.map(({ title }) => title)],
    ...summary.map((row) => [row.router, ...columns.map((column) => column.text(row))]),
    ...baselines.map(({ name, bitsPerByte }) => [name, bitsPerByte.toFixed(3)]),
  ];
  const widths = Array.from({ length: columns.length + 1 }, (_, i) =>
    Math.max(...lines.map((line) => line[i]?.length ?? 0)),
  );
  const rendered = lines.map((line) =>
    line.map((cell, i) => (i === 0 ? cell.padEnd(widths[i] ?? 0) : cell.padStart(widths[i] ?? 0))).join("  "),
  );
  rendered.splice(1, 0, widths.map((width) => "─".repeat(width)).join("  "));
  return rendered.join("\n");
}
