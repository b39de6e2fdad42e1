// All families of vectors, by the name that stands in their files.
import type { Family } from "../vectors.ts";
import { adapterFamilies } from "./adapters.ts";
import { classicFamilies } from "./classic.ts";
import { deepseekFamilies } from "./deepseek.ts";
import { ensembleFamilies } from "./ensemble.ts";
import { factorisedFamilies } from "./factorised.ts";
import { fieldFamilies } from "./field.ts";
import { firstFamilies } from "./first.ts";
import { foundingFamilies } from "./founding.ts";
import { graphFamilies } from "./graph.ts";
import { lookupFamilies } from "./lookup.ts";
import { structuredFamilies } from "./structured.ts";
import { trainingFamilies } from "./training.ts";
import { visionFamilies } from "./vision.ts";

export const families: Readonly<Record<string, Family>> = {
  ...adapterFamilies,
  ...ensembleFamilies,
  ...factorisedFamilies,
  ...fieldFamilies,
  ...classicFamilies,
  ...deepseekFamilies,
  ...firstFamilies,
  ...foundingFamilies,
  ...graphFamilies,
  ...lookupFamilies,
  ...structuredFamilies,
  ...trainingFamilies,
  ...visionFamilies,
};
