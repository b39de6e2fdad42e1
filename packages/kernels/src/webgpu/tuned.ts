// Tile sizes that `tune` found better than the defaults, by adapter: consulted by every backend. A device that is not
// in the table, and a class of shapes that is not in its entry, get the defaults of kernels/tiles.ts.

/** By adapter description, then by class of shape and weight format, the name of a tile. Plain JSON. */
export type TileTable = Readonly<Record<string, Readonly<Record<string, string>>>>;

// SwiftShader was measured: no class had a tile that beat the default twice. No GPU has been measured yet.
export const tuned: TileTable = {};

/** Vendor, architecture and description of a device's adapter. */
export function describe(device: Pick<GPUDevice, "adapterInfo">): string {
  const { vendor, architecture, description } = device.adapterInfo ?? {};
  return [vendor, architecture, description].filter((word) => word).join(" ") || "unnamed adapter";
}

/** The entry of one adapter: what the user measured goes before what comes with the package. */
export function tilesFor(
  adapter: string,
  own: TileTable | undefined,
  table: TileTable = tuned,
): Readonly<Record<string, string>> | undefined {
  const [stored, measured] = [table[adapter], own?.[adapter]];
  return stored && measured ? { ...stored, ...measured } : (measured ?? stored);
}
