// What is to be written: tensors with their parts in the source, and the files they go to.
import { CheckpointError, type Json, UnsupportedError } from "@switchyard/core";
import { isRecord } from "../checkpoint.ts";
import { type ExpertLayout, expertLayout, layoutFamilies } from "../expert-layout.ts";
import { quote, storedBytes } from "../safetensors.ts";
import type { ConvertOptions, FloatType, Origin, SourceTensor } from "./origin.ts";

const fileType: Readonly<Record<FloatType, string>> = { f32: "F32", f16: "F16", bf16: "BF16" };
const configType: ReadonlyMap<string, string> = new Map([
  ["F32", "float32"],
  ["F16", "float16"],
  ["BF16", "bfloat16"],
]);
const floats: ReadonlySet<string> = new Set(["F32", "F16", "BF16"]);
/** A range of a source tensor's bytes, and the type it is stored in. */
interface Part {
  readonly tensor: SourceTensor;
  readonly from: number;
  readonly to: number;
}

/** A tensor to be written: parts one after the other, each converted to its type. */
export interface Draft {
  readonly name: string;
  readonly dtype: string;
  readonly shape: readonly number[];
  readonly parts: readonly Part[];
  /** The file of its first part. */
  readonly file: string;
}

const whole = (tensor: SourceTensor): Draft => ({
  ...{ name: tensor.name, dtype: tensor.dtype, shape: tensor.shape, file: tensor.file },
  parts: [{ tensor, from: 0, to: tensor.bytes }],
});

/** Throws UnsupportedError where the family has no other layout. */
function layoutOf({ checkpoint }: Origin): ExpertLayout {
  const type = checkpoint.config.model_type;
  const layout = typeof type === "string" ? expertLayout(type) : undefined;
  if (layout) return layout;
  throw new UnsupportedError(
    `experts: the model_type ${JSON.stringify(type ?? null)} has one layout of experts only; those with two are ` +
      layoutFamilies.join(", "),
  );
}

function refuseQuantized({ name, dtype }: SourceTensor): void {
  if (floats.has(dtype)) return;
  throw new UnsupportedError(
    `experts: ${quote(name)} is stored as ${dtype}; only F32, F16 and BF16 experts can change their layout`,
  );
}

/** Tensors of single experts become parts of fused ones, which stand where their first part stood. */
function fuse(tensors: readonly SourceTensor[], layout: ExpertLayout): Draft[] {
  const groups = new Map<string, (SourceTensor | undefined)[][]>();
  for (const tensor of tensors) {
    const found = layout.place(tensor.name);
    if (!found) continue;
    refuseQuantized(tensor);
    const { fused, expert, part, parts } = found;
    if (expert >= tensors.length) {
      throw new CheckpointError(`${quote(tensor.name)} is of expert ${expert}, but earlier experts are missing`);
    }
    const group = groups.get(fused) ?? [];
    groups.set(fused, group);
    while (group.length <= expert) group.push(Array.from({ length: parts }, () => undefined));
    (group[expert] as (SourceTensor | undefined)[])[part] = tensor;
  }
  const odd = tensors.find(({ name }) => /\.experts\.\d+\./.test(name) && !layout.place(name));
  if (odd) {
    throw new UnsupportedError(
      `experts: ${quote(odd.name)} has no place in the fused layout; quantised experts have none`,
    );
  }
  const made = new Set<string>();
  return tensors.flatMap((tensor): Draft[] => {
    const name = layout.place(tensor.name)?.fused;
    if (name === undefined) return [{ ...whole(tensor), name: layout.fusedName(tensor.name) }];
    if (made.has(name)) return [];
    made.add(name);
    const experts = groups.get(name) ?? [];
    const [rows = 0, columns = 0] = tensor.shape;
    const parts = experts.flatMap((matrices, e) =>
      matrices.map((matrix, i): Part => {
        const lacking = `cannot fuse ${quote(name)}: expert ${e}`;
        if (!matrix) {
          const expected = layout.separate(name)?.(e)[i] ?? "";
          throw new CheckpointError(`${lacking} lacks ${quote(expected)}`);
        }
        if (matrix.shape.length !== 2 || matrix.shape.join() !== tensor.shape.join()) {
          throw new CheckpointError(`${lacking} has [${matrix.shape}] in ${quote(matrix.name)}, not [${tensor.shape}]`);
        }
        return { tensor: matrix, from: 0, to: matrix.bytes };
      }),
    );
    const shape = [experts.length, (experts[0]?.length ?? 0) * rows, columns];
    return [{ name, dtype: tensor.dtype, shape, parts, file: tensor.file }];
  });
}

/** Fused tensors become one tensor for each expert and matrix. */
function separate(tensors: readonly SourceTensor[], layout: ExpertLayout): Draft[] {
  return tensors.flatMap((tensor): Draft[] => {
    const names = layout.separate(tensor.name);
    if (!names) return [{ ...whole(tensor), name: layout.separateName(tensor.name) }];
    refuseQuantized(tensor);
    const [experts = 0, rows = 0, columns = 0] = tensor.shape;
    const parts = names(0).length;
    if (tensor.shape.length !== 3 || experts === 0 || rows % parts !== 0) {
      throw new CheckpointError(
        `cannot separate ${quote(tensor.name)}: it is [${tensor.shape}], expected [experts, ${parts === 2 ? "2 x rows" : "rows"}, columns]`,
      );
    }
    const shape = [rows / parts, columns];
    const size = tensor.bytes / experts / parts;
    return Array.from({ length: experts }, (_, e) => names(e)).flatMap((own, e) =>
      own.map((name, i): Draft => {
        const from = (e * parts + i) * size;
        return { name, dtype: tensor.dtype, shape, parts: [{ tensor, from, to: from + size }], file: tensor.file };
      }),
    );
  });
}

const quantizedType = /^(U8|I8|F8_|F4|F6_)/;
const packed = /(_packed|qweight)$/;
const companion = /(^|[._])(scales?|scale_inv|zeros?|zero_points?)$/;
const moduleOf = (name: string): string => name.slice(0, Math.max(0, name.lastIndexOf(".")));

/** Says why a tensor keeps its type; undefined where it can be converted. */
export function keepers(tensors: readonly SourceTensor[]): (tensor: SourceTensor) => string | undefined {
  const quantized = new Set(
    tensors
      .filter(({ name, dtype }) => quantizedType.test(dtype) || packed.test(name))
      .map(({ name }) => moduleOf(name)),
  );
  return ({ name, dtype }) => {
    if (quantizedType.test(dtype) || packed.test(name)) return `${dtype}: quantised weights keep their form`;
    if (!floats.has(dtype)) return `${dtype}: only F32, F16 and BF16 are converted`;
    if (companion.test(name) && quantized.has(moduleOf(name))) return "belongs to the quantised weights beside it";
    if (name.endsWith(".e_score_correction_bias")) return "decides which experts are chosen, so it keeps its precision";
    return undefined;
  };
}

/** Wide types first, so that every tensor is aligned, then by name: the order of the format's reference implementation. */
const widths =
  "BOOL F4 F6_E2M3 F6_E3M2 U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 I16 U16 F16 BF16 I32 U32 F32 C64 F64 I64 U64".split(" ");
const inFile = (a: Draft, b: Draft): number =>
  widths.indexOf(b.dtype) - widths.indexOf(a.dtype) || (a.name < b.name ? -1 : Number(a.name > b.name));

/** Numbers in names compare as numbers, so that layer 2 comes before layer 10 and a layer stays together. */
const inModel = new Intl.Collator("en", { numeric: true }).compare;

const shardName = (i: number, of: number): string =>
  of === 1 ? "model.safetensors" : `model-${`${i + 1}`.padStart(5, "0")}-of-${`${of}`.padStart(5, "0")}.safetensors`;

export const bytesOf = (draft: Draft): number => storedBytes(draft) as number;

/** Which drafts go to which file. */
function placed(drafts: readonly Draft[], { weights }: Origin, shardBytes: number | undefined): Map<string, Draft[]> {
  const files = new Map<string, Draft[]>();
  if (shardBytes === undefined) {
    for (const file of weights.keys()) files.set(file, []);
    for (const draft of drafts) files.get(draft.file)?.push(draft);
    const used = [...files].filter(([, content]) => content.length > 0);
    if (used.length === files.size || used.length === 0) return files;
    // Fusing may leave a file without tensors: the others are counted anew.
    return new Map(used.map(([, content], i) => [shardName(i, used.length), content]));
  }
  const shards: Draft[][] = [[]];
  let filled = 0;
  for (const draft of [...drafts].sort((a, b) => inModel(a.name, b.name))) {
    const size = bytesOf(draft);
    if (filled > 0 && filled + size > shardBytes) {
      shards.push([]);
      filled = 0;
    }
    shards.at(-1)?.push(draft);
    filled += size;
  }
  return new Map(shards.map((content, i) => [shardName(i, shards.length), content]));
}

export interface Plan {
  /** Files of weights that are written anew; those that are copies are absent. */
  readonly written: ReadonlyMap<
    string,
    { readonly drafts: readonly Draft[]; readonly metadata: Record<string, string> }
  >;
  /** All files of weights. */
  readonly weights: readonly string[];
  /** The index, where it is written anew; false where there is none. */
  readonly index: Json | undefined | false;
  /** The float type that config.json should name, where it changes. */
  readonly configType: string | undefined;
  readonly changed: boolean;
}

export function planned(origin: Origin, { dtype, shardBytes, experts }: ConvertOptions): Plan {
  const { tensors, weights, index } = origin;
  if (shardBytes !== undefined && !(Number.isSafeInteger(shardBytes) && shardBytes >= 1)) {
    throw new UnsupportedError(`shardBytes is ${shardBytes}, expected a whole number from 1`);
  }
  const laidOut =
    experts === "fused"
      ? fuse(tensors, layoutOf(origin))
      : experts === "separate"
        ? separate(tensors, layoutOf(origin))
        : tensors.map(whole);
  const names = new Set<string>();
  for (const { name } of laidOut) {
    if (names.has(name)) throw new CheckpointError(`two tensors would be named ${quote(name)}: both layouts are there`);
    names.add(name);
  }
  const keep = keepers(tensors);
  const drafts = laidOut.map((draft): Draft => {
    const kept = draft.parts.some(({ tensor }) => keep(tensor) !== undefined);
    const type = dtype === undefined || kept ? draft.dtype : fileType[dtype];
    const odd = draft.parts.find(({ tensor }) => tensor.dtype !== type);
    if (odd && type === draft.dtype && (dtype === undefined || kept)) {
      throw new CheckpointError(
        `cannot fuse ${quote(draft.name)}: ${quote(odd.tensor.name)} is ${odd.tensor.dtype}, others ${type}; ask for a dtype`,
      );
    }
    return { ...draft, dtype: type };
  });
  const files = placed(drafts, origin, shardBytes);
  const written = new Map<string, { drafts: readonly Draft[]; metadata: Record<string, string> }>();
  for (const [file, content] of files) {
    const own = tensors.filter((tensor) => tensor.file === file);
    const sorted = [...content].sort(inFile);
    const asBefore = (list: readonly Draft[]): boolean =>
      own.length === list.length &&
      list.every(({ name, dtype: type, parts: [part] }, i) => {
        return part?.tensor === own[i] && name === own[i]?.name && type === own[i]?.dtype;
      });
    // The same tensors in another order need no new file.
    if (weights.has(file) && asBefore(sortedLike(content, own))) continue;
    const kept = weights.get(file) ?? new Map([...weights.values()].flatMap((metadata) => [...metadata]));
    written.set(file, { drafts: sorted, metadata: Object.fromEntries(kept) });
  }
  const sameFiles = written.size === 0 && files.size === weights.size;
  const total = drafts.reduce((sum, draft) => sum + bytesOf(draft), 0);
  const old = index === undefined || !isRecord(index.metadata) ? {} : index.metadata;
  const map = [...files].flatMap(([file, content]) => content.map(({ name }) => [name, file] as const));
  const indexed = files.size > 1 || (shardBytes === undefined && index !== undefined && weights.size === files.size);
  const fresh: Json = {
    metadata: { ...old, total_size: total },
    weight_map: Object.fromEntries(map.sort(([a], [b]) => (a < b ? -1 : 1))),
  };
  const converted = drafts.some(({ dtype: type, parts }) => parts.some(({ tensor }) => tensor.dtype !== type));
  return {
    written,
    weights: [...files.keys()],
    index: sameFiles ? (index === undefined ? false : undefined) : indexed ? fresh : false,
    configType: converted && dtype !== undefined ? configType.get(fileType[dtype]) : undefined,
    changed: !sameFiles,
  };
}

/** Drafts in the order in which a file holds them. */
function sortedLike(drafts: readonly Draft[], own: readonly SourceTensor[]): Draft[] {
  const order = new Map(own.map(({ name }, i) => [name, i]));
  return [...drafts].sort((a, b) => (order.get(a.name) ?? -1) - (order.get(b.name) ?? -1));
}
