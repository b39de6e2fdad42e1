// Grouped-query attention (2305.13245) with what checkpoints add to it: biases, norms of queries and keys, clipping, sliding
// windows (1904.10509), attention sinks (gpt-oss).
import {
  attention,
  maximum,
  minimum,
  mul,
  reshape,
  rmsNorm,
  rope,
  sigmoid,
  sub,
  type Tensor,
  type Tree,
  transpose,
} from "@switchyard/core";
import type { GroupedAttention, Norm } from "../blueprint.ts";
import { product } from "../stored-matrix.ts";
import { leaf } from "../tree.ts";
import type { Attended, AttentionInput, AttentionModule } from "./kind.ts";

export function groupedAttention(options: GroupedAttention, width: number, { eps }: Norm): AttentionModule {
  const { heads, kvHeads, headSize, bias = false, outputBias = false, qkNorm, clip, window, sinks = false } = options;
  const { interleaved } = options.rope;
  const [inner, kvInner] = [heads * headSize, kvHeads * headSize];
  const settings = {
    causal: true,
    scale: options.scale ?? 1 / Math.sqrt(headSize),
    ...(window === undefined ? {} : { window }),
  };

  const run = (params: Tree, { hidden, layout, turns, remember }: AttentionInput): Attended => {
    const { batch, sequence, mask } = layout;
    const project = (name: "q" | "k" | "v", count: number): Tensor => {
      let z = product(params, name, hidden, bias ? leaf(params, `${name}Bias`) : undefined); // [batch, sequence, count * headSize]
      if (qkNorm === "projection" && name !== "v") z = rmsNorm(z, leaf(params, `${name}Norm`), { eps });
      if (clip !== undefined) z = minimum(maximum(z, -clip), clip);
      z = reshape(z, [batch, sequence, count, headSize]);
      if (qkNorm === "head" && name !== "v") z = rmsNorm(z, leaf(params, `${name}Norm`), { eps });
      return name === "v" ? z : rope(z, turns.cos, turns.sin, interleaved ? { interleaved } : {});
    };
    const q = project("q", heads);
    const { keys, values } = remember(project("k", kvHeads), project("v", kvHeads)); // [batch, past + sequence, kvHeads, headSize]
    const seen = { ...settings, ...(mask ? { mask } : {}) };
    const { output, lse } = attention(q, keys, values, seen);
    // A score without a value takes its share of the softmax: sum / (sum + e^sink).
    const kept = sinks ? mul(output, shares(lse, leaf(params, "sinks"))) : output; // [batch, sequence, heads, headSize]
    const joined = reshape(kept, [batch, sequence, inner]);
    return {
      output: product(params, "o", joined, outputBias ? leaf(params, "oBias") : undefined),
      probabilities() {
        const { probabilities, lse: again } = attention(q, keys, values, { ...seen, probabilities: true });
        if (!probabilities) throw new Error("attention gave no probabilities");
        if (!sinks) return probabilities; // [batch, heads, sequence, past + sequence]
        return mul(probabilities, reshape(sinkShare(again, leaf(params, "sinks")), [batch, heads, sequence, 1]));
      },
    };
  };

  return {
    shapes: {
      q: [inner, width],
      k: [kvInner, width],
      v: [kvInner, width],
      o: [width, inner],
      ...(bias ? { qBias: [inner], kBias: [kvInner], vBias: [kvInner] } : {}),
      ...(outputBias ? { oBias: [width] } : {}),
      ...(qkNorm
        ? { qNorm: [qkNorm === "head" ? headSize : inner], kNorm: [qkNorm === "head" ? headSize : kvInner] }
        : {}),
      ...(sinks ? { sinks: [heads] } : {}),
    },
    run,
  };
}

/** lse `[batch, heads, sequence]`, sinks `[heads]` -> the share of the softmax that is not the sink's, `[batch, heads, sequence]`. */
function sinkShare(lse: Tensor, sinks: Tensor): Tensor {
  return sigmoid(sub(lse, reshape(sinks, [sinks.size, 1])));
}

/** The same as a factor of `[batch, sequence, heads, headSize]`. */
function shares(lse: Tensor, sinks: Tensor): Tensor {
  const [batch = 0, heads = 0, sequence = 0] = lse.shape;
  return reshape(transpose(sinkShare(lse, sinks), [0, 2, 1]), [batch, sequence, heads, 1]);
}
