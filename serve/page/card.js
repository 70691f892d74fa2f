/** One picture in the gallery: a placeholder, then its previews, then itself. */

import { element, icon, iconButton } from "./dom.js";
import { fileName } from "./references.js";

/** @import { Grid, Order, Picture } from "./types.js" */

/**
 * @typedef {object} CardActions
 * @property {(card: Card) => void} open
 * @property {(picture: Picture) => void} more
 * @property {(card: Card) => void} remove
 */

export class Card {
  /** @type {Picture | null} */
  picture = null;
  #image = element("img", { alt: "" });
  #tokens = element("span", { class: "tokens" });
  #dropped = false;
  /** Tokens that the preview shows. */
  #shown = 0;
  #press = element("button", { type: "button", class: "picture", disabled: true });

  /**
   * @param {Order} order
   * @param {number} index
   * @param {Grid} grid
   * @param {CardActions} actions
   */
  constructor(order, index, grid, actions) {
    this.grid = grid;
    this.actions = actions;
    this.#press.append(this.#tokens);
    const one = order.classes[index];
    if (!one) throw new RangeError("no such picture");
    this.class = one;
    this.seed = order.seed + index;
    this.settings = order.settings;
    const several = new Set(order.classes).size > 1;
    this.caption = element(
      "p",
      { class: "caption" },
      ...(several ? [element("span", { class: "name" }, one.name)] : []),
      element("span", { class: "seed" }, `seed ${this.seed}`),
    );
    this.root = element("li", { class: "card" }, this.#press, this.caption);
    this.#press.setAttribute("aria-label", `${one.name}, seed ${this.seed}, not drawn yet`);
    this.#press.addEventListener("click", () => actions.open(this));
  }

  focus() {
    this.#press.focus();
  }

  /** Wait to be drawn, again if need be. What is drawn already would become the same. */
  begin() {
    if (this.picture) return;
    this.#image.remove();
    this.#shown = 0;
    this.decided(0);
  }

  /**
   * Mark the tokens that are decided and that the preview does not show yet.
   *
   * @param {number} tokens
   */
  decided(tokens) {
    const { columns, rows } = this.grid;
    /** @type {(column: number, row: number) => string} */
    const corner = (column, row) => `${(100 * column) / columns}% ${(100 * row) / rows}%`;
    const [row, column] = [Math.floor(this.#shown / columns), this.#shown % columns];
    const end = Math.min(Math.max(tokens, this.#shown), columns * rows);
    const [lastRow, lastColumn] = [Math.floor(end / columns), end % columns];
    const corners = [
      corner(column, row),
      corner(columns, row),
      corner(columns, lastRow),
      corner(lastColumn, lastRow),
      corner(lastColumn, lastRow + 1),
      corner(0, lastRow + 1),
      corner(0, row + 1),
      corner(column, row + 1),
    ];
    this.#tokens.style.clipPath = `polygon(${corners.join(",")})`;
  }

  /**
   * @param {string} source
   * @param {number} tokens That it shows.
   */
  preview(source, tokens) {
    if (this.picture) return;
    this.#show(source);
    this.#shown = tokens;
    this.decided(tokens);
  }

  /** @param {string} source */
  #show(source) {
    this.#image.src = source;
    if (!this.#image.isConnected) this.#press.prepend(this.#image);
  }

  /** @param {Blob} file */
  finish(file) {
    if (this.picture || this.#dropped) return;
    const picture = {
      class: this.class,
      seed: this.seed,
      settings: this.settings,
      file,
      url: URL.createObjectURL(file),
    };
    this.picture = picture;
    this.#show(picture.url);
    this.#tokens.remove();
    this.#press.disabled = false;
    this.#press.setAttribute("aria-label", `${this.class.name}, seed ${this.seed}: details`);
    const about = `${this.class.name}, seed ${this.seed}`;
    const download = element(
      "a",
      {
        class: "icon",
        href: picture.url,
        download: fileName(picture),
        "aria-label": `Download ${about}`,
        title: "Download",
      },
      icon("download"),
    );
    this.caption.after(
      element(
        "div",
        { class: "quick" },
        download,
        iconButton("more", `More like ${about}`, () => this.actions.more(picture)),
        iconButton("remove", `Remove ${about}`, () => this.actions.remove(this)),
      ),
    );
    this.root.classList.add("done");
  }

  /** Take it off the page and give its memory back. */
  drop() {
    this.#dropped = true;
    this.root.remove();
    this.#image.removeAttribute("src");
    if (this.picture) URL.revokeObjectURL(this.picture.url);
  }
}
