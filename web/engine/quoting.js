/** Values of strangers in our sentences: short, printable, on one line, as the Python runtime has them. */

const SHOWN = 60;

/**
 * A text in quotes, with what does not print escaped, its middle left out where it is long.
 *
 * @param {string} text
 */
export function shown(text) {
  const letters = [...text];
  let line = quoted(letters.slice(0, SHOWN));
  if ([...line].length > SHOWN) {
    const head = Math.floor((SHOWN - 3) / 2);
    const tail = SHOWN - 3 - head;
    const ends = [...quoted([...letters.slice(0, head), ...letters.slice(-tail)])];
    line = [...ends.slice(0, head), "...", ...ends.slice(-tail)].join("");
  }
  return shortened(line, SHOWN);
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
