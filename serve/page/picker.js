/** The field that classes are picked in: an editable combobox with a list that takes several. */

import { byId, element, icon, say, shortened } from "./dom.js";
import { folded } from "./references.js";

/** @import { Names } from "./references.js" */
/** @import { PictureClass } from "./types.js" */

/** More options make a slow page and a list that nobody reads to its end. */
const MOST_OPTIONS = 200;

export class Picker {
  /** @type {PictureClass[]} */
  chosen = [];
  /** @type {PictureClass[]} */
  #shown = [];
  /** Index of the option that Enter takes; -1 for none. */
  #active = -1;
  #open = false;
  #box = byId("combobox", HTMLElement);
  #input = byId("class-input", HTMLInputElement);
  #toggle = byId("class-toggle", HTMLButtonElement);
  #popup = byId("class-popup", HTMLElement);
  #list = byId("class-list", HTMLElement);
  #chips = byId("chips", HTMLElement);
  #error = byId("class-error", HTMLElement);

  /**
   * @param {Names} names
   * @param {number} most Classes that may be chosen.
   * @param {() => void} changed
   */
  constructor(names, most, changed) {
    this.names = names;
    this.most = most;
    this.changed = changed;
    const input = this.#input;
    input.addEventListener("keydown", (event) => this.#key(event));
    input.addEventListener("input", () => {
      say(this.#error, "");
      this.#show(input.value.trim() ? 0 : -1);
    });
    input.addEventListener("click", () => this.#show(this.#active));
    this.#toggle.addEventListener("click", () => {
      if (this.#open) this.close();
      else this.#show(-1);
      input.focus();
    });
    // Pressing in the list must not take the focus from the field.
    this.#popup.addEventListener("pointerdown", (event) => {
      if (event.pointerType === "mouse") event.preventDefault();
    });
    this.#list.addEventListener("click", (event) => {
      const option = event.target instanceof Element && event.target.closest("[role=option]");
      const pressed = option && this.#shown[[...this.#list.children].indexOf(option)];
      if (pressed) this.#take(pressed);
    });
    document.addEventListener("pointerdown", (event) => {
      if (event.target instanceof Node && !this.#box.contains(event.target)) this.close();
    });
    this.#box.addEventListener("focusout", (event) => {
      if (event.relatedTarget instanceof Node && !this.#box.contains(event.relatedTarget))
        this.close();
    });
  }

  /** Whether there is text that has not become a choice; says so if there is. */
  unfinished() {
    const text = this.#input.value.trim();
    if (!text) return false;
    const found = this.names.find(text);
    if (found) {
      this.#take(found);
      return false;
    }
    this.refuse(`This model has no class “${shortened(text)}”.`);
    return true;
  }

  /** @param {string} sentence */
  refuse(sentence) {
    say(this.#error, sentence);
    this.#input.focus();
  }

  /** @param {PictureClass[]} classes */
  choose(classes) {
    this.chosen = classes.slice(0, this.most);
    this.#input.value = "";
    say(this.#error, "");
    this.close();
    this.#drawChips();
    this.changed();
  }

  close() {
    this.#open = false;
    this.#active = -1;
    this.#popup.hidden = true;
    this.#input.setAttribute("aria-expanded", "false");
    this.#toggle.setAttribute("aria-expanded", "false");
    this.#input.removeAttribute("aria-activedescendant");
  }

  /** @param {PictureClass} one */
  #take(one) {
    const without = this.chosen.filter(({ id }) => id !== one.id);
    const added = without.length === this.chosen.length;
    if (added && without.length >= this.most) {
      this.close();
      this.refuse(`At most ${this.most} classes at a time.`);
      return;
    }
    this.choose(added ? [...without, one] : without);
  }

  /** @param {KeyboardEvent} event */
  #key(event) {
    if (event.isComposing) return;
    const { key } = event;
    const active = this.#shown[this.#active];
    if (key === "ArrowDown" || key === "ArrowUp") {
      event.preventDefault();
      if (this.#open && !event.altKey) this.#move(key === "ArrowDown" ? 1 : -1);
      else if (key === "ArrowUp" && event.altKey) this.close();
      else this.#show(event.altKey ? -1 : key === "ArrowDown" ? 0 : Infinity);
    } else if ((key === "PageDown" || key === "PageUp") && this.#open) {
      event.preventDefault();
      this.#activate(
        Math.min(Math.max(this.#active + (key === "PageDown" ? 8 : -8), 0), this.#shown.length - 1),
      );
    } else if (key === "Enter" && this.#open && active) {
      event.preventDefault();
      this.#take(active);
    } else if (key === "Escape" && (this.#open || this.#input.value)) {
      event.preventDefault();
      if (!this.#open) this.#input.value = "";
      say(this.#error, "");
      this.close();
    } else if (key === "Backspace" && !this.#input.value && this.chosen.length) {
      this.choose(this.chosen.slice(0, -1));
    }
  }

  /** @param {number} by */
  #move(by) {
    const count = this.#shown.length;
    if (count)
      this.#activate(this.#active < 0 && by < 0 ? count - 1 : (this.#active + by + count) % count);
  }

  /**
   * Open the list on what the text asks for.
   *
   * @param {number} active
   */
  #show(active) {
    const text = this.#input.value;
    const found = this.names.search(text);
    this.#shown = found.slice(0, MOST_OPTIONS);
    this.#list.replaceChildren(...this.#shown.map((one, index) => this.#option(one, index, text)));
    this.#list.hidden = !this.#shown.length;
    const hidden = found.length - this.#shown.length;
    say(
      byId("class-more", HTMLElement),
      hidden
        ? `${hidden} more: type to narrow the list.`
        : found.length
          ? ""
          : `No class has “${shortened(text)}” in its name.`,
    );
    this.#open = true;
    this.#popup.hidden = false;
    this.#input.setAttribute("aria-expanded", String(this.#shown.length > 0));
    this.#toggle.setAttribute("aria-expanded", "true");
    this.#popup.scrollTop = 0;
    this.#activate(Math.min(active, this.#shown.length - 1));
  }

  /** @param {number} index */
  #activate(index) {
    this.#list.querySelector(".active")?.classList.remove("active");
    this.#active = index;
    const option = this.#list.children[index];
    if (option) {
      option.classList.add("active");
      option.scrollIntoView({ block: "nearest" });
      this.#input.setAttribute("aria-activedescendant", option.id);
    } else {
      this.#input.removeAttribute("aria-activedescendant");
    }
  }

  /**
   * @param {PictureClass} one
   * @param {number} index
   * @param {string} text
   */
  #option(one, index, text) {
    const selected = this.chosen.some(({ id }) => id === one.id);
    const name = element("span", { class: "name" }, ...marked(one.name, text));
    const number = element("span", { class: "number" }, selected ? icon("check") : String(one.id));
    return element(
      "li",
      { id: `class-option-${index}`, role: "option", "aria-selected": String(selected) },
      name,
      number,
    );
  }

  #drawChips() {
    const chips = this.chosen.map((one) => {
      const label = `Remove ${one.name}`;
      const button = element(
        "button",
        { type: "button", "aria-label": label, title: label },
        element("span", {}, one.name),
        icon("close"),
      );
      button.addEventListener("click", () => {
        this.choose(this.chosen.filter((other) => other !== one));
        this.#input.focus();
      });
      return element("li", {}, button);
    });
    this.#chips.replaceChildren(...chips);
    this.#chips.hidden = !chips.length;
    this.#input.placeholder = chips.length ? "Another…" : "Anything, or type to search";
  }
}

/**
 * The name with the first place of the first word of `text` in it marked.
 *
 * @param {string} name
 * @param {string} text
 * @returns {(Node | string)[]}
 */
function marked(name, text) {
  const word = folded(text).split(/\s+/)[0] ?? "";
  const start = word ? name.toLowerCase().indexOf(word) : -1;
  if (start < 0) return [name];
  const end = start + word.length;
  return [name.slice(0, start), element("mark", {}, name.slice(start, end)), name.slice(end)];
}
