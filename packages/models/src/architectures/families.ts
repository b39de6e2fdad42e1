// The families of checkpoints that are loaded without being asked for.
import type { DescribedArchitecture } from "./architecture.ts";
import { deepSeekV2 } from "./deepseek-v2.ts";
import { deepSeekV3 } from "./deepseek-v3.ts";
import { gptOss } from "./gpt-oss.ts";
import { graniteMoe } from "./granitemoe.ts";
import { jetMoE } from "./jetmoe.ts";
import { mixtral } from "./mixtral.ts";
import { olmoe } from "./olmoe.ts";
import { phiMoe } from "./phimoe.ts";
import { qwen2Moe } from "./qwen2-moe.ts";
import { qwen3Moe } from "./qwen3-moe.ts";

export const architectures: readonly DescribedArchitecture[] = [
  mixtral,
  olmoe,
  qwen2Moe,
  qwen3Moe,
  deepSeekV2,
  deepSeekV3,
  gptOss,
  graniteMoe,
  phiMoe,
  jetMoE,
];
