// All families of vectors that this package runs, by the name that stands in their files.
import { packFamilies } from "./pack.ts";
import { type Family, selfContrastFamilies } from "./self-contrast.ts";

export const families: Readonly<Record<string, Family>> = { ...selfContrastFamilies, ...packFamilies };
