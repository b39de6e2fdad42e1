// All families of vectors, by the name that stands in their files.
import type { Family } from "../vectors.ts";
import { classicFamilies } from "./classic.ts";
import { deepseekFamilies } from "./deepseek.ts";
import { fieldFamilies } from "./field.ts";
import { firstFamilies } from "./first.ts";
import { foundingFamilies } from "./founding.ts";
import { graphFamilies } from "./graph.ts";

export const families: Readonly<Record<string, Family>> = {
  ...fieldFamilies,
  ...classicFamilies,
  ...deepseekFamilies,
  ...firstFamilies,
  ...foundingFamilies,
  ...graphFamilies,
};
