// All families of vectors that this package runs, by the name that stands in their files.
import { type Family, selfContrastFamilies } from "./self-contrast.ts";

export const families: Readonly<Record<string, Family>> = { ...selfContrastFamilies };
