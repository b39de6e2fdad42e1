// One self-contained HTML file about a routing trace: what stands out in words, loads, entropy, who works with whom, where tokens go
// from layer to layer, and the text coloured by expert. Light and dark, on a page and a phone, and without colour vision.
import { type Style, styleOf, swatch } from "./figures.ts";
import { specialisationOfLoad } from "./metrics.ts";
import { css, escapeHtml, factsHtml, hue, percent } from "./page.ts";
import { heatFigure, layersFigure, mostMarked, type Square, squaresFigure, strengthLegend } from "./trace-figures.ts";

/** What a report says of a layer; `LayerAnalysis` of @switchyard/models has this form. */
export interface ReportLayer {
  readonly index: number;
  readonly name?: string;
  readonly experts: number;
  /** Tokens that each expert saw, `[experts]`. */
  readonly load: readonly number[];
  /** Summed weights of each expert, `[experts]`. */
  readonly importance?: readonly number[];
  readonly expertsPerToken: number;
  readonly untouched: number;
  readonly entropy?: number;
  readonly loadEntropy: number;
  readonly imbalance: number;
  readonly dead: readonly number[];
  readonly overloaded: readonly number[];
  readonly loadByLabel?: readonly (readonly number[])[];
  readonly together?: readonly (readonly number[])[];
  readonly combinations?: number;
}

/** What `analyseTrace` of @switchyard/models gives. */
export interface ReportAnalysis {
  readonly model: { readonly name: string; readonly type?: string };
  readonly tokens: number;
  readonly sequences: number;
  readonly labels: readonly { readonly name: string; readonly tokens: number }[];
  readonly overload: number;
  readonly layers: readonly ReportLayer[];
  readonly transitions: readonly {
    readonly from: number;
    readonly to: number;
    readonly counts: readonly (readonly number[])[];
    readonly told: number;
  }[];
}

/** What `traceTokens` of @switchyard/models gives. */
export interface ReportTokens {
  readonly count: number;
  readonly sequence: ArrayLike<number>;
  readonly token: ArrayLike<number>;
  readonly kept: number;
  /** `[count, layers, kept]`, -1 = none. */
  readonly experts: ArrayLike<number>;
  readonly weights?: ArrayLike<number>;
  readonly stretches: readonly {
    readonly first: number;
    readonly tokens: number;
    /** `[layers, kept]`, -1 = none. */
    readonly experts: ArrayLike<number>;
    readonly shares: ArrayLike<number>;
  }[];
}

export interface TraceReport {
  readonly analysis: ReportAnalysis;
  readonly tokens: ReportTokens;
  /** Text of each of `tokens`; default: their ids. */
  readonly texts?: readonly string[];
  /** Label of a sequence: a place in `analysis.labels`. */
  labelOf?(sequence: number): number | undefined;
}

/** Bytes of a page. */
const pageBudget = 2_900_000;
/** Bytes that experts and weights of the tokens may take of them, even beside very many figures. */
const leastForTokens = 300_000;
const mostLabels = 6;
const mostSquares = 6;

const layerName = ({ index, name }: ReportLayer): string => `layer ${index}${name === undefined ? "" : ` ${name}`}`;
const capital = (text: string): string => text.charAt(0).toUpperCase() + text.slice(1);

/** "3, 5 to 8 and 11". */
export function numberList(ids: readonly number[]): string {
  const runs: [number, number][] = [];
  for (const id of ids) {
    const last = runs.at(-1);
    if (last && last[1] === id - 1) last[1] = id;
    else runs.push([id, id]);
  }
  const parts = runs.flatMap(([a, b]) => (b - a > 1 ? [`${a} to ${b}`] : a === b ? [`${a}`] : [`${a}`, `${b}`]));
  return listed(parts);
}

const times = (load: readonly number[]): number[] => {
  const total = load.reduce((sum, x) => sum + x, 0);
  return load.map((x) => (total === 0 ? 0 : (x * load.length) / total));
};

/** How much the expert tells about the label, undefined without two labels. */
function specialised({ loadByLabel, experts }: ReportLayer): number | undefined {
  if (loadByLabel === undefined || loadByLabel.length < 2) return undefined;
  const rows = loadByLabel.map((row) => times(row).map((x) => x / row.length));
  return specialisationOfLoad(Float64Array.from(rows.flat()), experts);
}

/** "10,000". */
const spelled = (n: number): string => n.toLocaleString("en");
const plural = (n: number, what: string): string => `${spelled(n)} ${what}${n === 1 ? "" : "s"}`;
const listed = (parts: readonly string[]): string =>
  parts.length < 2 ? parts.join("") : `${parts.slice(0, -1).join(", ")} and ${parts.at(-1)}`;

/** Layers with dead or with overloaded experts get a sentence each up to so many, else one for all of them. */
const mostSentences = 3;

/** "6 of 64 experts are dead: 10, 14, 30, 35, 41 and 43." */
function deadText({ dead, experts }: ReportLayer): string {
  return dead.length === 1
    ? `expert ${dead[0]} is dead.`
    : `${dead.length} of ${experts} experts are dead: ${numberList(dead)}.`;
}

/** "63 (4.1 ×)", busiest first. */
function overloadedNames(layer: ReportLayer, most: number): string {
  const all = times(layer.load);
  const named = layer.overloaded.slice(0, most).map((e) => `${e} (${(all[e] ?? 0).toFixed(1)} ×)`);
  const more = layer.overloaded.length - named.length;
  return more > 0 ? `${named.join(", ")} and ${more} more` : listed(named);
}

/** Every dead expert and, unless `overloaded` is false, the most overloaded ones: a line for each layer that has any. */
export function troubledExperts(
  { layers, tokens }: ReportAnalysis,
  { overloaded = true }: { readonly overloaded?: boolean } = {},
): readonly (readonly [layer: string, text: string])[] {
  if (tokens === 0) return [];
  return layers.flatMap((layer): [string, string][] => {
    const dead = layer.dead.length > 0 ? [capital(deadText(layer))] : [];
    const over = overloaded && layer.overloaded.length > 0 ? [`Overloaded: ${overloadedNames(layer, 12)}.`] : [];
    return dead.length + over.length === 0 ? [] : [[layerName(layer), [...dead, ...over].join(" ")]];
  });
}

function deadFindings({ layers }: ReportAnalysis): string[] {
  const dead = layers.filter((layer) => layer.dead.length > 0);
  const [worst] = [...dead].sort((a, b) => b.dead.length - a.dead.length);
  if (!worst) return ["Every expert of every layer saw a token."];
  const fewest = Math.min(...layers.map(({ experts, load }) => load.reduce((sum, x) => sum + x, 0) / experts));
  const count = (of: (layer: ReportLayer) => number): number => layers.reduce((sum, layer) => sum + of(layer), 0);
  return [
    ...(dead.length <= mostSentences
      ? dead.map((layer) => `${capital(layerName(layer))}: ${deadText(layer)} No token went there.`)
      : [
          `${count((layer) => layer.dead.length)} of ${plural(
            count(({ experts }) => experts),
            "expert",
          )} are dead, in ${dead.length} of ${layers.length} layers: no token went there. The most in ${layerName(worst)}: ${deadText(worst)}`,
        ]),
    ...(fewest < 10
      ? [
          `That may be chance: an even share is only ${fewest.toFixed(1)} tokens per expert. Use a longer text to be sure.`,
        ]
      : []),
  ];
}

function overloadFindings({ layers, overload }: ReportAnalysis): string[] {
  const over = layers.filter((layer) => layer.overloaded.length > 0);
  if (over.length === 0) return [`No expert has more than ${overload} times an even share of the load.`];
  if (over.length <= mostSentences) {
    return over.map(
      (layer) =>
        `${capital(layerName(layer))}: overloaded beyond ${overload} × an even share: expert${layer.overloaded.length === 1 ? "" : "s"} ${overloadedNames(layer, 4)}.`,
    );
  }
  const worst = over
    .map((layer) => ({ layer, expert: layer.overloaded[0] ?? 0 }))
    .map((one) => ({ ...one, share: times(one.layer.load)[one.expert] ?? 0 }))
    .sort((a, b) => b.share - a.share)
    .slice(0, 3)
    .map(({ layer, expert, share }) => `expert ${expert} in ${layerName(layer)} (${share.toFixed(1)} ×)`);
  const count = over.reduce((sum, layer) => sum + layer.overloaded.length, 0);
  return [
    `${spelled(count)} experts in ${over.length} of ${layers.length} layers carry more than ${overload} × an even share; most of all ${listed(worst)}.`,
  ];
}

/** What a reader should know first, in sentences. Counted over all layers; each names where. */
export function traceFindings(analysis: ReportAnalysis): readonly string[] {
  const { layers, tokens, labels, transitions } = analysis;
  if (tokens === 0) return ["The trace holds no tokens."];
  const found = [...deadFindings(analysis), ...overloadFindings(analysis)];
  const untouched = layers.filter((layer) => layer.untouched > 0);
  if (untouched.length > 0) {
    const [first] = [...untouched].sort((a, b) => b.untouched - a.untouched);
    if (first)
      found.push(
        `Up to ${percent(first.untouched / tokens)} of the tokens get no expert at all (${layerName(first)}).`,
      );
  }
  const [pair] = layers
    .flatMap((layer) => strongestPair(layer) ?? [])
    .sort((a, b) => b.share - a.share)
    .slice(0, 1);
  if (pair && pair.share > 0.5) {
    found.push(
      `The closest pair: ${percent(pair.share)} of the tokens of expert ${pair.a} in ${layerName(pair.layer)} also go to expert ${pair.b}.`,
    );
  }
  const [path] = [...transitions].sort((a, b) => b.told - a.told);
  const [from, to] = [layers[path?.from ?? -1], layers[path?.to ?? -1]];
  if (path && from && to && path.told > 0) {
    found.push(
      `Knowing a token's leading expert in ${layerName(from)} tells most about the one in ${layerName(to)}: ${percent(path.told)} of what there is to know.`,
    );
  }
  const [special] = layers
    .map((layer) => ({ layer, value: specialised(layer) }))
    .filter((one): one is { layer: ReportLayer; value: number } => one.value !== undefined)
    .sort((a, b) => b.value - a.value);
  if (special && labels.length > 1) {
    found.push(
      `Experts take sides most in ${layerName(special.layer)}: specialisation ${special.value.toFixed(2)} between ${labels.map(({ name }) => name).join(", ")} (0 none, 1 complete).`,
    );
  }
  return found;
}

/** The pair of which the second sees most of the first's tokens, of experts with at least a quarter of an even share. */
function strongestPair(layer: ReportLayer): { layer: ReportLayer; a: number; b: number; share: number } | undefined {
  const mean = layer.load.reduce((sum, x) => sum + x, 0) / layer.experts;
  let best: { layer: ReportLayer; a: number; b: number; share: number } | undefined;
  for (const [a, row] of (layer.together ?? []).entries()) {
    const load = layer.load[a] ?? 0;
    if (load < mean / 4 || load === 0) continue;
    for (const [b, n] of row.entries()) {
      if (a !== b && n / load > (best?.share ?? 0)) best = { layer, a, b, share: n / load };
    }
  }
  return best;
}

/** The dead and overloaded experts of every layer, where the findings do not name them all. */
function namedHtml(analysis: ReportAnalysis): string {
  const { layers } = analysis;
  const counts = [
    layers.filter(({ dead }) => dead.length > 0),
    layers.filter(({ overloaded }) => overloaded.length > 0),
  ];
  if (counts.every(({ length }) => length <= mostSentences)) return "";
  return `<details class="note"><summary>Dead and overloaded experts of every layer</summary>${factsHtml(troubledExperts(analysis))}</details>`;
}

const columns: readonly { title: string; meaning: string; text: (layer: ReportLayer) => string }[] = [
  { title: "experts", meaning: "Experts of the layer.", text: ({ experts }) => `${experts}` },
  {
    title: "per token",
    meaning: "Experts a token goes to, mean; null experts count as none.",
    text: ({ expertsPerToken }) => expertsPerToken.toFixed(2),
  },
  {
    title: "busiest",
    meaning: "Load of the busiest expert, times an even share: 1 is even.",
    text: ({ imbalance }) => imbalance.toFixed(2),
  },
  {
    title: "importance",
    meaning: "Summed weights of the expert that has the most of them, times an even share (1701.06538).",
    text: ({ importance }) => (importance === undefined ? "" : Math.max(0, ...times(importance)).toFixed(2)),
  },
  { title: "dead", meaning: "Experts that no token chose.", text: ({ dead }) => `${dead.length}` },
  {
    title: "overloaded",
    meaning: "Experts with more than the named multiple of an even share.",
    text: ({ overloaded }) => `${overloaded.length}`,
  },
  {
    title: "evenness",
    meaning: "Entropy of the load over all tokens: 1 all experts alike, 0 one has everything.",
    text: ({ loadEntropy }) => loadEntropy.toFixed(2),
  },
  {
    title: "entropy",
    meaning: "How undecided the router is on a token, mean: 0 certain, 1 all experts alike.",
    text: ({ entropy }) => entropy?.toFixed(2) ?? "",
  },
  {
    title: "pairs in use",
    meaning: "Share of the pairs of experts, most frequent first, before 95 % of all meetings are reached.",
    text: ({ combinations }) => (combinations === undefined ? "" : percent(combinations)),
  },
  {
    title: "specialisation",
    meaning: "How much the expert tells about the label: 0 nothing, 1 everything.",
    text: (layer) => specialised(layer)?.toFixed(2) ?? "",
  },
];

function tableHtml(layers: readonly ReportLayer[]): string {
  const used = columns.filter(({ text }) => layers.some((layer) => text(layer) !== ""));
  const heads = used.map(({ title, meaning }) => `<th scope="col" title="${escapeHtml(meaning)}">${title}</th>`);
  const rows = layers.map((layer) => {
    const cells = used.map(({ title, text }) => {
      const value = text(layer);
      return value === "" ? "<td></td>" : `<td data-label="${title}"><span>${value}</span></td>`;
    });
    return `<tr><th scope="row">${escapeHtml(layerName(layer))}</th>${cells.join("")}</tr>`;
  });
  const meanings = used.map(({ title, meaning }) => `<dt>${title}</dt><dd>${escapeHtml(meaning)}</dd>`);
  return (
    `<table><thead><tr><th scope="col">layer</th>${heads.join("")}</tr></thead><tbody>${rows.join("")}</tbody></table>` +
    `<details class="note"><summary>What the columns say</summary><dl class="facts">${meanings.join("")}</dl></details>`
  );
}

function loadHtml({ layers, labels, overload }: ReportAnalysis): string {
  const figure = (title: string, of: (layer: ReportLayer) => readonly number[]): string => {
    const rows = layers.map((layer) => ({ name: layerName(layer), times: times(of(layer)) }));
    const greatest = Math.max(0, ...rows.map(({ times: own }) => own.reduce((a, b) => Math.max(a, b), 0)));
    const label = `Load of every expert by layer, ${title}; greatest ${greatest.toFixed(1)} times an even share`;
    const legend = strengthLegend("0", `${Math.max(overload, greatest).toFixed(1)} ×`);
    return `${heatFigure(rows, { overload, label })}<figcaption>${escapeHtml(capital(title))}. ${legend}</figcaption>`;
  };
  const shown = labels
    .map((label, i) => ({ ...label, i }))
    .filter(({ tokens }) => tokens > 0)
    .sort((a, b) => b.tokens - a.tokens);
  const byLabel = shown
    .slice(0, mostLabels)
    .map(
      ({ name, tokens, i }) =>
        `<figure><h3>${escapeHtml(name)}</h3>${figure(`${plural(tokens, "token")} of ${name}`, (layer) => layer.loadByLabel?.[i] ?? [])}</figure>`,
    );
  const rest =
    shown.length > mostLabels
      ? `<p class="note">The ${mostLabels} labels with the most tokens; ${shown.length - mostLabels} more are in the analysis.</p>`
      : "";
  return `<figure>${figure("all tokens", ({ load }) => load)}</figure>${labels.length > 1 ? byLabel.join("") + rest : ""}`;
}

/** At most so many, spread evenly. */
const spreadOver = <T>(all: readonly T[], most: number): T[] =>
  all.length <= most
    ? [...all]
    : Array.from({ length: most }, (_, i) => all[Math.round((i * (all.length - 1)) / (most - 1))] as T);

function togetherHtml({ layers }: ReportAnalysis): string {
  const meeting = layers.filter(({ together }) => together?.some((row, a) => row.some((n, b) => a !== b && n > 0)));
  if (meeting.length === 0) {
    const why = layers.some(({ together }) => together) ? "No token had two experts." : "Pairs were not counted.";
    return `<p class="note">${why}</p>`;
  }
  const squares = spreadOver(meeting, mostSquares).map((layer): Square => {
    const pair = strongestPair(layer);
    const said = pair
      ? `; most often expert ${pair.b} joins expert ${pair.a}, in ${percent(pair.share)} of its tokens`
      : "";
    return {
      title: layerName(layer),
      shares: (layer.together ?? []).map((row, a) => row.map((n) => n / Math.max(1, layer.load[a] ?? 0))),
      own: true,
      label: `Co-activation of ${layer.experts} experts in ${layerName(layer)}${said}`,
    };
  });
  const left = meeting.length > mostSquares ? ` ${mostSquares} of ${meeting.length} layers are shown.` : "";
  return (
    `${squaresFigure(squares)}<p class="note">Of the tokens of the row's expert, the per cent that the column's expert sees too. ` +
    `One strong pair does one expert's work; even rows are experts that combine freely.${left}</p>`
  );
}

function transitionsHtml({ layers, transitions }: ReportAnalysis): string {
  if (transitions.length === 0)
    return '<p class="note">There is no second layer to go to, or pairs were not counted.</p>';
  const squares = spreadOver(transitions, mostSquares).flatMap(({ from, to, counts, told }): Square[] => {
    const [a, b] = [layers[from], layers[to]];
    if (!a || !b) return [];
    return [
      {
        title: `${layerName(a)} → ${layerName(b).replace(/^layer /, "")}`,
        shares: counts.map((row) => {
          const total = row.reduce((sum, n) => sum + n, 0);
          return row.map((n) => n / Math.max(1, total));
        }),
        own: false,
        label: `From ${layerName(a)} to ${layerName(b)}: the leading expert there is told by the one here to ${percent(told)}`,
      },
    ];
  });
  const shares = transitions.map(({ told }) => told);
  const told =
    transitions.length > 12
      ? `${percent(Math.min(...shares))} to ${percent(Math.max(...shares))}`
      : transitions
          .map(({ to, told: share }) => `${percent(share)} for ${layerName(layers[to] as ReportLayer)}`)
          .join(", ");
  const left =
    transitions.length > mostSquares ? ` ${mostSquares} of ${transitions.length} transitions are shown.` : "";
  return (
    `${squaresFigure(squares)}<p class="note">Rows: a token's leading expert in one layer; columns: in the next; per cent of the row's ` +
    `tokens. Strong cells are paths that many tokens take.${left} What the layer before tells about it: ${told.replaceAll(" %", "\u00a0%")}.</p>`
  );
}

const base64 = (bytes: Uint8Array): string => {
  let binary = "";
  for (let i = 0; i < bytes.length; i += 0x8000) binary += String.fromCharCode(...bytes.subarray(i, i + 0x8000));
  return btoa(binary);
};

const bytesOf = (text: string): number => new TextEncoder().encode(text).length;

/** Experts as numbers of one or two bytes (all ones: none), and weights as bytes of `scale`. */
function packed(ids: ArrayLike<number>, weights: ArrayLike<number> | undefined, wide: boolean, scale: number) {
  const none = wide ? 0xffff : 0xff;
  const bytes = new Uint8Array(ids.length * (wide ? 2 : 1));
  for (let i = 0; i < ids.length; i++) {
    const id = ids[i] ?? -1;
    const value = id < 0 || id >= none ? none : id;
    bytes[wide ? 2 * i : i] = value & 255;
    if (wide) bytes[2 * i + 1] = value >> 8;
  }
  const shares =
    weights &&
    Uint8Array.from({ length: weights.length }, (_, i) =>
      Math.round(255 * Math.min(1, Math.max(0, (weights[i] ?? 0) / scale))),
    );
  return { ids: base64(bytes), ...(shares ? { weights: base64(shares) } : {}) };
}

/** The first `kept` of every `from` entries. */
const firstOf = (values: ArrayLike<number>, from: number, kept: number): Float64Array =>
  Float64Array.from(
    { length: (values.length / from) * kept },
    (_, i) => values[Math.floor(i / kept) * from + (i % kept)] as number,
  );

/** The coloured text, with what its script needs; `others`: bytes of the rest of the page. */
function readingHtml({ analysis, tokens, texts, labelOf }: TraceReport, others: number): string {
  const { layers, labels } = analysis;
  const most = Math.max(...layers.map(({ experts }) => experts));
  const wide = most > 255;
  const places = tokens.count + tokens.stretches.length;
  const textBytes = bytesOf(JSON.stringify(texts ?? []));
  const tokenBudget = Math.max(leastForTokens, pageBudget - others - textBytes);
  const cost = (kept: number, weighted: boolean): number =>
    (places * layers.length * kept * ((wide ? 2 : 1) + (weighted ? 1 : 0)) * 4) / 3;
  let kept = tokens.kept;
  while (kept > 1 && cost(kept, true) > tokenBudget) kept--;
  const weighted = tokens.weights !== undefined && cost(kept, true) <= tokenBudget;
  // So many layers that not even one expert of each fits: fewer tokens.
  const count = Math.min(tokens.count, Math.floor(tokens.count / Math.max(1, cost(kept, weighted) / tokenBudget)));
  const row = layers.length * tokens.kept;
  const slice = (values: ArrayLike<number>, n: number): Float64Array =>
    firstOf(Array.prototype.slice.call(values, 0, n * row), tokens.kept, kept);
  const weights = weighted && tokens.weights ? slice(tokens.weights, count) : undefined;
  const scale = weights?.reduce((a, b) => Math.max(a, b), 0) || 1;
  const stretches = count < tokens.count ? [] : tokens.stretches;
  const join = (of: (one: ReportTokens["stretches"][number]) => ArrayLike<number>): Float64Array => {
    const all = new Float64Array(stretches.length * layers.length * kept);
    for (const [i, one] of stretches.entries()) all.set(firstOf(of(one), tokens.kept, kept), i * layers.length * kept);
    return all;
  };
  const runs: [string, number][] = [];
  let last = -1;
  for (let i = 0; i < count; i++) {
    const sequence = tokens.sequence[i] as number;
    const run = runs.at(-1);
    if (run && sequence === last) run[1]++;
    else {
      const label = labels[labelOf?.(sequence) ?? -1]?.name;
      runs.push([`text ${sequence + 1}${label === undefined ? "" : ` · ${label}`}`, 1]);
    }
    last = sequence;
  }
  const data = {
    layers: layers.map(layerName),
    kept,
    wide,
    scale,
    texts: Array.from({ length: count }, (_, i) => texts?.[i] ?? `#${tokens.token[i]}`),
    plain: texts === undefined,
    runs,
    tokens: packed(slice(tokens.experts, count), weights, wide, scale),
    stretches: {
      from: stretches.map(({ first }) => first),
      sizes: stretches.map(({ tokens: n }) => n),
      ...packed(
        join(({ experts }) => experts),
        join(({ shares }) => shares),
        wide,
        1,
      ),
    },
  };
  const middle = Math.floor(layers.length / 2);
  const options = layers.map(
    (layer, l) => `<option value="${l}"${l === middle ? " selected" : ""}>${escapeHtml(layerName(layer))}</option>`,
  );
  const chips = Array.from(
    { length: Math.min(most, 1024) },
    (_, e) => `<button type="button" class="chip" style="--h:${hue(e)}" aria-pressed="false">${e}</button>`,
  );
  const rest = stretches.reduce((sum, { tokens: n }) => sum + n, 0);
  const also =
    rest > 0
      ? ` The first ${spelled(count)} tokens stand one by one, the other ${spelled(rest)} as blocks of up to ${stretches[0]?.tokens} with their most frequent expert.`
      : count < analysis.tokens
        ? ` The first ${spelled(count)} of ${spelled(analysis.tokens)} tokens.`
        : "";
  const used = Math.max(...layers.map(({ expertsPerToken }) => expertsPerToken));
  const heaviest =
    used > kept + 0.5
      ? ` Of every token only the ${plural(kept, "expert")} with the greatest ${tokens.weights ? "weights" : "preference"} fit here.`
      : "";
  const brackets = weighted
    ? ` In brackets stand weights${stretches.length > 0 ? ", of blocks the share of their tokens" : ""}.`
    : "";
  return `<p>A token's colour and number are its leading expert in the chosen layer; a button lights up the tokens of one expert.${heaviest}${brackets}${also}</p>
<div class="reading trace">
<div class="controls"><label>layer <select aria-label="layer">${options.join("")}</select></label>
<label><input type="checkbox" checked> expert numbers</label></div>
<div class="controls chips" role="group" aria-label="light up one expert">${chips.join("")}</div>
<div><div class="sample numbers" tabindex="0" role="group" aria-label="text, token by token; arrow keys move"></div>
<p class="detail" aria-live="polite">Point at a token, tap it, or move with the arrow keys, to see its experts in every layer.</p></div>
<noscript><p class="note">The coloured text needs JavaScript; nothing is loaded from elsewhere.</p></noscript>
<script type="application/json">${JSON.stringify(data).replaceAll("<", "\\u003c")}</script></div>`;
}

/** Plain browser JavaScript: builds the text, colours it by a layer, lights one expert's tokens, shows a token's experts. */
const script = `
for (const box of document.querySelectorAll(".reading.trace")) {
  const data = JSON.parse(box.querySelector("script").textContent), { kept, wide, scale } = data, L = data.layers.length;
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const numbers = (text) => { const b = bytes(text); return wide ? Uint16Array.from({ length: b.length / 2 }, (_, i) => b[2 * i] | (b[2 * i + 1] << 8)) : b; };
  const none = wide ? 65535 : 255, n = data.texts.length;
  const ids = [numbers(data.tokens.ids), numbers(data.stretches.ids)];
  const weights = [data.tokens.weights && bytes(data.tokens.weights), bytes(data.stretches.weights)];
  const text = box.querySelector(".sample"), detail = box.querySelector(".detail"), hint = detail.textContent;
  const choice = box.querySelector("select"), chips = [...box.querySelectorAll(".chip")], spans = [];
  const part = (i) => (i < n ? [0, i] : [1, i - n]);
  const routes = (i, layer) => {
    const [k, j] = part(i), at = (j * L + layer) * kept, found = [];
    for (let s = at; s < at + kept; s++) if (ids[k][s] !== none) found.push([ids[k][s], weights[k] ? weights[k][s] / 255 * (k ? 1 : scale) : null]);
    return found;
  };
  const add = (parent, string, kind = data.plain ? " id" : "") => {
    const span = document.createElement("span");
    span.className = "t" + kind;
    // A line ends after the token's number, not before it; several ends in one token are told by their signs.
    const lines = /\\n*$/.exec(string)[0];
    span.textContent = (string === "" ? "▫" : string.slice(0, string.length - lines.length).replaceAll("\\n", "↵\\n")) + "↵".repeat(lines.length);
    span.i = spans.push(span) - 1;
    parent.append(span, lines ? "\\n" : "");
  };
  const head = (string) => { const b = document.createElement("span"); b.className = "from"; b.textContent = string; text.append(b); };
  let at = 0;
  for (const [name, length] of data.runs) {
    if (data.runs.length > 1 || data.stretches.from.length) head(name);
    const div = document.createElement("div");
    for (let i = 0; i < length; i++) add(div, data.texts[at++]);
    text.append(div);
  }
  if (data.stretches.from.length) {
    head("the rest, in blocks of up to " + data.stretches.sizes[0] + " tokens");
    const div = document.createElement("div");
    for (const _ of data.stretches.from) add(div, "\\u2007\\u2007", " block");
    text.append(div);
  }
  let lit = null, on = -1;
  const hueOf = (e) => Math.round((210 + e * 137.508) % 360);
  const paint = () => {
    const layer = Number(choice.value);
    spans.forEach((span, i) => {
      const found = routes(i, layer), first = found[0];
      span.dataset.n = first ? first[0] : "";
      span.classList.toggle("none", !first);
      span.classList.toggle("lit", lit !== null && found.some(([e]) => e === lit));
      span.style.setProperty("--h", first ? hueOf(first[0]) : 0);
    });
    box.classList.toggle("dimmed", lit !== null);
    chips.forEach((chip, e) => chip.setAttribute("aria-pressed", String(e === lit)));
  };
  choice.addEventListener("change", paint);
  chips.forEach((chip, e) => chip.addEventListener("click", () => { lit = lit === e ? null : e; paint(); }));
  box.querySelector("input").addEventListener("change", (event) => text.classList.toggle("numbers", event.target.checked));
  const show = (i) => {
    spans[on]?.classList.remove("on");
    on = i;
    if (i < 0) { detail.textContent = hint; return; }
    spans[i].classList.add("on");
    const [k, j] = part(i), name = document.createElement("b");
    name.textContent = k ? "tokens " + (data.stretches.from[j] + 1) + " to " + (data.stretches.from[j] + data.stretches.sizes[j]) : JSON.stringify(data.texts[j]);
    const words = (l) => data.layers[l] + ": " + (routes(i, l).map(([e, w]) => e + (w === null ? "" : " (" + (k ? Math.round(100 * w) + " %" : w.toFixed(2)) + ")")).join(", ") || "no expert");
    const list = document.createElement("span"), chosen = document.createElement("b");
    chosen.textContent = words(Number(choice.value)).replace(": ", ": experts ").replace("experts no", "no");
    list.className = "routes";
    data.layers.forEach((_, l) => {
      const line = document.createElement("span");
      line.textContent = words(l);
      list.append(line);
    });
    detail.replaceChildren(name, " ", chosen, list);
  };
  const pointed = (event) => { if (event.target.i !== undefined) show(event.target.i); };
  text.addEventListener("pointerover", pointed);
  text.addEventListener("pointerdown", pointed);
  text.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    show(Math.min(spans.length - 1, Math.max(0, on + step)));
    spans[on].scrollIntoView({ block: "nearest" });
  });
  paint();
}
`;

const traceCss = `
.cells { stroke: var(--heat); fill: none; } .axis { fill: var(--ink); font-size: 11px; }
.squares { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(15rem, 46%), 1fr)); gap: 1rem; margin: 1rem 0; }
.square { margin: 0; min-width: 0; } .square h3 { margin: 0 0 .2rem; font-size: .9rem; font-weight: 600; }
.strengths { display: inline-flex; gap: .4rem; align-items: center; white-space: nowrap; }
.strengths .plot { display: inline-block; width: 7rem; height: .7rem; border: 1px solid var(--rule); }
.trace .sample { max-height: 34rem; outline-offset: 2px; } .trace .sample > div { margin-bottom: .8rem; }
.trace .chips { max-height: 7.2rem; overflow-y: auto; gap: .3rem; padding: .2rem; }
.trace .t { padding: .1em 0; box-shadow: -1px 0 0 var(--panel); } .trace .t.block { display: inline-block; } .trace .t.id { margin-right: .35em; padding: .1em .2em; }
.trace .numbers .t::after { padding-left: .15em; padding-right: .1em; font-weight: 600; opacity: .9; }
.trace .detail { position: sticky; bottom: 0; background: var(--paper); padding: .5rem 0; max-height: min(40vh, 17rem); overflow-y: auto; border-top: 1px solid var(--rule); }
.routes { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(13rem, 100%), 1fr)); gap: 0 1rem; }
.findings { padding-left: 1.2rem; } .findings li { margin: .25rem 0; overflow-wrap: anywhere; } h1 { overflow-wrap: anywhere; }
`;

function legendHtml(names: readonly string[]): string {
  const item = (name: string, style: Style): string => `<span>${swatch(style)} ${escapeHtml(name)}</span>`;
  return `<div class="legend">${names.map((name, i) => item(name, styleOf(i))).join("")}</div>`;
}

/**
 * The report of a trace as one HTML document that needs no network. Up to 3 MB for 10,000 tokens: the more layers, the fewer experts
 * of each token it keeps. Deterministic: the same trace gives the same bytes.
 *
 * @example writeFileSync("report.html", traceReport({ analysis: await analyseTrace(trace), tokens: await traceTokens(trace) }));
 */
export function traceReport(report: TraceReport): string {
  const { analysis } = report;
  const { model, layers, labels, tokens, sequences } = analysis;
  const findings = traceFindings(analysis);
  const dead = layers.reduce((sum, layer) => sum + layer.dead.length, 0);
  const over = layers.reduce((sum, layer) => sum + layer.overloaded.length, 0);
  const all = layers.reduce((sum, { experts }) => sum + experts, 0);
  const series = [
    { name: "evenness of the load", values: layers.map(({ loadEntropy }) => loadEntropy) },
    ...(layers.some(({ entropy }) => entropy !== undefined)
      ? [{ name: "entropy of a token's routing", values: layers.map(({ entropy }) => entropy) }]
      : []),
    ...(labels.length > 1 ? [{ name: "specialisation", values: layers.map(specialised) }] : []),
  ];
  const title = `Routing of ${model.name}`;
  const lead = `${plural(tokens, "token")} through ${plural(layers.length, "layer")} that route${layers.length === 1 ? "s" : ""}: of ${plural(all, "expert")}, ${dead === 0 ? "none" : spelled(dead)} dead and ${over === 0 ? "none" : spelled(over)} overloaded.`;
  const about = [
    ...(model.type === undefined ? [] : [`model type ${model.type}`]),
    plural(sequences, "text"),
    ...(labels.length > 0 ? [labels.map(({ name, tokens: n }) => `${name} (${plural(n, "token")})`).join(", ")] : []),
  ];
  const figures =
    tokens === 0
      ? ""
      : `
<h2>Layer by layer</h2>
${tableHtml(layers)}
<figure>${legendHtml(series.map(({ name }) => name))}${layersFigure(
          series,
          layers.map(({ index, name }) => (name === undefined ? `${index}` : `${index} ${name.slice(0, 4)}.`)),
        )}
<figcaption>From 0 to 1 over the layers. Evenness: 1 all experts alike; entropy: 1 undecided, 0 certain.</figcaption></figure>
<h2>Where the tokens went</h2>
<p>Load of each expert as a multiple of an even share: 1.0 is even. × is an expert that no token chose; more than ${analysis.overload} × is
overloaded, underlined or marked ▲.${
          layers.some(({ experts }) => experts > mostMarked)
            ? " Cells too small for marks have none; the lists above name these experts."
            : ""
        }</p>
${loadHtml(analysis)}
<h2>Who works with whom</h2>
${togetherHtml(analysis)}
<h2>From layer to layer</h2>
${transitionsHtml(analysis)}`;
  const named = namedHtml(analysis);
  const others = bytesOf(figures) + bytesOf(named) + 40_000; // style, script, buttons, findings
  const body = tokens === 0 ? "" : `${figures}\n<h2>The text, coloured by expert</h2>\n${readingHtml(report, others)}`;
  return `<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Switchyard: ${escapeHtml(title)}</title><style>${css}${traceCss}</style></head><body>
<header><h1>${escapeHtml(title)}</h1>
<p class="lead">${escapeHtml(lead)}</p>
<p class="meta">${escapeHtml(about.join("; "))}.</p></header>
<main><h2>What stands out</h2>
<ul class="findings">${findings.map((one) => `<li>${escapeHtml(one)}</li>`).join("")}</ul>${named}${body}</main>
<script>${script}</script></body></html>
`;
}
