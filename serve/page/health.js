/** Whether the server is there, told at the top of the page when it is not. */

import { ApiError } from "./api.js";
import { say } from "./dom.js";

/** @import { Api } from "./api.js" */

/** Milliseconds between two looks: while all is well, and while it is not. */
const SELDOM = 15_000;
const OFTEN = 2_000;
const WELCOME = 4_000;

export class Health {
  #timer = 0;
  #well = true;

  /**
   * @param {Api} api
   * @param {HTMLElement} notice
   * @param {() => boolean} busy Whether streams are open, which tell more than asking would.
   * @param {() => void} back Hears that the server is there again.
   */
  constructor(api, notice, busy, back) {
    this.api = api;
    this.notice = notice;
    this.busy = busy;
    this.back = back;
    document.addEventListener("visibilitychange", () => this.look());
    this.#later();
  }

  /** @param {string} sentence */
  trouble(sentence) {
    this.#well = false;
    say(this.notice, sentence);
    this.#later();
  }

  async look() {
    window.clearTimeout(this.#timer);
    if (document.hidden) return;
    if (!this.busy() || !this.#well) await this.#ask();
    this.#later();
  }

  async #ask() {
    try {
      const why = await this.api.notReady();
      if (why) return this.trouble(why);
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      return this.trouble(error.message);
    }
    if (this.#well) return;
    this.#well = true;
    say(this.notice, "The server is back.");
    window.setTimeout(
      () => this.#well && this.notice.textContent === "The server is back." && say(this.notice, ""),
      WELCOME,
    );
    this.back();
  }

  #later() {
    window.clearTimeout(this.#timer);
    this.#timer = window.setTimeout(() => this.look(), this.#well ? SELDOM : OFTEN);
  }
}
