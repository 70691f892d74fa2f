/** One picture, large, with what draws it again. */

import { announce, byId, element } from "./dom.js";
import { SETTINGS, commandFor, fileName, linkTo } from "./references.js";

/** @import { Card } from "./card.js" */
/** @import { Gallery } from "./gallery.js" */
/** @import { Names } from "./references.js" */
/** @import { Model, Picture } from "./types.js" */

const LABELS = {
  cfg_scale: "Guidance",
  temperature: "Temperature",
  top_k: "Top-k",
  top_p: "Top-p",
};
const COPIED_FOR = 2000;

export class Details {
  /** @type {Card | null} */
  #card = null;
  #dialog = byId("details", HTMLDialogElement);
  #image = byId("details-image", HTMLImageElement);
  #previous = byId("details-previous", HTMLButtonElement);
  #next = byId("details-next", HTMLButtonElement);
  #link = byId("details-link", HTMLElement);
  #command = byId("details-command", HTMLElement);

  /**
   * @param {Gallery} gallery
   * @param {Model} model
   * @param {Names} names
   * @param {{ more: (picture: Picture) => void, use: (picture: Picture) => void }} actions
   */
  constructor(gallery, model, names, actions) {
    this.gallery = gallery;
    this.model = model;
    this.names = names;
    this.#previous.addEventListener("click", () => this.#step(-1));
    this.#next.addEventListener("click", () => this.#step(1));
    this.#dialog.addEventListener("keydown", ({ key, target }) => {
      if (target instanceof HTMLElement && target.tagName === "CODE") return;
      if (key === "ArrowLeft") this.#step(-1);
      if (key === "ArrowRight") this.#step(1);
    });
    // A press on the backdrop is one on the dialog itself: its content covers all of it.
    this.#dialog.addEventListener(
      "click",
      ({ target }) => target === this.#dialog && this.#dialog.close(),
    );
    this.#dialog.addEventListener("close", () => {
      this.#card?.focus();
      this.#card = null;
      this.#image.removeAttribute("src");
    });
    press("details-close", () => this.#dialog.close());
    press("details-more", () => this.#closeAnd(actions.more));
    press("details-use", () => this.#closeAnd(actions.use));
    press("details-remove", () => this.#remove());
    press("copy-link", (button) => copy(this.#link.textContent ?? "", button));
    press("copy-command", (button) => copy(this.#command.textContent ?? "", button));
  }

  /** @param {Card} card */
  open(card) {
    this.#show(card);
    if (!this.#dialog.open) this.#dialog.showModal();
    this.#dialog.scrollTop = 0;
  }

  /** @param {Card} card */
  #show(card) {
    const { picture } = card;
    if (!picture) return;
    this.#card = card;
    const { aim, id } = this.model;
    const reference = this.names.reference(picture.class);
    byId("details-title", HTMLElement).textContent = picture.class.name;
    this.#image.src = picture.url;
    this.#image.width = aim.width;
    this.#image.height = aim.height;
    this.#image.alt = `${picture.class.name}, seed ${picture.seed}`;
    const facts = [
      ["Seed", picture.seed],
      ...SETTINGS.map((name) => [
        LABELS[name],
        name === "top_k" && !picture.settings.top_k ? "all" : picture.settings[name],
      ]),
      ["Class", picture.class.id],
      ["Model", `${id}, ${aim.width} × ${aim.height}`],
    ];
    byId("details-facts", HTMLElement).replaceChildren(
      ...facts.map(([name, value]) =>
        element("div", {}, element("dt", {}, String(name)), element("dd", {}, String(value))),
      ),
    );
    const download = byId("details-download", HTMLAnchorElement);
    download.href = picture.url;
    download.download = fileName(picture);
    this.#link.textContent = linkTo(picture, reference);
    const command = commandFor(picture, reference, id === "emoji" ? "" : id);
    // Lines break between options, never inside one.
    this.#command.replaceChildren(
      ...command.split(/(?= --)/).map((part) => element("span", {}, part)),
    );
    const { cards } = this.gallery;
    this.#previous.disabled = cards[0] === card;
    this.#next.disabled = cards.at(-1) === card;
  }

  /** @param {number} by */
  #step(by) {
    const { cards } = this.gallery;
    const next = this.#card && cards[cards.indexOf(this.#card) + by];
    if (next) this.#show(next);
  }

  /** @param {(picture: Picture) => void} action */
  #closeAnd(action) {
    const picture = this.#card?.picture;
    this.#dialog.close();
    if (picture) action(picture);
  }

  #remove() {
    const card = this.#card;
    if (!card) return;
    const { cards } = this.gallery;
    const index = cards.indexOf(card);
    const beside = cards[index + 1] ?? cards[index - 1];
    this.gallery.removeCard(card);
    announce("Removed.");
    if (beside) return this.#show(beside);
    this.#card = null;
    this.#dialog.close();
    byId("class-input", HTMLInputElement).focus();
  }
}

/**
 * @param {string} id
 * @param {(button: HTMLButtonElement) => void} action
 */
function press(id, action) {
  const button = byId(id, HTMLButtonElement);
  button.addEventListener("click", () => action(button));
}

/**
 * @param {string} text
 * @param {HTMLButtonElement} button Says for a moment that it is done.
 */
async function copy(text, button) {
  const label = (button.dataset["label"] ??= button.textContent ?? "");
  const done = await intoClipboard(text, button);
  button.textContent = done ? "Copied" : "Select the text and copy it";
  announce(done ? "Copied." : "It could not be copied.");
  setTimeout(() => (button.textContent = label), COPIED_FOR);
}

/**
 * @param {string} text
 * @param {HTMLElement} near
 */
async function intoClipboard(text, near) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Off loopback and without TLS browsers offer the old way only, from a field inside the dialog.
    const field = element("textarea", { class: "unseen", "aria-hidden": "true", tabindex: -1 });
    field.value = text;
    near.after(field);
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    near.focus();
    return done;
  }
}
