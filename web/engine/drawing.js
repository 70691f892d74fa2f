/** The loop: classes and seeds in, tokens and pictures out, with what there is to see on the way. */

import { breath } from "./breath.js";
import { stateBytesPerRow } from "./manifest.js";
import { uniform } from "./noise.js";
import { PreviewPace, filledUp, grayFrom } from "./previews.js";
import { guide, rowClasses, rowsPerImage, sample } from "./sampling.js";

/**
 * @import { Engine } from "./engine.js"
 * @import { CheckedOrder } from "./order.js"
 * @import { PictureNews, PreviewNews, ProgressNews } from "./types.js"
 *
 * @typedef {Omit<ProgressNews, "id"> | Omit<PreviewNews, "id"> | Omit<PictureNews, "id">} Drawn
 */

// State that is held at a time, old and new. More images than fit are drawn one batch after another.
const STATE_BYTES = 2 ** 28;

/**
 * Draw. Image i depends on the bundle, its class, its seed and the options alone, whatever is drawn
 * with it. Leaving the loop ends the work; between any two tokens other tasks have their turn.
 *
 * @param {Engine} engine
 * @param {CheckedOrder} order
 * @returns {AsyncGenerator<Drawn>}
 */
export async function* draw(engine, order) {
  const rowBytes = 2 * stateBytesPerRow(engine.manifest) * rowsPerImage(order.options);
  const most = Math.max(1, Math.floor(STATE_BYTES / rowBytes));
  for (let first = 0; first < order.classes.length; first += most)
    yield* drawTogether(engine, order, first, Math.min(most, order.classes.length - first));
}

/**
 * @param {Engine} engine
 * @param {CheckedOrder} order
 * @param {number} first
 * @param {number} count
 * @returns {AsyncGenerator<Drawn>}
 */
async function* drawTogether(engine, { classes, seeds, options, every }, first, count) {
  const { model } = engine.manifest;
  const { num_tokens, vocab_size, num_classes } = model;
  const each = rowsPerImage(options);
  const wanted = classes.slice(first, first + count);
  const images = wanted.map(() => new Int32Array(num_tokens));
  const pace = new PreviewPace(every, count, num_tokens);
  const rows = await engine.begin(
    wanted.flatMap((one) => rowClasses(one, options.cfg_scale, num_classes)),
  );
  let stepping = 0; // ms
  let began = performance.now();
  try {
    for (let step = 0; step < num_tokens; step++) {
      const last = images.flatMap((tokens) => Array(each).fill(step ? tokens[step - 1] : 0));
      const logits = await rows.step(last, step);
      images.forEach((tokens, image) => {
        const at = image * each * vocab_size;
        const cond = logits.subarray(at, at + vocab_size);
        const uncond = logits.subarray(at + vocab_size, at + 2 * vocab_size);
        const scores = each === 2 ? guide(cond, uncond, options.cfg_scale) : cond;
        tokens[step] = sample(scores, uniform(seeds[first + image] ?? 0n, step), options);
      });
      const done = step + 1;
      yield { type: "progress", step: done, num_tokens, first, count };
      await breath();
      if (done === num_tokens) break;
      stepping += performance.now() - began;
      const due = pace.due(done, stepping, engine.decodeMs);
      yield* previews(engine, images, due, done, first);
      began = performance.now();
    }
  } finally {
    rows.dispose();
  }
  for (const [image, tokens] of images.entries()) {
    const rgba = await engine.decode(tokens);
    yield { type: "picture", index: first + image, ...pixels(engine, rgba), tokens: [...tokens] };
    await breath();
  }
}

/**
 * @param {Engine} engine
 * @param {Int32Array[]} images
 * @param {number[]} due Which of them.
 * @param {number} step
 * @param {number} first
 * @returns {AsyncGenerator<Drawn>}
 */
async function* previews(engine, images, due, step, first) {
  for (const image of due) {
    const tokens = images[image];
    if (!tokens) continue;
    const rgba = await engine.decode(filledUp(tokens, step));
    grayFrom(rgba, engine.manifest.model, step);
    yield { type: "preview", index: first + image, step, ...pixels(engine, rgba) };
    await breath();
  }
}

/**
 * @param {Engine} engine
 * @param {Uint8ClampedArray<ArrayBuffer>} rgba
 */
function pixels({ manifest }, rgba) {
  const { image_width, image_height } = manifest.model;
  return { width: image_width, height: image_height, rgba: rgba.buffer };
}
