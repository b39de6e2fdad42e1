// Analysis, comparison and token lists of made-up traces, against core's measures on the same routing and against loops of their own.
import { engine } from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import { assignments, coActivation, combinationUsage, expertImportance, routingChange } from "@switchyard/core/moe";
import { describe, expect, it } from "vitest";
import { analyseTrace, type TraceChunks } from "./analyse.ts";
import { diffTraces } from "./diff.ts";
import type { TraceChunk, TraceHeader } from "./format.ts";
import { traceTexts, traceTokens } from "./tokens.ts";
import { headerOf } from "./trace.test-util.ts";

const header = headerOf({
  layers: [
    { index: 1, experts: 5, slots: 3, plan: "sparse" },
    { index: 2, name: "attention", experts: 3, nulls: 1, slots: 2, plan: "sparse" },
    { index: 2, experts: 1, slots: 1, plan: "sparse" },
  ],
  labels: ["prose", "code"],
  sequences: [{ label: 1 }, { label: 0 }, {}],
  types: { experts: "i8", weights: "f32", logits: null },
});

/** A generator of numbers from 0 to 1 that always gives the same ones. */
function numbers(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 32;
  };
}

/** Distinct experts by falling weight, some slots empty; every seventh token is padding. */
function madeUp(head: TraceHeader, tokens: number, seed: number): TraceChunk {
  const random = numbers(seed);
  const layers = head.layers.map(({ experts, nulls = 0, slots }) => {
    const ids = new Int32Array(tokens * slots).fill(-1);
    const weights = new Float32Array(tokens * slots);
    for (let t = 0; t < tokens; t++) {
      const order = Array.from({ length: experts + nulls }, (_, id) => ({ id, by: random() ** (id + 1) }));
      order.sort((a, b) => b.by - a.by);
      const filled = Math.min(order.length, random() < 0.2 ? slots - 1 : slots);
      for (let s = 0; s < filled; s++) {
        ids[t * slots + s] = order[s]?.id ?? -1;
        weights[t * slots + s] = Math.fround(1 / (s + 2) + random() / 100);
      }
    }
    return { experts: ids, weights };
  });
  const column = (of: (t: number) => number): Int32Array => Int32Array.from({ length: tokens }, (_, t) => of(t));
  return {
    first: 0,
    tokens,
    pass: Uint32Array.from(column((t) => Math.floor(t / 10))),
    sequence: Uint32Array.from(column((t) => t % 3)),
    position: column((t) => (t % 7 === 6 ? -1 : Math.floor(t / 3))),
    token: column((t) => t % 11),
    layers,
  };
}

const part = (chunk: TraceChunk, head: TraceHeader, from: number, to: number): TraceChunk => ({
  first: from,
  tokens: to - from,
  pass: chunk.pass.slice(from, to),
  sequence: chunk.sequence.slice(from, to),
  position: chunk.position.slice(from, to),
  token: chunk.token.slice(from, to),
  layers: chunk.layers.map(({ experts, weights }, i) => {
    const slots = head.layers[i]?.slots ?? 0;
    return {
      experts: experts.slice(from * slots, to * slots),
      ...(weights ? { weights: weights.slice(from * slots, to * slots) } : {}),
    };
  }),
});

/** The chunk in pieces of a size. */
const traceOf = (head: TraceHeader, chunk: TraceChunk, size = chunk.tokens): TraceChunks => ({
  header: head,
  async *[Symbol.asyncIterator]() {
    for (let at = 0; at < chunk.tokens; at += size) yield part(chunk, head, at, Math.min(chunk.tokens, at + size));
  },
});

const noTokens = (head: TraceHeader): TraceChunks => traceOf(head, part(chunk, head, 0, 0));
const on = engine(cpu({ precision: 64 }));
const chunk = madeUp(header, 101, 7);
const realTokens = Array.from({ length: 101 }, (_, t) => t).filter((t) => (chunk.position[t] ?? -1) >= 0);
/** Ids and weights of the real tokens of a layer, null experts out. */
function choicesOf(own: TraceChunk, layer: number) {
  const { slots = 0, experts = 0 } = header.layers[layer] ?? {};
  const slot = (t: number, s: number): number => t * slots + s;
  const ids = realTokens.map((t) =>
    Array.from({ length: slots }, (_, s) => own.layers[layer]?.experts[slot(t, s)] ?? -1),
  );
  const weights = realTokens.map((t) =>
    Array.from({ length: slots }, (_, s) => own.layers[layer]?.weights?.[slot(t, s)] ?? 0),
  );
  const clean = ids.map((row) => row.map((id) => (id >= experts ? -1 : id)));
  return {
    experts,
    slots,
    ids,
    clean,
    weights,
    tensor: on.tensor(Int32Array.from(clean.flat()), [clean.length, slots]),
    weightTensor: on.tensor(Float32Array.from(weights.flat().map((w, i) => (clean.flat()[i] === -1 ? 0 : w))), [
      clean.length,
      slots,
    ]),
  };
}

describe("analyseTrace", () => {
  it.each([101, 10, 1])("gives core's measures, read in chunks of %i tokens", async (size) => {
    const found = await analyseTrace(traceOf(header, chunk, size));
    expect([found.tokens, found.padding, found.passes, found.sequences]).toEqual([realTokens.length, 14, 11, 3]);
    for (const [i, layer] of found.layers.entries()) {
      const { experts, tensor, weightTensor, clean, ids } = choicesOf(chunk, i);
      const plan = { kind: "sparse", experts: tensor, weights: weightTensor } as const;
      const together = coActivation(assignments(plan, { tokens: clean.length, experts }));
      expect(layer.together?.flat()).toEqual(Array.from(await together.data()));
      expect(layer.load).toEqual(layer.together?.map((row, e) => row[e]));
      const [usage = 0] = await combinationUsage(together).data();
      expect(layer.combinations ?? 0).toBeCloseTo(usage, 12);
      const importance = await expertImportance(plan, { experts }).data();
      for (const [e, sum] of importance.entries()) expect(layer.importance?.[e]).toBeCloseTo(sum, 9);
      expect(layer.expertsPerToken).toBeCloseTo(clean.flat().filter((id) => id >= 0).length / clean.length, 12);
      expect(layer.nullLoad).toBe(ids.flat().filter((id) => id >= experts).length);
      expect(layer.untouched).toBe(clean.filter((row) => row.every((id) => id < 0)).length);
    }
  });

  it("counts by label, and transitions of leading experts, as loops do", async () => {
    const { layers, labels, transitions } = await analyseTrace(traceOf(header, chunk, 13));
    const label = (t: number): number => [1, 0, -1][chunk.sequence[t] ?? 0] ?? -1;
    expect(labels).toEqual(
      ["prose", "code"].map((name, l) => ({ name, tokens: realTokens.filter((t) => label(t) === l).length })),
    );
    for (const [i, { loadByLabel = [] }] of layers.entries()) {
      const { clean, experts } = choicesOf(chunk, i);
      for (const [l, row] of loadByLabel.entries()) {
        expect(row).toEqual(
          Array.from(
            { length: experts },
            (_, e) => clean.filter((ids, n) => label(realTokens[n] ?? 0) === l && ids.includes(e)).length,
          ),
        );
      }
    }
    expect(transitions.map(({ from, to }) => [from, to])).toEqual([
      [0, 1],
      [1, 2],
    ]);
    const leaders = [0, 1].map((i) => choicesOf(chunk, i).clean.map((ids) => ids.find((id) => id >= 0) ?? -1));
    for (const [a, row] of transitions[0]?.counts.entries() ?? []) {
      for (const [b, count] of row.entries()) {
        expect(count).toBe(realTokens.filter((_, n) => leaders[0]?.[n] === a && leaders[1]?.[n] === b).length);
      }
    }
  });

  it("finds dead and overloaded experts, evenness, and what one layer tells about the next", async () => {
    const head = headerOf({
      layers: [
        { index: 0, experts: 4, slots: 1, plan: "sparse" },
        { index: 1, experts: 4, slots: 1, plan: "sparse" },
      ],
    });
    const columns = { pass: new Uint32Array(6), sequence: new Uint32Array(6), token: new Int32Array(6).fill(-1) };
    const copied: TraceChunk = {
      first: 0,
      tokens: 6,
      ...columns,
      position: Int32Array.of(0, 1, 2, 3, 4, 5),
      layers: [{ experts: Int32Array.of(1, 1, 1, 3, 1, 1) }, { experts: Int32Array.of(0, 0, 0, 2, 0, 0) }],
    };
    const { layers, transitions } = await analyseTrace(traceOf(head, copied));
    expect(layers[0]).toMatchObject({ dead: [0, 2], overloaded: [1], imbalance: 20 / 6 });
    expect(layers[0]?.loadEntropy).toBeCloseTo(-((5 / 6) * Math.log(5 / 6) + Math.log(1 / 6) / 6) / Math.log(4), 12);
    expect(layers[0]).not.toHaveProperty("entropy");
    expect(layers[0]).not.toHaveProperty("importance");
    expect(transitions[0]?.told).toBeCloseTo(1, 12);
    const blind = { ...copied, layers: [copied.layers[0], { experts: Int32Array.of(2, 2, 2, 2, 2, 2) }] };
    expect((await analyseTrace(traceOf(head, blind as TraceChunk))).transitions[0]?.told).toBe(0);
    expect((await analyseTrace(traceOf(head, copied), { overload: 4 })).layers[0]?.overloaded).toEqual([]);
  });

  it("takes entropy from logits where there are some, else from the weights", async () => {
    const one = { index: 0, experts: 2, nulls: 1, slots: 2, plan: "sparse" } as const;
    const tokens = { tokens: 2, pass: new Uint32Array(2), sequence: new Uint32Array(2), first: 0 };
    const base = { ...tokens, position: Int32Array.of(0, 1), token: Int32Array.of(0, 1) };
    const weights = Float32Array.of(0.75, 0.25, 1, 0);
    const experts = Int32Array.of(0, 1, 1, 2);
    const plain = headerOf({ layers: [one], types: { experts: "i8", weights: "f32", logits: null } });
    const binary = (p: number): number => -(p * Math.log2(p) + (1 - p) * Math.log2(1 - p));
    const { layers } = await analyseTrace(traceOf(plain, { ...base, layers: [{ experts, weights }] }));
    expect(layers[0]?.entropy).toBeCloseTo(binary(0.75) / 2, 7);
    const scored = headerOf({ layers: [one], types: { experts: "i8", weights: "f32", logits: "f32" } });
    const logits = Float32Array.of(0, Math.log(3), 50, 5, 5, Number.NEGATIVE_INFINITY);
    const whole = {
      header: scored,
      async *[Symbol.asyncIterator]() {
        yield { ...base, layers: [{ experts, weights, logits }] };
      },
    };
    expect((await analyseTrace(whole)).layers[0]?.entropy).toBeCloseTo((binary(0.25) + 1) / 2, 6);
  });

  it("gives zeros for a trace without tokens, and refuses one that does not fit", async () => {
    const empty = await analyseTrace(noTokens(header));
    expect([empty.tokens, empty.layers[0]?.imbalance, empty.layers[0]?.expertsPerToken]).toEqual([0, 0, 0]);
    expect(JSON.stringify(empty)).not.toContain("null,");
    const layers = Array.from({ length: 20 }, (_, index) => ({
      index,
      experts: 2 ** 20,
      slots: 1,
      plan: "sparse" as const,
    }));
    const wide = headerOf({ layers, types: { experts: "i32", weights: null, logits: null } });
    await expect(analyseTrace(noTokens(wide))).rejects.toThrow(/20 layers with 41943040 counts/);
    const one = headerOf({ ...wide, layers: layers.slice(0, 1) });
    const unpaired = await analyseTrace(noTokens(one));
    expect(unpaired.layers[0]).not.toHaveProperty("together");
    const asked = analyseTrace(noTokens(one), { pairs: true });
    await expect(asked).rejects.toThrow(/leave pairs out/);
  });
});

describe("diffTraces", () => {
  const other: TraceChunk = { ...chunk, layers: madeUp(header, 101, 8).layers };

  it("gives core's routing change, whatever the chunks, per layer and label", async () => {
    const found = await diffTraces(traceOf(header, chunk, 10), traceOf(header, other, 7));
    expect(found.tokens).toBe(realTokens.length);
    const label = (t: number): number => [1, 0, -1][chunk.sequence[t] ?? 0] ?? -1;
    for (const [i, layer] of found.layers.entries()) {
      const [a, b] = [choicesOf(chunk, i), choicesOf(other, i)];
      for (const [l, got] of [layer, ...layer.labels].entries()) {
        const mask = on.tensor(
          Float32Array.from(realTokens, (t) => Number(l === 0 || label(t) === l - 1)),
          [realTokens.length],
        );
        const { sets, overlap } = routingChange(a.tensor, b.tensor, { experts: a.experts, mask });
        expect(got.sets).toBeCloseTo((await sets.data())[0] ?? -1, 12);
        expect(got.overlap).toBeCloseTo((await overlap.data())[0] ?? -1, 12);
      }
      // A null expert in front is no leader here.
      const lead = (ids: number[]): number => ids.find((id) => id >= 0) ?? -1;
      const changed = a.clean.filter((ids, n) => lead(ids) !== lead(b.clean[n] ?? [])).length;
      expect(layer.firsts).toBeCloseTo(changed / realTokens.length, 12);
    }
    const mean = found.layers.reduce((sum, { sets }) => sum + sets, 0) / 3;
    expect(found.total.sets).toBeCloseTo(mean, 12);
    expect(found.total.sets).toBeGreaterThan(0.2);
    expect(found.labels.map(({ name }) => name)).toEqual(["prose", "code"]);
    const same = await diffTraces(traceOf(header, chunk), traceOf(header, chunk, 3));
    expect(same.total).toEqual({ sets: 0, overlap: 0, firsts: 0 });
  });

  const changed = (columns: Partial<TraceChunk>): TraceChunks => traceOf(header, { ...chunk, ...columns });
  it("says where the tokens differ", async () => {
    const token = chunk.token.slice();
    token[10] = 99;
    await expect(diffTraces(changed({}), changed({ token }))).rejects.toThrow(
      /token 9 is id 10 at position 3 of sequence 1 in A and id 99 at position 3 of sequence 1 in B/,
    );
    token[10] = -1;
    expect((await diffTraces(changed({}), changed({ token }))).tokens).toBe(realTokens.length);
    const sequence = chunk.sequence.slice();
    sequence[0] = 1;
    await expect(diffTraces(changed({}), changed({ sequence }))).rejects.toThrow(/token 0 is .* sequence 0 in A/);
    const short = traceOf(header, part(chunk, header, 0, 50));
    await expect(diffTraces(short, changed({}))).rejects.toThrow(/A ends after 43, B goes on/);
    await expect(diffTraces(changed({}), short)).rejects.toThrow(/B ends after 43, A goes on/);
  });

  it("refuses other layers and other tokenizers", async () => {
    const with_ = (more: Partial<TraceHeader>): TraceChunks => traceOf({ ...header, ...more }, chunk);
    await expect(diffTraces(with_({}), with_({ layers: header.layers.slice(1) }))).rejects.toThrow(
      /A has 3 layers .* B has 2/,
    );
    const layers = header.layers.map((layer) => ({ ...layer, experts: layer.experts + 1 }));
    await expect(diffTraces(with_({}), with_({ layers }))).rejects.toThrow(
      /entry 0 of their layers is layer 1 with 5 experts in A and layer 1 with 6 experts in B/,
    );
    const [a, b] = ["a", "b"].map((digit) => with_({ tokenizer: digit.repeat(64) })) as [TraceChunks, TraceChunks];
    await expect(diffTraces(a, b)).rejects.toThrow(/tokenizers differ/);
  });
});

describe("traceTokens", () => {
  it("keeps the first tokens in the order of their texts, the others in stretches", async () => {
    const all = await traceTokens(traceOf(header, chunk, 9));
    expect([all.count, all.stretches.length, all.kept]).toEqual([realTokens.length, 0, 3]);
    const places = Array.from(all.sequence, (s, i) => s * 1000 + (all.position[i] ?? 0));
    expect(places).toEqual([...places].sort((a, b) => a - b));
    // Token 8 is sequence 2, position 2.
    const at = places.indexOf(2002);
    expect(all.token[at]).toBe(8);
    expect(Array.from(all.experts.subarray(at * 9, at * 9 + 3))).toEqual(
      Array.from(chunk.layers[0]?.experts.subarray(24, 27) ?? []),
    );
    const some = await traceTokens(traceOf(header, chunk, 9), { most: 10, kept: 2, stretches: 2 });
    expect([some.count, some.kept]).toEqual([10, 2]);
    const rest = realTokens.length - 10;
    expect(some.stretches.map(({ first, tokens }) => [first, tokens])).toEqual([
      [10, 64],
      [74, rest - 64],
    ]);
    const own = choicesOf(chunk, 0).clean.slice(10, 74);
    const counts = [0, 1, 2, 3, 4].map((e) => ({ e, n: own.filter((ids) => ids.includes(e)).length }));
    counts.sort((a, b) => b.n - a.n || a.e - b.e);
    expect(Array.from(some.stretches[0]?.experts.subarray(0, 2) ?? [])).toEqual([counts[0]?.e, counts[1]?.e]);
    expect(some.stretches[0]?.shares[0]).toBeCloseTo((counts[0]?.n ?? 0) / 64, 6);
  });

  it("names tokens by the header's texts, or by their ids", async () => {
    const tokens = { count: 3, sequence: Uint32Array.of(0, 0, 0), token: Int32Array.of(1, 2, -1) };
    const known = headerOf({ extra: { tokens: { 1: "wha", 2: "le" } } });
    expect(traceTexts(tokens, { header: known })).toEqual(["wha", "le", "#-1"]);
    expect(traceTexts(tokens, { header })).toEqual(["#1", "#2", "#-1"]);
  });
});
