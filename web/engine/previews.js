/** Pictures on their way, gray where nothing is decided, without much of the time that steps need. */

import { tokenSide } from "./parts.js";

/** @import { ModelCard } from "./types.js" */

// Of the time that steps take, at most so much goes to previews besides.
const SHARE = 1 / 4;
// At a time so many images as take about so long; where decoding is slow, one after another.
const LONGEST_MS = 500;
// What decoding an image is thought to take before one was: browsers run it slowly at first.
const UNKNOWN_MS = 2000;

const GRAY = 128;

/** When to decode which images of those that are drawn together: evenly, as many as there is time for. */
export class PreviewPace {
  /** Of the places where there may be a preview. */
  #last = 0;
  #next = 0;

  /**
   * @param {number} every At least so many steps from one to the next; 0 for none.
   * @param {number} images
   * @param {number} numTokens
   */
  constructor(every, images, numTokens) {
    this.every = every;
    this.images = images;
    this.numTokens = numTokens;
  }

  /**
   * The images to show now that so many tokens are drawn: by turns, none if it is not time.
   *
   * @param {number} step
   * @param {number} steppingMs What these steps took.
   * @param {number | null} pictureMs What decoding an image takes, if that is known.
   */
  due(step, steppingMs, pictureMs) {
    if (!this.every) return [];
    const each = pictureMs ?? UNKNOWN_MS;
    const together = Math.min(this.images, Math.max(1, Math.floor(LONGEST_MS / each)));
    const steps = (steppingMs / step) * this.numTokens;
    const affordable = Math.floor((SHARE * steps) / (together * each));
    const times = Math.min(affordable, Math.ceil(this.numTokens / this.every) - 1);
    const place = Math.floor((step * (times + 1)) / this.numTokens);
    if (place <= this.#last) return [];
    this.#last = place;
    const first = this.#next;
    this.#next = (first + together) % this.images;
    return Array.from({ length: together }, (_, index) => (first + index) % this.images);
  }
}

/**
 * The tokens to decode where only the first `done` are drawn. The last one stands for those that are
 * not: it disturbs its neighbours least.
 *
 * @param {Int32Array} tokens
 * @param {number} done At least 1.
 */
export function filledUp(tokens, done) {
  return tokens.map((token, index) => (index < done ? token : tokens[done - 1] ?? token));
}

/**
 * Paint gray what shows tokens that are not drawn.
 *
 * @param {Uint8ClampedArray} rgba
 * @param {ModelCard} model
 * @param {number} done Tokens that are.
 */
export function grayFrom(rgba, model, done) {
  const side = tokenSide(model);
  const across = model.image_width / side;
  const pixels = new Uint32Array(rgba.buffer);
  const gray = new Uint32Array(Uint8Array.of(GRAY, GRAY, GRAY, 255).buffer)[0] ?? 0;
  for (let token = done; token < model.num_tokens; token++) {
    const left = (token % across) * side;
    const top = Math.floor(token / across) * side;
    for (let y = top; y < top + side; y++) {
      const row = y * model.image_width + left;
      pixels.fill(gray, row, row + side);
    }
  }
}
