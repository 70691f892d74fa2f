/** Values of strangers in our sentences: short, printable, on one line, as the Python runtime has them. */

const SHOWN = 60;
const HEAD = 28;
const TAIL = SHOWN - HEAD - 3;

/**
 * A text in quotes, with what does not print escaped, its middle left out where it is long.
 *
 * @param {string} text
 */
export function shown(text) {
  const letters = [...text];
  const line = quoted(letters.slice(0, SHOWN));
  if ([...line].length <= SHOWN) return line;
  return withoutMiddle(quoted([...letters.slice(0, HEAD), ...letters.slice(-TAIL)]));
}

/**
 * The digits of a number, as many as fit.
 *
 * @param {string} digits
 */
export function shownNumber(digits) {
  return digits.length <= SHOWN ? digits : withoutMiddle(digits);
}

/** @param {string} line */
function withoutMiddle(line) {
  const letters = [...line];
  return [...letters.slice(0, HEAD), "...", ...letters.slice(-TAIL)].join("");
}

/**
 * @param {string} text
 * @param {number} limit
 */
export function shortened(text, limit) {
  const letters = [...text];
  return letters.length <= limit ? text : `${letters.slice(0, limit - 3).join("")}...`;
}

/** @param {string[]} letters */
function quoted(letters) {
  const mark = letters.includes("'") && !letters.includes('"') ? '"' : "'";
  return mark + letters.map((letter) => escaped(letter, mark)).join("") + mark;
}

/** @type {Record<string, string>} */
const ESCAPES = { "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t" };

/**
 * @param {string} letter
 * @param {string} mark
 */
function escaped(letter, mark) {
  if (letter === mark) return `\\${mark}`;
  const escape = ESCAPES[letter];
  if (escape) return escape;
  if (letter === " " || !/[\p{C}\p{Z}]/u.test(letter)) return letter;
  const code = letter.codePointAt(0) ?? 0;
  if (code < 0x100) return `\\x${hex(code, 2)}`;
  return code < 0x10000 ? `\\u${hex(code, 4)}` : `\\U${hex(code, 8)}`;
}

/**
 * @param {number} code
 * @param {number} digits
 */
function hex(code, digits) {
  return code.toString(16).padStart(digits, "0");
}
