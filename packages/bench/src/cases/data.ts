// Inputs of the benchmark cases, the same for every contender: fixed pseudo-random numbers, no library's generator.

/** `n` numbers, uniform in [-scale, scale); a linear congruential generator (Numerical Recipes' constants). */
export function noise(n: number, seed: number, scale = 1): Float32Array<ArrayBuffer> {
  const values = new Float32Array(n);
  let state = Math.imul(seed, 0x9e3779b1) >>> 0;
  for (let i = 0; i < n; i++) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    values[i] = (state / 2 ** 31 - 1) * scale;
  }
  return values;
}

/** `n` integers in [0, below). */
export function noiseIds(n: number, seed: number, below: number): Int32Array<ArrayBuffer> {
  return Int32Array.from(noise(n, seed), (x) => Math.min(below - 1, Math.floor(((x + 1) / 2) * below)));
}
