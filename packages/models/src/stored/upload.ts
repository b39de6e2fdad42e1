// From the host to a device: in the stored type where the device has products for it, widened to f32 where it has not.
import {
  type Engine,
  groupedMatmulOp,
  linearOp,
  quantizedGroupedMatmulOp,
  quantizedLinearOp,
  type Spec,
  type Tensor,
  type Tree,
} from "@switchyard/core";
import { type HostCodes, type HostFloats, type HostMatrix, nodeKey } from "./host-matrix.ts";
import { widen } from "./widen.ts";

/** How a matrix will be held on a device. */
export interface UploadPlan {
  /** "f32", "bf16", "f16", or the key of a node: "int4/32". */
  readonly form: string;
  /** What a device that has this type needs for it. */
  readonly bytes: number;
  /** Where it is widened: how it is stored, the bytes that would take, and why the device cannot take it so. */
  readonly widened?: { readonly from: string; readonly bytes: number; readonly reason: string };
}

export interface UploadOptions {
  /** Called where a matrix had to be widened, with what it costs. */
  widened?(plan: UploadPlan, shape: readonly number[]): void;
}

/** All of a HostMatrix but its elements: what can be told before anything is read. */
type Formed =
  | Pick<HostFloats, "kind" | "dtype" | "shape">
  | (Pick<HostCodes, "kind" | "format" | "group" | "rows" | "shape"> & { readonly zeros?: unknown });

const sizeOf = (shape: readonly number[]): number => shape.reduce((n, d) => n * d, 1);

/** Shapes of codes and scales of values [..., out, in]. */
function parts({ format, shape, group, rows }: Pick<HostCodes, "format" | "shape" | "group" | "rows">) {
  const [out = 0, inner = 0] = shape.slice(-2);
  const outer = shape.slice(0, -2);
  const packed = format === "int4" || format === "mxfp4";
  return {
    codes: [...outer, out, packed ? inner / 2 : inner],
    scales: [...outer, Math.ceil(out / rows), Math.ceil(inner / group)],
  };
}

function storedBytes(host: Formed): number {
  if (host.kind === "floats") return sizeOf(host.shape) * (host.dtype === "f32" ? 4 : 2);
  const { codes, scales } = parts(host);
  return sizeOf(codes) + sizeOf(scales) * ((host.format === "mxfp4" ? 1 : 4) + (host.zeros ? 1 : 0));
}

/** Why the device has no products with such a matrix; undefined where it has. */
function refusal(engine: Engine, host: Formed): string | undefined {
  const { shape } = host;
  const x: Spec = { shape: [1, shape.at(-1) ?? 0], dtype: "f32" };
  const ends: Spec = { shape: [shape[0] ?? 0], dtype: "i32" };
  const stacked = shape.length === 3;
  let answer: string;
  if (host.kind === "floats") {
    if (host.dtype === "f32") return undefined;
    if (shape.length !== 2 && !stacked) return "only matrices have products";
    const w: Spec = { shape, dtype: host.dtype };
    answer = stacked ? engine.explain(groupedMatmulOp, [x, w, ends], {}) : engine.explain(linearOp, [x, w], {});
  } else {
    const { format, group, rows } = host;
    const { codes, scales } = parts(host);
    const weights: Spec[] = [
      { shape: codes, dtype: "u8" },
      { shape: scales, dtype: format === "mxfp4" ? "u8" : "f32" },
    ];
    const zeros: Spec[] = host.zeros ? [{ shape: scales, dtype: "u8" }] : [];
    const attrs = format === "fp8" ? { format, group, rows } : { format, group };
    answer = stacked
      ? engine.explain(quantizedGroupedMatmulOp, [x, ...weights, ends, ...zeros], attrs)
      : engine.explain(quantizedLinearOp, [x, ...weights, ...zeros], attrs);
  }
  return answer === "kernel" ? undefined : answer.replace(/^(fallback|unsupported): /, "");
}

/**
 * In which type a matrix will lie on the device of an engine, and how many bytes that takes; nothing is copied. The elements of
 * `host` are not looked at: what `checkPiece` gives will do.
 */
export function planUpload(engine: Engine, host: Formed): UploadPlan {
  const reason = refusal(engine, host);
  const bytes = storedBytes(host);
  if (reason === undefined) return { form: nodeKey(host), bytes };
  return { form: "f32", bytes: 4 * sizeOf(host.shape), widened: { from: nodeKey(host), bytes, reason } };
}

/**
 * A matrix [out, in] or a stack [experts, out, in] on an engine, for `product` and `groupedProduct`: a tensor, or a node of a
 * format and its codes. Where the backend has no product with that type it is widened to f32, of which `widened` is told.
 */
export function upload(engine: Engine, host: HostMatrix, options: UploadOptions = {}): Tree {
  const plan = planUpload(engine, host);
  if (plan.widened) options.widened?.(plan, host.shape);
  if (plan.widened) return engine.tensor(widen(host), host.shape);
  if (host.kind === "floats") return engine.tensor(host.data, host.shape, host.dtype);
  const { codes, scales } = parts(host);
  // A scope: where there is no room for the scales, the codes are freed.
  return engine.scope(() => ({
    [plan.form]: {
      codes: engine.tensor(host.codes, codes, "u8"),
      scales: engine.tensor(host.scales, scales),
      ...(host.zeros ? { zeros: engine.tensor(host.zeros, scales, "u8") } : {}),
    },
  }));
}

/** Anything stored as an f32 tensor: norms, biases, what is used otherwise than in products. */
export const uploadFloats = (engine: Engine, host: HostMatrix): Tensor => engine.tensor(widen(host), host.shape);
