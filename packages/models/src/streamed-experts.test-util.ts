// A checkpoint in memory whose layers are nothing but experts, and the same experts on a device.
import type { Engine, Json, Tree } from "@switchyard/core";
import type { Experts } from "@switchyard/core/moe";
import { topK } from "@switchyard/routers/top-k";
import type { Blueprint, GateActivation, MoEFeedForward } from "./blueprint.ts";
import { type OpenCheckpoint, readCheckpoint } from "./checkpoint.ts";
import { expertSet } from "./feed-forward.ts";
import { type RandomCheckpointOptions, randomTensors } from "./random-checkpoint.ts";
import { rotary } from "./rope.ts";
import { type ByteSource, bytesSource, encodeSafetensors } from "./safetensors.ts";
import type { Description, Piece, Source } from "./source.ts";
import { readSource, upload, uploadFloats } from "./stored-matrix.ts";

export interface SampleOptions extends Pick<RandomCheckpointOptions, "dtype" | "seed"> {
  readonly layers?: number;
  readonly experts?: number;
  readonly width?: number;
  readonly hidden?: number;
  readonly activation?: GateActivation;
  readonly bias?: boolean;
  /** Experts in one tensor, [in, out], gate and up alternating, as gpt-oss has them. */
  readonly stacked?: boolean;
  readonly quantization?: { readonly [key: string]: Json };
}

export interface Sample {
  readonly checkpoint: OpenCheckpoint;
  readonly description: Description;
  readonly part: MoEFeedForward;
  readonly layers: number;
  /** The experts of a layer in memory: all in one stack. */
  resident(engine: Engine, layer: number): Promise<Experts>;
}

/** `wrap` may watch or break the file. */
export async function sample(
  options: SampleOptions = {},
  wrap = (source: ByteSource): ByteSource => source,
): Promise<Sample> {
  const {
    layers = 1,
    experts = 5,
    width = 48,
    hidden = 40,
    activation = "silu",
    bias = false,
    stacked = false,
  } = options;
  const part: MoEFeedForward = { kind: "moe", experts, hidden, router: topK({ k: 2 }), activation, bias };
  const sources = new Map<string, Source>();
  for (let layer = 0; layer < layers; layer++) {
    const prefix = `layers.${layer}.experts`;
    const place = (name: string, shape: readonly number[], expert: (e: number) => Piece[]): void => {
      sources.set(`layers.${layer}.moe.experts.${name}`, { kind: "experts", shape: [experts, ...shape], expert });
    };
    const one = (name: string, shape: readonly number[], more: Partial<Piece>) => (e: number) => [
      { name: `${prefix}.${name}`, shape, index: e, of: experts, ...more },
    ];
    if (stacked) {
      place(
        "gateUp",
        [2 * hidden, width],
        one("gate_up", [2 * hidden, width], { transposed: true, alternating: true }),
      );
      place("down", [width, hidden], one("down", [width, hidden], { transposed: true }));
    } else {
      const piece = (e: number, name: string, shape: readonly number[]): Piece => ({
        name: `${prefix}.${e}.${name}`,
        shape,
      });
      place("gateUp", [2 * hidden, width], (e) => [piece(e, "gate", [hidden, width]), piece(e, "up", [hidden, width])]);
      place("down", [width, hidden], (e) => [piece(e, "down", [width, hidden])]);
    }
    if (bias) {
      place("gateUpBias", [2 * hidden], one("gate_up_bias", [2 * hidden], { alternating: true }));
      place("downBias", [width], one("down_bias", [width], {}));
    }
  }
  const rope = rotary(undefined, { headSize: 8, theta: 10_000 });
  const attention = { kind: "grouped", heads: 2, kvHeads: 1, headSize: 8, rope } as const;
  const blueprint: Blueprint = {
    vocabulary: 7,
    width,
    context: 16,
    layers: Array.from({ length: layers }, () => ({ attention, feedForward: part })),
    norm: { kind: "rms", eps: 1e-5 },
    tieEmbeddings: true,
  };
  const description: Description = { blueprint, sources };
  const config = {
    model_type: "sample",
    ...(options.quantization ? { quantization_config: options.quantization } : {}),
  };
  const parts: Uint8Array[] = [];
  // Large enough that activations matter.
  const weights = { ...options, scale: 0.3 };
  for await (const bytes of encodeSafetensors(randomTensors(config, description, weights))) parts.push(bytes);
  const files = new Map([
    ["model.safetensors", new Uint8Array(Buffer.concat(parts))],
    ["config.json", new TextEncoder().encode(JSON.stringify(config))],
  ]);
  const checkpoint = await readCheckpoint(async (name) => {
    const bytes = files.get(name);
    if (!bytes) return undefined;
    return name === "config.json" ? bytesSource(name, bytes) : wrap(bytesSource(name, bytes));
  }, "the sample");
  return {
    checkpoint,
    description,
    part,
    layers,
    async resident(engine, layer) {
      const params: Record<string, Tree> = {};
      for (const name of ["gateUp", "down", ...(bias ? ["gateUpBias", "downBias"] : [])]) {
        const host = await readSource(checkpoint, sources.get(`layers.${layer}.moe.experts.${name}`) as Source);
        params[name] = name.endsWith("Bias") ? uploadFloats(engine, host) : upload(engine, host);
      }
      return expertSet({ count: experts, width, hidden, activation, bias, params });
    },
  };
}
