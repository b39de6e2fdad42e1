// The parts of a decoder that fine-tuning trains or freezes: what each parameter belongs to, by its path in the tree of parameters.
import { ShapeError } from "@switchyard/core";

/** Every part, in the order in which they are listed to people. */
export const tuningParts = ["experts", "shared", "dense", "attention", "router", "embed", "head", "norms"] as const;

/**
 * What a parameter belongs to:
 * - experts: matrices and biases of routed feed-forward experts;
 * - shared: experts that every token goes through, their gate, and the bias behind the experts (JetMoE);
 * - dense: feed-forward layers without a router;
 * - attention: projections with their biases, norms of queries and keys, sinks, and the experts of a mixture of attention heads;
 * - router: weights and biases of routers, those inside attention too;
 * - embed, head: the two ends (tied ones are embed); norms: the norms of layers and the last one.
 */
export type TuningPart = (typeof tuningParts)[number];

/** The path of the matrix that a leaf of an adapter (`withLora`) stands beside; any other path as it is. */
export const matrixPath = (path: string): string => path.replace(/\.lora\/.*$/, "");

/** Whether the path is that of an adapter's own leaf: "layers.0.attention.q.lora/2.a", or the same with b. */
export const isLora = (path: string): boolean => /\.lora\/[^/]+\.[ab]$/.test(path);

const inLayer: readonly (readonly [RegExp, TuningPart])[] = [
  [/^(attention|moe)Norm(Bias)?$/, "norms"],
  [/^(attention|moe)\.router\./, "router"],
  [/^attention\./, "attention"],
  [/^moe\.experts\./, "experts"],
  [/^(moe\.shared\.|moeBias$)/, "shared"],
  [/^dense\./, "dense"],
];
const outside: Readonly<Record<string, TuningPart>> = {
  embed: "embed",
  head: "head",
  headBias: "head",
  norm: "norms",
  normBias: "norms",
};

/**
 * The part of a path as `leaves(model.params)` gives it. Leaves of adapters, and of matrices held as codes, belong to the part of
 * their matrix.
 * @throws ShapeError for a path that no decoder has.
 * @example partOf("layers.0.moe.experts.down"); // "experts"
 */
export function partOf(path: string): TuningPart {
  const own = matrixPath(path);
  const [, rest] = /^layers\.\d+\.(.+)$/.exec(own) ?? [];
  // Codes lie one level below the name: "embed.int8/32.codes".
  const first = own.split(".")[0] ?? "";
  const found =
    rest === undefined
      ? Object.hasOwn(outside, first)
        ? outside[first]
        : undefined
      : inLayer.find(([pattern]) => pattern.test(rest))?.[1];
  if (found !== undefined) return found;
  throw new ShapeError(
    `partOf: "${path}" is no parameter of a decoder; expected a path such as "layers.0.moe.experts.down", "embed" or "norm"`,
  );
}

/** The number of the layer in a path; undefined outside of layers. */
export function layerOf(path: string): number | undefined {
  const [, layer] = /^layers\.(\d+)\./.exec(path) ?? [];
  return layer === undefined ? undefined : Number(layer);
}
