/** How far the model has come, above the pictures; and where they are drawn, below its name. */

import { announce, element } from "../../serve/page/dom.js";

/** @import { ReadyNews } from "../engine/types.js" */

/** What takes fewer milliseconds is not worth a word. */
const SOON = 300;

export class Loading {
  #text = element("p");
  #bar = element("progress", { max: 1, "aria-label": "Loading" });
  #again = element("button", { type: "button" }, "Try again");
  #root = element("section", { class: "loading", "aria-label": "The model", hidden: true });
  #where = element("p", { class: "hint where" });
  #timer = 0;
  /** @type {Map<string, { loaded: number, total: number }>} */
  #files = new Map();

  /**
   * @param {number} bytes About how many there are.
   * @param {() => void} retry
   */
  constructor(bytes, retry) {
    this.bytes = bytes;
    this.#again.addEventListener("click", retry);
    this.#root.append(this.#text, this.#again, this.#bar);
    document.querySelector("main")?.prepend(this.#root);
    document.querySelector("header.top")?.append(this.#where);
    this.#say("in this browser");
  }

  /** It will be loaded with the first picture, for somebody who saves data. */
  later() {
    this.#text.textContent = `The first picture loads ${megabytes(this.bytes)}, later ones nothing.`;
    this.#show("later");
  }

  begin() {
    this.#files.clear();
    this.#bar.removeAttribute("value");
    this.#text.textContent = `Loading the model, ${megabytes(this.bytes)}…`;
    this.#timer = window.setTimeout(() => this.#show("loading"), SOON);
  }

  /**
   * @param {string} file
   * @param {number} loaded
   * @param {number} total 0 if it is not known.
   */
  progress(file, loaded, total) {
    this.#files.set(file, { loaded, total });
    const files = [...this.#files.values()];
    const done = files.reduce((sum, one) => sum + one.loaded, 0);
    const all = Math.max(
      this.bytes,
      files.reduce((sum, one) => sum + Math.max(one.loaded, one.total), 0),
    );
    this.#bar.max = all;
    this.#bar.value = done;
    this.#text.textContent =
      done < all
        ? `Loading the model: ${number(done)} of ${megabytes(all)}, once.`
        : "Starting the model…";
  }

  /** @param {ReadyNews} news */
  ready({ backend, threads, note }) {
    window.clearTimeout(this.#timer);
    if (!this.#root.hidden) announce("The model is loaded.");
    this.#root.hidden = true;
    const on = threads === 1 ? "one thread" : `${threads} threads`;
    this.#say(`in this browser, on ${backend === "webgpu" ? "the GPU" : on}`);
    this.#where.title = note;
  }

  /** @param {string} sentence */
  failed(sentence) {
    window.clearTimeout(this.#timer);
    this.#text.textContent = sentence;
    this.#show("failed");
    announce(sentence);
  }

  /** @param {string} place */
  #say(place) {
    this.#where.textContent = `Drawn ${place}. Nothing you ask for leaves this device.`;
  }

  /** @param {"later" | "loading" | "failed"} state */
  #show(state) {
    this.#root.hidden = false;
    this.#root.dataset["state"] = state;
    this.#bar.hidden = state !== "loading";
    this.#again.hidden = state !== "failed";
  }
}

/** @param {number} bytes */
function megabytes(bytes) {
  return `${number(bytes)} MB`;
}

/** @param {number} bytes */
function number(bytes) {
  return (bytes / 1e6).toFixed(1);
}
