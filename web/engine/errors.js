/** What goes wrong, as one sentence for people and a code for the page. */

/** @import { ErrorCode } from "./types.js" */

export class EngineError extends Error {
  /**
   * @param {ErrorCode} code
   * @param {string} message
   * @param {string} [file] The file of the bundle that is at fault.
   */
  constructor(code, message, file) {
    super(message);
    this.code = code;
    this.file = file;
  }
}

const OUT_OF_MEMORY =
  /bad_alloc|out of memory|allocation fail|failed to allocate|enlarge memory|could not allocate|\bOOM\b/i;

/**
 * What somebody else's code threw, as an EngineError.
 *
 * @param {unknown} error
 * @param {ErrorCode} code If it is not a lack of memory.
 * @param {string} what That did not work, "the model's step cannot be loaded".
 */
export function wrapped(error, code, what) {
  if (error instanceof EngineError) return error;
  // WebAssembly of C++ throws the address of an exception, of which memory is the likeliest.
  const said = error instanceof Error ? error.message : String(error);
  if (typeof error === "number" || OUT_OF_MEMORY.test(said))
    return new EngineError(
      "memory",
      "There is too little memory for this model; close other tabs, or draw fewer pictures at a time.",
    );
  return new EngineError(code, `${what} (${firstLine(said)})`);
}

/** @param {string} text */
function firstLine(text) {
  const line = (text.trim().split(/[\r\n\u2028\u2029]/)[0] ?? "").replace(/\p{C}/gu, "?");
  return line.length > 160 ? `${line.slice(0, 157)}...` : line;
}
