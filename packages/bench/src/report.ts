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
import { css, escapeHtml, factsHtml, hue, percent } from "./page.ts";
import type { OverSeeds, Results, RunResult, Sample, SampleToken } from "./results.ts";
import { columns, shortCount } from "./summary.ts";

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

/** Links to the traces of every run, relative to the report; "" where none were kept. */
function tracesHtml(runs: readonly RunResult[], head: (router: string) => string): string {
  const kept = runs.filter(
    ({ checkpoints, untraced }) => untraced !== undefined || checkpoints.some((one) => one.trace),
  );
  if (kept.length === 0) return "";
  const severalSeeds = new Set(runs.map(({ seed }) => seed)).size > 1;
  const rows = kept.map(({ router, seed, checkpoints, untraced }) => {
    const links = checkpoints.flatMap(({ step, trace }) =>
      trace === undefined ? [] : [`<a href="${escapeHtml(encodeURI(trace))}">${step}</a>`],
    );
    const name = `${head(router)}${severalSeeds ? `, seed ${seed}` : ""}`;
    return `<dt>${name}</dt><dd>${untraced === undefined ? `after ${links.join(", ")} steps` : escapeHtml(untraced)}</dd>`;
  });
  const [files = []] = kept
    .map(({ checkpoints }) => checkpoints.flatMap(({ trace }) => trace ?? []))
    .filter(({ length }) => length > 1);
  const [first, last] = [files[0], files.at(-1)].map((file) => escapeHtml(file ?? ""));
  const commands = first
    ? `<p>In this folder, the first command shows one, token by token; the second says what changed between two, by layer and by domain.</p>
<pre>npx switchyard trace report ${last}\nnpx switchyard trace diff ${first} ${last}</pre>`
    : "";
  return `<h2>Routing traces</h2>
<p>Where every token of the probe went, at each checkpoint, as files beside this page.</p>
${commands}<dl class="facts traces">${rows.join("")}</dl>`;
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
${firstRuns.map((one) => heading(one.router) + readingHtml(one, domainNames)).join("")}
${tracesHtml(results.runs, named)}`;
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
