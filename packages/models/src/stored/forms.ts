// What the pieces of a source will be, from the headers alone: looked up once for each source of a checkpoint, because planning, loading
// and streaming ask again and again, and a large model has tens of thousands of pieces.
import { type CheckpointIndex, type Piece, piecesAt, piecesOf, type Source } from "../source.ts";
import type { HostFloats } from "./host-matrix.ts";
import { checkPiece, type StoredForm } from "./read-piece.ts";

/** Forms of the pieces of a whole parameter, or of each expert of a stack. */
type Forms = readonly (readonly StoredForm[])[];

const known = new WeakMap<CheckpointIndex, WeakMap<Source, Forms>>();

/**
 * The form of every piece: `[0]` of a whole parameter, `[e]` of expert e. `visit` is called with each piece.
 * Throws CheckpointError as `checkPiece` does.
 */
export function formsOf(index: CheckpointIndex, source: Source, visit?: (piece: Piece) => void): Forms {
  let sources = known.get(index);
  if (!sources) {
    sources = new WeakMap();
    known.set(index, sources);
  }
  const before = sources.get(source);
  if (before) {
    if (visit) for (const piece of piecesOf(source)) visit(piece);
    return before;
  }
  const count = source.kind === "whole" ? 1 : (source.shape[0] ?? 0);
  const made: (readonly StoredForm[])[] = [];
  for (let e = 0; e < count; e++) {
    const forms: StoredForm[] = [];
    for (const piece of piecesAt(source, e)) {
      forms.push(checkPiece(index, piece));
      visit?.(piece);
    }
    const last = made.at(-1);
    // Experts are alike, as a rule: one list serves all of them.
    made.push(last && isAlike(last, forms) ? last : forms);
  }
  sources.set(source, made);
  return made;
}

const isAlike = (a: readonly StoredForm[], b: readonly StoredForm[]): boolean =>
  a.length === b.length && a.every((form, i) => isSame(form, b[i] as StoredForm));

/** Whether two forms are equal in all they say. */
function isSame(a: StoredForm, b: StoredForm): boolean {
  if (a.shape.length !== b.shape.length || a.shape.some((d, i) => d !== b.shape[i])) return false;
  if (a.kind === "floats") return b.kind === "floats" && a.dtype === b.dtype;
  return b.kind === "codes" && a.format === b.format && a.group === b.group && a.rows === b.rows && a.zeros === b.zeros;
}

/** Bytes of a stored tensor. */
export interface Stretch {
  readonly name: string;
  readonly from: number;
  readonly bytes: number;
}

/** Floats that need no rearranging: their names in files. */
const plainTypes: ReadonlyMap<string, HostFloats["dtype"]> = new Map([
  ["F32", "f32"],
  ["F16", "f16"],
  ["BF16", "bf16"],
]);
const sizeOf = (shape: readonly number[]): number => shape.reduce((n, d) => n * d, 1);

/**
 * Where the elements of a parameter (or of its expert e, where that is given) lie in the files, one stretch after the other, if they
 * are used as they are stored: floats of one type, in order. Undefined where some are packed, transposed, alternate or are converted.
 * Throws CheckpointError as `checkPiece` does.
 */
export function plainStretches(
  index: CheckpointIndex,
  source: Source,
  expert?: number,
): { readonly dtype: HostFloats["dtype"]; readonly stretches: readonly Stretch[] } | undefined {
  const forms = formsOf(index, source);
  const stretches: Stretch[] = [];
  let type: HostFloats["dtype"] | undefined;
  const [first, end] = expert === undefined ? [0, forms.length] : [expert, expert + 1];
  for (let e = first; e < end; e++) {
    const own = forms[e] ?? [];
    for (const [i, piece] of piecesAt(source, e).entries()) {
      const dtype = plainType(index, piece, own[i]);
      if (dtype === undefined || (type !== undefined && type !== dtype)) return undefined;
      type = dtype;
      const { shape, rows, index: entry = 0 } = piece;
      const [out = 1, ...rest] = shape;
      const line = sizeOf(rest) * (dtype === "f32" ? 4 : 2);
      const { from, total } = rows ?? { from: 0, total: out };
      stretches.push({ name: piece.name, from: (entry * total + from) * line, bytes: out * line });
    }
  }
  return type && { dtype: type, stretches };
}

function plainType(
  index: CheckpointIndex,
  piece: Piece,
  form: StoredForm | undefined,
): HostFloats["dtype"] | undefined {
  if (form?.kind !== "floats" || piece.transposed || piece.alternating) return undefined;
  return plainTypes.get(index.stored(piece.name).dtype);
}
