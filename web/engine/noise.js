/** Uniform numbers of (seed, step), from Philox4x32-10: `aim_runtime/noise.py`. */

const ROUNDS = 10;

/**
 * The number u in (0, 1) of a seed and a step.
 *
 * @param {bigint} seed From 0 to 2^64 - 1.
 * @param {number} step
 */
export function uniform(seed, step) {
  let k0 = Number(seed & 0xffffffffn);
  let k1 = Number(seed >> 32n);
  let [c0, c1, c2, c3] = [step, 0, 0, 0];
  for (let round = 0; round < ROUNDS; round++) {
    const left = 0xd2511f53;
    const right = 0xcd9e8d57;
    [c0, c1, c2, c3] = [
      (high(c2, right) ^ c1 ^ k0) >>> 0,
      Math.imul(c2, right) >>> 0,
      (high(c0, left) ^ c3 ^ k1) >>> 0,
      Math.imul(c0, left) >>> 0,
    ];
    k0 = (k0 + 0x9e3779b9) >>> 0;
    k1 = (k1 + 0xbb67ae85) >>> 0;
  }
  return (c0 + 0.5) / 2 ** 32;
}

/**
 * The upper 32 of the 64 bits of a product of two whole numbers below 2^32.
 *
 * @param {number} a
 * @param {number} b
 */
function high(a, b) {
  const aLow = a & 0xffff;
  const aHigh = a >>> 16;
  const bLow = b & 0xffff;
  const bHigh = b >>> 16;
  const middle = aHigh * bLow + Math.floor((aLow * bLow) / 2 ** 16); // below 2^33: exact
  const carry = aLow * bHigh + (middle % 2 ** 16);
  return aHigh * bHigh + Math.floor(middle / 2 ** 16) + Math.floor(carry / 2 ** 16);
}
