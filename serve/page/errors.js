/** Why pictures could not be drawn. The message is a sentence for people. */
export class DrawingError extends Error {
  /**
   * @param {string} message
   * @param {object} [about]
   * @param {number} [about.wait] Seconds after which the same will be worth another try by itself.
   * @param {boolean} [about.general] Whether any other order would have failed the same way.
   */
  constructor(message, { wait = 0, general = false } = {}) {
    super(message);
    this.wait = wait;
    this.general = general;
  }
}
