// From a description to a model: everything is checked against what the checkpoint stores before the first weight is read, then read
// parameter by parameter in its stored type.
import { CheckpointError, dispose, type Engine, type Random, type Tensor, type Tree } from "@switchyard/core";
import { blueprintShapes, buildDecoder } from "./build-decoder.ts";
import { heldInFloat32, planMemory } from "./memory.ts";
import type { Checkpoint, LanguageModel, ReadModelOptions } from "./model.ts";
import { type ReadPart, readParts } from "./read-parts.ts";
import { quote } from "./safetensors.ts";
import type { Description } from "./source.ts";
import { formsOf, pieceNames, plainStretches, planUpload, readSource, upload, widen } from "./stored-matrix.ts";
import { expertStore } from "./streamed-experts.ts";
import { checkAllUsed } from "./weights.ts";

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
    formsOf(checkpoint, source, (piece) => {
      for (const name of pieceNames(piece, checkpoint)) used.add(name);
    });
  }
  checkAllUsed(checkpoint, used, ignores);
}

/** What routers are made from before the checkpoint's parameters take their places: drawing numbers would cost more than reading. */
function zeros(engine: Engine): Random {
  const tensor = (shape: readonly number[]): Tensor =>
    engine.tensor(new Float32Array(shape.reduce((n, d) => n * d, 1)), shape);
  // Routers scale what they draw and hand it to the engine: one array of each size serves all layers.
  const drawn = new Map<number, Float64Array>();
  const self: Random = {
    at: () => self,
    uniform: tensor,
    normal: tensor,
    exponential: tensor,
    host(_, count) {
      const numbers = drawn.get(count) ?? new Float64Array(count);
      drawn.set(count, numbers);
      return numbers.fill(0);
    },
  };
  return self;
}

/** Parameters of which the host holds a copy are read together up to this many bytes; a larger one alone. */
const together = 2 ** 23;

/**
 * Reads parameters in their stored type and puts them into `loaded`, by path. Where the host reaches the device's memory they are written
 * there as they are read; elsewhere the host holds one at a time, or several small ones.
 */
async function readResident(
  checkpoint: Checkpoint,
  engine: Engine,
  {
    sources,
    weights,
    skips,
    loaded,
  }: {
    readonly sources: Description["sources"];
    readonly weights: "stored" | "f32";
    skips(path: string): boolean;
    readonly loaded: Map<string, Tree>;
  },
): Promise<void> {
  let parts: ReadPart[] = [];
  let arrived: (() => void)[] = [];
  let onHost = 0;
  const finish = async (): Promise<void> => {
    const [reading, after] = [parts, arrived];
    [parts, arrived, onHost] = [[], [], 0];
    await readParts(checkpoint, reading);
    for (const one of after) one();
  };
  for (const [path, source] of sources) {
    if (skips(path)) continue;
    const { shape } = source;
    const wide = weights === "f32" || heldInFloat32(path, shape);
    const plain = plainStretches(checkpoint, source);
    const size = shape.reduce((n, d) => n * d, 1);
    const bytes = plain?.stretches.reduce((n, one) => n + one.bytes, 0);
    if (!plain || bytes !== size * (plain.dtype === "f32" ? 4 : 2)) {
      const host = await readSource(checkpoint, source);
      const widened = wide || (path === "embed" && host.kind !== "floats");
      loaded.set(path, widened ? engine.tensor(widen(host), shape) : upload(engine, host));
      continue;
    }
    const { dtype, stretches } = plain;
    const form = { kind: "floats", dtype, shape } as const;
    const asStored = dtype === "f32" || (!wide && planUpload(engine, form).form === dtype);
    const room = asStored ? engine.room?.(shape, dtype) : undefined;
    let target: () => Uint8Array;
    let stays = true;
    if (room) {
      loaded.set(path, room.tensor);
      ({ bytes: target, stays } = room);
    } else {
      if (onHost > 0 && onHost + bytes > together) await finish();
      onHost += bytes;
      const data = dtype === "f32" ? new Float32Array(size) : new Uint16Array(size);
      const all = new Uint8Array(data.buffer);
      target = () => all;
      arrived.push(() => {
        const host = { ...form, data };
        loaded.set(path, wide ? engine.tensor(widen(host), shape) : upload(engine, host));
      });
    }
    let begin = 0;
    for (const { name, from, bytes: length } of stretches) {
      const start = begin;
      parts.push({
        name,
        from,
        to: from + length,
        put: (read, at) => target().set(read, start + at),
        ...(stays ? { into: () => target().subarray(start, start + length) } : {}),
      });
      begin += length;
    }
  }
  await finish();
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
    await readResident(checkpoint, engine, {
      sources: description.sources,
      weights,
      skips: (path) => streamed?.serves(path) ?? false,
      loaded,
    });
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
