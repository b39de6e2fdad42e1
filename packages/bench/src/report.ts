// One self-contained HTML file about a comparison: no network, light and dark, readable on a phone and without colour vision.
import {
  computeFigure,
  domainFigure,
  loadFigure,
  lossFigure,
  routingFigures,
  type Style,
  styleOf,
  swatch,
  togetherFigure,
} from "./figures.ts";
import type { OverSeeds, Results, RunResult, Sample, SampleToken } from "./results.ts";
import { columns, shortCount } from "./summary.ts";

const escapes: Readonly<Record<string, string>> = {
  "&": "&amp;",
  "<": "&lt;",
  ">": "&gt;",
  '"': "&quot;",
  "'": "&#39;",
};
const escapeHtml = (text: string): string => text.replace(/[&<>"']/g, (c) => escapes[c] ?? c);

const css = `
:root {
  color-scheme: light dark;
  --paper: #fdfcf9; --ink: #1d1d1f; --muted: #6a6a70; --rule: #dedcd5; --panel: #f4f2ec; --accent: #005a9c;
  --series-1: #0068b0; --series-2: #c24e00; --series-3: #007a58; --series-4: #9b3f7b; --series-5: #7a6200; --series-6: #5547b5;
  --heat: #0b5fa5; --heat-ink: #ffffff; --token: 86%; --token-chroma: 72%;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #16171a; --ink: #e9e7e2; --muted: #9c9a94; --rule: #34363b; --panel: #1f2125; --accent: #7cc0ff;
    --series-1: #62b5f5; --series-2: #ff9a57; --series-3: #43c9a0; --series-4: #ec93cb; --series-5: #dcc04a; --series-6: #a99df5;
    --heat: #6db8f2; --heat-ink: #0c1014; --token: 27%; --token-chroma: 42%;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2.5rem 1.25rem 5rem; max-width: 54rem; background: var(--paper); color: var(--ink);
  font: 1.0625rem/1.6 Charter, "Iowan Old Style", "Palatino Linotype", Palatino, Georgia, serif; text-rendering: optimizeLegibility;
}
h1 { font-size: clamp(1.7rem, 5vw, 2.4rem); line-height: 1.15; margin: 0 0 .6rem; letter-spacing: -.01em; text-wrap: balance; }
h2 { font-size: 1.35rem; line-height: 1.25; margin: 3.2rem 0 .4rem; }
p { margin: .5rem 0 1rem; } .lead { font-size: 1.15rem; margin-bottom: .4rem; }
.meta, figcaption, .note { color: var(--muted); font-size: .92rem; line-height: 1.5; }
table, .plot, .legend, .controls, .detail, .facts, .chip { font-family: ui-sans-serif, system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
a { color: var(--accent); }
figure { margin: 1rem 0 1.6rem; } figcaption { margin-top: .5rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .2rem; display: flex; gap: .5rem; align-items: center; }
.plot { display: block; overflow: visible; width: 100%; height: auto; color: var(--ink); font-size: 11.5px; background: none; }
.plot text { white-space: pre; } .plot [aria-label*="grid"] { stroke: var(--ink); }
h3 .plot, .legend .plot, td .plot, th .plot { display: inline-block; width: 44px; height: 14px; flex: none; }
.narrow { display: none; } .pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1.2rem 1.6rem; }
.pair h3 { margin: 0; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .9rem; margin: .4rem 0; }
.legend span { display: inline-flex; align-items: center; gap: .4rem; }
table { border-collapse: collapse; width: 100%; font-size: .86rem; font-variant-numeric: tabular-nums; margin: 1rem 0 .4rem; }
th, td { padding: .45rem .3rem; text-align: right; border-bottom: 1px solid var(--rule); vertical-align: top; }
th:first-child, td:first-child { text-align: left; white-space: nowrap; }
thead th { vertical-align: bottom; font-weight: 500; color: var(--muted); line-height: 1.25; border-bottom: 1.5px solid var(--ink); }
td { white-space: nowrap; } td small { display: block; color: var(--muted); font-weight: 400; }
tbody th { font-weight: 600; } tr.baseline :is(th, td) { color: var(--muted); font-weight: 400; }
.best { font-weight: 700; } .best::before { content: "▸ "; color: var(--accent); }
.sample {
  font: .95rem/1.9 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  background: var(--panel); border: 1px solid var(--rule); border-radius: .5rem; padding: .9rem 1rem; margin: .6rem 0 0;
  max-height: 24rem; overflow-y: auto;
}
.from { display: block; color: var(--muted); font: .8rem/1.4 ui-sans-serif, system-ui, sans-serif; margin-bottom: .3rem; white-space: normal; }
.t { background: hsl(var(--h) var(--token-chroma) var(--token)); border-radius: .2rem; cursor: default; }
.t.none { background: none; } .t.prompt { text-decoration: underline; text-decoration-thickness: 1px; text-underline-offset: .3em; }
.t:hover, .t.on { outline: 2px solid var(--ink); }
.numbers .t::after { content: attr(data-n); font-size: .6em; vertical-align: super; line-height: 0; color: var(--ink); opacity: .75; }
.dimmed .t { background: none; opacity: .45; } .dimmed .t.lit { opacity: 1; background: hsl(var(--h) var(--token-chroma) var(--token)); }
.controls { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center; font-size: .88rem; margin: .7rem 0 0; }
.controls label { display: inline-flex; gap: .4rem; align-items: center; }
select { font: inherit; color: inherit; background: var(--paper); border: 1px solid var(--rule); border-radius: .35rem; padding: .2rem .4rem; }
.chips { display: flex; flex-wrap: wrap; gap: .3rem; }
.chip {
  font-size: .8rem; color: inherit; border: 1px solid var(--rule); border-radius: .35rem; padding: .12rem .5rem; cursor: pointer;
  background: hsl(var(--h) var(--token-chroma) var(--token));
}
.chip[aria-pressed="true"] { outline: 2px solid var(--ink); }
.detail { min-height: 2.9em; font-size: .86rem; line-height: 1.45; margin: .5rem 0 0; color: var(--muted); font-variant-numeric: tabular-nums; }
.detail b { color: var(--ink); font-weight: 600; white-space: pre-wrap; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; font-size: .88rem; margin: .6rem 0; }
.facts dt { color: var(--muted); } .facts dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  body { padding: 1.5rem .9rem 3rem; font-size: 1rem; }
  .wide { display: none; } .narrow { display: block; } .pair { grid-template-columns: 1fr; }
  thead { display: none; } table, tbody, tr, th, td { display: block; border: 0; }
  tbody tr { border-top: 1px solid var(--rule); padding: .6rem 0; display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: .1rem 1rem; }
  tbody th { grid-column: 1 / -1; padding: 0 0 .2rem; } td { display: flex; justify-content: space-between; gap: .6rem; padding: .1rem 0; text-align: right; }
  td::before { content: attr(data-label); color: var(--muted); font-weight: 400; text-align: left; white-space: normal; }
  td small { display: inline; margin-left: .3em; } td:empty { display: none; } .best::before { content: attr(data-label) " ▸"; }
}
@media print { .controls { display: none; } body { max-width: none; } }
`;

/** Plain browser JavaScript: chooses the coloured layer, lights one expert's tokens, shows a token's experts. */
const script = `
for (const box of document.querySelectorAll(".reading")) {
  const tokens = [...box.querySelectorAll(".t")], detail = box.querySelector(".detail");
  const layerChoice = box.querySelector("select"), chips = [...box.querySelectorAll(".chip")], hint = detail.innerHTML;
  const routes = JSON.parse(box.querySelector("script").textContent);
  let lit = null;
  const paint = () => {
    const layer = Number(layerChoice.value);
    tokens.forEach((token, i) => {
      const [experts] = routes[i][layer] ?? [[]];
      token.dataset.n = experts.join("·");
      token.classList.toggle("none", experts.length === 0);
      token.classList.toggle("lit", lit !== null && experts.includes(lit));
      token.style.setProperty("--h", experts.length ? chips[experts[0]].dataset.h : 0);
    });
    box.classList.toggle("dimmed", lit !== null);
    chips.forEach((chip, e) => chip.setAttribute("aria-pressed", String(e === lit)));
  };
  layerChoice.addEventListener("change", paint);
  chips.forEach((chip, e) => chip.addEventListener("click", () => { lit = lit === e ? null : e; paint(); }));
  box.querySelector("input").addEventListener("change", (event) => box.classList.toggle("numbers", event.target.checked));
  const show = (event) => {
    const i = tokens.indexOf(event.target);
    tokens.forEach((token, j) => token.classList.toggle("on", j === i));
    if (i < 0) { detail.innerHTML = hint; return; }
    detail.textContent = "";
    const name = document.createElement("b");
    name.textContent = JSON.stringify(tokens[i].dataset.text);
    detail.append(name, " ", routes[i].map(([experts, weights], layer) =>
      "layer " + (layer + 1) + ": " + (experts.map((e, j) => "expert " + e + " (" + weights[j].toFixed(2) + ")").join(", ") || "no expert")).join(" · "));
  };
  for (const text of box.querySelectorAll(".sample")) {
    text.addEventListener("pointerover", show);
    text.addEventListener("pointerdown", show);
    text.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") show({ target: text }); });
  }
  tokens.forEach((token) => token.removeAttribute("title"));
  paint();
}
`;

const hue = (expert: number): number => Math.round((210 + expert * 137.508) % 360);
const rounded = (x: number): number => Number(x.toFixed(3));

/** Experts of a token by falling weight. */
function byWeight(layer: SampleToken["layers"][number] | undefined): readonly [number[], number[]] {
  const pairs = (layer?.experts ?? []).map((expert, j) => ({ expert, weight: layer?.weights[j] ?? 0 }));
  pairs.sort((a, b) => b.weight - a.weight || a.expert - b.expert);
  return [pairs.map(({ expert }) => expert), pairs.map(({ weight }) => rounded(weight))];
}

function tokenHtml(token: SampleToken, inPrompt: boolean, layer: number): string {
  const routes = token.layers.map(byWeight);
  const title = routes
    .map(
      ([experts, weights], l) =>
        `layer ${l + 1}: ${experts.map((e, j) => `expert ${e} (${weights[j]?.toFixed(2)})`).join(", ")}`,
    )
    .join("\n");
  const first = routes[layer]?.[0][0];
  const shown = escapeHtml(token.text).replaceAll("\n", '<span class="note">↵</span>\n');
  const colour = first === undefined ? "" : ` style="--h:${hue(first)}"`;
  const classes = `t${inPrompt ? " prompt" : ""}${first === undefined ? " none" : ""}`;
  return `<span class="${classes}"${colour} data-text="${escapeHtml(token.text)}" title="${escapeHtml(title)}">${shown}</span>`;
}

/** The samples of one run with their controls; `domains` name the texts the prompts come from. */
function readingHtml(run: RunResult, domains: readonly string[]): string {
  const layers = run.samples[0]?.tokens[0]?.layers.length ?? 0;
  const layer = Math.floor(layers / 2);
  const options = Array.from(
    { length: layers },
    (_, l) => `<option value="${l}"${l === layer ? " selected" : ""}>layer ${l + 1}</option>`,
  );
  const chips = Array.from(
    { length: run.experts },
    (_, e) =>
      `<button type="button" class="chip" data-h="${hue(e)}" style="--h:${hue(e)}" aria-pressed="false">${e}</button>`,
  );
  const texts = run.samples.map((sample, i) => {
    const known = `${percent(sample.knownWords)} known words`;
    const from = domains[i] === undefined ? known : `${escapeHtml(domains[i])}, ${known}`;
    return `<div class="sample"><span class="from">${from}</span>${sampleSpans(sample, layer)}</div>`;
  });
  // A "<" inside the JSON could end the script element.
  const all = run.samples.flatMap(({ tokens }) => tokens.map((token) => token.layers.map(byWeight)));
  const routes = JSON.stringify(all).replaceAll("<", "\\u003c");
  return `<div class="reading">
<div class="controls"><label>colour by <select aria-label="layer">${options.join("")}</select></label>
<label><input type="checkbox"> expert numbers</label><span class="chips" role="group" aria-label="light up one expert">${chips.join("")}</span></div>
${texts.join("\n")}
<p class="detail">Point at a token, or tap it, to see its experts and their weights.</p>
<script type="application/json">${routes}</script></div>`;
}

function sampleSpans(sample: Sample, layer: number): string {
  let length = 0;
  const spans = sample.tokens.map((token) => {
    const inPrompt = length < sample.prompt.length;
    length += token.text.length;
    return tokenHtml(token, inPrompt, layer);
  });
  return spans.join("");
}

const percent = (x: number): string => `${Math.round(100 * x)} %`;
const mean = (values: readonly number[]): number => values.reduce((sum, x) => sum + x, 0) / Math.max(1, values.length);

function duration(seconds: number): string {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  const minutes = Math.floor(seconds / 60);
  return `${minutes} min ${String(Math.round(seconds - 60 * minutes)).padStart(2, "0")} s`;
}

function tableHtml(results: Results, styles: ReadonlyMap<string, Style>): string {
  const least = Math.min(...results.summary.map(({ bitsPerByte }) => bitsPerByte.mean));
  const rows = results.summary.map((row) => {
    const cells = columns.map((column, i) => {
      const best = i === 0 && row.bitsPerByte.mean === least && results.summary.length > 1 ? ' class="best"' : "";
      const text = escapeHtml(column.text(row)).replace(/ (± [\d.]+)/, "<small>$1</small>");
      return `<td${best} data-label="${column.title}"><span>${text}</span></td>`;
    });
    const style = styles.get(row.router);
    return `<tr><th scope="row">${style === undefined ? "" : swatch(style)} ${escapeHtml(row.router)}</th>${cells.join("")}</tr>`;
  });
  const baselines = results.baselines.map(
    ({ name, bitsPerByte }) =>
      `<tr class="baseline"><th scope="row">${escapeHtml(name)}</th><td data-label="bits/byte"><span>${bitsPerByte.toFixed(3)}</span></td>` +
      `${columns
        .slice(1)
        .map(() => "<td></td>")
        .join("")}</tr>`,
  );
  const heads = columns.map(({ title, meaning }) => `<th scope="col" title="${escapeHtml(meaning)}">${title}</th>`);
  return `<table><thead><tr><th scope="col">router</th>${heads.join("")}</tr></thead><tbody>${rows.join("")}${baselines.join("")}</tbody></table>`;
}

/** The finding in one or two sentences, only as strong as the numbers are. */
export function finding({ summary, baselines, domains }: Results): string {
  const ordered = [...summary].sort((a, b) => a.bitsPerByte.mean - b.bitsPerByte.mean);
  const [best, second] = ordered;
  if (best === undefined) return "No run has finished yet.";
  const bits = best.bitsPerByte.mean.toFixed(3);
  const where = domains.length > 1 ? `, mean over ${domains.length} domains` : "";
  const lead = `${best.router} needs ${bits} bits per byte of text it has not seen${where}`;
  const beaten = baselines
    .filter(({ bitsPerByte }) => best.bitsPerByte.mean < bitsPerByte)
    .sort((a, b) => b.order - a.order)[0];
  const against =
    baselines.length === 0
      ? ""
      : beaten === undefined
        ? `; that does not yet beat the ${baselines[0]?.name} (${baselines[0]?.bitsPerByte.toFixed(3)})`
        : `; the ${beaten.name} needs ${beaten.bitsPerByte.toFixed(3)}`;
  const rest = second === undefined ? "" : ` ${difference(second.router, best.bitsPerByte, second.bitsPerByte)}`;
  return `${lead}${against}.${rest}`;
}

function difference(second: string, a: OverSeeds, b: OverSeeds): string {
  const gap = b.mean - a.mean;
  const text = `${second} follows ${gap < 0.0005 ? "level with it" : `${gap.toFixed(3)} behind`}`;
  if (a.halfWidth === undefined || b.halfWidth === undefined) {
    return `${text}. One seed each: a difference of a few thousandths is within chance.`;
  }
  const apart = gap > a.halfWidth + b.halfWidth;
  return `${text}; the 95 % intervals over the seeds ${apart ? "do not overlap" : "overlap, so the order is not certain"}.`;
}

function factsHtml(facts: readonly (readonly [string, string])[]): string {
  return `<dl class="facts">${facts.map(([name, value]) => `<dt>${escapeHtml(name)}</dt><dd>${escapeHtml(value)}</dd>`).join("")}</dl>`;
}

const valueText = (value: string | number | readonly string[] | readonly number[]): string =>
  typeof value === "object" ? value.join(", ") : String(value);

function togetherHtml(run: RunResult, head: string): string {
  const { layers } = run.final;
  const meet = layers.some(({ together }) => together.some((row, a) => row.some((share, b) => a !== b && share > 0)));
  if (!meet) return `<figure>${head}<figcaption>No token had two experts.</figcaption></figure>`;
  const used = layers.map(({ combinations }) => percent(combinations)).join(", ");
  return (
    `<figure>${head}${togetherFigure(run)}<figcaption>95 % of all meetings are reached after ${used} of the pairs ` +
    "(layer by layer).</figcaption></figure>"
  );
}

/** What noise changes, one row per router: means over the layers. */
function noiseHtml(runs: readonly RunResult[], head: (router: string) => string): string {
  const columns: readonly [string, (run: RunResult) => string][] = [
    ["other experts", ({ final }) => percent(mean(final.layers.map(({ noised }) => noised.sets)))],
    ["another first expert", ({ final }) => percent(mean(final.layers.map(({ noised }) => noised.firsts)))],
    ["experts replaced, mean", ({ final }) => percent(mean(final.layers.map(({ noised }) => noised.overlap)))],
    ["bits/byte, clean", ({ final }) => final.bitsPerByte.clean.toFixed(3)],
    ["bits/byte, noised", ({ final }) => final.bitsPerByte.noised.toFixed(3)],
  ];
  const rows = runs.map(
    (run) =>
      `<tr><th scope="row">${head(run.router)}</th>${columns
        .map(([title, text]) => `<td data-label="${title}"><span>${text(run)}</span></td>`)
        .join("")}</tr>`,
  );
  const heads = columns.map(([title]) => `<th scope="col">${title}</th>`);
  return `<table><thead><tr><th scope="col">router</th>${heads.join("")}</tr></thead><tbody>${rows.join("")}</tbody></table>`;
}

/** The report as one HTML document. Deterministic: the same results give the same bytes. */
export function renderReport(results: Results): string {
  const routers = [...new Set(results.runs.map(({ router }) => router))];
  const styles = new Map(routers.map((name, i) => [name, styleOf(i)]));
  const firstRuns = routers.flatMap((name) => results.runs.find(({ router }) => router === name) ?? []);
  const domainNames = results.domains.map(({ name }) => name);
  const [run] = firstRuns;
  const seeds = new Set(results.runs.map(({ seed }) => seed)).size;
  const named = (name: string): string => {
    const style = styles.get(name);
    return `${style === undefined ? "" : swatch(style)} ${escapeHtml(name)}`;
  };
  const heading = (name: string): string => `<h3>${named(name)}</h3>`;
  const title = routers.length === 1 ? `Training with ${routers[0]}` : `${routers.length} routers compared`;
  const trained =
    run === undefined ? "" : ` ${run.steps} steps of ${shortCount(run.tokens / Math.max(1, run.steps))} tokens each`;
  const legend = routers.map((name) => `<span>${named(name)}</span>`);
  const body =
    run === undefined
      ? ""
      : `
<h2>Results</h2>
${tableHtml(results, styles)}
<details class="note"><summary>What the columns say</summary>${factsHtml(columns.map(({ title: name, meaning }) => [name, meaning]))}</details>
<h2>Learning</h2>
<figure><div class="narrow"><div class="legend">${legend.join("")}</div></div>${lossFigure(results)}
<figcaption>Bits per byte. Bold with markers: held-out text, mean over the domains; thin: the training batches.
Dotted: byte models with Witten-Bell smoothing, trained and measured on the same text.</figcaption></figure>
<figure>${domainFigure(results)}
<figcaption>Held-out bits per byte by domain at the end of training; ticks are the byte models.</figcaption></figure>
<h2>Where the tokens went</h2>
<p>Load of each expert on held-out text of each domain, as a multiple of an even share: 1.0 is even, 0 is unused.
Rows that differ within a layer show experts that took sides.</p>
${firstRuns.map((one) => `<figure>${heading(one.router)}${loadFigure(one, domainNames)}</figure>`).join("")}
<h2>How much a token got</h2>
<div class="legend">${legend.join("")}</div>
<figure>${computeFigure(results)}
<figcaption>Experts per token by domain at the end of training, mean over the layers. Routers that choose how many experts a token gets spend
their compute here; null experts count as none.</figcaption></figure>
<h2>Who works with whom</h2>
<p>Of the tokens that the row's expert sees, how many per cent the column's expert sees too. One strong pair does one expert's work;
even rows are experts that combine freely.</p>
${firstRuns.map((one) => togetherHtml(one, heading(one.router))).join("")}
<h2>How routing settled</h2>
<div class="legend">${legend.join("")}</div>
<div class="pair">${routingFigures(results)
          .map(({ title: name, svg }) => `<figure><h3>${name}</h3>${svg}</figure>`)
          .join("")}</div>
<p class="note">On a fixed probe of held-out text, mean over the layers${seeds > 1 ? " and seeds; the bands span the seeds" : ""}.
Fluctuation is the share of tokens whose experts changed since the checkpoint before.</p>
<h2>How routing holds under noise</h2>
<p>The same probe with one token in ${Math.round(1 / (run.final.noise || 1))} replaced by another one of its text, at the end of training. Counted are the tokens that were not
replaced: their routes change because their surroundings did.</p>
${noiseHtml(firstRuns, named)}
<h2>Samples, coloured by expert</h2>
<p>What each model writes after the underlined words, which it has not seen in training. A token's colour is its leading expert in the chosen
layer; a button lights up the tokens of one expert. Known words are those that occur in the training text.</p>
${firstRuns.map((one) => heading(one.router) + readingHtml(one, domainNames)).join("")}`;
  return `<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Switchyard: ${escapeHtml(title)}</title><style>${css}</style></head><body>
<header><h1>${escapeHtml(title)}</h1>
<p class="lead">${escapeHtml(finding(results))}</p>
<p class="meta">Run “${escapeHtml(results.name)}”, ${results.created.slice(0, 10)}${results.complete ? "" : ", interrupted: runs are missing"}.
${escapeHtml(domainNames.join(", "))};${trained}; ${seeds === 1 ? "one seed" : `${seeds} seeds`}; ${duration(results.seconds)} in all.</p></header>
<main>${body}
<h2>Text, settings, machine</h2>
${factsHtml(
  results.domains.map(({ name, files, trainingBytes, validationBytes }) => [
    name,
    `${shortCount(trainingBytes)}B for training, ${shortCount(validationBytes)}B held out, from ${files} file${files === 1 ? "" : "s"}`,
  ]),
)}
${factsHtml(Object.entries(results.settings).map(([name, value]) => [name, valueText(value)]))}
${factsHtml([...Object.entries(results.machine), ...Object.entries(results.versions)].map(([name, value]) => [name, String(value)]))}
<p class="note">All numbers of this page stand in results.json beside it.</p></main>
<script>${script}</script></body></html>
`;
}
