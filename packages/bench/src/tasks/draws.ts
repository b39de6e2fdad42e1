// Numbers drawn from a seed and a name, the same on every machine: what the tasks make their samples of.

export interface Draws {
  /** In [0, 1). */
  uniform(): number;
  /** Mean 0, variance 1. */
  normal(): number;
  /** One of 0..count-1. */
  below(count: number): number;
}

/** Draws for one place: the same seed and name give the same numbers. */
export function draws(seed: number, name: string): Draws {
  let state = (0x9e3779b9 ^ seed) >>> 0;
  for (const letter of name) state = mixed((state ^ (letter.codePointAt(0) ?? 0)) >>> 0);
  const uniform = (): number => {
    state = (state + 0x6d2b79f5) >>> 0;
    return mixed(state) / 2 ** 32;
  };
  return {
    uniform,
    normal: () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform()),
    below: (count) => Math.floor(uniform() * count),
  };
}

/** The finaliser of murmur3: every bit of x moves half of the bits. */
function mixed(x: number): number {
  let h = Math.imul(x ^ (x >>> 16), 0x85ebca6b);
  h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35);
  return (h ^ (h >>> 16)) >>> 0;
}
