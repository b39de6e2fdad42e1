// What a device must bring: a table of kernels, upload, download and free. Nothing here knows about gradients or scopes.

/** Storage types. Arithmetic is f32 (the reference backend can be told to hold floats as float64). Masks are f32 0/1. */
export type DType = "f32" | "f16" | "bf16" | "i32" | "u8";
export type TypedArray = Float32Array | Float64Array | Int32Array | Uint8Array | Uint16Array;

/** `format` names a packed or quantised layout ("panels", "mxfp4", "int4-g128"); absent: row-major. */
export interface Spec {
  readonly shape: readonly number[];
  readonly dtype: DType;
  readonly format?: string;
}

export interface Operand<H> extends Spec {
  readonly handle: H;
}

export interface Kernel<H> {
  /** Returns one handle per result. Returning an input's handle makes the result a view of it (reshape). */
  // biome-ignore lint/suspicious/noExplicitAny: kernel tables hold ops of every attribute type
  (inputs: readonly Operand<H>[], results: readonly (Spec & { readonly reuse?: H })[], attrs: any): readonly H[];
  /**
   * `reuse` may also be the storage of a smaller input: the kernel finds out whether there is room behind it, and takes other
   * storage where there is none. Without this, `reuse` always has the size of the result.
   */
  grows?: true;
  /** The one result is a view of the first input, whatever the attributes: the engine makes it without calling the kernel. */
  view?: true;
  /** A reason why this call cannot be served; undefined when it can. */
  // biome-ignore lint/suspicious/noExplicitAny: kernel tables hold ops of every attribute type
  unsupported?(inputs: readonly Spec[], attrs: any): string | undefined;
}

/** The closed part: a backend that lacks one does not compile. topkIndices and argsort are stable, lower index first, everywhere. */
export type PrimitiveName =
  | "add"
  | "mul"
  | "maximum"
  | "less"
  | "where"
  | "recip"
  | "exp"
  | "log"
  | "sqrt"
  | "tanh"
  | "erf"
  | "floor"
  | "cast"
  | "reshape"
  | "transpose"
  | "slice"
  | "concat"
  | "takeRows"
  | "addRows"
  | "sumTo"
  | "maxLast"
  | "cumsum"
  | "matmul"
  | "topkIndices"
  | "argsort"
  | "blockEnds";

/** Memory of a device that the host writes. */
export interface HostRoom {
  /** All of it, as it is now. */
  bytes(): Uint8Array;
  /**
   * Whether the memory stays where it is when more is asked for, so that a read may go on writing what `bytes` gave while others
   * compute. (The array itself may be detached by then: a new one shows the same memory.)
   */
  readonly stays: boolean;
}

export interface Backend<H> {
  readonly name: string;
  readonly kernels: { readonly [P in PrimitiveName]: Kernel<H> } & {
    readonly [fusedOp: string]: Kernel<H> | undefined;
  };
  /**
   * Copies `data` to the device; the caller may change it afterwards. Element types are converted where they differ
   * from `spec.dtype`.
   */
  upload(data: TypedArray, spec: Spec): H;
  /**
   * Storage whose elements the host writes itself before anything reads it, as the bytes of `spec.dtype`. `bytes` is called anew for
   * each write: memory that grows may move. Only where the host reaches the device's memory; what is left unwritten is undefined.
   */
  room?(spec: Spec): HostRoom & { readonly handle: H };
  /**
   * The elements as they are at this call: after the kernels that were called before it, before those called after it.
   * Any number of downloads may be pending and settle in any order. Nobody waits for them: while one is pending its
   * handle may be freed, or taken over by a kernel (`reuse`), and the elements must still arrive unchanged. (The
   * trainer's snapshot starts its reads together; a step may follow before they end.) So a backend that cannot copy at
   * once orders the copy on its queue, and holds memory back until then. Rejects with DeviceError when the device
   * failed in anything called before: numbers that may be wrong are never delivered.
   */
  download(x: Operand<H>): Promise<TypedArray>;
  /** Only where the host may block; WebGPU leaves it out. */
  downloadSync?(x: Operand<H>): TypedArray;
  /**
   * Gives a handle back, once. Kernels that use it may still be queued, downloads of it pending (see there). Must not
   * throw because the device failed: scopes free what they hold while that error passes through them.
   */
  free(handle: H): void;
  flush?(): void;
  /** Ends the backend: workers, device, memory. Later calls throw. */
  dispose?(): void;
}
