// The figures of a trace's report. Heat maps are drawn as runs of one strength, which keeps a large one small; small ones print their
// numbers. One colour in many strengths, and marks where it matters, so that no colour vision is needed.
import * as Plot from "@observablehq/plot";
import { bothWidths, styleOf, svg, type Width, widths } from "./figures.ts";
import { escapeHtml } from "./page.ts";

const strengths = 12;
const strengthOf = (share: number): number => Math.round(strengths * Math.min(1, Math.max(0, share)));

/** Rows of values from 0 to 1 as horizontal strokes, one path per strength, in units of cells. */
function strokes(values: readonly (readonly number[])[], gap: number): string {
  const paths = new Map<number, string>();
  for (const [y, row] of values.entries()) {
    for (let x = 0; x < row.length; ) {
      const strength = strengthOf(row[x] ?? 0);
      let end = x + 1;
      while (gap === 0 && end < row.length && strengthOf(row[end] ?? 0) === strength) end++;
      if (strength > 0)
        paths.set(strength, `${paths.get(strength) ?? ""}M${x} ${y}h${gap === 0 ? end - x : (1 - gap).toFixed(2)}`);
      x = end;
    }
  }
  return [...paths]
    .map(([strength, path]) => `<path d="${path}" opacity="${(strength / strengths).toFixed(2)}"/>`)
    .join("");
}

/** Adjacent experts taken together, by their mean, so that at most `most` are left. */
export function grouped(values: readonly number[], most: number): number[] {
  const size = Math.max(1, Math.ceil(values.length / most));
  return Array.from({ length: Math.ceil(values.length / size) }, (_, i) => {
    const part = values.slice(i * size, (i + 1) * size);
    return part.reduce((sum, x) => sum + x, 0) / part.length;
  });
}

export interface HeatRow {
  readonly name: string;
  /** By expert, times an even share; layers with fewer experts have shorter rows. */
  readonly times: readonly number[];
}

/** Load by row and expert, 1 = an even share. × marks experts without load, ▲ those above `overload`, where there is room. */
export function heatFigure(rows: readonly HeatRow[], { overload, label }: { overload: number; label: string }): string {
  const experts = Math.max(1, ...rows.map(({ times }) => times.length));
  const most = Math.max(overload, ...rows.map(({ times }) => times.reduce((a, b) => Math.max(a, b), 0)));
  return bothWidths((width) => heat(rows, { experts, most, overload, label, width }));
}

interface Heat {
  readonly experts: number;
  readonly most: number;
  readonly overload: number;
  readonly label: string;
  readonly width: Width;
}

/** Cells of at least so many pixels hold a mark. */
const markedCell = 7.5;
const mostBlocks = 4;
/** Up to so many experts are marked at every width. */
export const mostMarked = mostBlocks * Math.floor((widths.narrow - 105) / markedCell);

/** Ranges of experts that stand below each other: one, or so many that a cell holds its mark. */
function blocksOf(experts: number, room: number): [from: number, to: number][] {
  const count = Math.ceil(experts / Math.floor(room / markedCell));
  if (count > mostBlocks) return [[0, experts]];
  const size = Math.ceil(experts / count);
  return Array.from({ length: count }, (_, i) => [i * size, Math.min(experts, (i + 1) * size)]);
}

interface Cells {
  readonly cell: number;
  readonly height: number;
  readonly most: number;
  readonly overload: number;
}

const inkOn = (share: number): string => (share > 0.55 ? "var(--heat-ink)" : "var(--ink)");

/** The load in every cell, a cross where there is none. */
function numbersOf(rows: readonly (readonly number[])[], { cell, height, most, overload }: Cells): string {
  const texts = rows.flatMap((times, y) =>
    times.map((x, e) => {
      const bold = x > overload ? ' font-weight="700" text-decoration="underline"' : "";
      const at = `x="${((e + 0.48) * cell).toFixed(1)}" y="${((y + 0.5) * height).toFixed(1)}"`;
      return `<text ${at} fill="${inkOn(x / most)}"${bold}>${x === 0 ? "×" : x.toFixed(1)}</text>`;
    }),
  );
  return texts.join("");
}

/** Crosses and triangles in the cells of dead and overloaded experts: one path for each kind, since there may be thousands. */
function marksOf(rows: readonly (readonly number[])[], { cell, height, most, overload }: Cells): string {
  const r = Number(Math.min(2.6, 0.32 * cell, 0.32 * height).toFixed(1));
  const wide = Number((2 * r).toFixed(1));
  const paths = { crosses: "", dark: "", light: "" };
  for (const [y, times] of rows.entries()) {
    for (const [e, x] of times.entries()) {
      const [left, middle] = [(e + 0.5) * cell, (y + 0.5) * height];
      const top = (middle - r).toFixed(1);
      if (x === 0) paths.crosses += `M${(left - r).toFixed(1)} ${top}l${wide} ${wide}m0-${wide}l-${wide} ${wide}`;
      else if (x > overload) {
        paths[x / most > 0.55 ? "light" : "dark"] += `M${left.toFixed(1)} ${top}l${r} ${wide}h-${wide}z`;
      }
    }
  }
  return (
    `<path class="crosses" d="${paths.crosses}" fill="none" stroke="var(--ink)" stroke-width=".8"/>` +
    `<path class="triangles" d="${paths.dark}" fill="var(--ink)"/>` +
    `<path class="triangles" d="${paths.light}" fill="var(--heat-ink)"/>`
  );
}

function heat(rows: readonly HeatRow[], { experts, most, overload, label, width }: Heat): string {
  const room = widths[width];
  const left = Math.min(width === "wide" ? 150 : 105, 12 + 6.4 * Math.max(...rows.map(({ name }) => name.length)));
  const blocks = blocksOf(experts, room - left);
  const [[, widest] = [0, experts]] = blocks;
  const group = Math.max(1, Math.ceil(widest / (room - left))); // a cell has at least a pixel
  const columns = Math.ceil(widest / group);
  const cell = Math.min(60, (room - left - 2) / columns);
  const numbers = cell >= 21 && group === 1;
  const height = numbers ? 21 : Math.max(6, Math.min(15, cell, 420 / rows.length));
  const every = 2 ** Math.ceil(Math.log2(Math.max(1, (23 / cell) * group)));
  const bottom = rows.length * height;
  const apart = bottom + 24;
  const step = Math.ceil(11 / height);
  const names = rows.flatMap(({ name }, y) =>
    y % step === 0
      ? [`<text x="-7" y="${((y + 0.5) * height).toFixed(1)}" text-anchor="end">${escapeHtml(name)}</text>`]
      : [],
  );
  const parts = blocks.map(([from, to], block) => {
    const own = rows.map(({ times }) => times.slice(from, to));
    const shown = own.map((times) => grouped(times, columns).map((x) => x / most));
    const marks =
      group > 1 || cell < 7
        ? ""
        : numbers
          ? numbersOf(own, { cell, height, most, overload })
          : marksOf(own, { cell, height, most, overload });
    const ticks = Array.from({ length: Math.ceil((to - from) / every) }, (_, i) => {
      const e = i * every;
      return `<text x="${((e / group + 0.5) * cell).toFixed(1)}" y="${bottom + 11}">${from + e}</text>`;
    });
    return (
      `<g transform="translate(0 ${(block * apart).toFixed(1)})">` +
      `<g class="cells" transform="translate(0 ${(height / 2).toFixed(1)}) scale(${cell.toFixed(3)} ${height.toFixed(2)})" stroke-width="${height > 9 ? 0.94 : 1}">` +
      `${strokes(shown, cell > 9 ? 0.05 : 0)}</g>` +
      `<g class="marks" style="font-size:${cell < 25 ? 9 : 10.5}px">${marks}</g>` +
      `<g class="axis">${names.join("")}${ticks.join("")}</g></g>`
    );
  });
  const end = (blocks.length - 1) * apart + bottom;
  return (
    `<svg class="plot" viewBox="0 0 ${room} ${(end + 34).toFixed(0)}" role="img" aria-label="${escapeHtml(label)}">` +
    `<g transform="translate(${left.toFixed(0)} 2)" text-anchor="middle" dominant-baseline="central" fill="var(--ink)">${parts.join("")}` +
    `<g class="axis"><text x="${((columns * cell) / 2).toFixed(0)}" y="${(end + 26).toFixed(0)}">expert</text></g></g></svg>`
  );
}

export interface Square {
  readonly title: string;
  /** Shares from 0 to 1, by row and column. */
  readonly shares: readonly (readonly number[])[];
  /** Leaves out the diagonal. */
  readonly own: boolean;
  readonly label: string;
}

const mostSide = 64;

/** A square of shares per layer, side by side as many as fit. Up to 12 experts print numbers in per cent. */
export function squaresFigure(squares: readonly Square[]): string {
  const greatest = squares.reduce(
    (most, { shares, own }) =>
      shares.reduce((a, row, y) => row.reduce((b, x, i) => (own && i === y ? b : Math.max(b, x)), a), most),
    0.1,
  );
  const drawn = squares.map(({ title, shares, own, label }) => {
    const plain = shares.map((row, y) => row.map((x, i) => (own && i === y ? 0 : x)));
    const wide = plain.map((row) => grouped(row, mostSide));
    const columns = wide[0]?.length ?? 0;
    const across = Array.from({ length: columns }, (_, x) =>
      grouped(
        wide.map((row) => row[x] ?? 0),
        mostSide,
      ),
    );
    const small = Array.from({ length: across[0]?.length ?? 0 }, (_, y) => across.map((column) => column[y] ?? 0));
    const most = Math.max(greatest, 0.1);
    const [height, numbers] = [small.length, Math.max(columns, small.length) <= 12];
    const texts = small.flatMap((row, y) =>
      row.flatMap((x, i) => {
        if (own && i === y) return [`<text x="${20 * i + 10}" y="${20 * y + 10}" fill="var(--muted)">–</text>`];
        const ink = x / most > 0.55 ? "var(--heat-ink)" : "var(--ink)";
        return numbers
          ? [`<text x="${20 * i + 10}" y="${20 * y + 10}" fill="${ink}">${Math.round(100 * x)}</text>`]
          : [];
      }),
    );
    const groups = Math.max(1, Math.ceil(shares.length / mostSide));
    const ids = (n: number, place: (i: number) => string, all: number): string =>
      Array.from({ length: n }, (_, i) =>
        numbers || i === 0 || i === n - 1
          ? `<text ${place(i)}>${numbers ? i : Math.min(all - 1, Math.round((i / Math.max(1, n - 1)) * (all - 1)))}</text>`
          : "",
      ).join("");
    // Axis texts of large squares keep their size: the unit grows with the square.
    const font = numbers ? 8 : Math.max(columns, height) * 0.85;
    const edge = 2.2 * font;
    const box = `viewBox="${-edge} ${-edge} ${20 * columns + edge} ${20 * height + edge}"`;
    const frame = `<rect width="${20 * columns}" height="${20 * height}" fill="none" stroke="var(--rule)" stroke-width="${font / 9}"/>`;
    const note = groups > 1 ? ` <span class="note">by groups of ${groups}</span>` : "";
    return (
      `<figure class="square"><h3>${escapeHtml(title)}${note}</h3><svg class="plot" ${box} role="img" aria-label="${escapeHtml(label)}" ` +
      `text-anchor="middle" dominant-baseline="central" style="font-size:${font.toFixed(1)}px">${frame}` +
      `<g class="cells" transform="translate(0 10) scale(20)" stroke-width="${numbers ? 0.94 : 1}">` +
      `${strokes(
        small.map((row) => row.map((x) => x / most)),
        numbers ? 0.05 : 0,
      )}</g>${numbers || own ? texts.join("") : ""}` +
      `<g fill="var(--muted)">${ids(columns, (i) => `x="${20 * i + 10}" y="${-0.9 * font}"`, shares[0]?.length ?? 0)}` +
      `${ids(height, (i) => `x="${-1.1 * font}" y="${20 * i + 10}"`, shares.length)}</g></svg></figure>`
    );
  });
  return `<div class="squares">${drawn.join("")}</div>`;
}

/** What a figure's colours mean: the strengths with their values. */
export const strengthLegend = (least: string, greatest: string): string =>
  `<span class="strengths">${least}<svg class="plot" viewBox="0 0 ${strengths} 1" preserveAspectRatio="none" aria-hidden="true"><g class="cells" transform="translate(0 .5)" stroke-width="1">${strokes([Array.from({ length: strengths }, (_, i) => (i + 1) / strengths)], 0)}</g></svg>${greatest}</span>`;

export interface LayerSeries {
  readonly name: string;
  /** By layer, undefined where there is none. */
  readonly values: readonly (number | undefined)[];
}

/** Numbers from 0 to 1 over the layers: lines that differ by dash and marker as well. */
export function layersFigure(series: readonly LayerSeries[], names: readonly string[]): string {
  const points = series.map(({ values }) => values.flatMap((y, x) => (y === undefined ? [] : [{ x, y }])));
  const said = series.map(({ name }, i) => `${name} ${points[i]?.map(({ y }) => y.toFixed(2)).join(", ")}`);
  return bothWidths((width) => {
    const step = Math.ceil(names.length / Math.floor(widths[width] / (width === "wide" ? 70 : 60)));
    return svg(
      width,
      {
        height: 230,
        marginLeft: 34,
        marginRight: 16,
        marginTop: 12,
        marginBottom: 30,
        x: {
          type: "point",
          domain: names.map((_, i) => i),
          label: null,
          ticks: names.flatMap((_, i) => (i % step === 0 ? [i] : [])),
          tickFormat: (i: number) => names[i] ?? "",
        },
        y: { domain: [0, 1], label: null, grid: true, ticks: 5 },
        marks: points.flatMap((own, i) => {
          const { colour, dash, symbol } = styleOf(i);
          return [
            Plot.line(own, { x: "x", y: "y", stroke: colour, strokeWidth: 2, strokeDasharray: dash }),
            Plot.dot(own, { x: "x", y: "y", r: 4, symbol, fill: colour, stroke: "var(--paper)" }),
          ];
        }),
      },
      `By layer: ${said.join("; ")}`,
    );
  });
}
