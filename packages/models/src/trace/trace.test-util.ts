// Headers and chunks of made-up routing traces.
import type { TraceChunk, TraceHeader } from "./format.ts";

export const headerOf = (more: Partial<TraceHeader> = {}): TraceHeader => ({
  format: "moe-routing-trace",
  version: 1,
  model: { name: "whale" },
  layers: [
    { index: 0, experts: 5, slots: 2, plan: "sparse", expertBytes: 64 },
    { index: 3, name: "attention", experts: 3, nulls: 1, slots: 3, plan: "sparse" },
  ],
  tokenizer: null,
  labels: [],
  sequences: [],
  types: { experts: "i8", weights: null, logits: null },
  ...more,
});

/** Columns of the right sizes with values that differ from place to place; bf16 holds all of them exactly. */
export function chunkOf(header: TraceHeader, tokens: number, first = 0, pass = first): TraceChunk {
  const columns = Int32Array.from({ length: tokens }, (_, i) => first + i);
  const numbers = (count: number): Float32Array =>
    Float32Array.from({ length: count }, (_, i) => ((i * 7) % 64) / 16 - 1);
  return {
    first,
    tokens,
    pass: Uint32Array.from(columns, (_, i) => pass + i),
    sequence: Uint32Array.from(columns, (x) => x % 3),
    position: columns.map((x) => (x % 4) - 1),
    token: columns.map((x) => x * 1000),
    layers: header.layers.map(({ experts, nulls = 0, slots }) => ({
      experts: Int32Array.from({ length: tokens * slots }, (_, i) => ((i + first) % (experts + nulls + 1)) - 1),
      ...(header.types.weights ? { weights: numbers(tokens * slots) } : {}),
      ...(header.types.logits ? { logits: numbers(tokens * (experts + nulls)) } : {}),
    })),
  };
}
