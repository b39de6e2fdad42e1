// The device under the kernels: pooled buffers, a list of commands that becomes one command buffer, cached pipelines, and errors that
// are noticed before any number is handed out. Nothing here knows an op.
import { DeviceError, ShapeError, type Spec, type TypedArray, UnsupportedError } from "@switchyard/core";
import { bytesPerElement, decodeData, encodeData, sizeOf } from "./formats.ts";
import { type ParamType, type Program, shaderText } from "./program.ts";

/** The limits that kernels respect; `limits` of the options may only lower them. */
export interface Limits {
  readonly maxBufferSize: number;
  readonly maxStorageBufferBindingSize: number;
  readonly maxStorageBuffersPerShaderStage: number;
  readonly maxComputeWorkgroupStorageSize: number;
  readonly maxComputeInvocationsPerWorkgroup: number;
  readonly maxComputeWorkgroupsPerDimension: number;
}
const limitNames = [
  "maxBufferSize",
  "maxStorageBufferBindingSize",
  "maxStorageBuffersPerShaderStage",
  "maxComputeWorkgroupStorageSize",
  "maxComputeInvocationsPerWorkgroup",
  "maxComputeWorkgroupsPerDimension",
] as const satisfies readonly (keyof Limits)[];

/** A GPUBuffer of the pool. */
interface Pooled {
  readonly buffer: GPUBuffer;
  readonly id: number;
  readonly size: number;
  /** Number of the command buffer that used it last: an upload may overtake everything recorded in the open one. */
  used: number;
}
/** A stretch of a tensor in one buffer: `count` entries of the leading dimension from `first` on. */
export interface Part {
  readonly pooled: Pooled;
  readonly bytes: number;
  readonly first: number;
  readonly count: number;
}
/** The handle of a tensor: one part, or several where it exceeds what one binding may hold. */
export interface WebgpuHandle {
  readonly parts: readonly Part[];
  readonly bytes: number;
}

export type Groups = number | { readonly indirect: WebgpuHandle; readonly offset?: number };
export type Bound = WebgpuHandle | Part;

interface Dispatch {
  readonly program: Program;
  readonly parts: readonly Part[];
  readonly params: number;
  readonly groups: readonly [number, number, number] | { readonly buffer: GPUBuffer; readonly offset: number };
}
interface Copy {
  readonly from: GPUBuffer;
  readonly fromOffset: number;
  readonly to: GPUBuffer;
  readonly toOffset: number;
  readonly bytes: number;
}
interface Clear {
  readonly clear: GPUBuffer;
}
type Command = Dispatch | Copy | Clear;

/** What is looked up once per program and not per dispatch. */
interface Prepared {
  readonly buffers: readonly string[];
  readonly params: readonly { readonly name: string; readonly type: ParamType }[];
}
interface Pipeline {
  readonly layout: GPUBindGroupLayout;
  readonly pipeline: GPUComputePipeline;
  readonly groups: Map<string, GPUBindGroup>;
}

/** What kernels see. */
export interface Gpu {
  readonly device: GPUDevice;
  readonly limits: Limits;
  /** WGSL may compute in f16. */
  readonly f16: boolean;
  /** A driver that runs on the processor: barriers and workgroup memory are slow there, registers fast. */
  readonly software: boolean;
  /** Arithmetic of tile products with weights; sums of many are f32 either way. */
  readonly arithmetic: "f32" | "f16";
  /** Names of tiles by class of shape (kernels/tiles.ts), where this device has been tuned. */
  readonly tiles: Readonly<Record<string, string>> | undefined;
  /** Uninitialised storage for a result. */
  alloc(spec: Spec): WebgpuHandle;
  /** Uninitialised storage that a kernel uses between its own dispatches; `free` it once they are recorded. */
  scratch(elements: number): WebgpuHandle;
  free(handle: WebgpuHandle): void;
  /** Records one dispatch; with 0 groups nothing. */
  run<R extends string, W extends string, P extends string>(
    program: Program<R, W, P>,
    reads: Readonly<Record<NoInfer<R>, Bound>>,
    writes: Readonly<Record<NoInfer<W>, Bound>>,
    params: Readonly<Record<NoInfer<P>, number>>,
    groups: Groups,
  ): void;
  /** Records a copy of bytes; offsets and bytes are multiples of 4. */
  copy(from: Bound, fromOffset: number, to: Bound, toOffset: number, bytes: number): void;
  /** Records zeros over a whole tensor. */
  clear(x: WebgpuHandle): void;
  /** The one part of a tensor; throws where it has several, naming `op`. */
  whole(op: string, x: Bound): Part;
}

const UNIFORM_SLOT = 256;
const UNIFORM_PAGE = 65_536;
const MOST_BIND_GROUPS = 4096;

const roundUp = (n: number, to: number): number => Math.ceil(n / to) * to;
/** Four sizes per power of two: at most a quarter is wasted, and buffers come back into use. */
function sizeClass(bytes: number): number {
  if (bytes <= 256) return 256;
  const step = 2 ** (Math.ceil(Math.log2(bytes)) - 3);
  return roundUp(roundUp(bytes, step), 16);
}

export interface GpuOptions {
  readonly limits?: Partial<Limits>;
  /** Unused buffers kept for reuse, in bytes. */
  readonly idle: number;
  /** Whether the driver computes on the processor; default: what the adapter says. */
  readonly software?: boolean;
  /** "f16" needs the feature shader-f16. */
  readonly arithmetic?: "f32" | "f16";
  readonly tiles?: Readonly<Record<string, string>>;
}

export interface OwnedGpu extends Gpu {
  upload(data: TypedArray, spec: Spec): WebgpuHandle;
  download(x: Spec & { readonly handle: WebgpuHandle }): Promise<TypedArray>;
  flush(): void;
  memory(): { readonly used: number; readonly held: number };
  pipelines(): number;
  /** What ended this device; undefined while all is well. */
  failure(): DeviceError | UnsupportedError | undefined;
  dispose(): void;
}

export function createGpu(device: GPUDevice, options: GpuOptions): OwnedGpu {
  if (options.arithmetic === "f16" && !device.features.has("shader-f16")) {
    throw new UnsupportedError(
      'webgpu: arithmetic "f16" needs the feature "shader-f16", which this device lacks: the adapter has none, or the device was ' +
        "requested without it (requestDevice() asks for it)",
    );
  }
  const limits = Object.fromEntries(
    limitNames.map((name) => [name, Math.min(device.limits[name], options.limits?.[name] ?? Number.POSITIVE_INFINITY)]),
  ) as { readonly [K in keyof Limits]: number };
  // Usage flags by value: the globals that name them do not exist in Node.
  const usage = { MAP_READ: 1, COPY_SRC: 4, COPY_DST: 8, UNIFORM: 64, STORAGE: 128, INDIRECT: 256 };

  let failed: DeviceError | UnsupportedError | undefined;
  /** Settles when every error scope opened so far has answered. */
  let checked: Promise<void> = Promise.resolve();
  let epoch = 1;
  let commands: Command[] = [];
  let numbers = 0;
  let nextId = 0;
  let used = 0;
  let held = 0;
  let idle = 0;
  const free = new Map<number, Pooled[]>();
  const doomed: Pooled[] = [];
  const pipelines = new Map<string, Pipeline>();
  const prepared = new WeakMap<Program, Prepared>();
  let bindGroups = 0;
  const uniformPages: {
    readonly data: ArrayBuffer;
    readonly view: DataView;
    readonly buffer: GPUBuffer;
    id: number;
  }[] = [];

  const fail = (error: DeviceError | UnsupportedError): void => {
    failed ??= error;
    commands = [];
    numbers = 0;
  };
  const check = (): void => {
    if (failed) throw failed;
  };
  device.lost.then((info) => {
    fail(
      new DeviceError(
        `webgpu: the device was lost (${info.reason ?? "unknown"}${info.message ? `: ${info.message}` : ""}); what it held is gone. ` +
          "recover() gives a backend on a new device; go on from the last snapshot",
      ),
    );
  });

  /** Runs a body of WebGPU calls; what its error scopes catch ends this device. The scopes open and close within one turn. */
  function guarded<T>(what: string, body: () => T): T {
    const kinds = ["internal", "out-of-memory", "validation"] as const;
    for (const kind of kinds) device.pushErrorScope(kind);
    let scopes: Promise<GPUError | null>[] = [];
    try {
      return body();
    } finally {
      scopes = [...kinds].reverse().map(() => device.popErrorScope());
      const answers = Promise.all(
        scopes.map((scope, i) =>
          scope.then(
            (error) => {
              if (error) fail(deviceError(what, kinds[kinds.length - 1 - i] ?? "validation", error.message));
            },
            (cause) => fail(new DeviceError(`webgpu: ${what}: the device gave no answer: ${String(cause)}`, { cause })),
          ),
        ),
      );
      checked = Promise.all([checked, answers]).then(() => undefined);
    }
  }

  // ---------------------------------------------------------------- buffers
  function take(bytes: number, what: () => string, forUpload: boolean): Pooled {
    check();
    const size = Math.min(sizeClass(bytes), roundUp(limits.maxBufferSize, 4));
    const list = free.get(size);
    if (list) {
      // An upload happens before the commands recorded so far: only a buffer that none of them uses will do.
      const i = forUpload ? list.findIndex((pooled) => pooled.used < epoch) : list.length - 1;
      const [pooled] = i < 0 ? [] : list.splice(i, 1);
      if (pooled) {
        idle -= size;
        used += size;
        return pooled;
      }
    }
    if (bytes > limits.maxBufferSize) {
      throw new DeviceError(
        `webgpu: ${what()} needs ${bytes} bytes in one buffer; this device allows ${limits.maxBufferSize}`,
      );
    }
    const buffer = guarded(`allocating ${size} bytes for ${what()} (${used} in use, ${idle} kept for reuse)`, () =>
      device.createBuffer({ size, usage: usage.STORAGE | usage.COPY_SRC | usage.COPY_DST | usage.INDIRECT }),
    );
    held += size;
    used += size;
    return { buffer, id: nextId++, size, used: 0 };
  }
  function giveBack(pooled: Pooled): void {
    used -= pooled.size;
    idle += pooled.size;
    const list = free.get(pooled.size);
    if (list) list.push(pooled);
    else free.set(pooled.size, [pooled]);
    if (idle > options.idle) trim();
  }
  /** Destroys unused buffers, the largest first, until half of what may be kept is left. */
  function trim(): void {
    for (const size of [...free.keys()].sort((a, b) => b - a)) {
      const list = free.get(size) ?? [];
      while (idle > options.idle / 2) {
        const pooled = list.pop();
        if (!pooled) break;
        idle -= size;
        doomed.push(pooled);
      }
    }
    if (commands.length === 0) destroyDoomed();
  }
  /** Only with no open commands: a command buffer with a destroyed buffer is invalid. */
  function destroyDoomed(): void {
    if (doomed.length === 0) return;
    for (const pooled of doomed.splice(0)) {
      held -= pooled.size;
      pooled.buffer.destroy();
    }
    for (const one of pipelines.values()) one.groups.clear();
    bindGroups = 0;
  }

  function allocate(spec: Spec, forUpload: boolean): WebgpuHandle {
    const element = bytesPerElement(spec.dtype);
    const bytes = sizeOf(spec.shape) * element;
    const what = () => `a tensor [${spec.shape.join(", ")}] ${spec.dtype}`;
    const limit = Math.min(limits.maxStorageBufferBindingSize, limits.maxBufferSize);
    if (bytes <= limit) {
      const pooled = take(Math.max(bytes, 4), what, forUpload);
      return { bytes, parts: [{ pooled, bytes, first: 0, count: spec.shape[0] ?? 1 }] };
    }
    const leading = spec.shape[0] ?? 1;
    const each = bytes / leading;
    // Parts begin on whole words, so that packed types can be read as words.
    let count = Math.floor(limit / each);
    if (each % 4 !== 0) count -= count % 4;
    if (count < 1) {
      throw new DeviceError(
        `webgpu: ${what()} has entries of ${each} bytes along its first dimension; this device binds at most ${limit} bytes at once ` +
          "(maxStorageBufferBindingSize), so it cannot be split between them",
      );
    }
    const parts: Part[] = [];
    try {
      for (let first = 0; first < leading; first += count) {
        const n = Math.min(count, leading - first);
        parts.push({ pooled: take(n * each, what, forUpload), bytes: n * each, first, count: n });
      }
    } catch (error) {
      for (const part of parts) giveBack(part.pooled);
      throw error;
    }
    return { bytes, parts };
  }

  // ---------------------------------------------------------------- commands
  function whole(op: string, x: Bound): Part {
    if (!("parts" in x)) return x;
    const [part] = x.parts;
    if (!part || x.parts.length > 1) {
      throw new UnsupportedError(
        `webgpu: ${op}: a tensor of ${x.bytes} bytes lies in ${x.parts.length} buffers, because this device binds at most ` +
          `${limits.maxStorageBufferBindingSize} bytes at once; this op takes tensors in one buffer only`,
      );
    }
    return part;
  }

  function prepare(one: Program): Prepared {
    const known = prepared.get(one);
    if (known) return known;
    const params = Object.entries(one.params).map(([name, type]) => ({ name, type }));
    if (params.length >= UNIFORM_SLOT / 4)
      throw new RangeError(`webgpu: ${one.key}: ${params.length} numbers, at most 63`);
    const made = { buffers: [...Object.keys(one.reads), ...Object.keys(one.writes)], params };
    prepared.set(one, made);
    return made;
  }

  /** Writes the numbers of one dispatch; answers their byte offset over all pages. */
  function writeParams(one: Program, params: Readonly<Record<string, number>>, groups: number): number {
    const offset = numbers;
    const page = Math.floor(offset / UNIFORM_PAGE);
    if (page === uniformPages.length) {
      const data = new ArrayBuffer(UNIFORM_PAGE);
      const buffer = guarded("allocating a page of uniforms", () =>
        device.createBuffer({ size: UNIFORM_PAGE, usage: usage.UNIFORM | usage.COPY_DST }),
      );
      uniformPages.push({ data, view: new DataView(data), buffer, id: nextId++ });
    }
    const view = uniformPages[page]?.view;
    let at = offset % UNIFORM_PAGE;
    view?.setUint32(at, groups, true);
    for (const { name, type } of prepare(one).params) {
      at += 4;
      const value = params[name];
      if (value === undefined) throw new TypeError(`webgpu: ${one.key}: the number "${name}" is missing`);
      if (type === "f32") view?.setFloat32(at, value, true);
      else if (type === "i32") view?.setInt32(at, value, true);
      else view?.setUint32(at, value, true);
    }
    numbers += UNIFORM_SLOT;
    return offset;
  }

  /** Workgroups in up to three dimensions. */
  function fold(n: number): readonly [number, number, number] {
    const most = limits.maxComputeWorkgroupsPerDimension;
    if (n <= most) return [n, 1, 1];
    const rows = Math.ceil(n / most);
    return rows <= most ? [most, rows, 1] : [most, most, Math.ceil(rows / most)];
  }

  function pipelineOf(one: Program): Pipeline {
    const known = pipelines.get(one.key);
    if (known) return known;
    const compute = 4;
    const reads = Object.keys(one.reads).length;
    const writes = Object.keys(one.writes).length;
    const entries: GPUBindGroupLayoutEntry[] = Array.from({ length: reads + writes }, (_, binding) => ({
      binding,
      visibility: compute,
      buffer: { type: binding < reads ? "read-only-storage" : "storage" },
    }));
    const layout = device.createBindGroupLayout({
      entries: [
        ...entries,
        {
          binding: reads + writes,
          visibility: compute,
          buffer: { type: "uniform", hasDynamicOffset: true, minBindingSize: UNIFORM_SLOT },
        },
      ],
    });
    const module = device.createShaderModule({ label: one.key, code: shaderText(one) });
    const pipeline = device.createComputePipeline({
      label: one.key,
      layout: device.createPipelineLayout({ bindGroupLayouts: [layout] }),
      compute: { module, entryPoint: "entry" },
    });
    const made = { layout, pipeline, groups: new Map<string, GPUBindGroup>() };
    pipelines.set(one.key, made);
    return made;
  }

  function bindGroupOf(one: Pipeline, parts: readonly Part[], page: number): GPUBindGroup {
    const uniforms = uniformPages[page];
    let key = `${page}`;
    for (const { pooled, bytes } of parts) key += `,${pooled.id}:${bytes}`;
    const known = one.groups.get(key);
    if (known) return known;
    if (!uniforms) throw new RangeError(`webgpu: page ${page} of the uniforms is missing`);
    const entries: GPUBindGroupEntry[] = parts.map(({ pooled, bytes }, binding) => ({
      binding,
      // Whole vec4s, so that a kernel may read four elements at once up to the end.
      resource: { buffer: pooled.buffer, size: Math.min(roundUp(Math.max(bytes, 4), 16), pooled.size) },
    }));
    if (++bindGroups > MOST_BIND_GROUPS) {
      for (const other of pipelines.values()) other.groups.clear();
      bindGroups = 1;
    }
    const group = device.createBindGroup({
      layout: one.layout,
      entries: [...entries, { binding: parts.length, resource: { buffer: uniforms.buffer, size: UNIFORM_SLOT } }],
    });
    one.groups.set(key, group);
    return group;
  }

  function encode(encoder: GPUCommandEncoder): void {
    let pass: GPUComputePassEncoder | undefined;
    for (const command of commands) {
      if ("program" in command) {
        pass ??= encoder.beginComputePass();
        const one = pipelineOf(command.program);
        const page = Math.floor(command.params / UNIFORM_PAGE);
        pass.setPipeline(one.pipeline);
        pass.setBindGroup(0, bindGroupOf(one, command.parts, page), [command.params % UNIFORM_PAGE]);
        const { groups } = command;
        if ("buffer" in groups) pass.dispatchWorkgroupsIndirect(groups.buffer, groups.offset);
        else pass.dispatchWorkgroups(...groups);
        continue;
      }
      pass?.end();
      pass = undefined;
      if ("clear" in command) encoder.clearBuffer(command.clear);
      else encoder.copyBufferToBuffer(command.from, command.fromOffset, command.to, command.toOffset, command.bytes);
    }
    pass?.end();
  }

  function flush(): void {
    check();
    if (commands.length === 0) {
      destroyDoomed();
      return;
    }
    const names = new Set(commands.map((command) => ("program" in command ? command.program.key : "copy")));
    guarded(`${commands.length} commands (${[...names].slice(0, 12).join(", ")})`, () => {
      const encoder = device.createCommandEncoder();
      encode(encoder);
      uniformPages.forEach((page, i) => {
        const bytes = Math.min(numbers - i * UNIFORM_PAGE, UNIFORM_PAGE);
        if (bytes > 0) device.queue.writeBuffer(page.buffer, 0, page.data, 0, bytes);
      });
      device.queue.submit([encoder.finish()]);
    });
    commands = [];
    numbers = 0;
    epoch++;
    destroyDoomed();
  }

  const record = (command: Command, parts: readonly Part[]): void => {
    check();
    for (const part of parts) part.pooled.used = epoch;
    commands.push(command);
  };

  const self: OwnedGpu = {
    device,
    limits,
    f16: device.features.has("shader-f16"),
    software: options.software ?? device.adapterInfo?.isFallbackAdapter ?? false,
    arithmetic: options.arithmetic ?? "f32",
    tiles: options.tiles,
    alloc: (spec) => allocate(spec, false),
    scratch: (elements) => allocate({ shape: [elements], dtype: "i32" }, false),
    free(handle) {
      for (const part of handle.parts) giveBack(part.pooled);
    },
    whole,

    run(one, reads, writes, params, groups) {
      if (groups === 0) return;
      const [from, to]: readonly Readonly<Record<string, Bound>>[] = [reads, writes];
      const parts = prepare(one).buffers.map((name) => {
        const bound = from?.[name] ?? to?.[name];
        if (!bound) throw new TypeError(`webgpu: ${one.key}: the buffer "${name}" is missing`);
        return whole(one.key, bound);
      });
      if (typeof groups === "number") {
        const at = writeParams(one, params, groups);
        record({ program: one, parts, params: at, groups: fold(groups) }, parts);
      } else {
        const at = writeParams(one, params, 0xffffffff);
        const source = whole(one.key, groups.indirect);
        const indirect = { buffer: source.pooled.buffer, offset: groups.offset ?? 0 };
        record({ program: one, parts, params: at, groups: indirect }, [...parts, source]);
      }
    },

    copy(from, fromOffset, to, toOffset, bytes) {
      if (bytes === 0) return;
      const [a, b] = [whole("copy", from), whole("copy", to)];
      record({ from: a.pooled.buffer, fromOffset, to: b.pooled.buffer, toOffset, bytes: roundUp(bytes, 4) }, [a, b]);
    },

    clear(x) {
      for (const part of x.parts) record({ clear: part.pooled.buffer }, [part]);
    },

    upload(data, spec) {
      check();
      if (data.length !== sizeOf(spec.shape)) {
        throw new ShapeError(
          `webgpu: upload: [${spec.shape.join(", ")}] needs ${sizeOf(spec.shape)} elements, found ${data.length}`,
        );
      }
      const bytes = encodeData(data, spec.dtype);
      const handle = allocate(spec, true);
      let from = 0;
      for (const part of handle.parts) {
        const padded = roundUp(part.bytes, 4);
        // writeBuffer takes whole words; the last one of a packed type may be half full.
        const piece = bytes.subarray(from, from + part.bytes);
        const words = padded === part.bytes ? piece : padTo(piece, padded);
        if (padded > 0) device.queue.writeBuffer(part.pooled.buffer, 0, words, 0, padded);
        from += part.bytes;
      }
      return handle;
    },

    async download({ handle, shape, dtype }) {
      check();
      const staging = handle.parts.map((part) => {
        const size = roundUp(Math.max(part.bytes, 4), 4);
        const buffer = guarded(`allocating ${size} bytes to read a tensor [${shape.join(", ")}]`, () =>
          device.createBuffer({ size, usage: usage.MAP_READ | usage.COPY_DST }),
        );
        if (part.bytes > 0) {
          const copy = {
            from: part.pooled.buffer,
            fromOffset: 0,
            to: buffer,
            toOffset: 0,
            bytes: roundUp(part.bytes, 4),
          };
          record(copy, [part]);
        }
        return { buffer, bytes: part.bytes };
      });
      flush();
      const asked = checked;
      try {
        await Promise.all(staging.map(({ buffer }) => buffer.mapAsync(1)));
      } catch (cause) {
        // Of a lost device the reads fail first, then comes the reason.
        await Promise.race([device.lost, new Promise((resolve) => setTimeout(resolve, 1000))]);
        await asked;
        if (failed) throw failed;
        fail(new DeviceError(`webgpu: reading a tensor [${shape.join(", ")}] failed: ${String(cause)}`, { cause }));
        throw failed;
      }
      await asked;
      try {
        if (failed) throw failed;
        const bytes = new Uint8Array(handle.bytes);
        let at = 0;
        for (const { buffer, bytes: n } of staging) {
          bytes.set(new Uint8Array(buffer.getMappedRange(), 0, n), at);
          at += n;
        }
        return decodeData(bytes, dtype);
      } finally {
        for (const { buffer } of staging) buffer.destroy();
      }
    },

    flush,
    memory: () => ({ used, held }),
    pipelines: () => pipelines.size,
    failure: () => failed,
    dispose() {
      fail(new UnsupportedError("webgpu: this backend was disposed of"));
      for (const list of free.values()) for (const pooled of list) pooled.buffer.destroy();
      for (const page of uniformPages) page.buffer.destroy();
      free.clear();
    },
  };
  return self;
}

function deviceError(what: string, kind: GPUErrorFilter, message: string): DeviceError {
  const cause = { "out-of-memory": "out of memory", validation: "an invalid command", internal: "an internal error" };
  const advice = kind === "out-of-memory" ? "; use smaller batches or a smaller model" : "";
  return new DeviceError(`webgpu: ${cause[kind]} while ${what}: ${message}${advice}`);
}

const padTo = (bytes: Uint8Array<ArrayBuffer>, size: number): Uint8Array<ArrayBuffer> => {
  const padded = new Uint8Array(size);
  padded.set(bytes);
  return padded;
};
