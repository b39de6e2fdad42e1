// Host arrays the suites compute with: a shape and row-major numbers. Nothing here touches an engine.

/** A row-major array on the host: Float64Array stands for f32 values, Int32Array for i32 ids, Uint8Array for codes. */
export interface HostArray {
  readonly shape: readonly number[];
  readonly data: Float64Array | Int32Array | Uint8Array;
}

export const sizeOf = (shape: readonly number[]): number => shape.reduce((product, n) => product * n, 1);

/** Floats, rounded to f32 so that a device and a float64 oracle see the same inputs. */
export function floats(shape: readonly number[], values: ArrayLike<number>): HostArray {
  if (values.length !== sizeOf(shape))
    throw new RangeError(`floats: ${values.length} values for the shape [${shape.join(", ")}]`);
  return { shape, data: Float64Array.from(values, Math.fround) };
}

/** Integers (expert ids, labels, positions). */
export function ints(shape: readonly number[], values: ArrayLike<number>): HostArray {
  if (values.length !== sizeOf(shape))
    throw new RangeError(`ints: ${values.length} values for the shape [${shape.join(", ")}]`);
  return { shape, data: Int32Array.from(values) };
}

/** Bytes (codes of quantised weights). */
export function bytes(shape: readonly number[], values: ArrayLike<number>): HostArray {
  if (values.length !== sizeOf(shape))
    throw new RangeError(`bytes: ${values.length} values for the shape [${shape.join(", ")}]`);
  return { shape, data: Uint8Array.from(values) };
}

/** A small generator (mulberry32) keyed by text: a case draws the same numbers whatever ran before it. */
export function generator(key: string): () => number {
  let state = 0x9e3779b9;
  for (let i = 0; i < key.length; i++) state = Math.imul(state ^ key.charCodeAt(i), 0x85ebca6b) >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

/** Uniform floats in [low, high), f32-exact. */
export function uniform(next: () => number, shape: readonly number[], low = -2, high = 2): HostArray {
  const data = new Float64Array(sizeOf(shape));
  for (let i = 0; i < data.length; i++) data[i] = Math.fround(low + (high - low) * next());
  return { shape, data };
}

/** Uniform integers in [low, high). */
export function integers(next: () => number, shape: readonly number[], low: number, high: number): HostArray {
  const data = new Int32Array(sizeOf(shape));
  for (let i = 0; i < data.length; i++) data[i] = Math.floor(low + (high - low) * next());
  return { shape, data };
}

/** |found - expected| <= absolute + relative * (largest finite magnitude expected). */
export interface Tolerance {
  readonly absolute: number;
  readonly relative: number;
}

export const coordinates = (flat: number, shape: readonly number[]): number[] => {
  const position: number[] = [];
  let rest = flat;
  for (let axis = shape.length - 1; axis >= 0; axis--) {
    const n = shape[axis] ?? 1;
    position.unshift(rest % n);
    rest = Math.floor(rest / n);
  }
  return position;
};

/**
 * Throws an Error that names the worst entry where `found` leaves the tolerance. Integers must be equal; NaN equals NaN
 * and an infinity equals itself only.
 */
export function assertClose(what: string, found: HostArray, expected: HostArray, tolerance: Tolerance): void {
  if (found.shape.length !== expected.shape.length || found.shape.some((n, i) => n !== expected.shape[i]))
    throw new Error(`${what}: shape [${found.shape.join(", ")}], expected [${expected.shape.join(", ")}]`);
  if (found.data.length !== expected.data.length)
    throw new Error(`${what}: ${found.data.length} values, expected ${expected.data.length}`);
  const exact = !(expected.data instanceof Float64Array);
  let scale = 0;
  for (const value of expected.data) if (Number.isFinite(value)) scale = Math.max(scale, Math.abs(value));
  const allowed = exact ? 0 : tolerance.absolute + tolerance.relative * scale;
  let worst = -1;
  let worstError = allowed;
  for (let i = 0; i < expected.data.length; i++) {
    const a = found.data[i] ?? Number.NaN;
    const b = expected.data[i] ?? Number.NaN;
    if (Object.is(a, b) || a === b) continue;
    const error = Number.isFinite(a) && Number.isFinite(b) ? Math.abs(a - b) : Number.POSITIVE_INFINITY;
    if (error > worstError) {
      worst = i;
      worstError = error;
    }
  }
  if (worst >= 0)
    throw new Error(
      `${what}: entry [${coordinates(worst, expected.shape).join(", ")}] is ${found.data[worst]}, expected ` +
        `${expected.data[worst]} (difference ${worstError}, allowed ${allowed})`,
    );
}
