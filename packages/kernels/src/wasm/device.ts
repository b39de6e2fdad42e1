// What kernel tables work with: storage for results and temporaries, and `launch`, which writes a job's arguments and runs a wasm kernel.
import type { DType, Kernel, Operand, Spec } from "@switchyard/core";
import { UnsupportedError } from "@switchyard/core";
import type { Block, Heap } from "./heap.ts";
import { JOB, JOB_WORDS, type Pool } from "./pool.ts";

export type Input = Operand<Block>;
export type Result = Spec & { readonly reuse?: Block };

export interface Device {
  readonly heap: Heap;
  readonly threads: number;
  /** Storage of a result: the one given for reuse, or a new block of `least` bytes or more. Freed again if the kernel throws. */
  result(spec: Result, least?: number): Block;
  /** Storage until the kernel returns. */
  temporary(bytes: number): Block;
  /** A table of 32-bit words, until the kernel returns; gives its address. */
  table(words: ArrayLike<number>): number;
  /** Runs a wasm kernel: `job` are its arguments (floats through `bits`), `cost` the estimated nanoseconds on one thread. */
  launch(kernel: string, job: readonly number[], units: number, cost: number): void;
  /** Wraps the body of a kernel: temporaries end with it. */
  kernel(name: string, body: Body, unsupported?: Refusal): Kernel<Block>;
}
// biome-ignore lint/suspicious/noExplicitAny: kernel tables hold ops of every attribute type
export type Body = (inputs: readonly Input[], results: readonly Result[], attrs: any) => readonly Block[];
// biome-ignore lint/suspicious/noExplicitAny: kernel tables hold ops of every attribute type
export type Refusal = (inputs: readonly Spec[], attrs: any) => string | undefined;

export const elementBytes = (dtype: DType): number => (dtype === "f32" || dtype === "i32" ? 4 : dtype === "u8" ? 1 : 2);
export const sizeOf = (shape: readonly number[]): number => shape.reduce((n, d) => n * d, 1);
export const bytesOf = (spec: Spec): number => sizeOf(spec.shape) * elementBytes(spec.dtype);
export const lastOf = (spec: Spec): number => spec.shape.at(-1) ?? 1;
/** Product of all dimensions but the last. */
export const rowsOf = (spec: Spec): number => sizeOf(spec.shape.slice(0, -1));

const word = new Float32Array(1);
const wordBits = new Int32Array(word.buffer);
/** The bits of a float, as an argument of a job. */
export function bits(x: number): number {
  word[0] = x;
  return wordBits[0] ?? 0;
}

/** list[i] of a list that is known to be long enough. */
export function at<T>(list: readonly T[], i: number): T {
  const item = list[i];
  if (item === undefined) throw new RangeError(`wasm: argument ${i} of ${list.length} is missing`);
  return item;
}

/** Refuses inputs of another dtype than the letters say: f (f32), i (i32), w (f32, bf16 or f16), n (f32 or i32), ? (any). */
export const only =
  (letters: string): Refusal =>
  (inputs) => {
    for (let i = 0; i < inputs.length; i++) {
      const { dtype, format } = inputs[i] as Spec;
      const letter = letters[Math.min(i, letters.length - 1)];
      const fits =
        letter === "?" ||
        (letter === "f" && dtype === "f32") ||
        (letter === "i" && dtype === "i32") ||
        (letter === "n" && (dtype === "f32" || dtype === "i32")) ||
        (letter === "w" && (dtype === "f32" || dtype === "bf16" || dtype === "f16"));
      if (!fits) return `input ${i} is ${dtype}`;
      if (format !== undefined) return `input ${i} has the format ${format}`;
    }
    return undefined;
  };

export function createDevice(heap: Heap, pool: Pool): Device {
  let current = "";
  const temporaries: Block[] = [];
  const results: Block[] = [];

  return {
    heap,
    threads: pool.threads,
    result(spec, least = 0) {
      if (spec.reuse) return spec.reuse;
      const block = heap.alloc(
        Math.max(bytesOf(spec), least),
        () => `the result [${spec.shape.join(", ")}] ${spec.dtype} of ${current}`,
      );
      results.push(block);
      return block;
    },
    temporary(bytes) {
      const block = heap.alloc(bytes, () => `working memory of ${current}`);
      temporaries.push(block);
      return block;
    },
    table(words) {
      const { ptr } = this.temporary(words.length * 4);
      heap.i32().set(words, ptr / 4);
      return ptr;
    },
    launch(kernel, job, units, cost) {
      if (job.length > JOB_WORDS) throw new Error(`wasm: ${kernel} has ${job.length} arguments`);
      const words = heap.i32();
      for (let i = 0; i < job.length; i++) words[JOB / 4 + i] = job[i] as number;
      pool.run(kernel, units, cost);
    },
    kernel(name, body, unsupported) {
      const kernel: Kernel<Block> = (inputs, specs, attrs) => {
        const reason = unsupported?.(inputs, attrs);
        if (reason !== undefined) throw new UnsupportedError(`wasm: ${name}: ${reason}; cast() it first`);
        const outer = current;
        const [firstTemporary, firstResult] = [temporaries.length, results.length];
        current = name;
        try {
          return body(inputs, specs, attrs);
        } catch (error) {
          for (const block of results.slice(firstResult)) heap.free(block);
          throw error;
        } finally {
          while (temporaries.length > firstTemporary) heap.free(temporaries.pop() as Block);
          results.length = firstResult;
          current = outer;
        }
      };
      if (unsupported) kernel.unsupported = unsupported;
      return kernel;
    },
  };
}
