// Rotary positions and attention. The matrix of scores is stored: threads share no memory that could hold pieces of it.
import type { Kernel } from "@switchyard/core";
import {
  at,
  type Body,
  type Calls,
  type GpujsHandle,
  type Input,
  lastOf,
  only,
  sizeOf,
  type Value,
  type Work,
} from "../calls.ts";
import { divide, logarithm, type Program, split } from "../program.ts";
import { maxOver } from "./reduce.ts";

/** The place of element i of x [batch, s, heads, d] and of its angle; `sign` -1 turns back. */
const angle = `
  ${split("line", "c", "i", "d")}
  ${divide("token", "line", "heads")}
  ${split("b", "position", "token", "s")}
  let angles = position;
  if (perRow > 0) { angles = token; }`;
const ropeHalves: Program = {
  name: "ropeHalves",
  arrays: ["x", "cos", "sin"],
  sizes: ["s", "heads", "d", "half", "perRow"],
  numbers: ["sign"],
  body: `${angle}
  let y = x[i];
  if (c < half) {
    y = x[i] * cos[angles * half + c] - sign * x[i + half] * sin[angles * half + c];
  } else {
    if (c < 2 * half) {
      y = x[i] * cos[angles * half + c - half] + sign * x[i - half] * sin[angles * half + c - half];
    }
  }
  return y;`,
};
const ropePairs: Program = {
  name: "ropePairs",
  arrays: ["x", "cos", "sin"],
  sizes: ["s", "heads", "d", "half", "perRow"],
  numbers: ["sign"],
  body: `${angle}
  ${split("pair", "second", "c", "2")}
  let y = x[i];
  if (c < 2 * half) {
    if (second < 1) {
      y = x[i] * cos[angles * half + pair] - sign * x[i + 1] * sin[angles * half + pair];
    } else {
      y = x[i] * cos[angles * half + pair] + sign * x[i - 1] * sin[angles * half + pair];
    }
  }
  return y;`,
};

// Scores and probabilities are [batch, heads, s, total]; `group` query heads share a head of keys and values.
const place = `
  ${split("line", "j", "i", "total")}
  ${split("headLine", "q", "line", "s")}
  ${split("b", "h", "headLine", "heads")}
  ${divide("kv", "h", "group")}`;
const sharedSizes = ["s", "total", "heads", "group", "kvHeads"];
/** A hidden score. Infinity has no literal on a GPU, and this is as small beside any score. */
const HIDDEN = "-3e38";

const scores = (mask: boolean): Program => ({
  name: mask ? "scoresMasked" : "scores",
  arrays: ["queries", "keys", ...(mask ? ["mask"] : [])],
  // `window` 0 is none.
  sizes: [...sharedSizes, "d", "causal", "window"],
  numbers: ["scale"],
  body: `${place}
  const behind = total - s + q - j;
  let sum = 0;
  if ((causal > 0 && behind < 0) || (window > 0 && behind >= window)${mask ? " || mask[b * total + j] == 0" : ""}) {
    sum = ${HIDDEN};
  } else {
    const left = ((b * s + q) * heads + h) * d;
    const right = ((b * total + j) * kvHeads + kv) * d;
    for (let p = 0; p < d; p++) { sum += queries[left + p] * keys[right + p]; }
    sum = sum * scale;
  }
  return sum;`,
});
const plainScores = scores(false);
const maskedScores = scores(true);

/** log(sum of exp) of each row of scores. Where everything is hidden it is log(0), -infinity. */
const logSums: Program = {
  name: "attentionSums",
  arrays: ["x", "top"],
  sizes: ["total"],
  body: `
  let m = top[i];
  let sum = 0;
  if (m > -1e38) {
    for (let p = 0; p < total; p++) { sum += Math.exp(x[i * total + p] - m); }
  } else {
    m = 0;
  }
  ${logarithm("y", "sum")}
  return y + m;`,
};
const probabilities: Program = {
  name: "attentionWeights",
  arrays: ["x", "lse"],
  sizes: ["total"],
  body: `
  ${divide("row", "i", "total")}
  let y = 0;
  if (lse[row] > -1e38) { y = Math.exp(x[i] - lse[row]); }
  return y;`,
};
const output: Program = {
  name: "attention",
  arrays: ["p", "values"],
  sizes: [...sharedSizes, "d"],
  body: `
  ${split("line", "c", "i", "d")}
  ${split("token", "h", "line", "heads")}
  ${split("b", "q", "token", "s")}
  ${divide("kv", "h", "group")}
  const left = ((b * heads + h) * s + q) * total;
  let sum = 0;
  for (let j = 0; j < total; j++) { sum += p[left + j] * values[((b * total + j) * kvHeads + kv) * d + c]; }
  return sum;`,
};

/** Of each token and head, the output times its gradient. */
const dots: Program = {
  name: "attentionDots",
  arrays: ["a", "b"],
  sizes: ["d"],
  body: `
  let sum = 0;
  for (let p = 0; p < d; p++) { sum += a[i * d + p] * b[i * d + p]; }
  return sum;`,
};
const scoresGrad: Program = {
  name: "attentionScoresGrad",
  arrays: ["p", "dout", "values", "delta"],
  sizes: [...sharedSizes, "d"],
  numbers: ["scale"],
  body: `${place}
  const token = (b * s + q) * heads + h;
  const right = ((b * total + j) * kvHeads + kv) * d;
  let sum = 0;
  for (let c = 0; c < d; c++) { sum += dout[token * d + c] * values[right + c]; }
  return p[i] * (sum - delta[token]) * scale;`,
};
/** Keys and values gather from their group's queries: a [batch, heads, s, total], x [batch, s, heads, d]. */
const keysGrad: Program = {
  name: "attentionKeysGrad",
  arrays: ["a", "x"],
  sizes: [...sharedSizes, "d"],
  body: `
  ${split("line", "c", "i", "d")}
  ${split("key", "kv", "line", "kvHeads")}
  ${split("b", "j", "key", "total")}
  let sum = 0;
  for (let g = 0; g < group; g++) {
    const h = kv * group + g;
    for (let q = 0; q < s; q++) {
      sum += a[((b * heads + h) * s + q) * total + j] * x[((b * s + q) * heads + h) * d + c];
    }
  }
  return sum;`,
};

interface Attrs {
  readonly causal: boolean;
  readonly scale: number;
  readonly window?: number;
}
interface Sizes {
  readonly [name: string]: number;
}

function sizesOf(q: Input, k: Input): Sizes {
  const [s, heads, total, kvHeads] = [at(q.shape, 1), at(q.shape, 2), at(k.shape, 1), at(k.shape, 2)];
  return { s, total, heads, group: heads / kvHeads, kvHeads };
}

function scoresOf(work: Work, q: Input, k: Input, mask: Input | undefined, attrs: Attrs): Promise<Value> {
  const sizes = sizesOf(q, k);
  const length = at(q.shape, 0) * (sizes.heads ?? 0) * (sizes.s ?? 0) * (sizes.total ?? 0);
  const { causal, window = 0, scale } = attrs;
  const params = { ...sizes, d: lastOf(q), causal: causal ? 1 : 0, window, scale };
  return work.run(mask ? maskedScores : plainScores, length, [q.value, k.value, ...(mask ? [mask.value] : [])], params);
}

const attention: Body = async ([q, k, v, mask], [out, lseSpec], attrs: Attrs & { probabilities?: boolean }, work) => {
  if (!q || !k || !v || !out || !lseSpec) return [];
  const sizes = sizesOf(q, k);
  const total = at(k.shape, 1);
  const x = await scoresOf(work, q, k, mask, attrs);
  const rows = sizeOf(lseSpec.shape);
  const lse = await work.run(logSums, rows, [x, await maxOver(work, x, rows, total)], { total });
  const p = await work.run(probabilities, x.length, [x, lse], { total });
  const y = await work.run(output, sizeOf(out.shape), [p, v.value], { ...sizes, d: lastOf(v) });
  return attrs.probabilities ? [y, lse, p] : [y, lse];
};

const attentionGrad: Body = async (inputs, [dqSpec, dkSpec, dvSpec], attrs: Attrs & { mask: boolean }, work) => {
  const [q, k, v] = [at(inputs, 0), at(inputs, 1), at(inputs, 2)];
  const [out, lse, dout] = [
    at(inputs, inputs.length - 3),
    at(inputs, inputs.length - 2),
    at(inputs, inputs.length - 1),
  ];
  if (!dqSpec || !dkSpec || !dvSpec) return [];
  const sizes = sizesOf(q, k);
  const { total = 0 } = sizes;
  const [d, dv] = [lastOf(q), lastOf(v)];
  const x = await scoresOf(work, q, k, attrs.mask ? at(inputs, 3) : undefined, attrs);
  const p = await work.run(probabilities, x.length, [x, lse.value], { total });
  const delta = await work.run(dots, lse.value.length, [out.value, dout.value], { d: dv });
  const { scale } = attrs;
  const ds = await work.run(scoresGrad, x.length, [p, dout.value, v.value, delta], { ...sizes, d: dv, scale });
  return [
    await work.run(output, sizeOf(dqSpec.shape), [ds, k.value], { ...sizes, d }),
    await work.run(keysGrad, sizeOf(dkSpec.shape), [ds, q.value], { ...sizes, d }),
    await work.run(keysGrad, sizeOf(dvSpec.shape), [p, dout.value], { ...sizes, d: dv }),
  ];
};

export function attentionKernels(calls: Calls): Readonly<Record<string, Kernel<GpujsHandle>>> {
  return {
    rope: calls.kernel(
      "rope",
      async ([x, cos, sin], [y], attrs: { interleaved?: boolean; inverse?: boolean }, work) => {
        if (!x || !cos || !sin || !y) return [];
        const params = {
          s: at(x.shape, 1),
          heads: at(x.shape, 2),
          d: lastOf(x),
          half: lastOf(cos),
          perRow: cos.shape.length === 3 ? 1 : 0,
          sign: attrs.inverse ? -1 : 1,
        };
        const values = [x.value, cos.value, sin.value];
        return [await work.run(attrs.interleaved ? ropePairs : ropeHalves, sizeOf(y.shape), values, params)];
      },
      only("fff"),
    ),
    attention: calls.kernel("attention", attention, only("ffff")),
    attentionGrad: calls.kernel("attentionGrad", attentionGrad, only("f")),
  };
}
