// Checkpoints as plain bytes: a reader of files with JSON.parse and loops, and rounding by the definition of the formats.
import { cpSync } from "node:fs";
import { readdir, readFile } from "node:fs/promises";
import { basename, join } from "node:path";
import { expect } from "vitest";
import { encodeSafetensors } from "./safetensors.ts";

/** The recorded checkpoints. */
export const golden = [
  "deepseek_v2",
  "deepseek_v3",
  "deepseek_v3_fp8",
  "gpt_oss",
  "gpt_oss_mxfp4",
  "granitemoe",
  "jetmoe",
  "mixtral",
  "olmoe",
  "phimoe",
  "qwen2_moe",
  "qwen3_moe",
];

/** A recorded checkpoint without what was recorded; answers its folder. */
export function copyFixture(name: string, folder: string): string {
  const filter = (file: string): boolean => !basename(file).startsWith("golden");
  cpSync(join(import.meta.dirname, "..", "test", "fixtures", name), folder, { recursive: true, filter });
  return folder;
}

export interface Raw {
  readonly dtype: string;
  readonly shape: number[];
  readonly bytes: Buffer;
  readonly file: string;
}

/** Every tensor of a folder, by a reader that shares nothing with the package. */
export async function rawTensors(folder: string): Promise<Map<string, Raw>> {
  const found = new Map<string, Raw>();
  for (const file of (await readdir(folder)).filter((name) => /^model.*\.safetensors$/.test(name)).sort()) {
    const bytes = await readFile(join(folder, file));
    const length = Number(bytes.readBigUInt64LE(0));
    const { __metadata__: _, ...tensors } = JSON.parse(bytes.toString("utf8", 8, 8 + length));
    for (const [name, { dtype, shape, data_offsets: at }] of Object.entries<{
      dtype: string;
      shape: number[];
      data_offsets: [number, number];
    }>(tensors)) {
      expect(found.has(name)).toBe(false);
      found.set(name, { dtype, shape, file, bytes: bytes.subarray(8 + length + at[0], 8 + length + at[1]) });
    }
  }
  return found;
}

/** A number of a 16- or 32-bit float by the definition of the format. */
export function valueAt(bytes: Buffer, dtype: string, i: number): number {
  if (dtype === "F32") return bytes.readFloatLE(4 * i);
  const bits = bytes.readUInt16LE(2 * i);
  const [exponentBits, fractionBits] = dtype === "F16" ? [5, 10] : [8, 7];
  const sign = bits >> 15 ? -1 : 1;
  const exponent = (bits >> fractionBits) & (2 ** exponentBits - 1);
  const fraction = bits & (2 ** fractionBits - 1);
  const bias = 2 ** (exponentBits - 1) - 1;
  if (exponent === 2 ** exponentBits - 1) return fraction ? Number.NaN : sign * Number.POSITIVE_INFINITY;
  return exponent === 0
    ? sign * fraction * 2 ** (1 - bias - fractionBits)
    : sign * (1 + fraction / 2 ** fractionBits) * 2 ** (exponent - bias);
}

/** The nearest number of a format, ties to the even fraction. */
export function nearestOf(x: number, dtype: string): number {
  if (dtype === "F32" || x === 0 || !Number.isFinite(x)) return x;
  const [fractionBits, least] = dtype === "F16" ? [10, -14] : [7, -126];
  const step = 2 ** (Math.max(Math.floor(Math.log2(Math.abs(x))), least) - fractionBits);
  const [low, rest] = [Math.floor(x / step), x / step - Math.floor(x / step)];
  const rounded = (rest > 0.5 || (rest === 0.5 && low % 2 !== 0) ? low + 1 : low) * step;
  return rounded === 0 && x < 0 ? -0 : rounded;
}

/** That a folder holds the same files, byte for byte. */
export async function expectCopies(from: string, to: string): Promise<void> {
  const names = (await readdir(from)).sort();
  expect((await readdir(to)).sort()).toEqual(names);
  for (const name of names)
    expect((await readFile(join(to, name))).equals(await readFile(join(from, name))), name).toBe(true);
}

/** A file of weights in memory. */
export async function encoded(
  tensors: Readonly<Record<string, { dtype: string; shape: number[]; bytes: Uint8Array }>>,
): Promise<Buffer> {
  const pieces: Uint8Array[] = [];
  const sources = Object.entries(tensors).map(([name, { dtype, shape, bytes }]) => ({
    ...{ name, dtype, shape },
    bytes: () => bytes,
  }));
  for await (const piece of encodeSafetensors(sources)) pieces.push(piece);
  return Buffer.concat(pieces);
}
