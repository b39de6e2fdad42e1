// What this adapter uses of a TensorFlow.js namespace, by structure: @tensorflow/tfjs-core, tfjs, tfjs-node and tfjs-node-gpu
// all fit, and our types need none of theirs.

export type TfDType = "float32" | "int32" | "bool";
export type TfValues = Float32Array | Int32Array | Uint8Array | string[];

/** A tensor of TensorFlow.js. */
export interface TfTensor {
  readonly shape: number[];
  /** "float32", "int32", "bool", "complex64" or "string". */
  readonly dtype: string;
  readonly size: number;
  /** The storage: views made by `reshape` and `clone` share it. */
  readonly dataId: object;
  readonly isDisposed: boolean;
  dispose(): void;
  data(): Promise<TfValues>;
  dataSync(): TfValues;
}

type Num = TfTensor | number;

/**
 * A TensorFlow.js namespace (version 4), as it is handed in: the functions that the adapter calls must be there and give what it
 * expects. What they take is left open, because theirs is written in classes that only their own types can name.
 */
export type TfNamespace = { readonly [F in keyof TfCore]: (...args: never[]) => ReturnType<TfCore[F]> };

/** The same functions with their parameters, for the kernels. */
export interface TfCore {
  // The running library
  ready(): Promise<void>;
  getBackend(): string;
  setBackend(name: string): Promise<boolean>;
  /** The backend object; its device or context is looked at for failures. */
  backend(): object;
  env(): { getBool(flag: string): boolean };
  memory(): { readonly numTensors: number; readonly numBytes: number };
  /** What `body` leaves is told by `keep`, so that nothing need be returned. */
  tidy(body: () => void): void;
  keep(x: TfTensor): TfTensor;
  /** Takes (...inputs, save) => { value, gradFunc(dy, saved) }. */
  customGrad(f: object): (...inputs: never[]) => TfTensor;

  // Making and shaping
  tensor(values: Float32Array | Int32Array, shape: number[], dtype: TfDType): TfTensor;
  scalar(value: number, dtype?: TfDType): TfTensor;
  zeros(shape: number[], dtype?: TfDType): TfTensor;
  fill(shape: number[], value: number, dtype?: TfDType): TfTensor;
  range(start: number, stop: number, step?: number, dtype?: "float32" | "int32"): TfTensor;
  cast(x: TfTensor, dtype: TfDType): TfTensor;
  reshape(x: TfTensor, shape: number[]): TfTensor;
  transpose(x: TfTensor, perm?: number[]): TfTensor;
  slice(x: TfTensor, begin: number[], size: number[]): TfTensor;
  concat(xs: TfTensor[], axis: number): TfTensor;
  reverse(x: TfTensor, axis?: number): TfTensor;
  pad(x: TfTensor, paddings: Array<[number, number]>, value?: number): TfTensor;
  broadcastTo(x: TfTensor, shape: number[]): TfTensor;
  gather(x: TfTensor, indices: TfTensor, axis?: number, batchDims?: number): TfTensor;
  scatterND(indices: TfTensor, updates: TfTensor, shape: number[]): TfTensor;

  // Arithmetic
  add(a: Num, b: Num): TfTensor;
  sub(a: Num, b: Num): TfTensor;
  mul(a: Num, b: Num): TfTensor;
  div(a: Num, b: Num): TfTensor;
  maximum(a: Num, b: Num): TfTensor;
  minimum(a: Num, b: Num): TfTensor;
  less(a: Num, b: Num): TfTensor;
  lessEqual(a: Num, b: Num): TfTensor;
  greater(a: Num, b: Num): TfTensor;
  greaterEqual(a: Num, b: Num): TfTensor;
  equal(a: Num, b: Num): TfTensor;
  logicalAnd(a: TfTensor, b: TfTensor): TfTensor;
  where(condition: TfTensor, a: TfTensor, b: TfTensor): TfTensor;
  abs(x: TfTensor): TfTensor;
  neg(x: TfTensor): TfTensor;
  reciprocal(x: TfTensor): TfTensor;
  exp(x: TfTensor): TfTensor;
  log(x: TfTensor): TfTensor;
  sqrt(x: TfTensor): TfTensor;
  rsqrt(x: TfTensor): TfTensor;
  square(x: TfTensor): TfTensor;
  tanh(x: TfTensor): TfTensor;
  erf(x: TfTensor): TfTensor;
  floor(x: TfTensor): TfTensor;
  sigmoid(x: TfTensor): TfTensor;
  isNaN(x: TfTensor): TfTensor;
  clipByValue(x: TfTensor, low: number, high: number): TfTensor;

  // Reductions, products, orders
  sum(x: TfTensor, axis?: number | number[], keepDims?: boolean): TfTensor;
  mean(x: TfTensor, axis?: number | number[], keepDims?: boolean): TfTensor;
  max(x: TfTensor, axis?: number | number[], keepDims?: boolean): TfTensor;
  cumsum(x: TfTensor, axis?: number, exclusive?: boolean, reverse?: boolean): TfTensor;
  matMul(a: TfTensor, b: TfTensor, transposeA?: boolean, transposeB?: boolean): TfTensor;
  topk(x: TfTensor, k?: number, sorted?: boolean): { readonly values: TfTensor; readonly indices: TfTensor };
}
