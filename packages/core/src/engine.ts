// Engines run ops. `engine(backend)` looks a kernel up or falls back to smaller ops; decorators (autodiff, counted) wrap its `run`.
import type { Backend, DType, HostRoom, Operand, Spec, TypedArray } from "./backend.ts";
import { ShapeError, UnsupportedError } from "./errors.ts";
import { first, type Op } from "./op.ts";
import { register, runScope } from "./scope.ts";
import { gone, type Scopes, type Storage, Stored, show, sizeOf, type Tensor } from "./tensor.ts";

export interface Engine {
  /** For example "autodiff(wasm)". */
  readonly name: string;
  /** 0 on a backend's own engine, one more for each decorator: the outermost engine among the inputs runs an op. */
  readonly level: number;
  /** The engine that owns the backend: constants are made there. */
  readonly root: Engine;
  /** Whether `read` works: results may be waited for. */
  readonly canBlock: boolean;
  readonly scopes: Scopes;
  run<A>(op: Op<A>, inputs: readonly Tensor[], attrs: A): readonly Tensor[];
  /** Copies host data to the device; the dtype follows from the array type (Float32/Float64Array f32, Int32Array i32, Uint8Array u8). */
  tensor(data: TypedArray, shape: readonly number[], dtype?: DType): Tensor;
  /**
   * A tensor that is written by the host in parts, without a copy of all of it: `bytes` are its elements, row-major, taken anew for each
   * write and valid until the caller gives way to others. To be filled before the tensor is used. Undefined where the host does not
   * reach the device's memory; absent where the engine has no memory of its own.
   */
  room?(shape: readonly number[], dtype: DType): (HostRoom & { readonly tensor: Tensor }) | undefined;
  /** Frees everything made inside but the tensors found in what is returned: plain records, lists and maps. Async bodies are rejected by the type. */
  scope<R>(body: () => R extends Promise<unknown> ? never : R): R;
  /**
   * Copies the elements to the host at once, row-major; the device finishes first what was asked of it. For what only the host can
   * decide in the middle of a pass (`needs: ["host"]`); everything else reads with `x.data()`. Throws UnsupportedError unless
   * `canBlock`.
   */
  read(x: Tensor): TypedArray;
  /** The caller will not use x again: its storage may be overwritten; later use throws. */
  give(x: Tensor): Tensor;
  // biome-ignore lint/suspicious/noExplicitAny: any op may be asked about
  explain(op: Op<any>, inputs: readonly Spec[], attrs: any): string;
  /** Number of device handles alive. */
  live(): number;
}

/** An engine on one backend. */
export function engine<H>(backend: Backend<H>): Engine {
  const scopes: Scopes = { frames: [] };
  let live = 0;

  const operand = ({ shape, dtype, format, storage: { content: handle } }: Stored<H>): Operand<H> =>
    format === undefined ? { shape, dtype, handle } : { shape, dtype, format, handle };
  const device = {
    free(handle: H): void {
      live--;
      backend.free(handle);
    },
    // async: a backend that throws at once still rejects.
    read: async (x: Stored<H>): Promise<TypedArray> => backend.download(operand(x)),
  };
  const wrap = (spec: Spec, storage: Storage<H>): Stored<H> =>
    register(scopes, new Stored<H>(self, spec, storage, device));
  const store = (handle: H): Storage<H> => {
    live++;
    return { count: 0, content: handle };
  };

  // biome-ignore lint/suspicious/noExplicitAny: the table holds ops of every attribute type
  const refusal = (op: Op<any>, inputs: readonly Spec[], attrs: any): string | undefined => {
    const kernel = backend.kernels[op.name];
    return kernel ? kernel.unsupported?.(inputs, attrs) : `${backend.name} has no kernel "${op.name}"`;
  };

  const own = (op: { readonly name: string }, x: Tensor, i: number): Stored<H> => {
    if (!(x instanceof Stored) || x.engine !== self) {
      throw new UnsupportedError(
        `${op.name}: input ${i}, ${show(x)}, belongs to engine ${x.engine.name}, another one than ${self.name}; ` +
          "copy it over with engine.tensor(await x.data(), x.shape)",
      );
    }
    if (!x.alive) throw new Error(`${op.name}: input ${i}, ${gone(x)}`);
    return x as Stored<H>;
  };

  const self: Engine = {
    name: backend.name,
    level: 0,
    get root() {
      return self;
    },
    canBlock: backend.downloadSync !== undefined,
    scopes,

    run(op, inputs, attrs) {
      const xs = inputs.map((x, i) => own(op, x, i));
      const specs = op.shapes(xs, attrs);
      const given = xs.filter((x) => x.given);
      const reason = refusal(op, xs, attrs);
      const kernel = backend.kernels[op.name];
      let results: readonly Tensor[];
      if (kernel?.view && reason === undefined) {
        results = [wrap(first(specs), first(xs).storage)];
      } else if (kernel && reason === undefined) {
        const reusing = (spec: Spec, i: number): Spec & { readonly reuse?: H } => {
          const source = xs[op.reuses?.[i] ?? -1];
          const size = sizeOf(spec.shape);
          const fits = source && (kernel.grows ? source.size <= size : source.size === size);
          const free = fits && source.given && source.storage.count === 1;
          return free && source.dtype === spec.dtype ? { ...spec, reuse: source.storage.content } : spec;
        };
        const wanted = given.length > 0 ? specs.map(reusing) : specs;
        const handles = kernel(xs.map(operand), wanted, attrs);
        if (handles.length !== specs.length) {
          throw new Error(
            `kernel ${op.name} of ${backend.name} gave ${handles.length} results, expected ${specs.length}`,
          );
        }
        results = specs.map((spec, i) => {
          const handle = handles[i] as H;
          // A handle that came in as an input makes a view (reshape) or took its storage over (give).
          const shared = xs.find((x) => x.storage.content === handle);
          return wrap(spec, shared ? shared.storage : store(handle));
        });
      } else if (op.fallback) {
        const composite = op.fallback;
        // The composite may use an input several times: giving ends with the whole op, not with its first step.
        for (const x of given) x.given = false;
        results = runScope(scopes, () => composite(xs, attrs)).map((y) =>
          xs.some((x) => x === y) ? wrap(y, (y as Stored<H>).storage) : y,
        );
      } else {
        throw new UnsupportedError(`${op.name}(${xs.map(show).join(", ")}): ${reason}, and it has no fallback`);
      }
      for (const x of given) x.dispose();
      return results;
    },

    tensor(data, shape, dtype = dtypeOf(data)) {
      checkData(data, shape);
      return wrap({ shape: [...shape], dtype }, store(backend.upload(data, { shape, dtype })));
    },

    room(shape, dtype) {
      checkShape(shape);
      const made = backend.room?.({ shape, dtype });
      if (!made) return undefined;
      const tensor = wrap({ shape: [...shape], dtype }, store(made.handle));
      return {
        tensor,
        stays: made.stays,
        bytes() {
          if (!tensor.alive) throw new Error(`room: ${gone(tensor)}`);
          return made.bytes();
        },
      };
    },

    scope: (body) => runScope(scopes, body) as never,

    read(x) {
      const stored = own({ name: "read" }, x, 0);
      if (backend.downloadSync) return backend.downloadSync(operand(stored));
      throw new UnsupportedError(
        `read(${show(x)}): ${backend.name} cannot wait for its results; await x.data() between passes, or use a CPU backend`,
      );
    },

    give(x) {
      const stored = own({ name: "give" }, x, 0);
      const gift = wrap(stored, stored.storage);
      gift.given = true;
      stored.dispose();
      return gift;
    },

    explain(op, inputs, attrs) {
      const reason = refusal(op, inputs, attrs);
      if (reason === undefined) return "kernel";
      return op.fallback ? `fallback: ${reason}` : `unsupported: ${reason}`;
    },

    live: () => live,
  };
  return self;
}

/** A second reference to the same storage, owned by the caller and by no scope. */
export function alias(x: Tensor): Tensor {
  if (!(x instanceof Stored))
    throw new UnsupportedError("a tensor of another copy of @switchyard/core; install one copy");
  if (!x.alive) throw new Error(gone(x));
  return x.another();
}

export function dtypeOf(data: TypedArray): DType {
  if (data instanceof Float32Array || data instanceof Float64Array) return "f32";
  if (data instanceof Int32Array) return "i32";
  if (data instanceof Uint8Array) return "u8";
  if (data instanceof Uint16Array)
    throw new ShapeError("a Uint16Array holds f16 or bf16: say which, tensor(data, shape, dtype)");
  throw new ShapeError(
    "tensor: the data is no typed array; make it one, such as Float32Array.from(values), or Int32Array.from(ids)",
  );
}

function checkShape(shape: readonly number[]): void {
  if (shape.some((d) => !Number.isInteger(d) || d < 0))
    throw new ShapeError(`tensor: shape [${shape.join(", ")}] is not made of counts`);
}

export function checkData(data: TypedArray, shape: readonly number[]): void {
  checkShape(shape);
  if (data.length !== sizeOf(shape)) {
    throw new ShapeError(
      `tensor: shape [${shape.join(", ")}] needs ${sizeOf(shape)} elements, the data has ${data.length}`,
    );
  }
}
