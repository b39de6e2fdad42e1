// Puts the wasm backend together: binary, memory, threads, kernel tables, upload and download.
import { type Backend, ShapeError, type Spec, type TypedArray, UnsupportedError } from "@switchyard/core";
import { bytesOf, createDevice, type Device, sizeOf } from "./device.ts";
import { type Block, createHeap, type Heap } from "./heap.ts";
import { attentionKernels } from "./kernels/attention.ts";
import { cast, elementwiseKernels } from "./kernels/elementwise.ts";
import { expertKernels } from "./kernels/experts.ts";
import { matmulKernels, SCRATCH } from "./kernels/matmul.ts";
import { quantizedKernels } from "./kernels/quantized.ts";
import { reduceKernels } from "./kernels/reduce.ts";
import { rowKernels } from "./kernels/rows.ts";
import { shapeKernels } from "./kernels/shape.ts";
import { compile, hasRelaxedSimd, type Variant } from "./loader.ts";
import { createPool, HEAP_START, type Pool, threadsPossible, WORTH_SHARING } from "./pool.ts";

export interface WasmOptions {
  /** Threads, the calling one included. Default: one per processor, at most 8; one where memory cannot be shared (`note` says why). */
  readonly threads?: number;
  /** The build; default: relaxed SIMD where the engine has it. */
  readonly variant?: Variant;
  /** Most bytes the heap may grow to, from 32 MB; default 4 GB, the limit of 32-bit wasm. */
  readonly memory?: number;
}

/** The handle of a tensor: a block of the wasm heap. */
export type WasmHandle = Block;

export interface WasmBackend extends Backend<WasmHandle> {
  /** Threads at work, the calling one included. */
  readonly threads: number;
  readonly variant: Variant;
  /** Why there are fewer threads, or a slower build, than asked for; empty when all is well. */
  readonly note: string;
  /** Bytes in tensors, bytes held by the heap. */
  memory(): { readonly used: number; readonly held: number };
  downloadSync(x: Spec & { readonly handle: WasmHandle }): TypedArray;
  dispose(): void;
}

const PAGE = 65_536;
const MOST_PAGES = 65_536;
const LEAST_BYTES = 2 ** 25;

/**
 * The default backend: WebAssembly SIMD, threads where memory can be shared.
 * @example const cpu = engine(await wasm({ threads: 2 }));
 * @throws UnsupportedError without WebAssembly SIMD, for a number of threads that is not a whole number from 1 to 64, for less
 * than 32 MB of memory.
 */
export function wasm(options: WasmOptions = {}): Promise<WasmBackend> {
  return create(options, WORTH_SHARING);
}

/** `wasm` with the threshold as a parameter: tests share every job, however small. */
export async function create(options: WasmOptions, shareFrom: number): Promise<WasmBackend> {
  const { variant = hasRelaxedSimd() ? "relaxed" : "plain", memory: limit = MOST_PAGES * PAGE } = options;
  const asked = options.threads ?? Math.min(globalThis.navigator?.hardwareConcurrency ?? 1, 8);
  if (!Number.isInteger(asked) || asked < 1 || asked > 64) {
    throw new UnsupportedError(`wasm: threads must be a whole number from 1 to 64, not ${asked}`);
  }
  if (!(limit >= LEAST_BYTES)) throw new UnsupportedError(`wasm: memory must be at least 32 MB, not ${limit} bytes`);
  const notes: string[] = [];
  if (variant === "plain" && options.variant === undefined) {
    notes.push(
      "plain SIMD build: this engine has no relaxed SIMD (Node 22 or a current browser runs about 1.4 times as fast)",
    );
  }
  const sharing = threadsPossible();
  if (asked > 1 && !sharing.possible) notes.push(sharing.why);
  let started: { readonly heap: Heap; readonly pool: Pool } | undefined;
  if (asked > 1 && sharing.possible) {
    try {
      started = await start(variant, asked, limit, shareFrom);
    } catch (error) {
      // A page's policy may forbid workers; the reason stays readable in `note`.
      if (!(error instanceof UnsupportedError)) throw error;
      notes.push(`one thread: ${error.message}`);
    }
  }
  const { heap, pool } = started ?? (await start(variant, 1, limit, shareFrom));
  return assemble(heap, pool, variant, notes.join("; "));
}

async function start(
  variant: Variant,
  threads: number,
  limit: number,
  shareFrom: number,
): Promise<{ readonly heap: Heap; readonly pool: Pool }> {
  const shared = threads > 1;
  const module = await compile(variant, shared);
  const memory = reserve(Math.min(MOST_PAGES, Math.floor(limit / PAGE)), shared);
  const heap = createHeap(memory.memory, HEAP_START, memory.pages * PAGE);
  const scratch = Array.from(
    { length: threads },
    () => heap.alloc(SCRATCH, () => "the working memory of a thread").ptr,
  );
  return { heap, pool: await createPool({ module, memory: memory.memory, scratch, shareFrom }) };
}

/** A memory that may grow to `pages`; where the system refuses to set so much address space aside, to half of it, and so on. */
function reserve(pages: number, shared: boolean): { readonly memory: WebAssembly.Memory; readonly pages: number } {
  const initial = 256;
  for (let most = pages; ; most = Math.floor(most / 2)) {
    try {
      return { memory: new WebAssembly.Memory({ initial, maximum: most, shared }), pages: most };
    } catch (error) {
      if (!(error instanceof RangeError) || most / 2 < initial) throw error;
    }
  }
}

/** The backend over a heap and its threads. */
export function assemble(heap: Heap, pool: Pool, variant: Variant, note: string): WasmBackend {
  const device = createDevice(heap, pool);
  const stays = growsInPlace(heap.memory);
  let open = true;
  const check = (): void => {
    if (!open) throw new UnsupportedError("wasm: this backend was disposed of");
  };

  const downloadSync: WasmBackend["downloadSync"] = (x) => {
    check();
    const { ptr } = x.handle;
    const n = sizeOf(x.shape);
    switch (x.dtype) {
      case "f32":
        return Float32Array.from(heap.f32().subarray(ptr / 4, ptr / 4 + n));
      case "i32":
        return Int32Array.from(heap.i32().subarray(ptr / 4, ptr / 4 + n));
      case "f16":
      case "bf16":
        return Uint16Array.from(heap.u16().subarray(ptr / 2, ptr / 2 + n));
      case "u8":
        return Uint8Array.from(heap.u8().subarray(ptr, ptr + n));
      default:
        return x.dtype satisfies never;
    }
  };

  return {
    name: "wasm",
    threads: pool.threads,
    variant,
    note,
    kernels: {
      ...elementwiseKernels(device),
      ...shapeKernels(device),
      ...reduceKernels(device),
      ...rowKernels(device),
      ...matmulKernels(device),
      ...expertKernels(device),
      ...quantizedKernels(device),
      ...attentionKernels(device),
    },
    upload(data, spec) {
      check();
      if (data.length !== sizeOf(spec.shape)) {
        throw new ShapeError(
          `wasm: upload: [${spec.shape.join(", ")}] needs ${sizeOf(spec.shape)} elements, found ${data.length}`,
        );
      }
      const block = heap.alloc(bytesOf(spec), () => `a tensor [${spec.shape.join(", ")}] ${spec.dtype}`);
      write(device, block, data, spec);
      return block;
    },
    room(spec) {
      check();
      const bytes = bytesOf(spec);
      const handle = heap.alloc(bytes, () => `a tensor [${spec.shape.join(", ")}] ${spec.dtype}`);
      return { handle, stays, bytes: () => heap.u8().subarray(handle.ptr, handle.ptr + bytes) };
    },
    downloadSync,
    download: async (x) => downloadSync(x),
    free(handle) {
      if (open) heap.free(handle);
    },
    memory: () => ({ used: heap.used(), held: heap.held() }),
    dispose() {
      open = false;
      pool.dispose();
    },
  };
}

/**
 * Whether a memory is never moved when it grows. Shared memory is not, by the standard. V8 sets all addresses up to the maximum aside on
 * 64-bit machines, as it needs them to catch accesses out of bounds; told not to, it may take less and move.
 */
function growsInPlace({ buffer }: WebAssembly.Memory): boolean {
  if (!(buffer instanceof ArrayBuffer)) return true;
  const { process } = globalThis;
  const { v8, bun } = process?.versions ?? {};
  if (v8 === undefined || bun !== undefined || !["x64", "arm64"].includes(process.arch)) return false;
  return ![...process.execArgv, process.env.NODE_OPTIONS ?? ""].some((one) => one.includes("wasm"));
}

/** Numbers are converted to the storage type; a Uint16Array for f16 or bf16 holds its bits. */
function write(device: Device, block: Block, data: TypedArray, spec: Spec): void {
  const { heap } = device;
  const { ptr } = block;
  const { dtype } = spec;
  if (dtype === "f32") heap.f32().set(data, ptr / 4);
  else if (data instanceof Uint16Array && (dtype === "f16" || dtype === "bf16")) heap.u16().set(data, ptr / 2);
  else if (data instanceof Int32Array && dtype === "i32") heap.i32().set(data, ptr / 4);
  else if (data instanceof Uint8Array && dtype === "u8") heap.u8().set(data, ptr);
  else {
    const dtypeOfData = data instanceof Int32Array ? "i32" : data instanceof Uint8Array ? "u8" : "f32";
    const source = { shape: spec.shape, dtype: dtypeOfData } as const;
    const from = heap.alloc(
      bytesOf(source),
      () => `the conversion of an upload [${spec.shape.join(", ")}] to ${dtype}`,
    );
    try {
      write(device, from, data, source);
      cast(device, { ...source, handle: from }, block, dtype);
    } finally {
      heap.free(from);
    }
  }
}
