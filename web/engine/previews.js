/** Pictures on their way, gray where nothing is decided, without taking the time that steps need. */

import { tokenSide } from "./parts.js";

/** @import { ModelCard } from "./types.js" */

// After a preview none is decoded for so many times what it took: steps keep two thirds of the time.
const REST = 2;
// At a time so many images as take about so long; where decoding is slow, one after another.
const LONGEST_MS = 500;

const GRAY = 128;

/** When to decode which images of those that are drawn together. */
export class PreviewPace {
  #freeAt = 0;
  #pictureMs = LONGEST_MS;
  #next = 0;

  /**
   * @param {number} every Steps; 0 for never.
   * @param {number} images
   */
  constructor(every, images) {
    this.every = every;
    this.images = images;
  }

  /**
   * The images to show now that so many tokens are drawn: by turns, none if it is not time.
   *
   * @param {number} step
   */
  due(step) {
    if (!this.every || step % this.every || performance.now() < this.#freeAt) return [];
    const most = Math.max(1, Math.floor(LONGEST_MS / this.#pictureMs));
    const count = Math.min(most, this.images);
    const first = this.#next;
    this.#next = (first + count) % this.images;
    return Array.from({ length: count }, (_, index) => (first + index) % this.images);
  }

  /**
   * So many images took so long.
   *
   * @param {number} count
   * @param {number} ms
   */
  took(count, ms) {
    this.#freeAt = performance.now() + REST * ms;
    this.#pictureMs = ms / count;
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
