// The routing traces of a training run: what the probe's tokens did at a checkpoint, in the format of @switchyard/models.
import { createHash } from "node:crypto";
import { type LayerDecisions, type ProbeRouting, type TraceFiles, writeWhole } from "@switchyard/bench";
import { type Tokenizer, type TraceHeader, type TraceLayer, traceWriter } from "@switchyard/models";
import { tokenTexts } from "./recording.ts";

const chunkTokens = 1024;

/** The hash of tokenizer.json as `saveModel` writes it beside the trained weights. */
const hashOf = ({ files }: Tokenizer): string =>
  createHash("sha256")
    .update(`${JSON.stringify(files.tokenizer, null, 2)}\n`)
    .digest("hex");

function headerOf(routing: ProbeRouting, tokenizer: Tokenizer): TraceHeader {
  const { router, seed, step, totalSteps, domains, windows, token, layers } = routing;
  const wide = Math.max(...layers.map(({ experts, nulls }) => experts + nulls));
  return {
    format: "moe-routing-trace",
    version: 1,
    model: { name: `${router} after ${step} of ${totalSteps} steps` },
    layers: layers.map(
      ({ plan, experts, nulls, slots }, index): TraceLayer => ({
        index,
        experts,
        ...(nulls > 0 ? { nulls } : {}),
        slots,
        plan,
      }),
    ),
    tokenizer: hashOf(tokenizer),
    labels: domains,
    sequences: windows.map((label) => ({ label })),
    types: {
      experts: wide <= 128 ? "i8" : wide <= 32768 ? "i16" : "i32",
      weights: "f32",
      // Only to tell how certain a router is, for which two or three digits will do.
      logits: layers.every(({ probabilities }) => probabilities !== undefined) ? "bf16" : null,
    },
    tool: "switchyard train",
    extra: { router, seed, step, steps: totalSteps, tokens: tokenTexts(tokenizer, token) },
  };
}

/** Writes probes as routing traces whose tokens have their texts and the domains as labels. Logits are ln of the probabilities. */
export function probeTraces(tokenizer: Tokenizer): TraceFiles {
  return {
    async write(path, routing) {
      const pieces: Uint8Array[] = [];
      const header = headerOf(routing, tokenizer);
      const writer = await traceWriter({ write: async (bytes) => void pieces.push(bytes) }, header);
      const { window, batch, position, token, layers } = routing;
      const rows = (layer: LayerDecisions, from: number, to: number) => {
        const { slots, experts, nulls, ids, weights, probabilities } = layer;
        const wide = experts + nulls;
        return {
          experts: ids.slice(from * slots, to * slots),
          weights: weights.slice(from * slots, to * slots),
          ...(header.types.logits && probabilities
            ? { logits: probabilities.slice(from * wide, to * wide).map(Math.log) }
            : {}),
        };
      };
      for (let from = 0; from < token.length; from += chunkTokens) {
        const to = Math.min(token.length, from + chunkTokens);
        await writer.write({
          tokens: to - from,
          pass: batch.slice(from, to),
          sequence: window.slice(from, to),
          position: position.slice(from, to),
          token: token.slice(from, to),
          layers: layers.map((layer) => rows(layer, from, to)),
        });
      }
      await writer.close();
      writeWhole(path, pieces);
    },
  };
}
