// The values of a tensor in another float type.
import { UnsupportedError } from "@switchyard/core";
import { fromFloat32 } from "../narrow.ts";
import { quote, toFloat32 } from "../safetensors.ts";
import type { SourceTensor } from "./origin.ts";

const largest: ReadonlyMap<string, number> = new Map([
  ["F16", 65_504],
  ["BF16", 2 ** 127 * (2 - 2 ** -7)],
  ["F32", 2 ** 127 * (2 - 2 ** -23)],
]);

export interface Counts {
  converted: number;
  rounded: number;
  toZero: number;
  saturated: number;
}

/**
 * Bytes of floats in another type: rounded to nearest, ties to even; NaN and infinity stay what they are.
 * Throws UnsupportedError where a finite value is too large, unless `saturate`.
 */
export function converted(
  bytes: Uint8Array,
  { tensor, to, saturate, counts }: { tensor: SourceTensor; to: string; saturate: boolean; counts?: Counts },
): Uint8Array {
  const values = toFloat32(bytes, tensor.dtype, tensor.name);
  if (counts) counts.converted += values.length;
  const result = fromFloat32(values, to);
  // What was exact stays exact.
  if (to === "F32") return result;
  const stored = new Uint16Array(result.buffer, result.byteOffset, values.length);
  const infinity = to === "F16" ? 0x7c00 : 0x7f80;
  for (let i = 0; i < stored.length; i++) {
    if (((stored[i] as number) & infinity) !== infinity || !Number.isFinite(values[i])) continue;
    if (!saturate) {
      throw new UnsupportedError(
        `${quote(tensor.name)} holds ${values[i]}, and the largest number of ${to} is ${largest.get(to)}; ` +
          "choose another dtype, or saturate (--saturate) to write the largest number instead",
      );
    }
    // One below infinity, whatever the sign.
    stored[i] = (stored[i] as number) - 1;
    if (counts) counts.saturated++;
  }
  if (!counts) return result;
  const back = toFloat32(result, to, tensor.name);
  for (let i = 0; i < values.length; i++) {
    const [x, y] = [values[i] as number, back[i] as number];
    if (x === y || Number.isNaN(x)) continue;
    counts.rounded++;
    if (y === 0) counts.toZero++;
  }
  return result;
}
