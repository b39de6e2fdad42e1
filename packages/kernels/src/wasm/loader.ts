// Picks one of the two embedded binaries and compiles it. Works where there is no file system and no URL to fetch from.
import { UnsupportedError } from "@switchyard/core";
import { type Binary, plain, relaxed } from "./binary.generated.ts";

/** "relaxed": with fused multiply-add, about twice as fast; "plain": WebAssembly SIMD as every current engine has it. */
export type Variant = "relaxed" | "plain";

// (func (result v128) (f32x4.relaxed_madd (splat 1) (splat 2) (splat 3)))
const relaxedProbe = [
  0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 19, 1, 17, 0, 65, 1, 253, 15, 65, 2, 253, 15, 65,
  3, 253, 15, 253, 133, 2, 11,
];

/** Whether this engine runs relaxed SIMD (Node 22 and later, current browsers). */
export const hasRelaxedSimd = (): boolean => WebAssembly.validate(Uint8Array.from(relaxedProbe));

/** Compiles a variant for a private or a shared memory. */
export async function compile(variant: Variant, shared: boolean): Promise<WebAssembly.Module> {
  const binary = variant === "relaxed" ? relaxed : plain;
  const bytes = await inflate(binary);
  if (shared) bytes[binary.memoryFlag] = 3;
  if (!WebAssembly.validate(bytes)) {
    throw new UnsupportedError(
      `wasm: this engine cannot run the ${variant} SIMD build${shared ? " with shared memory" : ""}; ` +
        "it needs WebAssembly SIMD (Node 22 or later, a browser of 2022 or later)",
    );
  }
  return WebAssembly.compile(bytes);
}

async function inflate({ data }: Binary): Promise<Uint8Array<ArrayBuffer>> {
  const packed = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}
