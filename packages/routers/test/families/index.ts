// All families of vectors, by the name that stands in their files.
import type { Family } from "../vectors.ts";
import { firstFamilies } from "./first.ts";

export const families: Readonly<Record<string, Family>> = {
  ...firstFamilies,
};
