// From a description to a model: everything is checked against what the checkpoint stores before the first weight is read, then read
// parameter by parameter in its stored type.
import { CheckpointError, dispose, type Engine, type Random, type Tensor, type Tree } from "@switchyard/core";
import { blueprintShapes, buildDecoder } from "./build-decoder.ts";
import { heldInFloat32, planMemory } from "./memory.ts";
import type { Checkpoint, LanguageModel, ReadModelOptions } from "./model.ts";
import { quote } from "./safetensors.ts";
import type { Description, Piece, Source } from "./source.ts";
import { checkPiece, pieceNames, readSource, upload, widen } from "./stored-matrix.ts";
import { expertStore } from "./streamed-experts.ts";
import { checkAllUsed } from "./weights.ts";

function* piecesOf(source: Source): Generator<Piece> {
  if (source.kind === "whole") {
    yield* source.pieces;
    return;
  }
  for (let e = 0; e < (source.shape[0] ?? 0); e++) yield* source.expert(e);
}

/**
 * Throws CheckpointError unless every parameter of the model has a source whose tensors are there, of the right shape and a known
 * form, and no tensor is left over.
 */
export function checkDescription(checkpoint: Checkpoint, description: Description): void {
  const { blueprint, sources, ignores = () => false } = description;
  for (const [path, shape] of blueprintShapes(blueprint)) {
    const source = sources.get(path);
    if (!source || source.shape.join() !== shape.join()) {
      throw new CheckpointError(
        `the parameter ${quote(path)} [${shape}] has ${source ? `a source of [${source.shape}]` : "no source"} in this checkpoint`,
      );
    }
  }
  const used = new Set<string>();
  for (const source of sources.values()) {
    for (const piece of piecesOf(source)) {
      checkPiece(checkpoint, piece);
      for (const name of pieceNames(piece, checkpoint)) used.add(name);
    }
  }
  checkAllUsed(checkpoint, used, ignores);
}

/** What routers are made from before the checkpoint's parameters take their places: drawing numbers would cost more than reading. */
function zeros(engine: Engine): Random {
  const tensor = (shape: readonly number[]): Tensor =>
    engine.tensor(new Float32Array(shape.reduce((n, d) => n * d, 1)), shape);
  const self: Random = {
    at: () => self,
    uniform: tensor,
    normal: tensor,
    exponential: tensor,
    host: (_, count) => new Float64Array(count),
  };
  return self;
}

/**
 * The model of a checkpoint on an engine. Throws CheckpointError for a checkpoint that does not fit the description; what was
 * read is freed then.
 */
export async function loadDescription(
  checkpoint: Checkpoint,
  engine: Engine,
  description: Description,
  { weights = "stored", memory, streaming }: ReadModelOptions = {},
): Promise<LanguageModel> {
  checkDescription(checkpoint, description);
  const { kind, capacity } = planMemory(engine, checkpoint, description, { memory, weights });
  const streamed =
    kind === "streamed"
      ? expertStore({ checkpoint, engine, description, capacity, weights, ...(streaming ? { policy: streaming } : {}) })
      : undefined;
  const loaded = new Map<string, Tree>();
  try {
    for (const [path, source] of description.sources) {
      if (streamed?.serves(path)) continue;
      const host = await readSource(checkpoint, source);
      const wide =
        weights === "f32" || heldInFloat32(path, source.shape) || (path === "embed" && host.kind !== "floats");
      loaded.set(path, wide ? engine.tensor(widen(host), source.shape) : upload(engine, host));
    }
    const unused = new Set(loaded.keys());
    const model = buildDecoder(engine, description.blueprint, {
      random: zeros(engine),
      parameters: {
        given(path) {
          unused.delete(path);
          return loaded.get(path) as Tree;
        },
        ...(streamed ? { streamed } : {}),
        router(path, shape) {
          unused.delete(path);
          const found = loaded.get(path) as Tensor | undefined;
          if (found?.shape.join() === shape.join()) return found;
          throw new CheckpointError(
            `the router's ${quote(path)} [${shape}] has ${found ? `a source of [${found.shape}]` : "no source"} in this checkpoint`,
          );
        },
      },
    });
    const [stray] = unused;
    if (stray !== undefined) {
      throw new CheckpointError(`the description has a source for ${quote(stray)}, which the model has not`);
    }
    return model;
  } catch (error) {
    dispose([...loaded.values()]);
    throw error;
  }
}
