/**
 * From scores to tokens: the sampler's specification, `aim_runtime/sampling.py`, operation by operation.
 * Guidance is float32, all that follows float64.
 */

import { EngineError } from "./errors.js";

/** @import { SamplingOptions } from "./types.js" */

// An ample bound on the relative error of a sum of as many numbers as there are codes, in float64.
const SUM_ERROR = 2 ** -36;

/** @param {SamplingOptions} options */
export function rowsPerImage({ cfg_scale }) {
  return cfg_scale === 0 || cfg_scale === 1 ? 1 : 2;
}

/**
 * The class of every row of an image, the one with the class first.
 *
 * @param {number} classId
 * @param {number} cfgScale
 * @param {number} noClass
 */
export function rowClasses(classId, cfgScale, noClass) {
  if (cfgScale === 1) return [classId];
  return cfgScale === 0 ? [noClass] : [classId, noClass];
}

/**
 * Classifier-free guidance: without + scale * (with - without), each operation rounded to float32.
 *
 * @param {Float32Array} cond
 * @param {Float32Array} uncond
 * @param {number} cfgScale
 */
export function guide(cond, uncond, cfgScale) {
  const scale = Math.fround(cfgScale);
  const guided = new Float32Array(cond.length);
  for (let token = 0; token < guided.length; token++) {
    const without = at(uncond, token);
    const apart = Math.fround(scale * Math.fround(at(cond, token) - without));
    guided[token] = without + apart; // rounded as it is stored
  }
  return guided;
}

/**
 * Draw one token from guided scores.
 *
 * @param {Float32Array} scores
 * @param {number} u
 * @param {SamplingOptions} options
 */
export function sample(scores, u, { temperature, top_k, top_p }) {
  const { best, token } = highest(scores);
  if (!Number.isFinite(best))
    throw new EngineError(
      "backend",
      "The model's scores are not finite; the bundle or the guidance is at fault.",
    );
  if (temperature === 0) return token;
  const values = weights(scores, best, temperature);
  if (top_k > 0 && top_k < scores.length) {
    const least = kthLargest(scores, top_k); // those that tie with it stay
    for (let index = 0; index < values.length; index++)
      if (at(scores, index) < least) values[index] = 0;
  }
  if (top_p < 1) {
    const least = nucleusLimit(values, top_p);
    for (let index = 0; index < values.length; index++)
      if (at(values, index) < least) values[index] = 0;
  }
  // What was dropped adds nothing to the sum, so that no u falls on it.
  const cumulative = cumulated(values);
  return firstAbove(cumulative, u * at(cumulative, cumulative.length - 1));
}

/**
 * What the probabilities are proportional to; 1 for the best.
 *
 * @param {Float32Array} scores
 * @param {number} best
 * @param {number} temperature
 */
function weights(scores, best, temperature) {
  const values = new Float64Array(scores.length);
  for (let index = 0; index < values.length; index++)
    values[index] = Math.exp((at(scores, index) - best) / temperature);
  return values;
}

/**
 * The largest score and its first index; NaN where there is one.
 *
 * @param {Float32Array} scores
 */
function highest(scores) {
  let best = -Infinity;
  let token = 0;
  for (let index = 0; index < scores.length; index++) {
    const score = at(scores, index);
    if (score > best) [best, token] = [score, index];
    else if (Number.isNaN(score)) return { best: NaN, token };
  }
  return { best, token };
}

/**
 * @param {Float32Array} scores
 * @param {number} k
 */
function kthLargest(scores, k) {
  return at(scores.toSorted(), scores.length - k);
}

/**
 * The weight that a token must have for those no likelier to share more than 1 - top_p with it.
 *
 * Tokens below 1 - top_p of the mean share less than that together, even if all were among them: they
 * fall, and only the sum of their weights matters. So few have to be sorted.
 *
 * @param {Float64Array} values
 * @param {number} topP
 */
function nucleusLimit(values, topP) {
  let total = 0;
  for (let index = 0; index < values.length; index++) total += at(values, index);
  const unlikely = ((1 - topP) * total) / values.length / 2; // half, whatever was rounded
  let below = 0;
  const likely = values.filter((value) => {
    if (value < unlikely) below += value;
    return value >= unlikely;
  });
  const found = limitAmong(likely, below, topP);
  // Where the order of a sum could decide, it is that of the definition.
  return found ?? limitAmong(values, 0, topP, 0) ?? NaN;
}

/**
 * The limit among values above which there is `below` in all; null if it is not sure to the last bit.
 *
 * @param {Float64Array} values
 * @param {number} below
 * @param {number} topP
 * @param {number} [error] Of a sum, relative to it.
 */
function limitAmong(values, below, topP, error = SUM_ERROR) {
  const ascending = values.toSorted();
  const share = cumulated(ascending, below);
  const total = at(share, share.length - 1);
  const limit = (1 - topP) * total;
  const first = Math.min(firstAbove(share, limit), share.length - 1);
  const before = first ? at(share, first - 1) : below;
  const near = Math.min(Math.abs(at(share, first) - limit), Math.abs(limit - before));
  return error > 0 && near <= error * total ? null : at(ascending, first);
}

/**
 * @param {Float64Array} values
 * @param {number} [before] The sum at the start.
 */
function cumulated(values, before = 0) {
  let sum = before;
  const sums = new Float64Array(values.length);
  for (let index = 0; index < sums.length; index++) sums[index] = sum += at(values, index);
  return sums;
}

/**
 * The first index whose value is above `limit`, or their number, of ascending ones.
 *
 * @param {Float64Array} ascending
 * @param {number} limit
 */
function firstAbove(ascending, limit) {
  let low = 0;
  let high = ascending.length;
  while (low < high) {
    const middle = (low + high) >>> 1;
    if (at(ascending, middle) > limit) high = middle;
    else low = middle + 1;
  }
  return low;
}

/**
 * An index that is there.
 *
 * @param {Float32Array | Float64Array} array
 * @param {number} index
 */
function at(array, index) {
  return /** @type {number} */ (array[index]);
}
