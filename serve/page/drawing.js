/** One order on its way: from the press of the button to pictures, or to a sentence why not. */

import { DrawingError } from "./errors.js";

/** @import { Group } from "./group.js" */
/** @import { Turns } from "./turns.js" */
/** @import { DrawOrder, Source } from "./types.js" */

export class Drawing {
  #abort = new AbortController();

  /**
   * @param {Source} source
   * @param {DrawOrder} order
   * @param {Turns} turns
   */
  constructor(source, order, turns) {
    this.source = source;
    this.order = order;
    this.turns = turns;
  }

  cancel() {
    this.#abort.abort();
  }

  /**
   * Draw into the group. Never throws: the group says how it ended.
   *
   * @param {Group} group
   * @returns {Promise<void>}
   */
  async into(group) {
    this.#abort.abort();
    const { signal } = (this.#abort = new AbortController());
    let wait = 0;
    do {
      wait = 0;
      group.begin();
      try {
        await this.#once(group, signal);
      } catch (error) {
        if (signal.aborted) group.fail("Cancelled.", "Draw it after all");
        else if (!(error instanceof DrawingError)) throw error;
        else if (error.wait) wait = error.wait;
        else {
          group.fail(error.message, "Try again");
          if (error.general) this.source.trouble(error.message);
        }
      }
    } while (wait && (await countdown(group, wait, signal)));
  }

  /**
   * @param {Group} group
   * @param {AbortSignal} signal
   */
  async #once(group, signal) {
    const giveBack = await this.turns.take(signal);
    try {
      for await (const event of this.source.draw(this.order, signal)) {
        if (event.type === "progress") group.progress(event);
        else if (event.type === "preview") group.preview(event.index, event.source, event.tokens);
        else if (event.type === "picture") group.picture(event.index, event.file);
        else group.finish();
      }
    } finally {
      giveBack();
    }
  }
}

/**
 * Say when the queue will be free, until it is. False when another try was asked for meanwhile.
 *
 * @param {Group} group
 * @param {number} seconds
 * @param {AbortSignal} signal
 */
async function countdown(group, seconds, signal) {
  const say = (/** @type {number} */ left) => `The queue is full. Trying again in ${left} s.`;
  const tell = group.fail(say(seconds), "Try now");
  for (let left = seconds; left > 0 && !signal.aborted; left--) {
    tell(say(left));
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
  return !signal.aborted;
}
