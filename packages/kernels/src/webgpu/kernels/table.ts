// The kernel table: one file per family, one readable template per kernel.
import type { Backend } from "@switchyard/core";
import type { Gpu, WebgpuHandle } from "../device.ts";
import { attentionKernels } from "./attention.ts";
import { elementwiseKernels } from "./elementwise.ts";
import { expertKernels } from "./experts.ts";
import { matmulKernels } from "./matmul.ts";
import { normaliseKernels } from "./normalise.ts";
import { optimiserKernels } from "./optimiser.ts";
import { quantizedKernels } from "./quantized.ts";
import { reduceKernels } from "./reduce.ts";
import { rowKernels } from "./rows.ts";
import { shapeKernels } from "./shape.ts";
import { sortKernels } from "./sort.ts";

export const kernels = (gpu: Gpu): Backend<WebgpuHandle>["kernels"] => ({
  ...elementwiseKernels(gpu),
  ...shapeKernels(gpu),
  ...reduceKernels(gpu),
  ...normaliseKernels(gpu),
  ...rowKernels(gpu),
  ...sortKernels(gpu),
  ...matmulKernels(gpu),
  ...expertKernels(gpu),
  ...quantizedKernels(gpu),
  ...attentionKernels(gpu),
  ...optimiserKernels(gpu),
});
