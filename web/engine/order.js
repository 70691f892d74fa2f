/** What is to be drawn, checked once: `Generator.request` of the Python runtime. */

import { EngineError } from "./errors.js";
import { MAX_CFG_SCALE } from "./parts.js";

/**
 * @import { DrawOrder, Manifest, SamplingOptions } from "./types.js"
 *
 * @typedef {object} CheckedOrder
 * @property {number[]} classes
 * @property {bigint[]} seeds
 * @property {SamplingOptions} options
 * @property {number} every
 */

const MOST_IMAGES = 1024;
const MAX_SEED = 2n ** 64n - 1n;

/**
 * Throws EngineError, which names what is wrong and what it may be.
 *
 * @param {DrawOrder} order
 * @param {Manifest} manifest
 * @returns {CheckedOrder}
 */
export function checkedOrder(order, manifest) {
  const { sampling, model } = manifest;
  const classes = list("classes", order.classes);
  const seeds = list("seeds", order.seeds).map(checkedSeed);
  if (seeds.length !== classes.length)
    throw wrong(`there are ${classes.length} classes and ${seeds.length} seeds; each picture has one`);
  const most = Number.MAX_VALUE;
  const temperature = order.temperature ?? sampling.temperature;
  return {
    classes: classes.map((one) => whole("class", one, 0, model.num_classes - 1)),
    seeds,
    options: {
      cfg_scale: number("guidance", order.guidance ?? sampling.cfg_scale, 0, MAX_CFG_SCALE),
      temperature: number("temperature", temperature, 0, most, "from 0 up"),
      top_k: whole("top_k", order.top_k ?? sampling.top_k, 0, Number.MAX_SAFE_INTEGER),
      top_p: number("top_p", order.top_p ?? sampling.top_p, Number.MIN_VALUE, 1, "above 0, up to 1"),
    },
    every: whole("every", order.every ?? 0, 0, 2 ** 31),
  };
}

/**
 * @template Item
 * @param {string} name
 * @param {Item[]} value
 */
function list(name, value) {
  if (!Array.isArray(value) || value.length < 1 || value.length > MOST_IMAGES)
    throw wrong(`${name} must be a list of 1 to ${MOST_IMAGES}`);
  return value;
}

/** @param {number | string} value */
function checkedSeed(value) {
  const plain = typeof value === "string" ? /^[0-9]{1,20}$/.test(value) : Number.isSafeInteger(value);
  const seed = plain ? BigInt(value) : -1n;
  if (seed < 0n || seed > MAX_SEED)
    throw wrong(
      `a seed is ${shownValue(value)}; it must be a whole number from 0 to ${MAX_SEED}, ` +
        "as text above 2^53 - 1",
    );
  return seed;
}

/**
 * @param {string} name
 * @param {number} value
 * @param {number} low
 * @param {number} high
 */
function whole(name, value, low, high) {
  if (!Number.isInteger(value) || value < low || value > high)
    throw wrong(`${name} is ${shownValue(value)}; it must be a whole number from ${low} to ${high}`);
  return value;
}

/**
 * @param {string} name
 * @param {number} value
 * @param {number} low
 * @param {number} high
 * @param {string} [allowed]
 */
function number(name, value, low, high, allowed = `from ${low} to ${high}`) {
  if (typeof value !== "number" || !(value >= low && value <= high))
    throw wrong(`${name} is ${shownValue(value)}; it must be a number ${allowed}`);
  return value;
}

/** @param {unknown} value */
function shownValue(value) {
  return typeof value === "string" ? `"${value.slice(0, 40)}"` : String(value).slice(0, 40);
}

/** @param {string} message */
function wrong(message) {
  return new EngineError("request", message);
}
