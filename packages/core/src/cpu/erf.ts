// The error function in double precision (absolute error about 2e-16), from its two classical expansions.

/** erf(x) = 2/sqrt(pi) * integral of exp(-t^2) from 0 to x. */
export const erf = (x: number): number => {
  const z = Math.abs(x);
  if (z <= 2) {
    // 2/sqrt(pi) exp(-x^2) sum of x (2x^2)^n / (1 3 5 ... (2n+1)): every term is positive, nothing cancels.
    let term = x;
    let sum = x;
    for (let n = 1; Math.abs(term) > 1e-18 * Math.abs(sum); n++) {
      term *= (2 * x * x) / (2 * n + 1);
      sum += term;
    }
    return (2 / Math.sqrt(Math.PI)) * Math.exp(-x * x) * sum;
  }
  if (Number.isNaN(x)) return x;
  if (z > 6) return Math.sign(x); // 1 - erf(6) is 2e-17
  // erfc by its continued fraction, evaluated from the far end: exp(-x^2) / (sqrt(pi) x (1 + 1/2x^2 / (1 + 2/2x^2 / (1 + ...
  let tail = 0;
  for (let n = 80; n >= 1; n--) tail = n / (2 * z * z) / (1 + tail);
  return Math.sign(x) * (1 - Math.exp(-z * z) / (Math.sqrt(Math.PI) * z * (1 + tail)));
};
