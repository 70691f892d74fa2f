/** The pictures of one press of the button, and how far they are. */

import { Card } from "./card.js";
import { announce, counted, element, iconButton } from "./dom.js";

/** @import { CardActions } from "./card.js" */
/** @import { Drawn, Grid, Order, Settings } from "./types.js" */

/**
 * @typedef {object} GroupActions
 * @property {() => void} cancel
 * @property {() => void} retry Draw the very same.
 * @property {() => void} again Draw the same with other seeds.
 * @property {() => void} remove
 *
 * @typedef {{ done: number, total: number, of?: Drawn }} Progress Tokens of all pictures together.
 */

/** Milliseconds between two looks at how far it is: each repaints the page, and tokens come faster. */
const TICK = 100;

export class Group {
  /** The cards by their place in the order; `cards` are those that are still there. */
  #ordered;
  #state = element("p", { class: "state" });
  #time = element("span", { class: "time" });
  #bar = element("progress", { max: 1 });
  #buttons = element("div", { class: "buttons" });
  #message = element("div", { class: "message", hidden: true });
  #pictures = element("ul", { class: "pictures" });
  #started = 0;
  #ticking = 0;
  /** What there is to show at the next tick. @type {Progress | null} */
  #progress = null;

  /**
   * @param {Order} order
   * @param {Grid} grid
   * @param {Partial<Settings>} unusual The settings worth a word.
   * @param {GroupActions} actions
   * @param {CardActions} cardActions
   */
  constructor(order, grid, unusual, actions, cardActions) {
    this.actions = actions;
    this.title = titleOf(order);
    this.count = order.classes.length;
    this.cards = order.classes.map((_, index) => new Card(order, index, grid, cardActions));
    this.#ordered = [...this.cards];
    this.#pictures.append(...this.cards.map(({ root }) => root));
    this.#bar.setAttribute("aria-label", `Progress of ${this.title}`);
    const heading = element(
      "div",
      { class: "heading" },
      element("h2", { title: this.title }, this.title),
      this.#state,
    );
    const words = Object.entries(unusual).map(
      ([name, value]) => `${name.replace("cfg_scale", "guidance").replace("_", "-")} ${value}`,
    );
    if (words.length) heading.append(element("p", { class: "hint" }, words.join(" · ")));
    this.root = element(
      "article",
      { class: "group", "aria-label": `${this.title}, ${counted(this.count, "picture")}` },
      element("header", {}, heading, this.#buttons),
      this.#bar,
      this.#message,
      this.#pictures,
    );
    this.root.style.setProperty("--count", String(this.count));
  }

  /** It is about to be asked for. */
  begin() {
    this.#enter("waiting", "Waiting");
    this.#bar.removeAttribute("value");
    this.#buttons.replaceChildren(iconButton("close", `Cancel ${this.title}`, this.actions.cancel));
    for (const card of this.cards) card.begin();
    this.#started = performance.now();
    this.#progress = null;
    this.#tick();
    this.#state.append(" · ", this.#time);
    this.#ticking = window.setInterval(() => this.#tick(), TICK);
    announce(`Drawing ${counted(this.count, "picture")} of ${this.title}.`);
  }

  /** @param {Progress} news */
  progress(news) {
    if (news.done) this.#progress = news;
  }

  #tick() {
    this.#time.textContent = duration(performance.now() - this.#started);
    if (!this.#progress) return;
    const { done, total, of } = this.#progress;
    this.#progress = null;
    if (this.#state.firstChild) this.#state.firstChild.textContent = "Drawing";
    this.root.dataset["state"] = "drawing";
    this.#bar.max = total;
    this.#bar.value = done;
    // What is done of all images together; they draw side by side, and decoding comes last.
    const { first, count, tokens } = of ?? { first: 0, count: this.count, tokens: done / this.count };
    for (const card of this.#ordered.slice(first, first + count)) card.decided(Math.floor(tokens));
  }

  /**
   * @param {number} index
   * @param {string} source
   * @param {number} tokens
   */
  preview(index, source, tokens) {
    this.#ordered[index]?.preview(source, tokens);
  }

  /**
   * @param {number} index
   * @param {Blob} file
   */
  picture(index, file) {
    this.#ordered[index]?.finish(file);
  }

  /** All pictures are there. */
  finish() {
    this.#enter("done", duration(performance.now() - this.#started));
    this.#buttons.append(
      iconButton("more", `More like ${this.title}`, this.actions.again),
      iconButton(
        "remove",
        `Remove ${counted(this.count, "picture")} of ${this.title}`,
        this.actions.remove,
      ),
    );
    announce(`${counted(this.count, "picture")} of ${this.title} done.`);
  }

  /**
   * It ended, or waits, without pictures.
   *
   * @param {string} sentence
   * @param {string} retry What the button says that tries again.
   * @returns {(sentence: string) => void} Says something else.
   */
  fail(sentence, retry) {
    this.#enter("failed", "Not drawn");
    const text = element("p", {}, sentence);
    const button = element("button", { type: "button" }, retry);
    button.addEventListener("click", this.actions.retry);
    this.#message.replaceChildren(text, button);
    this.#message.hidden = false;
    this.#buttons.append(iconButton("close", `Dismiss ${this.title}`, this.actions.remove));
    announce(`${this.title}: ${sentence}`);
    return (other) => (text.textContent = other);
  }

  /** Stop what goes on by itself. */
  stop() {
    window.clearInterval(this.#ticking);
  }

  /**
   * @param {string} state
   * @param {string} text
   */
  #enter(state, text) {
    this.stop();
    this.root.dataset["state"] = state;
    this.root.setAttribute("aria-busy", String(state === "waiting"));
    this.#state.textContent = text;
    this.#message.hidden = true;
    // A button that has the focus and goes would leave it nowhere.
    if (
      this.#buttons.contains(document.activeElement) ||
      this.#message.contains(document.activeElement)
    ) {
      this.root.tabIndex = -1;
      this.root.focus({ preventScroll: true });
    }
    this.#buttons.replaceChildren();
  }
}

/** @param {Order} order */
function titleOf({ classes }) {
  const names = [...new Set(classes.map(({ name }) => name))];
  if (names.length <= 3) return names.join(", ");
  return `${names.slice(0, 2).join(", ")} and ${names.length - 2} more`;
}

/**
 * @param {number} ms
 */
export function duration(ms) {
  const seconds = ms / 1000;
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  return `${Math.floor(seconds / 60)} min ${Math.floor(seconds % 60)} s`;
}
