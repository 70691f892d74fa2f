/**
 * From scores to tokens: the sampler's specification, `aim_runtime/sampling.py`, operation by operation.
 * Guidance is float32, all that follows float64.
 */

import { EngineError } from "./errors.js";

/** @import { SamplingOptions } from "./types.js" */

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
  return cond.map((score, token) => {
    const without = uncond[token] ?? NaN;
    return without + Math.fround(scale * Math.fround(score - without)); // stored as float32
  });
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
  const least = top_k > 0 && top_k < scores.length ? kthLargest(scores, top_k) : -Infinity;
  const kept = Uint32Array.from(scores.keys()).filter((index) => at(scores, index) >= least);
  let values = Float64Array.from(kept, (index) =>
    Math.exp((at(scores, index) - best) / temperature),
  );
  if (top_p < 1) {
    const enough = nucleusLimit(values, top_p);
    values = values.map((value) => (value >= enough ? value : 0)); // adds nothing: never drawn
  }
  const cumulative = cumulated(values);
  return at(kept, firstAbove(cumulative, u * at(cumulative, cumulative.length - 1)));
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
 * The weight that a token must have for the less likely ones to share more than 1 - top_p with it.
 *
 * @param {Float64Array} values
 * @param {number} topP
 */
function nucleusLimit(values, topP) {
  const ascending = values.toSorted();
  const share = cumulated(ascending);
  const first = firstAbove(share, (1 - topP) * at(share, share.length - 1));
  return at(ascending, Math.min(first, ascending.length - 1));
}

/** @param {Float64Array} values */
function cumulated(values) {
  let sum = 0;
  return values.map((value) => (sum += value));
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
 * @param {Float32Array | Float64Array | Uint32Array} array
 * @param {number} index
 */
function at(array, index) {
  return /** @type {number} */ (array[index]);
}
