/**
 * JSON as strict as the Python runtime reads it: no key twice in one object, whole numbers apart from
 * others. `JSON.parse` tells neither.
 */

import { shown } from "./quoting.js";

/** A number as it was written. */
export class JsonNumber {
  /** @param {string} text */
  constructor(text) {
    this.text = text;
    this.value = Number(text);
    this.whole = !/[.eE]/.test(text);
  }
}

/**
 * @typedef {null | boolean | string | JsonNumber | JsonValue[] | { [key: string]: JsonValue }} JsonValue
 */

const DEEPEST = 500;
// Python converts no longer ones.
const MOST_DIGITS = 4300;
const SPACE = /[ \t\n\r]*/y;
const NUMBER = /-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?/y;
const CONSTANT = /true|false|null|NaN|-?Infinity/y;

/** What is wrong with a text, to stand behind its name. */
export class JsonFault extends Error {}

/**
 * Objects have no prototype, so that any key is only a key.
 *
 * @param {string} text
 * @returns {JsonValue}
 */
export function parseJson(text) {
  const reader = new Reader(text);
  const value = reader.value(0);
  reader.space();
  if (reader.at < text.length) throw reader.invalid("something stands behind its end");
  return value;
}

class Reader {
  at = 0;

  /** @param {string} text */
  constructor(text) {
    this.text = text;
  }

  /** @param {string} reason */
  invalid(reason) {
    return new JsonFault(`is not valid JSON: ${reason} (character ${this.at})`);
  }

  space() {
    this.#match(SPACE);
  }

  /**
   * @param {number} depth
   * @returns {JsonValue}
   */
  value(depth) {
    if (depth > DEEPEST) throw new JsonFault("is not valid JSON: it is nested too deeply");
    this.space();
    const next = this.text[this.at];
    if (next === "{") return this.#object(depth);
    if (next === "[") return this.#array(depth);
    if (next === '"') return this.#string();
    const constant = this.#match(CONSTANT);
    if (constant === "null") return null;
    if (constant === "true" || constant === "false") return constant === "true";
    if (constant) throw new JsonFault(`holds ${constant}; numbers must be finite`);
    const number = this.#match(NUMBER);
    if (!number) throw this.invalid("a value is missing");
    if (number.length > MOST_DIGITS) throw this.invalid("a number has too many digits");
    return new JsonNumber(number);
  }

  /** @param {number} depth */
  #object(depth) {
    /** @type {{ [key: string]: JsonValue }} */
    const found = Object.create(null);
    this.at++;
    this.space();
    if (this.#next("}")) return found;
    do {
      this.space();
      if (this.text[this.at] !== '"') throw this.invalid("a key is missing");
      const key = this.#string();
      this.space();
      if (!this.#next(":")) throw this.invalid('":" is missing');
      if (key in found) throw new JsonFault(`holds the key ${shown(key)} twice in one object`);
      found[key] = this.value(depth + 1);
      this.space();
    } while (this.#next(","));
    if (!this.#next("}")) throw this.invalid('"," or "}" is missing');
    return found;
  }

  /** @param {number} depth */
  #array(depth) {
    /** @type {JsonValue[]} */
    const found = [];
    this.at++;
    this.space();
    if (this.#next("]")) return found;
    do {
      found.push(this.value(depth + 1));
      this.space();
    } while (this.#next(","));
    if (!this.#next("]")) throw this.invalid('"," or "]" is missing');
    return found;
  }

  #string() {
    let end = this.at;
    do {
      end = this.text.indexOf('"', end + 1);
      if (end < 0) throw this.invalid("a text does not end");
    } while (this.#escaped(end));
    const literal = this.text.slice(this.at, end + 1);
    try {
      /** @type {string} */
      const found = JSON.parse(literal);
      this.at = end + 1;
      return found;
    } catch {
      throw this.invalid("a text holds what must be escaped");
    }
  }

  /** @param {number} at Of a quotation mark. */
  #escaped(at) {
    let before = at;
    while (this.text[before - 1] === "\\") before--;
    return (at - before) % 2 === 1;
  }

  /** @param {string} letter */
  #next(letter) {
    const there = this.text[this.at] === letter;
    if (there) this.at++;
    return there;
  }

  /** @param {RegExp} pattern A sticky one. */
  #match(pattern) {
    pattern.lastIndex = this.at;
    const found = pattern.exec(this.text)?.[0] ?? "";
    this.at += found.length;
    return found;
  }
}
