// Where an element lies: broadcasting, transposing and slicing are all "walk this shape with these strides".

/** Row-major strides of a dense array. */
export const stridesOf = (shape: readonly number[]): number[] => {
  const strides = new Array<number>(shape.length).fill(1);
  for (let axis = shape.length - 2; axis >= 0; axis--) {
    strides[axis] = (strides[axis + 1] as number) * (shape[axis + 1] as number);
  }
  return strides;
};

/** Strides with which an array of shape `from` is read as if it had the larger shape `to`; 0 where it repeats. */
export const broadcastStrides = (from: readonly number[], to: readonly number[]): number[] => {
  const own = stridesOf(from);
  const missing = to.length - from.length;
  return to.map((_, axis) => (axis < missing || from[axis - missing] === 1 ? 0 : (own[axis - missing] as number)));
};

/** For each element of `shape` in row-major order, its position in the array that `strides` describe. */
export const positions = (shape: readonly number[], strides: readonly number[], start = 0): Int32Array => {
  let at = new Int32Array([start]);
  for (const [axis, size] of shape.entries()) {
    const stride = strides[axis] as number;
    const next = new Int32Array(at.length * size);
    for (let i = 0; i < at.length; i++) {
      for (let j = 0; j < size; j++) next[i * size + j] = (at[i] as number) + j * stride;
    }
    at = next;
  }
  return at;
};
