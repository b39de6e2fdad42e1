// The report of a trace as a document: self-contained, small enough, escaped, complete, with every number of the analysis in it.
import { analyseTrace, type TraceChunk, type TraceHeader, traceTokens } from "@switchyard/models";
import { parseHTML } from "linkedom";
import { describe, expect, test } from "vitest";
import { grouped } from "./trace-figures.ts";
import { numberList, type TraceReport, traceFindings, traceReport, troubledExperts } from "./trace-report.ts";

interface Made {
  readonly layers?: number;
  readonly experts?: number;
  readonly slots?: number;
  readonly tokens?: number;
  readonly labels?: readonly string[];
}

/** Expert e of token t in layer l follows a rule; the last expert of layer 1 is dead and expert 0 of it has too much. */
async function made({
  layers: count = 3,
  experts = 6,
  slots = 2,
  tokens = 60,
  labels = ["prose", "co<de"],
}: Made = {}) {
  const layers = Array.from({ length: count }, (_, index) => ({ index, experts, slots, plan: "sparse" as const }));
  const header: TraceHeader = {
    format: "moe-routing-trace",
    version: 1,
    model: { name: "wh<ale", type: "olmoe" },
    layers,
    tokenizer: null,
    labels,
    sequences: [{ label: 0 }, { label: 1 }].slice(0, labels.length),
    types: { experts: "i16", weights: "f32", logits: null },
  };
  const half = Math.ceil(tokens / 2);
  const chunk: TraceChunk = {
    first: 0,
    tokens,
    pass: new Uint32Array(tokens),
    sequence: Uint32Array.from({ length: tokens }, (_, t) => Number(t >= half)),
    position: Int32Array.from({ length: tokens }, (_, t) => t % half),
    token: Int32Array.from({ length: tokens }, (_, t) => t % 7),
    layers: layers.map((_, l) => {
      const ids = new Int32Array(tokens * slots);
      const weights = new Float32Array(tokens * slots);
      for (let t = 0; t < tokens; t++) {
        for (let s = 0; s < slots; s++) {
          const e =
            l === 1 && s === 0 ? 0 : l === 1 ? 1 + ((t + s) % (experts - 2)) : (t + s + (t >= half ? l : 0)) % experts;
          ids[t * slots + s] = e;
          weights[t * slots + s] = 1 / (s + 2);
        }
      }
      return { experts: ids, weights };
    }),
  };
  const trace = {
    header,
    async *[Symbol.asyncIterator]() {
      if (tokens > 0) yield chunk;
    },
  };
  const analysis = await analyseTrace(trace);
  const report: TraceReport = {
    analysis,
    tokens: await traceTokens(trace),
    texts: Array.from({ length: tokens }, (_, t) => ["it", " was", " <b>", "\n", "</script>", "", " é"][t % 7] ?? ""),
    labelOf: (sequence) => header.sequences[sequence]?.label,
  };
  return { analysis, report, html: traceReport(report) };
}

interface Data {
  readonly kept: number;
  readonly wide: boolean;
  readonly scale: number;
  readonly texts: readonly string[];
  readonly plain: boolean;
  readonly runs: readonly (readonly [string, number])[];
  readonly tokens: { readonly ids: string; readonly weights?: string };
  readonly stretches: { readonly from: readonly number[]; readonly sizes: readonly number[] };
}
const dataOf = (html: string): Data =>
  JSON.parse(parseHTML(html).document.querySelector('script[type="application/json"]')?.textContent ?? "");

describe("traceReport", () => {
  test("is one file that fetches nothing, escapes what it shows and gives the same bytes again", async () => {
    const { html, report } = await made();
    const { document } = parseHTML(html);
    const addresses = html.match(/https?:\/\/[^"')\s<]+/g) ?? [];
    expect(addresses.filter((address) => !address.startsWith("http://www.w3.org/"))).toEqual([]);
    expect(document.querySelectorAll("link, img, iframe, script[src]").length).toBe(0);
    expect(html).not.toMatch(/@import|url\(|NaN|wh<ale|co<de|&amp;lt;/);
    expect(document.querySelector("h1")?.textContent).toBe("Routing of wh<ale");
    expect(document.querySelectorAll("script").length).toBe(2);
    expect(traceReport(report)).toBe(html);
  });

  test("names dead and overloaded experts in words, and says when that may be chance", async () => {
    const { html, analysis } = await made();
    const found = traceFindings(analysis);
    expect(found).toContain("Layer 1: expert 5 is dead. No token went there.");
    expect(found).toContain("Layer 1: overloaded beyond 2 × an even share: expert 0 (3.0 ×).");
    expect(found.join(" ")).not.toContain("chance");
    const few = traceFindings((await made({ tokens: 12 })).analysis);
    expect(few.join(" ")).toContain("That may be chance: an even share is only 4.0 tokens per expert.");
    const items = [...parseHTML(html).document.querySelectorAll(".findings li")].map((item) => item.textContent);
    expect(items).toEqual(found);
    const good = traceFindings((await made({ layers: 1 })).analysis);
    expect(good.slice(0, 2)).toEqual([
      "Every expert of every layer saw a token.",
      "No expert has more than 2 times an even share of the load.",
    ]);
    expect(traceFindings((await made({ tokens: 0 })).analysis)).toEqual(["The trace holds no tokens."]);
  });

  test("the heat maps print every load and cross out dead experts, for all tokens and for each label", async () => {
    const { html, analysis } = await made();
    const { document } = parseHTML(html);
    const maps = [...document.querySelectorAll('svg[aria-label^="Load of every expert"]')];
    expect(maps).toHaveLength(2 * 3); // page and phone, all tokens and two labels
    const numbers = [...(maps[0]?.querySelectorAll("g.marks text") ?? [])].map((text) => text.textContent);
    const expected = analysis.layers.flatMap(({ load }) =>
      load.map((n) => (n === 0 ? "×" : ((n * 6) / 120).toFixed(1))),
    );
    expect(numbers).toEqual(expected);
    expect(expected).toContain("×");
    const rows = [...document.querySelectorAll("tbody tr")].map((row) => row.querySelector("th")?.textContent);
    expect(rows).toEqual(["layer 0", "layer 1", "layer 2"]);
  });

  test("smaller cells have a cross for every dead expert and a triangle for every overloaded one, at both widths", async () => {
    const { html, analysis } = await made({ experts: 100, layers: 2, tokens: 90 });
    const maps = [...parseHTML(html).document.querySelectorAll('svg[aria-label^="Load of every expert"]')];
    const marks = (map: Element | undefined, kind: string): number =>
      [...(map?.querySelectorAll(`.${kind}`) ?? [])].reduce(
        (sum, path) => sum + (path.getAttribute("d")?.match(/M/g)?.length ?? 0),
        0,
      );
    const count = (of: "dead" | "overloaded"): number =>
      analysis.layers.reduce((sum, layer) => sum + layer[of].length, 0);
    expect(count("dead")).toBeGreaterThan(0);
    expect(count("overloaded")).toBeGreaterThan(0);
    for (const map of maps.slice(0, 2)) {
      expect([marks(map, "crosses"), marks(map, "triangles")]).toEqual([count("dead"), count("overloaded")]);
      const texts = [...map.querySelectorAll(".axis text")].map((text) => text.textContent);
      expect(texts.at(-1)).toBe("expert");
      expect(texts).toContain("layer 0");
    }
    // The phone's map stands in blocks below each other.
    expect(maps[1]?.querySelectorAll(".cells").length).toBeGreaterThan(maps[0]?.querySelectorAll(".cells").length ?? 9);
  });

  test("many layers with dead and overloaded experts are summed up, and all named by layer", async () => {
    const { report } = await made({ experts: 100, layers: 7, tokens: 90 });
    const layers = report.analysis.layers.map((layer) => ({ ...layer, overloaded: [1, 0] }));
    const analysis = { ...report.analysis, layers };
    const html = traceReport({ ...report, analysis });
    const [dead, , over] = traceFindings(analysis);
    const all = analysis.layers.reduce((sum, layer) => sum + layer.dead.length, 0);
    expect(dead).toMatch(
      new RegExp(`^${all} of 700 experts are dead, in 7 of 7 layers: no token went there\\. The most in layer `),
    );
    expect(over).toMatch(
      /^\d+ experts in 7 of 7 layers carry more than 2 × an even share; most of all expert \d+ in layer \d \(/,
    );
    const rows = troubledExperts(analysis);
    expect(rows).toHaveLength(7);
    for (const [i, { dead: own }] of analysis.layers.entries())
      expect(rows[i]?.[1]).toContain(`${own.length} of 100 experts are dead: ${numberList(own)}.`);
    const details = parseHTML(html).document.querySelector("main > details");
    expect([...(details?.querySelectorAll("dd") ?? [])].map((dd) => dd.textContent)).toEqual(
      rows.map(([, text]) => text),
    );
  });

  test("the squares print who works with whom and where tokens go, in per cent", async () => {
    const { html, analysis } = await made();
    const { document } = parseHTML(html);
    const squares = [...document.querySelectorAll(".square svg")];
    expect(squares).toHaveLength(3 + 2);
    for (const square of squares) expect(square.getAttribute("aria-label")).toMatch(/\d/);
    const numbersOf = (square: Element | undefined): string[] =>
      [...(square?.querySelectorAll(":scope > text") ?? [])].map((text) => text.textContent ?? "");
    const { together = [], load = [] } = analysis.layers[0] ?? {};
    expect(numbersOf(squares[0])).toEqual(
      together.flatMap((row, a) => row.map((n, b) => (a === b ? "–" : `${Math.round((100 * n) / (load[a] ?? 1))}`))),
    );
    const [transition] = analysis.transitions;
    expect(numbersOf(squares[3])).toEqual(
      transition?.counts.flatMap((row) => {
        const total = row.reduce((sum, n) => sum + n, 0);
        return row.map((n) => `${Math.round((100 * n) / Math.max(1, total))}`);
      }),
    );
    expect((await made({ slots: 1 })).html).toContain("No token had two experts.");
    expect((await made({ layers: 1 })).html).toContain("There is no second layer to go to");
  });

  test("the text keeps its tokens, their experts and weights, by sequence and label", async () => {
    const { html, report } = await made();
    const data = dataOf(html);
    expect(data.texts).toEqual(report.texts);
    expect(data.runs).toEqual([
      ["text 1 · prose", 30],
      ["text 2 · co<de", 30],
    ]);
    const ids = [...atob(data.tokens.ids)].map((c) => c.charCodeAt(0));
    expect(ids).toEqual(Array.from(report.tokens.experts as Int32Array));
    const weights = [...atob(data.tokens.weights ?? "")].map((c) => (c.charCodeAt(0) / 255) * data.scale);
    for (const [i, weight] of (report.tokens.weights as Float32Array).entries())
      expect(weights[i]).toBeCloseTo(weight, 2);
    expect(parseHTML(html).document.querySelectorAll(".chip")).toHaveLength(6);
    const { texts, ...bare } = report;
    const plain = dataOf(traceReport(bare));
    expect([plain.plain, ...plain.texts.slice(0, 3)]).toEqual([true, "#0", "#1", "#2"]);
    expect(texts).toHaveLength(60);
  });

  test.each([
    [16, 64, 8, 10_000],
    [30, 300, 4, 10_500],
  ])(
    "stays under 3 MB for %i layers of %i experts, %i for each of %i tokens",
    async (layers, experts, slots, tokens) => {
      const { html } = await made({ layers, experts, slots, tokens });
      expect(html.length).toBeLessThan(3_000_000);
      const data = dataOf(html);
      expect([data.wide, data.texts.length]).toEqual([experts > 255, 10_000]);
      const rest = data.stretches.sizes.reduce((sum, size) => sum + size, 0);
      expect([rest, data.stretches.from[0] ?? 10_000]).toEqual([tokens - 10_000, 10_000]);
    },
  );

  test("a trace without tokens is a page that says so", async () => {
    const { html } = await made({ tokens: 0 });
    expect(parseHTML(html).document.querySelector("main")?.textContent).toContain("The trace holds no tokens.");
    expect(html).not.toContain("NaN");
  });
});

test("numbers in words, and experts by groups", () => {
  expect([[], [3], [3, 4], [1, 2, 3], [0, 2, 5, 6, 7, 9, 10]].map(numberList)).toEqual([
    "",
    "3",
    "3 and 4",
    "1 to 3",
    "0, 2, 5 to 7, 9 and 10",
  ]);
  expect(grouped([1, 2, 3, 4, 5], 2)).toEqual([2, 4.5]);
  expect(grouped([1, 2, 3], 3)).toEqual([1, 2, 3]);
});
