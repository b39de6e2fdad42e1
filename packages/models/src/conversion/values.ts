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
  const result = fromFloat32(values, to);
  // What was exact stays exact.
  if (to === "F32") {
    if (counts) counts.converted += values.length;
    return result;
  }
  let back = toFloat32(result, to, tensor.name);
  const tooLarge = (x: number, y: number): boolean => Number.isFinite(x) && !Number.isFinite(y);
  const over = values.findIndex((x, i) => tooLarge(x, back[i] as number));
  let out = result;
  if (over >= 0) {
    if (!saturate) {
      throw new UnsupportedError(
        `${quote(tensor.name)} holds ${values[over]}, and the largest number of ${to} is ${largest.get(to)}; ` +
          "choose another dtype, or saturate (--saturate) to write the largest number instead",
      );
    }
    const most = largest.get(to) as number;
    const clamped = values.map((x, i) => (tooLarge(x, back[i] as number) ? Math.sign(x) * most : x));
    if (counts) counts.saturated += values.reduce((n, x, i) => n + Number(tooLarge(x, back[i] as number)), 0);
    out = fromFloat32(clamped, to);
    back = toFloat32(out, to, tensor.name);
  }
  if (counts) {
    counts.converted += values.length;
    for (let i = 0; i < values.length; i++) {
      const [x, y] = [values[i] as number, back[i] as number];
      if (x === y || Number.isNaN(x)) continue;
      counts.rounded++;
      if (y === 0) counts.toZero++;
    }
  }
  return out;
}
