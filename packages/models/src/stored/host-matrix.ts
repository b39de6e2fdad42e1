// Matrices on the host in the type in which they are stored, and putting them together without widening: one below the other, or
// stacked expert by expert. Reading them is in read-piece.ts, giving them to a device in upload.ts.
import { type QuantizedFormat, ShapeError } from "@switchyard/core";
import { widen } from "./widen.ts";

/** Floats of any rank. F16 and BF16 are bit patterns. */
export interface HostFloats {
  readonly kind: "floats";
  readonly dtype: "f32" | "f16" | "bf16";
  readonly shape: readonly number[];
  readonly data: Float32Array | Uint16Array;
}

/** Weights in few bits, laid out as core's `QuantizedWeights`. */
export interface HostCodes {
  readonly kind: "codes";
  readonly format: QuantizedFormat;
  /** Of the values: [out, in] or [experts, out, in]. */
  readonly shape: readonly number[];
  /** Neighbours along `in`, and along `out` (fp8; 1 in the other formats), that share a scale. */
  readonly group: number;
  readonly rows: number;
  readonly codes: Uint8Array;
  /** f32; exponents in bytes for mxfp4. */
  readonly scales: Float32Array | Uint8Array;
  /** int8, int4. */
  readonly zeros?: Uint8Array;
}

/** A matrix [out, in], a stack of them [experts, out, in], or, as floats, anything that is no matrix. */
export type HostMatrix = HostFloats | HostCodes;

/** How a form is called, as dtype or as the one key of its node in a tree of parameters: "bf16", "int4/32", "mxfp4", "fp8/128x128". */
export const nodeKey = (
  form: Pick<HostFloats, "kind" | "dtype"> | Pick<HostCodes, "kind" | "format" | "group" | "rows">,
): string => {
  if (form.kind === "floats") return form.dtype;
  if (form.format === "mxfp4") return "mxfp4";
  return `${form.format}/${form.format === "fp8" ? `${form.rows}x` : ""}${form.group}`;
};

/** What it holds in memory. */
export const bytesOfHost = (host: HostMatrix): number =>
  host.kind === "floats"
    ? host.data.byteLength
    : host.codes.byteLength + host.scales.byteLength + (host.zeros?.byteLength ?? 0);

/**
 * Parts one below the other: [a, ...] and [b, ...] give [a + b, ...]. Their form is kept: scales are repeated where groups or
 * blocks of the parts differ or do not end with the part, which changes no value. Parts of different formats are widened to f32.
 * @throws ShapeError where the parts do not have equal rows.
 */
export function below(parts: readonly HostMatrix[]): HostMatrix {
  const [first] = parts;
  if (!first) throw new ShapeError("below: there are no parts");
  if (parts.length === 1) return first;
  const rest = first.shape.slice(1).join();
  if (parts.some(({ shape, kind }) => shape.length === 0 || shape.slice(1).join() !== rest || isStack(kind, shape)))
    throw new ShapeError(`below: rows differ or are no rows: ${parts.map(({ shape }) => `[${shape}]`).join(", ")}`);
  const out = parts.reduce((n, { shape }) => n + (shape[0] ?? 0), 0);
  return joined(parts, [out, ...first.shape.slice(1)], true);
}

/** Quantised stacks have scales of their own for each matrix: blocks do not run on from one to the next. */
const isStack = (kind: HostMatrix["kind"], shape: readonly number[]): boolean => kind === "codes" && shape.length > 2;

/**
 * Parts of one shape, expert by expert: n of [out, in] give [n, out, in]. Forms are kept as `below` keeps them.
 * @throws ShapeError where the shapes differ.
 */
export function stack(parts: readonly HostMatrix[]): HostMatrix {
  const [first] = parts;
  if (!first) throw new ShapeError("stack: there are no parts");
  if (parts.some(({ shape, kind }) => shape.join() !== first.shape.join() || isStack(kind, shape)))
    throw new ShapeError(`stack: shapes differ: ${parts.map(({ shape }) => `[${shape}]`).join(", ")}`);
  return joined(parts, [parts.length, ...first.shape], false);
}

function joined(parts: readonly HostMatrix[], shape: readonly number[], oneMatrix: boolean): HostMatrix {
  const codes = parts.filter((part) => part.kind === "codes");
  const format = codes[0]?.format;
  if (codes.length === parts.length && codes.every((part) => part.format === format))
    return joinedCodes(codes, shape, oneMatrix);
  const floats = parts.filter((part) => part.kind === "floats");
  const dtype = floats[0]?.dtype;
  if (dtype && dtype !== "f32" && floats.length === parts.length && floats.every((part) => part.dtype === dtype)) {
    const data = floats.map((part) => part.data);
    return { kind: "floats", dtype, shape, data: concatenated(data, (n) => new Uint16Array(n)) };
  }
  return { kind: "floats", dtype: "f32", shape, data: concatenated(parts.map(widen), (n) => new Float32Array(n)) };
}

function concatenated<T extends Float32Array | Uint16Array | Uint8Array>(
  parts: readonly ArrayLike<number>[],
  make: (length: number) => T,
): T {
  const result = make(parts.reduce((n, part) => n + part.length, 0));
  let at = 0;
  for (const part of parts) {
    result.set(part, at);
    at += part.length;
  }
  return result;
}

const gcd = (a: number, b: number): number => (b === 0 ? a : gcd(b, a % b));
/** The largest step that divides all of these; `otherwise` where there are none. */
export const commonStep = (steps: Iterable<number>, otherwise: number): number => {
  let step = 0;
  for (const one of steps) step = gcd(step, one);
  return step === 0 ? otherwise : step;
};

function joinedCodes(parts: readonly HostCodes[], shape: readonly number[], oneMatrix: boolean): HostCodes {
  const format = parts[0]?.format ?? "fp8";
  const inner = shape.at(-1) ?? 0;
  const out = shape.at(-2) ?? 0;
  const group = commonStep(
    parts.map((part) => part.group).filter((each) => each < inner),
    parts[0]?.group ?? inner,
  );
  // Where a block of rows may end: with the blocks of every part, and with every part but the last.
  const ends = parts.flatMap(({ rows, shape: [own = 0] }) => (rows < own ? [rows] : []));
  let at = 0;
  if (oneMatrix && format === "fp8")
    for (const { shape: own } of parts.slice(0, -1)) {
      at += own[0] ?? 0;
      ends.push(at);
    }
  const rows = format === "fp8" ? commonStep(ends, out) : 1;
  const alike = parts.map((part) => regrouped(part, rows, group));
  const zeros = parts.some((part) => part.zeros);
  return {
    kind: "codes",
    format,
    shape,
    group,
    rows,
    codes: concatenated(
      parts.map((part) => part.codes),
      (n) => new Uint8Array(n),
    ),
    scales: concatenated(
      alike.map((part) => part.scales),
      (n) => (format === "mxfp4" ? new Uint8Array(n) : new Float32Array(n)),
    ),
    ...(zeros
      ? {
          zeros: concatenated(
            alike.map((part) => part.zeros ?? new Uint8Array(part.scales.length).fill(format === "int4" ? 8 : 0)),
            (n) => new Uint8Array(n),
          ),
        }
      : {}),
  };
}

/** The same values with a scale for every `rows` x `group`, which must not cross the blocks there are. */
function regrouped(
  { shape: [out = 0, inner = 0], rows: oldRows, group: oldGroup, scales, zeros }: HostCodes,
  rows: number,
  group: number,
): Pick<HostCodes, "scales" | "zeros"> {
  const [down, across] = [Math.ceil(out / rows), Math.ceil(inner / group)];
  const before = Math.ceil(inner / oldGroup);
  if (Math.ceil(out / oldRows) === down && before === across) return zeros ? { scales, zeros } : { scales };
  const from = (i: number): number =>
    Math.floor((Math.floor(i / across) * rows) / oldRows) * before + Math.floor(((i % across) * group) / oldGroup);
  const spread = <T extends Float32Array | Uint8Array>(old: ArrayLike<number>, made: T): T => {
    for (let i = 0; i < made.length; i++) made[i] = old[from(i)] ?? Number.NaN;
    return made;
  };
  const n = down * across;
  return {
    scales: spread(scales, scales instanceof Uint8Array ? new Uint8Array(n) : new Float32Array(n)),
    ...(zeros ? { zeros: spread(zeros, new Uint8Array(n)) } : {}),
  };
}
