/** Take values out of a stranger's JSON, each checked, or say in one sentence what is wrong. */

import { EngineError } from "./errors.js";
import { shortened, shown, shownNumber } from "./quoting.js";
import { JsonFault, JsonNumber, parseJson } from "./strict_json.js";

/** @import { JsonValue } from "./strict_json.js" */

/**
 * Checks of values of one document, which messages call `subject` ("the manifest"). Every method takes
 * a value, where in the document it stands, and what it may be.
 */
export class CheckedJson {
  /** @param {string} subject */
  constructor(subject) {
    this.subject = subject;
  }

  /** @param {string} says */
  error(says) {
    return new EngineError("bundle", `${this.subject}${says}`);
  }

  /**
   * @param {string} text
   * @param {number} limit
   * @returns {JsonValue}
   */
  parse(text, limit) {
    if (text.length > limit)
      throw this.error(` has ${text.length} characters; at most ${limit} are read`);
    try {
      return parseJson(text);
    } catch (fault) {
      if (fault instanceof JsonFault) throw this.error(` ${fault.message}`);
      throw fault;
    }
  }

  /**
   * @param {string} where
   * @param {JsonValue | undefined} value
   * @param {string} allowed
   */
  wrong(where, value, allowed) {
    return this.error(`'s ${shortened(where, 80)} is ${described(value)}; it must be ${allowed}`);
  }

  /**
   * An object with exactly these keys.
   *
   * @template {string} Key
   * @param {JsonValue | undefined} value
   * @param {string} where
   * @param {readonly Key[]} keys
   * @returns {Record<Key, JsonValue>}
   */
  fields(value, where, keys) {
    const found = this.object(value, where, "an object");
    const missing = keys.find((key) => !(key in found));
    if (missing) throw this.error(`'s ${where} lacks the key '${missing}'`);
    const unknown = Object.keys(found).find((key) => !keys.some((one) => one === key));
    if (unknown !== undefined)
      throw this.error(
        `'s ${where} has the unknown key ${shown(unknown)}; it may have ${keys.join(", ")}`,
      );
    return /** @type {Record<Key, JsonValue>} */ (found);
  }

  /**
   * @param {JsonValue | undefined} value
   * @param {string} where
   * @param {string} allowed
   * @returns {Record<string, JsonValue>}
   */
  object(value, where, allowed) {
    if (!isObject(value)) throw this.wrong(where, value, allowed);
    return value;
  }

  /**
   * A list of `low` to `high` items.
   *
   * @param {JsonValue | undefined} value
   * @param {string} where
   * @param {number} low
   * @param {number} high
   */
  items(value, where, low, high) {
    if (!Array.isArray(value) || value.length < low || value.length > high)
      throw this.wrong(where, value, `a list of ${low} to ${high} items`);
    return value;
  }

  /**
   * A whole number from `low` to `high`.
   *
   * @param {JsonValue | undefined} value
   * @param {string} where
   * @param {number} low
   * @param {number} high
   */
  integer(value, where, low, high) {
    if (!(value instanceof JsonNumber && value.whole && value.value >= low && value.value <= high))
      throw this.wrong(where, value, `a whole number from ${low} to ${high}`);
    return value.value;
  }

  /**
   * A number from `low` to `high`.
   *
   * @param {JsonValue | undefined} value
   * @param {string} where
   * @param {number} low
   * @param {number} high
   */
  number(value, where, low, high) {
    if (!(value instanceof JsonNumber && value.value >= low && value.value <= high))
      throw this.wrong(where, value, `a number from ${low} to ${high}`);
    return value.value;
  }

  /**
   * One of the texts `allowed`.
   *
   * @template {string} Choice
   * @param {JsonValue | undefined} value
   * @param {string} where
   * @param {readonly Choice[]} allowed
   * @returns {Choice}
   */
  choice(value, where, allowed) {
    const found = allowed.find((item) => item === value);
    if (found === undefined)
      throw this.wrong(where, value, `one of ${allowed.map((item) => `'${item}'`).join(", ")}`);
    return found;
  }

  /**
   * A text that matches `pattern`, in words `allowed`.
   *
   * @param {JsonValue | undefined} value
   * @param {string} where
   * @param {RegExp} pattern From the first letter to the last.
   * @param {string} allowed
   */
  matching(value, where, pattern, allowed) {
    if (typeof value !== "string" || !pattern.test(value)) throw this.wrong(where, value, allowed);
    return value;
  }
}

/**
 * @param {JsonValue | undefined} value
 * @returns {value is { [key: string]: JsonValue }}
 */
export function isObject(value) {
  return (
    typeof value === "object" &&
    value !== null &&
    !Array.isArray(value) &&
    !(value instanceof JsonNumber)
  );
}

/**
 * As one short line for an error message.
 *
 * @param {JsonValue | undefined} value
 */
function described(value) {
  if (value === undefined || value === null) return "null";
  if (typeof value === "boolean") return String(value);
  if (typeof value === "string") return shown(value);
  if (Array.isArray(value)) return `a list of ${value.length} items`;
  if (isObject(value)) return `an object of ${Object.keys(value).length} keys`;
  if (!Number.isFinite(value.value) && !value.whole) return value.value < 0 ? "-inf" : "inf";
  return shownNumber(value.text);
}
