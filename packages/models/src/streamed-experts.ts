// Experts that do not fit into memory: they stay in the checkpoint's files, and those used lately are kept in ordinary array buffers in
// their stored type. A layer asks for what its tokens chose; each expert is copied to the device, runs its rows and is freed.
// Decisions are those of expert-cache.ts, so that a recorded trace foretells them.
import { concat, type Engine, ShapeError, slice, type Tensor, type Tree, UnsupportedError } from "@switchyard/core";
import type { Experts } from "@switchyard/core/moe";
import type { MoEFeedForward } from "./blueprint.ts";
import {
  type ExpertSource,
  type ExpertSources,
  type HostExpert,
  plainExpert,
  readExpert,
  readPlain,
} from "./expert-bytes.ts";
import { type ExpertLoad, expertCache, expertPredictor, lfu, lru } from "./expert-cache.ts";
import { expertSet } from "./feed-forward.ts";
import type { Checkpoint } from "./model.ts";
import type { CheckpointIndex, Description } from "./source.ts";
import { formsOf, nodeKey, planUpload, type StoredForm, upload, widen } from "./stored-matrix.ts";

/** How the experts to keep are chosen; "prefetch" is LRU that also loads what the next layer will probably want. */
export type StreamPolicy = "lru" | "lfu" | "prefetch";

/** What a store of streamed experts has done so far. */
export interface StreamCounts {
  /** Distinct experts of a layer in a pass, summed over the passes. */
  readonly requests: number;
  /** Requests for experts that were kept, or on their way already. */
  readonly hits: number;
  /** Experts that were loaded ahead. */
  readonly prefetches: number;
  /** Experts that were loaded, times `expertBytes`. */
  readonly bytesRead: number;
}

export interface ExpertStore {
  /** Experts that are kept in memory. */
  readonly capacity: number;
  /** What one takes in memory, in its stored type: the largest of all layers. */
  readonly expertBytes: number;
  /** The figures at this moment. */
  counts(): StreamCounts;
  /** Whether a parameter is streamed, by its path: "layers.0.moe.experts.gateUp". */
  serves(path: string): boolean;
  /** The experts of a layer; undefined where it has none that can be streamed. */
  experts(layer: number, part: MoEFeedForward): Experts | undefined;
  /** Waits for what is under way and lets go of what is kept; later passes are refused. Leaves the checkpoint open. */
  close(): Promise<void>;
}

export interface ExpertStoreOptions {
  readonly checkpoint: Checkpoint;
  readonly engine: Engine;
  readonly description: Description;
  /** Experts to keep, 0 or more. */
  readonly capacity: number;
  /** Default lru. */
  readonly policy?: StreamPolicy;
  /** "f32": experts are widened on their way to the device; default "stored". */
  readonly weights?: "stored" | "f32";
}

/** Experts that are read at a time. */
const readsAhead = 2;
/** Experts that may be in memory beside those that are kept: those being read, and the one that computes. */
export const expertsOnTheWay: number = readsAhead + 1;

/** The experts of one layer. */
export interface StreamedLayer {
  readonly layer: number;
  readonly count: number;
  readonly sources: ExpertSources;
  /** Matrices whose experts are not all stored alike: they are widened to f32, as a stack of them would be. */
  readonly uneven: ReadonlySet<string>;
  /** Bytes of the largest expert: as it is kept, and on the device. */
  readonly bytes: number;
  readonly deviceBytes: number;
  /** Of one expert in f32. */
  readonly floats: number;
}

/** Bytes of an expert's part: as it is kept, and on the device. */
interface PartSize {
  readonly held: number;
  readonly onDevice: number;
  /** How it is stored. */
  readonly form: string;
}

function partSize(engine: Engine, forms: readonly StoredForm[]): PartSize {
  // Pieces of different types are widened when they are put together.
  const mixed = new Set(forms.map((form) => (form.kind === "floats" ? form.dtype : form.format))).size > 1;
  let [held, onDevice] = [0, 0];
  for (const form of forms) {
    const plan = planUpload(engine, { ...form, shape: [1, ...form.shape] });
    const wide = 4 * form.shape.reduce((n, d) => n * d, 1);
    held += mixed ? wide : (plan.widened?.bytes ?? plan.bytes);
    onDevice += mixed ? wide : plan.bytes;
  }
  return { held, onDevice, form: [...new Set(forms.map(nodeKey))].join() };
}

/** What was found for a description: a plan of memory asks, and then the store that carries it out. */
const found = new WeakMap<Description, { engine: Engine; index: CheckpointIndex; layers: readonly StreamedLayer[] }>();

/** The layers whose experts lie one by one in the checkpoint, with their sizes; only headers are looked at. */
export function streamedLayers(
  engine: Engine,
  index: CheckpointIndex,
  description: Description,
): readonly StreamedLayer[] {
  const before = found.get(description);
  if (before?.engine === engine && before.index === index) return before.layers;
  const layers = findLayers(engine, index, description);
  found.set(description, { engine, index, layers });
  return layers;
}

function findLayers(engine: Engine, index: CheckpointIndex, { blueprint, sources }: Description): StreamedLayer[] {
  return blueprint.layers.flatMap(({ feedForward }, layer): StreamedLayer[] => {
    if (feedForward.kind !== "moe") return [];
    const names = ["gateUp", "down", ...(feedForward.bias ? ["gateUpBias", "downBias"] : [])];
    const own = new Map<string, ExpertSource>();
    for (const name of names) {
      const source = sources.get(`layers.${layer}.moe.experts.${name}`);
      if (source?.kind === "experts") own.set(name, source);
    }
    if (own.size < names.length) return [];
    const uneven = new Set<string>();
    const held = new Float64Array(feedForward.experts);
    const onDevice = new Float64Array(feedForward.experts);
    for (const [name, source] of own) {
      const forms = new Set<string>();
      let [last, size]: [readonly StoredForm[] | undefined, PartSize | undefined] = [undefined, undefined];
      // Experts of equal forms share one list of them.
      for (const [e, own] of formsOf(index, source).entries()) {
        if (!size || own !== last) [last, size] = [own, partSize(engine, own)];
        forms.add(size.form);
        held[e] = (held[e] ?? 0) + size.held;
        onDevice[e] = (onDevice[e] ?? 0) + size.onDevice;
      }
      if (forms.size > 1) uneven.add(name);
    }
    const most = (sizes: Float64Array): number => sizes.reduce((n, one) => Math.max(n, one), 0);
    const [bytes, deviceBytes] = [most(held), most(onDevice)];
    const floats = Array.from(own.values(), ({ shape }) => 4 * shape.slice(1).reduce((n, d) => n * d, 1));
    const all = floats.reduce((n, one) => n + one, 0);
    return [{ layer, count: feedForward.experts, sources: own, uneven, bytes, deviceBytes, floats: all }];
  });
}

/** An expert in memory or on its way there. */
interface Entry {
  readonly host: Promise<HostExpert>;
  /** Where its bytes are, if they stand there as in the file. */
  readonly buffer?: ArrayBuffer;
  /** The cache, and passes that wait for it: when none is left, the buffer serves another. */
  holders: number;
}

/** Rows from..to of expert e. */
interface Block {
  readonly e: number;
  readonly from: number;
  readonly to: number;
}

/** The blocks that have rows. Throws ShapeError where the ends fall or pass the rows. */
function blocksOf(ends: ArrayLike<number>, rows: number): Block[] {
  let from = 0;
  return Array.from(ends, (to, e) => {
    if (to < from || to > rows) {
      throw new ShapeError(`streamed experts: block ${e} ends at row ${to}, after ${from} of ${rows} rows`);
    }
    const block = { e, from, to };
    from = to;
    return block;
  }).filter((block) => block.to > block.from);
}

/**
 * A store of experts that are read when they are needed. All layers share its places. What streamed experts give is what resident
 * ones give, bit for bit, because a kernel serves an expert's block by its own rows alone. Passes may run at the same time; they
 * take turns, layer by layer. Where a read fails, the pass fails with its error and the next one tries again.
 * Throws CheckpointError for experts that the checkpoint lacks or stores in an unknown form.
 */
export function expertStore(options: ExpertStoreOptions): ExpertStore {
  const { checkpoint, engine, description, capacity, policy = "lru", weights = "stored" } = options;
  const layers = streamedLayers(engine, checkpoint, description);
  const paths = new Set(
    layers.flatMap(({ layer, sources }) => Array.from(sources.keys(), (name) => `layers.${layer}.moe.experts.${name}`)),
  );
  const stride = layers.reduce((most, { count }) => Math.max(most, count), 0);
  const expertBytes = layers.reduce((most, { bytes }) => Math.max(most, bytes), 0);
  const cache = expertCache({ capacity, policy: policy === "lfu" ? lfu() : lru() });
  /** What is kept or on its way: the ids that `cache` holds, between any two steps. */
  const kept = new Map<number, Entry>();
  /** Buffers that no expert needs, for the next ones. */
  let free: ArrayBuffer[] = [];
  const predictors = layers.map(() => expertPredictor());
  const latest = layers.map(() => 0);
  let before: { readonly place: number; readonly ids: readonly number[] } | undefined;
  const counts = { requests: 0, hits: 0, prefetches: 0, loads: 0 };
  const underWay = new Set<Promise<unknown>>();
  /** Most bytes that an expert needs in a buffer: matrices begin at multiples of four. */
  const bufferBytes = expertBytes + 16;
  let closed = false;

  const hold = (entry: Entry): Entry => {
    entry.holders++;
    return entry;
  };
  const drop = (entry: Entry | undefined): void => {
    if (!entry || --entry.holders > 0 || !entry.buffer) return;
    const { host, buffer } = entry;
    const release = (): void => {
      if (!closed) free.push(buffer);
    };
    host.then(release, release);
  };
  const leave = (id: number): void => {
    drop(kept.get(id));
    kept.delete(id);
  };
  const reading = (id: number): Pick<Entry, "host" | "buffer"> => {
    const { sources = new Map() } = layers[Math.floor(id / stride)] ?? {};
    const plain = plainExpert(checkpoint, sources, id % stride);
    if (!plain) return { host: readExpert(checkpoint, sources, id % stride) };
    const buffer = free.pop() ?? new ArrayBuffer(bufferBytes);
    return { host: readPlain(checkpoint, plain, buffer), buffer };
  };
  /** Carries a load out, for one who waits: what leaves goes now, what comes is there as a promise. */
  const begin = ({ id, evict, kept: stays }: ExpertLoad): Entry => {
    counts.loads++;
    if (evict !== undefined) leave(evict);
    const entry: Entry = { ...reading(id), holders: 1 };
    if (stays) kept.set(id, hold(entry));
    const { host } = entry;
    underWay.add(host);
    const done = (): boolean => underWay.delete(host);
    host.then(done, () => {
      done();
      // The cache must not believe that it holds what never came; who waits for it gets the error.
      if (kept.get(id) === entry) {
        leave(id);
        cache.forget(id);
      }
    });
    return entry;
  };

  const parameters = (host: HostExpert, uneven: ReadonlySet<string>): Tree =>
    Object.fromEntries(
      Array.from(host, ([name, matrix]) => {
        const one = { ...matrix, shape: [1, ...matrix.shape] };
        const wide = weights === "f32" || name.endsWith("Bias") || uneven.has(name);
        return [name, wide ? engine.tensor(widen(one), one.shape) : upload(engine, one)];
      }),
    );

  /** What one layer asks for, in its turn. */
  async function serve(place: number, part: MoEFeedForward, rows: Tensor, blocks: readonly Block[]): Promise<Tensor> {
    const { uneven = new Set<string>() } = layers[place] ?? {};
    const [n = 0, width = 0] = rows.shape;
    const { hidden, activation = "silu", bias = false } = part;
    const ids = blocks.map(({ e }) => place * stride + e);
    const { hits, loads } = cache.need(ids);
    counts.requests += ids.length;
    counts.hits += hits.length;
    const ahead = policy === "prefetch" ? expectNext(place, ids) : [];
    const byId = new Map(ids.map((id, i) => [id, blocks[i]]));
    const outputs = new Map<number, Tensor>();
    const run = (id: number, host: HostExpert): void => {
      const { from, to } = byId.get(id) as Block;
      const m = to - from;
      outputs.set(
        id,
        rows.engine.scope(() => {
          const params = parameters(host, uneven);
          const own = slice(rows, [from, 0], [m, width]);
          const one = expertSet({ count: 1, width, hidden, activation, bias, params });
          const layout = { batch: 1, sequence: m, past: 0 };
          return one.apply(params, own, engine.tensor(Int32Array.of(m), [1]), layout).output; // [m, width]
        }),
      );
    };
    // Held until they have run: a load may take the place of one that waits for its turn.
    const waiting = hits.map((id) => kept.get(id)).map((entry) => entry && hold(entry));
    const coming: (Entry | undefined)[] = [];
    const start = (i: number): void => {
      const load = loads[i];
      if (load) coming[i] = begin(load);
    };
    try {
      for (let i = 0; i < readsAhead; i++) start(i);
      for (const [i, id] of hits.entries()) {
        const host = await waiting[i]?.host.catch(() => undefined);
        if (host) run(id, host);
        else {
          // It was loaded ahead, and that failed: it is read once more.
          drop(waiting[i]);
          waiting[i] = begin({ id, kept: false });
          run(id, await (waiting[i] as Entry).host);
        }
        drop(waiting[i]);
        waiting[i] = undefined;
      }
      for (const [i, { id }] of loads.entries()) {
        const entry = coming[i] as Entry;
        const host = await entry.host;
        start(i + readsAhead);
        run(id, host);
        drop(entry);
        coming[i] = undefined;
      }
      for (const load of ahead) drop(begin(load));
      const filled = blocks.at(-1)?.to ?? 0;
      const [only] = outputs.size === 1 && filled === n ? outputs : [];
      if (only) {
        outputs.delete(only[0]);
        return only[1];
      }
      return rows.engine.scope(() => {
        const parts = ids.map((id) => outputs.get(id) as Tensor);
        const behind = n - filled;
        if (behind > 0 || n === 0) parts.push(engine.tensor(new Float32Array(behind * width), [behind, width]));
        return concat(parts, 0); // [n, width]
      });
    } catch (error) {
      await Promise.allSettled(coming.map((entry) => entry?.host));
      repair([...loads, ...ahead]);
      throw error;
    } finally {
      for (const entry of [...waiting, ...coming]) drop(entry);
      for (const output of outputs.values()) output.dispose();
    }
  }

  /** After a failure: what was decided and not carried out is undone. */
  function repair(loads: readonly ExpertLoad[]): void {
    for (const { id } of loads) if (cache.has(id) && !kept.has(id)) cache.forget(id);
    for (const id of kept.keys()) if (!cache.has(id)) leave(id);
  }

  /** Decides what to load for the next layer: as many experts as it wanted last time, those that followed these most often. */
  function expectNext(place: number, ids: readonly number[]): readonly ExpertLoad[] {
    if (before?.place === place - 1) predictors[place]?.observe(before.ids, ids);
    before = { place, ids };
    latest[place] = ids.length;
    const expected = predictors[place + 1]?.predict(ids, latest[place + 1] ?? 0) ?? [];
    const loads = cache.prefetch(expected, ids);
    counts.prefetches += loads.length;
    return loads;
  }

  let last: Promise<unknown> = Promise.resolve();
  const inTurn = <T>(body: () => Promise<T>): Promise<T> => {
    const turn = last.then(body);
    last = turn.catch(() => undefined);
    return turn;
  };
  const refuse = (): void => {
    if (closed) throw new UnsupportedError("streamed experts: the model was closed; load it again");
  };

  return {
    capacity,
    expertBytes,
    counts: () => ({
      requests: counts.requests,
      hits: counts.hits,
      prefetches: counts.prefetches,
      bytesRead: counts.loads * expertBytes,
    }),
    serves: (path) => paths.has(path),
    experts(layer, part) {
      const place = layers.findIndex((one) => one.layer === layer);
      if (place < 0) return undefined;
      return {
        count: part.experts,
        params: {},
        apply() {
          throw new UnsupportedError(
            "streamed experts run in step() only, which gives them time to load; for forward() load the model without a limit of memory",
          );
        },
        async stream(rows, ends) {
          refuse();
          const blocks = blocksOf(await ends.data(), rows.shape[0] ?? 0);
          return inTurn(() => {
            refuse();
            return serve(place, part, rows, blocks);
          });
        },
      };
    },
    async close() {
      closed = true;
      await last;
      await Promise.allSettled(underWay);
      kept.clear();
      free = [];
    },
  };
}
