// The figures of the report: results in, SVG out. Colours are CSS variables of the page, so that one SVG serves light and dark;
// routers differ by dash and marker as well as by colour, and heat maps print their numbers.
import * as Plot from "@observablehq/plot";
import { parseHTML } from "linkedom";
import type { CheckpointRecord, LayerRouting, Results, RunResult } from "./results.ts";
import { imbalanceOf } from "./summary.ts";

/** How a router is drawn. */
export interface Style {
  readonly colour: string;
  readonly dash: string;
  readonly symbol: "circle" | "square" | "triangle" | "diamond" | "star" | "times";
}

const symbols = ["circle", "square", "triangle", "diamond", "star", "times"] as const;
const dashes = ["none", "7 3", "2 3", "10 3 2 3", "4 2", "1 2"] as const;

/** Distinct for 36 routers: the second six have the colours of the first, with other dashes and markers. */
export function styleOf(index: number): Style {
  const shifted = index + Math.floor(index / 6);
  return {
    colour: `var(--series-${(index % 6) + 1})`,
    dash: dashes[shifted % dashes.length] ?? "none",
    symbol: symbols[shifted % symbols.length] ?? "circle",
  };
}

/** Figures are drawn twice, for a page and for a phone; the style sheet shows the one that fits. */
export const widths = { wide: 800, narrow: 350 } as const;
export type Width = keyof typeof widths;

/** A figure as SVG with what it says in words; the page styles it. */
export function svg(width: Width, options: Plot.PlotOptions, label: string): string {
  const { document } = parseHTML("<!doctype html><html><body></body></html>");
  const element = Plot.plot({
    document,
    width: widths[width],
    className: "plot",
    ...options,
  });
  element.setAttribute("role", "img");
  element.setAttribute("aria-label", label);
  for (const style of element.querySelectorAll("style")) style.remove(); // the page styles `.plot` once
  return element.outerHTML;
}

export function bothWidths(draw: (width: Width) => string): string {
  return `<div class="wide">${draw("wide")}</div><div class="narrow">${draw("narrow")}</div>`;
}

/** Moves labels apart to at least `gap`, keeping their order and staying close to where they belong. */
export function spread(positions: readonly number[], gap: number): readonly number[] {
  const order = positions.map((_, i) => i).sort((a, b) => (positions[a] ?? 0) - (positions[b] ?? 0));
  // Groups of touching labels: each is centred on the mean of the places its labels would like.
  const groups: { members: number[]; centre: number }[] = [];
  for (const i of order) {
    groups.push({ members: [i], centre: positions[i] ?? 0 });
    for (;;) {
      const last = groups.at(-1);
      const before = groups.at(-2);
      if (last === undefined || before === undefined) break;
      if (last.centre - before.centre >= (gap * (last.members.length + before.members.length)) / 2 - 1e-9) break;
      const members = [...before.members, ...last.members];
      groups.splice(-2, 2, {
        members,
        centre: members.reduce((sum, m) => sum + (positions[m] ?? 0), 0) / members.length,
      });
    }
  }
  const out = [...positions];
  for (const { members, centre } of groups) {
    for (const [place, i] of members.entries()) out[i] = centre + (place - (members.length - 1) / 2) * gap;
  }
  return out;
}

interface Point {
  readonly x: number;
  readonly y: number;
  readonly low?: number;
  readonly high?: number;
}

interface Series {
  readonly name: string;
  readonly style: Style;
  readonly points: readonly Point[];
}

const routersOf = (results: Results): readonly string[] => [...new Set(results.runs.map(({ router }) => router))];
const mean = (values: readonly number[]): number => values.reduce((sum, x) => sum + x, 0) / Math.max(1, values.length);

/** A number of every checkpoint over the seeds of each router: mean, least and greatest. */
function overTraining(
  results: Results,
  of: (record: CheckpointRecord, run: RunResult) => number | undefined,
): Series[] {
  return routersOf(results).map((name, i) => {
    const own = results.runs.filter(({ router }) => router === name);
    const points = (own[0]?.checkpoints ?? []).flatMap(({ step }, at) => {
      const values = own.flatMap((run) => {
        const record = run.checkpoints[at];
        return record === undefined ? [] : (of(record, run) ?? []);
      });
      if (values.length === 0) return [];
      return { x: tokensAt(own[0], step), y: mean(values), low: Math.min(...values), high: Math.max(...values) };
    });
    return { name, style: styleOf(i), points };
  });
}

const tokensAt = (run: RunResult | undefined, step: number): number =>
  run === undefined || run.steps === 0 ? 0 : (run.tokens / run.steps) * step;

/** At most `most` points, each the mean of a stretch. */
export function thinned(
  values: readonly number[],
  most: number,
): readonly { readonly at: number; readonly value: number }[] {
  const stretch = Math.max(1, Math.ceil(values.length / most));
  return Array.from({ length: Math.ceil(values.length / stretch) }, (_, i) => {
    const part = values.slice(i * stretch, (i + 1) * stretch);
    return { at: i * stretch + (part.length + 1) / 2, value: mean(part) };
  });
}

interface LineFigure {
  readonly series: readonly Series[];
  /** Thin lines behind the series. */
  readonly faint?: readonly Series[];
  readonly rules?: readonly { readonly name: string; readonly y: number }[];
  readonly label: string;
  readonly height: number;
  readonly digits: number;
  readonly fromZero?: boolean;
  readonly width: Width;
  readonly pixels?: number;
}

function lines(figure: LineFigure): string {
  const {
    series,
    faint = [],
    rules = [],
    label,
    height,
    digits,
    fromZero = false,
    width,
    pixels = widths[width],
  } = figure;
  const values = [
    ...series.flatMap(({ points }) => points.flatMap(({ y, low = y, high = y }) => [y, low, high])),
    ...faint.flatMap(({ points }) => points.map(({ y }) => y)),
    ...rules.map(({ y }) => y),
  ];
  const low = fromZero ? 0 : Math.min(...values);
  const high = Math.max(...values, low + 10 ** -digits);
  const pad = (high - low) * 0.06;
  const domain: [number, number] = [fromZero ? 0 : low - pad, high + pad];
  const marginTop = 14;
  const marginBottom = 34;
  const marginLeft = 40;
  const longest = Math.max(...series.map(({ name }) => name.length), 3);
  const marginRight = width === "wide" && pixels > 400 ? 22 + longest * 6.6 + 34 : 40;
  const inner = height - marginTop - marginBottom;
  const ends = series.flatMap((one) => {
    const last = one.points.at(-1);
    return last === undefined ? [] : [{ ...one, last }];
  });
  const toPixel = (y: number): number => ((domain[1] - y) / (domain[1] - domain[0])) * inner;
  const places = spread(
    ends.map(({ last }) => toPixel(last.y)),
    15,
  );
  const x = Math.max(0, ...series.flatMap(({ points }) => points.map((point) => point.x)));
  const unit = x >= 2e6 ? 1e6 : 1000;
  return svg(
    width,
    {
      width: pixels,
      height,
      marginTop,
      marginBottom,
      marginLeft,
      marginRight,
      x: {
        label: unit === 1e6 ? "training tokens, millions →" : "training tokens, thousands →",
        transform: (tokens: number) => tokens / unit,
        ticks: pixels < 400 ? 4 : 7,
        domain: [0, Math.max(x, 1) / unit],
      },
      y: { domain, label: null, grid: true, ticks: Math.max(3, Math.round(inner / 45)) },
      marks: [
        ...rules.map(({ y }) =>
          Plot.ruleY([y], { stroke: "var(--muted)", strokeDasharray: "1 3", strokeLinecap: "round" }),
        ),
        ...rules.map(({ name, y }) =>
          Plot.text([{ y }], {
            y: "y",
            text: () => `${name} ${y.toFixed(digits)}`,
            frameAnchor: "right",
            textAnchor: "end",
            dy: -7,
            fill: "var(--muted)",
            stroke: "var(--paper)",
            strokeWidth: 4,
          }),
        ),
        ...faint.map(({ points, style }) =>
          Plot.line(points, { x: "x", y: "y", stroke: style.colour, strokeOpacity: 0.35, strokeWidth: 1 }),
        ),
        ...series
          .filter(({ points }) => points.some(({ low: a, high: b }) => a !== b))
          .map(({ points, style }) =>
            Plot.areaY(points, { x: "x", y1: "low", y2: "high", fill: style.colour, fillOpacity: 0.16 }),
          ),
        ...series.map(({ points, style }) =>
          Plot.line(points, { x: "x", y: "y", stroke: style.colour, strokeWidth: 2, strokeDasharray: style.dash }),
        ),
        ...series.map(({ points, style }) =>
          Plot.dot(points, {
            x: "x",
            y: "y",
            r: 3.6,
            symbol: style.symbol,
            fill: style.colour,
            stroke: "var(--paper)",
            strokeWidth: 0.8,
          }),
        ),
        ...ends.map(({ name, style, last }, i) =>
          Plot.text([last], {
            x: "x",
            y: "y",
            text: () => (marginRight > 60 ? `${name} ${last.y.toFixed(digits)}` : last.y.toFixed(digits)),
            textAnchor: "start",
            dx: 9,
            dy: (places[i] ?? 0) - toPixel(last.y),
            fill: style.colour,
            fontWeight: 600,
          }),
        ),
      ],
    },
    label,
  );
}

/** Loss over training: bold with markers on held-out text, thin on the training batches; baselines as dotted rules. */
export function lossFigure(results: Results): string {
  const series = overTraining(results, ({ bitsPerByte }) => bitsPerByte);
  const faint = routersOf(results).map((name, i): Series => {
    const run = results.runs.find(({ router }) => router === name);
    const points = thinned(run?.training.bitsPerByte ?? [], 160).map(({ at, value }) => ({
      x: tokensAt(run, at),
      y: value,
    }));
    return { name, style: styleOf(i), points };
  });
  const rules = results.baselines.map(({ name, bitsPerByte }) => ({ name, y: bitsPerByte }));
  const label = `Held-out loss in bits per byte over training: ${described(series, 3)}`;
  const height = Math.max(320, 60 + 17 * series.length); // room for every label at the end of its line
  return bothWidths((width) =>
    lines({ series, faint, rules, label, digits: 3, height: width === "wide" ? Math.max(380, height) : 320, width }),
  );
}

const described = (series: readonly Series[], digits: number): string =>
  series.map(({ name, points }) => `${name} ends at ${points.at(-1)?.y.toFixed(digits) ?? "nothing"}`).join(", ");

const overLayers = (
  layers: readonly LayerRouting[],
  of: (layer: LayerRouting) => number | undefined,
): number | undefined => {
  const values = layers.flatMap((layer) => of(layer) ?? []);
  return values.length === 0 ? undefined : mean(values);
};

export interface SmallFigure {
  readonly title: string;
  readonly svg: string;
}

/** How routing developed: entropy, fluctuation, balance and specialisation, each the mean over the layers. */
export function routingFigures(results: Results): readonly SmallFigure[] {
  const of: readonly [string, (layer: LayerRouting) => number | undefined][] = [
    ["Routing entropy", (layer) => layer.entropy],
    ["Routing fluctuation", (layer) => layer.fluctuation],
    ["Load of the busiest expert, × the mean", imbalanceOf],
    ["Specialisation by domain", (layer) => layer.specialisation],
  ];
  return of.map(([title, value]) => {
    const series = overTraining(results, ({ layers }) => overLayers(layers, value));
    const label = `${title} over training: ${described(series, 2)}`;
    return { title, svg: lines({ series, label, digits: 2, height: 210, fromZero: true, width: "narrow" }) };
  });
}

interface ByDomain {
  readonly what: string;
  readonly axis: string;
  readonly of: (run: RunResult, domain: number) => number;
  /** Dotted ticks with a name above them. */
  readonly ticks?: readonly { readonly name: string; readonly domain: string; readonly x: number }[];
}

/** The end of training by domain: one marker per router, mean over the seeds. */
function byDomain(results: Results, { what, axis, of, ticks = [] }: ByDomain): string {
  const names = results.domains.map(({ name }) => name);
  const routers = routersOf(results);
  const dots = routers.flatMap((router, i) => {
    const own = results.runs.filter((run) => run.router === router);
    return names.map((domain, d) => ({ domain, x: mean(own.map((run) => of(run, d))), style: styleOf(i), router: i }));
  });
  const row = Math.max(46, 18 + 3.5 * routers.length);
  const label = `${what} by domain: ${routers
    .map(
      (router, i) =>
        `${router} ${dots
          .slice(i * names.length, (i + 1) * names.length)
          .map(({ domain, x }) => `${domain} ${x.toFixed(2)}`)
          .join(", ")}`,
    )
    .join("; ")}`;
  return bothWidths((width) =>
    svg(
      width,
      {
        height: 50 + names.length * row,
        marginLeft: Math.min(130, 14 + 7 * Math.max(...names.map(({ length }) => length))),
        marginRight: 24,
        marginTop: 16,
        marginBottom: 34,
        x: { label: `${axis} →`, grid: true, ticks: width === "wide" ? 8 : 5, inset: 8 },
        y: { domain: names, label: null, tickSize: 0 },
        marks: [
          Plot.ruleY(names, { stroke: "var(--rule)" }),
          Plot.tickX(ticks, {
            x: "x",
            y: "domain",
            stroke: "var(--muted)",
            strokeWidth: 1.5,
            strokeDasharray: "1 2.5",
            inset: 5,
          }),
          Plot.text(ticks, { x: "x", y: "domain", text: "name", dy: -22, fill: "var(--muted)", fontSize: 10.5 }),
          ...dots.map(({ style, router, ...dot }) =>
            Plot.dot([dot], {
              x: "x",
              y: "domain",
              dy: (router - (routers.length - 1) / 2) * Math.min(4, (row - 18) / routers.length), // equal numbers stay visible
              r: 5,
              symbol: style.symbol,
              fill: style.colour,
              stroke: "var(--paper)",
            }),
          ),
        ],
      },
      label,
    ),
  );
}

/** Held-out loss by domain, ticks for the baselines. */
export function domainFigure(results: Results): string {
  const ticks = results.baselines.flatMap(({ name, perDomain }) =>
    perDomain.map((x, d) => ({ name: name.replace(/ .*/, ""), domain: results.domains[d]?.name ?? "", x })),
  );
  return byDomain(results, {
    what: "Held-out bits per byte",
    axis: "bits per byte",
    of: (run, d) => run.checkpoints.at(-1)?.perDomain[d] ?? 0,
    ticks,
  });
}

/** Experts per token by domain, mean over the layers: where routers that choose how many spend their compute. */
export function computeFigure(results: Results): string {
  return byDomain(results, {
    what: "Experts per token",
    axis: "experts per token",
    of: (run, d) => mean((run.checkpoints.at(-1)?.layers ?? []).map((layer) => layer.expertsByDomain[d] ?? 0)),
  });
}

/** Who works with whom: of the tokens of the row's expert, the share that the column's expert sees too; one square per layer. */
export function togetherFigure(run: RunResult): string {
  const { layers } = run.final;
  const cells = layers.flatMap(({ together }, layer) =>
    together.flatMap((row, a) =>
      row.map((share, b) => ({ layer: `layer ${layer + 1}`, a, b, share: a === b ? 0 : share, own: a === b })),
    ),
  );
  const experts = layers[0]?.together.length ?? 0;
  const ids = Array.from({ length: experts }, (_, e) => e);
  const greatest = cells.reduce((most, cell) => (cell.share > most.share ? cell : most), {
    layer: "no layer",
    a: 0,
    b: 0,
    share: 0,
    own: false,
  });
  const most = Math.max(0.2, greatest.share);
  const label =
    `Co-activation of ${experts} experts for ${run.router}; most often expert ${greatest.b} joins expert ${greatest.a} in ` +
    `${greatest.layer}, in ${Math.round(100 * greatest.share)} % of its tokens`;
  return bothWidths((width) => {
    const across = Math.min(layers.length, width === "wide" ? 4 : 2);
    const rows = Math.ceil(layers.length / Math.max(1, across));
    const side = (widths[width] - 50) / Math.max(1, across);
    const numbers = (side - 12) / Math.max(1, experts) >= 19;
    const place = ({ layer }: { layer: string }): number => layers.findIndex((_, i) => layer === `layer ${i + 1}`);
    const facet = {
      fx: (cell: { layer: string }) => place(cell) % across,
      fy: (cell: { layer: string }) => Math.floor(place(cell) / across),
    };
    return svg(
      width,
      {
        height: rows * side + 30,
        marginLeft: 28,
        marginRight: 4,
        marginTop: 18,
        marginBottom: 20,
        x: { label: null, domain: ids, tickSize: 0, ticks: numbers ? ids : [] },
        y: { label: null, domain: ids, tickSize: 0, ticks: numbers ? ids : [] },
        fx: { axis: null, padding: 0.08 },
        fy: { axis: null, padding: 0.2 },
        opacity: { type: "identity" },
        marks: [
          Plot.cell(cells, {
            ...facet,
            x: "b",
            y: "a",
            inset: 0.5,
            rx: 2,
            fill: ({ own }: { own: boolean }) => (own ? "var(--rule)" : "var(--heat)"),
            fillOpacity: ({ own, share }: { own: boolean; share: number }) => (own ? 1 : 0.03 + 0.97 * (share / most)),
          }),
          ...(numbers
            ? [
                Plot.text(
                  cells.filter(({ own }) => !own),
                  {
                    ...facet,
                    x: "b",
                    y: "a",
                    text: ({ share }: { share: number }) => String(Math.round(100 * share)),
                    fontSize: 9,
                    fill: ({ share }: { share: number }) => (share / most > 0.55 ? "var(--heat-ink)" : "var(--ink)"),
                  },
                ),
              ]
            : []),
          Plot.text(
            layers.map((_, i) => ({ layer: `layer ${i + 1}` })),
            { ...facet, text: "layer", frameAnchor: "top", dy: -12, fill: "var(--muted)" },
          ),
        ],
      },
      label,
    );
  });
}

/** Load of every expert by layer and domain, 1 = an even share: one heat map for one run. */
export function loadFigure(run: RunResult, domains: readonly string[]): string {
  const layers = run.checkpoints.at(-1)?.layers ?? [];
  const cells = layers.flatMap(({ load }, layer) =>
    load.flatMap((row, d) =>
      row.map((share, expert) => ({
        layer: `layer ${layer + 1}`,
        domain: domains[d] ?? "",
        expert,
        times: share * row.length,
      })),
    ),
  );
  const most = Math.max(2, ...cells.map(({ times }) => times));
  const experts = Math.max(0, ...cells.map(({ expert }) => expert + 1));
  const marginLeft = Math.min(120, 14 + 6.2 * Math.max(0, ...domains.map(({ length }) => length)));
  const label = `Load of ${experts} experts by layer and domain for ${run.router}; greatest ${most.toFixed(1)} times an even share`;
  return bothWidths((width) => {
    const cell = (widths[width] - marginLeft - 60) / Math.max(1, experts);
    const numbers = cell >= 22;
    return svg(
      width,
      {
        height: 40 + layers.length * (domains.length * 22 + 10),
        marginLeft,
        marginRight: 60,
        marginTop: 4,
        marginBottom: 32,
        x: {
          label: "expert",
          tickSize: 0,
          domain: Array.from({ length: experts }, (_, e) => e),
          labelAnchor: "center",
        },
        y: { label: null, tickSize: 0, domain: [...domains] },
        fy: { label: null, domain: layers.map((_, i) => `layer ${i + 1}`), padding: 0.12 },
        marks: [
          Plot.cell(cells, {
            x: "expert",
            y: "domain",
            fy: "layer",
            inset: 0.5,
            rx: 2,
            fill: "var(--heat)",
            fillOpacity: ({ times }: { times: number }) => 0.04 + 0.96 * Math.min(1, times / most),
          }),
          ...(numbers
            ? [
                Plot.text(cells, {
                  x: "expert",
                  y: "domain",
                  fy: "layer",
                  text: ({ times }: { times: number }) => (times === 0 ? "0" : times.toFixed(1)),
                  fontSize: cell < 28 ? 9 : 10.5,
                  fill: ({ times }: { times: number }) => (times / most > 0.55 ? "var(--heat-ink)" : "var(--ink)"),
                }),
              ]
            : []),
        ],
        color: { type: "identity" },
        opacity: { type: "identity" },
      },
      label,
    );
  });
}

/** A line with its marker, for the legend. */
export function swatch({ colour, dash, symbol }: Style): string {
  const { document } = parseHTML("<!doctype html><html><body></body></html>");
  const element = Plot.plot({
    document,
    width: 44,
    height: 14,
    margin: 0,
    axis: null,
    className: "plot",
    x: { domain: [0, 44] },
    y: { domain: [0, 14] },
    marks: [
      Plot.ruleY([7], { stroke: colour, strokeWidth: 2, strokeDasharray: dash }),
      Plot.dot([[22, 7]], { r: 4, symbol, fill: colour, stroke: "var(--paper)" }),
    ],
  });
  element.setAttribute("aria-hidden", "true");
  for (const style of element.querySelectorAll("style")) style.remove();
  return element.outerHTML;
}
