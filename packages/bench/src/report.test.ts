// The report as a document: self-contained, complete, escaped, and with figures that hold the numbers.
import { parseHTML } from "linkedom";
import { describe, expect, test } from "vitest";
import { exampleResults } from "../test/example.ts";
import { spread, styleOf, thinned } from "./figures.ts";
import { finding, renderReport } from "./report.ts";
import type { Results } from "./results.ts";

const results = exampleResults([1, 2, 3], 3);
const html = renderReport(results);
const { document } = parseHTML(html);

describe("renderReport", () => {
  test("is one file: nothing is fetched", () => {
    const addresses = html.match(/https?:\/\/[^"')\s<]+/g) ?? [];
    expect(addresses.filter((address) => !address.startsWith("http://www.w3.org/"))).toEqual([]);
    expect(document.querySelectorAll("link, img, iframe, script[src]").length).toBe(0);
    expect(html).not.toMatch(/@import|url\(/);
  });

  test("the same results give the same bytes", () => expect(renderReport(results)).toBe(html));

  test("the table has a row per router and baseline, the best is marked", () => {
    const rows = [...(document.querySelector("tbody")?.querySelectorAll("tr") ?? [])];
    expect(rows.map((row) => row.querySelector("th")?.textContent?.trim())).toEqual([
      "topK",
      "switchRouter",
      "reMoE",
      "order-2 byte model",
      "order-3 byte model",
    ]);
    expect(document.querySelectorAll(".best").length).toBe(1);
    expect(rows[0]?.querySelector(".best")?.textContent).toContain(results.summary[0]?.bitsPerByte.mean.toFixed(3));
  });

  test("every figure is drawn for a page and for a phone and says in words what it shows", () => {
    const labelled = [...document.querySelectorAll("svg[role=img]")];
    // loss, domains, compute, load per router, co-activation of the two that have any: twice each; four small figures once
    expect(labelled.length).toBe(2 * (1 + 1 + 1 + 3 + 2) + 4);
    for (const svg of labelled) expect(svg.getAttribute("aria-label")).toMatch(/\d/);
    expect(html).not.toContain("NaN");
  });

  test("the heat map prints every load as a multiple of an even share", () => {
    const map = document.querySelector('svg[aria-label*="for topK"]');
    const numbers = [...(map?.querySelectorAll('g[aria-label="text"] text') ?? [])].map((text) => text.textContent);
    const loads = results.runs[0]?.checkpoints.at(-1)?.layers.flatMap(({ load }) => load.flat()) ?? [];
    expect(numbers).toEqual(loads.map((share) => (share * 8).toFixed(1)));
  });

  test("the co-activation squares print the share of every pair in per cent, without the diagonal", () => {
    const map = document.querySelector('svg[aria-label*="Co-activation of 8 experts for topK"]');
    const numbers = [...(map?.querySelectorAll('g[aria-label="text"] text') ?? [])].map((text) => text.textContent);
    const layers = results.runs[0]?.final.layers ?? [];
    const shares = layers.flatMap(({ together }) => together.flatMap((row, a) => row.filter((_, b) => b !== a)));
    expect(numbers.slice(0, shares.length)).toEqual(shares.map((share) => String(Math.round(100 * share))));
    expect(numbers.slice(shares.length)).toEqual(["layer 1", "layer 2", "layer 3"]);
    expect(document.querySelector("main")?.textContent).toContain("No token had two experts."); // switchRouter
  });

  test("compute per token is said by domain, and noise in a row per router", () => {
    const figure = document.querySelector('svg[aria-label^="Experts per token by domain"]');
    expect(figure?.getAttribute("aria-label")).toContain("switchRouter novel 1.00, speeches 1.00, code 1.00");
    const rows = [...document.querySelectorAll("table")].at(-1)?.querySelectorAll("tbody tr") ?? [];
    expect([...rows].map((row) => row.querySelector("td")?.textContent)).toEqual(["12 %", "14 %", "16 %"]);
  });

  test("traces are linked relative to the report, run by run; without any there is no such part", () => {
    expect(html).not.toContain("Routing traces");
    const [topK, other, ...rest] = results.runs;
    if (topK === undefined || other === undefined) throw new Error("two runs");
    const checkpoints = topK.checkpoints.map((one) => ({
      ...one,
      trace: `traces/topK_k=1-seed1/step-${one.step}.trace`,
    }));
    const runs = [{ ...topK, checkpoints }, { ...other, untraced: "a plan of <kind> names none" }, ...rest];
    const { document: page } = parseHTML(renderReport({ ...results, runs }));
    const links = [...page.querySelectorAll("dl.traces a")].map((a) => [a.getAttribute("href"), a.textContent]);
    expect(links).toEqual(checkpoints.map(({ step, trace }) => [trace, `${step}`]));
    const names = [...page.querySelectorAll("dl.traces dt")].map((dt) => dt.textContent?.trim());
    expect(names).toEqual([`${topK.router}, seed ${topK.seed}`, `${other.router}, seed ${other.seed}`]);
    expect(page.querySelector("dl.traces")?.textContent).toContain("a plan of <kind> names none");
    const [first, last] = [checkpoints[0]?.trace, checkpoints.at(-1)?.trace];
    expect(page.querySelector("pre")?.textContent).toBe(
      `npx switchyard trace report ${last}\nnpx switchyard trace diff ${first} ${last}`,
    );
  });

  test("three dozen routers are told apart by colour, dash and marker together", () => {
    const looks = Array.from({ length: 36 }, (_, i) => JSON.stringify(styleOf(i)));
    expect(new Set(looks).size).toBe(36);
  });

  test("the sample keeps its text, marks the prompt and knows each token's experts", () => {
    const reading = document.querySelector(".reading");
    const spans = [...(reading?.querySelectorAll(".t") ?? [])];
    expect(document.querySelectorAll(".reading")).toHaveLength(3);
    const sample = results.runs[0]?.samples[0];
    expect(spans.map((span) => span.getAttribute("data-text")).join("")).toBe(
      sample?.tokens.map(({ text }) => text).join(""),
    );
    expect(
      spans
        .filter((span) => span.classList.contains("prompt"))
        .map((s) => s.textContent)
        .join(""),
    ).toBe("It was");
    const routes = JSON.parse(reading?.querySelector("script")?.textContent ?? "null");
    expect(routes).toHaveLength(spans.length);
    const [experts, weights] = routes[4][1];
    expect(new Set(experts)).toEqual(new Set(sample?.tokens[4]?.layers[1]?.experts));
    expect(weights[0]).toBeGreaterThanOrEqual(weights[1]);
  });

  test("in a browser the layer, the lit expert and the pointed-at token follow the reader", () => {
    const page = parseHTML(html).document;
    const script = [...page.querySelectorAll("script")].at(-1)?.textContent ?? "";
    new Function("document", script)(page);
    const box = page.querySelector(".reading");
    const token = box?.querySelectorAll(".t")[4];
    const chips = [...(box?.querySelectorAll(".chip") ?? [])];
    const layers = results.runs[0]?.samples[0]?.tokens[4]?.layers ?? [];
    const leading = (layer: number): number => {
      const { experts = [], weights = [] } = layers[layer] ?? {};
      return experts[weights.indexOf(Math.max(...weights))] ?? -1;
    };
    const hueOf = (expert: number): string => chips[expert]?.getAttribute("data-h") ?? "none";
    const event = (name: string) => new (page.defaultView?.Event ?? Event)(name, { bubbles: true });
    const hueNow = (): string | undefined => /--h:\s*(\d+)/.exec(token?.getAttribute("style") ?? "")?.[1];

    expect(hueNow()).toBe(hueOf(leading(1)));
    expect(box?.classList.contains("dimmed")).toBe(false);
    const select = box?.querySelector("select");
    if (select) Object.defineProperty(select, "value", { value: "0" });
    select?.dispatchEvent(event("change"));
    expect(hueNow()).toBe(hueOf(leading(0)));

    chips[leading(0)]?.dispatchEvent(event("click"));
    expect(box?.classList.contains("dimmed")).toBe(true);
    expect(token?.classList.contains("lit")).toBe(true);
    chips[leading(0)]?.dispatchEvent(event("click"));
    expect(box?.classList.contains("dimmed")).toBe(false);

    token?.dispatchEvent(event("pointerover"));
    expect(box?.querySelector(".detail")?.textContent).toContain(`layer 1: expert ${leading(0)} (`);
  });

  test("names and texts from outside cannot become markup", () => {
    const nasty = '</script><b onload="x">&';
    const [run] = results.runs;
    const [sample] = run?.samples ?? [];
    if (run === undefined || sample === undefined) throw new Error("the example has runs and samples");
    const tokens = [{ text: nasty, layers: [{ experts: [0], weights: [1] }] }];
    const evil: Results = {
      ...results,
      name: nasty,
      domains: results.domains.map((domain) => ({ ...domain, name: nasty })),
      runs: [{ ...run, router: nasty, samples: [{ ...sample, text: nasty, tokens }] }],
    };
    const page = parseHTML(renderReport(evil)).document;
    expect(page.querySelectorAll("b").length).toBe(0);
    expect(page.querySelector(".t")?.textContent).toBe(nasty);
  });

  test("results without a finished run still make a page that says so", () => {
    const page = renderReport({ ...results, complete: false, runs: [], summary: [] });
    expect(page).toContain("No run has finished yet.");
    expect(page).toContain("interrupted");
  });

  test("runs of unequal length and a single seed are drawn", () => {
    const runs = exampleResults().runs.map((run, i) => ({ ...run, checkpoints: run.checkpoints.slice(0, 2 + i) }));
    expect(renderReport({ ...exampleResults(), runs })).not.toContain("NaN");
  });
});

describe("finding", () => {
  const row = (router: string, mean: number, halfWidth?: number) => {
    const [first] = results.summary;
    if (first === undefined) throw new Error("the example has a summary");
    return { ...first, router, bitsPerByte: { mean, ...(halfWidth === undefined ? {} : { halfWidth }) } };
  };
  const of = (...summary: ReturnType<typeof row>[]): string => finding({ ...results, summary });

  test("claims no more than the seeds allow", () => {
    expect(of(row("a", 2.5, 0.01), row("b", 2.6, 0.02))).toContain(
      "b follows 0.100 behind; the 95 % intervals over the seeds do not overlap",
    );
    expect(of(row("a", 2.5, 0.1), row("b", 2.6, 0.02))).toContain("overlap, so the order is not certain");
    expect(of(row("a", 2.5), row("b", 2.4))).toContain("b needs 2.400 bits per byte");
    expect(of(row("a", 2.5), row("b", 2.4))).toContain("within chance");
  });

  test("names the strongest baseline that is beaten, or says that none is", () => {
    expect(of(row("a", 2.5))).toContain("the order-2 byte model needs 2.760");
    expect(of(row("a", 2.1))).toContain("the order-3 byte model needs 2.130");
    expect(of(row("a", 2.9))).toContain("does not yet beat the order-2 byte model (2.760)");
  });
});

describe("spread", () => {
  test.each([
    [[], []],
    [[10], [10]],
    [
      [10, 40],
      [10, 40],
    ],
    [
      [10, 12],
      [3.5, 18.5],
    ],
    [
      [12, 10],
      [18.5, 3.5],
    ],
    [
      [10, 10, 10],
      [-5, 10, 25],
    ],
    [
      [0, 1, 100],
      [-7, 8, 100],
    ],
  ])("%j -> %j", (positions, expected) => expect(spread(positions, 15)).toEqual(expected));
});

test("thinned takes means of stretches and keeps short series", () => {
  expect(thinned([1, 2, 3, 4, 5], 2)).toEqual([
    { at: 2, value: 2 },
    { at: 4.5, value: 4.5 },
  ]);
  expect(thinned([7, 8], 10).map(({ value }) => value)).toEqual([7, 8]);
  expect(thinned([], 3)).toEqual([]);
});
