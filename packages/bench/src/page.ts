// What the pages of this package share: style sheet, escaping, colours of experts. One file each, light and dark, no network.
const escapes: Readonly<Record<string, string>> = {
  "&": "&amp;",
  "<": "&lt;",
  ">": "&gt;",
  '"': "&quot;",
  "'": "&#39;",
};
/** Text as it may stand between tags and in attributes. */
export const escapeHtml = (text: string): string => text.replace(/[&<>"']/g, (c) => escapes[c] ?? c);

export const css = `
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
pre { font: .85rem/1.5 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; overflow-x: auto; background: var(--panel); border: 1px solid var(--rule); border-radius: .4rem; padding: .5rem .8rem; }
.facts dt .plot { display: inline-block; width: 44px; height: 14px; } .traces { grid-template-columns: fit-content(45%) 1fr; }
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

/** Colour of an expert, as a hue: neighbours are far apart. Numbers tell experts apart, colour only helps. */
export const hue = (expert: number): number => Math.round((210 + expert * 137.508) % 360);

export const percent = (x: number): string => `${Math.round(100 * x)} %`;

/** Names and values, one pair per line. */
export function factsHtml(facts: readonly (readonly [string, string])[]): string {
  return `<dl class="facts">${facts.map(([name, value]) => `<dt>${escapeHtml(name)}</dt><dd>${escapeHtml(value)}</dd>`).join("")}</dl>`;
}
