/** Who may draw now. */

export class Turns {
  /** @type {(() => void)[]} */
  #waiting = [];
  active = 0;

  /** @param {number} most At a time. */
  constructor(most) {
    this.most = most;
  }

  /**
   * Resolves to what gives the turn back. Turns come in order; an aborted wait throws.
   *
   * @param {AbortSignal} signal
   * @returns {Promise<() => void>}
   */
  async take(signal) {
    if (this.active < this.most) this.active++;
    else await this.#handedOver(signal);
    return () => {
      const next = this.#waiting.shift();
      if (next) next();
      else this.active--;
    };
  }

  /**
   * @param {AbortSignal} signal
   * @returns {Promise<void>}
   */
  #handedOver(signal) {
    return new Promise((resolve, reject) => {
      const turn = () => {
        signal.removeEventListener("abort", leave);
        resolve();
      };
      const leave = () => {
        this.#waiting = this.#waiting.filter((other) => other !== turn);
        reject(signal.reason);
      };
      signal.addEventListener("abort", leave, { once: true });
      this.#waiting.push(turn);
    });
  }
}
