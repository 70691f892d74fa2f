/** The page: what was picked and set becomes an order, an order becomes a group of pictures. */

import { Details } from "./details.js";
import { announce, byId, counted, say, shortened } from "./dom.js";
import { Drawing } from "./drawing.js";
import { Gallery } from "./gallery.js";
import { Group } from "./group.js";
import { Picker } from "./picker.js";
import { Names, SETTINGS } from "./references.js";
import { SettingsForm, randomSeed } from "./settings.js";
import { Turns } from "./turns.js";

/** @import { Model, Order, Picture, PictureClass, Settings, Source } from "./types.js" */

/** Wider pictures (in pixels) have more room; of narrower ones each pixel is a square. */
const LARGE = 200;
const TINY = 64;
const NARROW = matchMedia("(max-width: 56rem)");

const drawButton = byId("draw", HTMLButtonElement);
const count = byId("count", HTMLInputElement);

export class Page {
  #gallery = new Gallery();
  #turns;

  /**
   * @param {Model} model
   * @param {PictureClass[]} classes
   * @param {Source} source
   */
  constructor(model, classes, source) {
    const { aim, id } = model;
    this.model = model;
    this.source = source;
    this.#turns = new Turns(source.atOnce);
    this.names = new Names(classes);
    this.settings = new SettingsForm(model);
    this.picker = new Picker(this.names, aim.limits.n, () => this.#formChanged());
    this.details = new Details(this.#gallery, model, this.names, {
      more: (picture) => this.#moreLike(picture),
      use: (picture) => this.#use(picture),
    });
    document.title = `aim · ${id}`;
    byId("model", HTMLElement).textContent =
      `${id} · ${aim.width} × ${aim.height} · ${counted(aim.num_classes, "class", "classes")}`;
    const root = document.documentElement;
    root.style.setProperty("--ratio", `${aim.width} / ${aim.height}`);
    root.style.setProperty("--rows", String(aim.grid[0]));
    root.style.setProperty("--columns", String(aim.grid[1]));
    root.classList.toggle("large", aim.width > LARGE);
    root.classList.toggle("tiny", aim.width < TINY);
    byId("class-hint", HTMLElement).textContent = "By name or number";
    byId("form", HTMLFormElement).addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    byId("surprise", HTMLButtonElement).addEventListener("click", () => {
      this.picker.choose(this.#random(1));
      announce(`${this.picker.chosen[0]?.name} chosen.`);
    });
    byId("fewer", HTMLButtonElement).addEventListener("click", () => this.#step(-1));
    byId("more", HTMLButtonElement).addEventListener("click", () => this.#step(1));
    count.addEventListener("input", () => this.#formChanged());
    count.value = String(Math.min(source.atFirst, aim.limits.n));
    drawButton.disabled = false;
    this.#formChanged();
  }

  /** Whether something is being drawn. */
  get busy() {
    return this.#turns.active > 0;
  }

  /** Take no more orders. */
  close() {
    drawButton.disabled = true;
  }

  /** Fill in the form from the address, and draw if it says so. */
  open(/** @type {URLSearchParams} */ query) {
    const wanted = query.getAll("class");
    const found = wanted.map((text) => this.names.find(text));
    const unknown = wanted.find((_, index) => !found[index]);
    this.picker.choose(found.filter((one) => one !== undefined));
    const settings = Object.fromEntries(
      SETTINGS.flatMap((name) => (query.has(name) ? [[name, query.get(name) ?? ""]] : [])),
    );
    this.settings.fill(settings, query.get("seed") ?? "");
    if (wanted.length) count.value = "1";
    this.#formChanged();
    if (unknown !== undefined)
      this.picker.refuse(
        `The link asks for the class “${shortened(unknown)}”, which this model does not have.`,
      );
    else if (query.get("draw") === "1") this.#submit({ keepAddress: true });
  }

  #submit({ keepAddress = false } = {}) {
    if (drawButton.disabled || this.picker.unfinished()) return;
    const each = this.#count();
    if (each === null) return count.focus();
    const { chosen } = this.picker;
    const classes = chosen.length
      ? chosen.flatMap((one) => Array(each).fill(one))
      : this.#random(each);
    const read = this.settings.read(classes.length);
    if (!read) return;
    this.picker.close();
    // The address may be a link to another picture, which a reload would draw again.
    if (!keepAddress && location.search) history.replaceState(null, "", location.pathname);
    this.#draw({ classes, ...read });
  }

  /** @param {Order} order */
  #draw(order) {
    const { aim } = this.model;
    const every = Math.max(aim.grid[1], Math.ceil(aim.num_tokens / this.source.previews));
    const reference = this.names.reference.bind(this.names);
    const drawing = new Drawing(this.source, { ...order, reference, every }, this.#turns);
    const group = new Group(
      order,
      { rows: aim.grid[0], columns: aim.grid[1] },
      this.#unusual(order.settings),
      {
        cancel: () => drawing.cancel(),
        retry: () => drawing.into(group),
        again: () => this.#draw({ ...order, seed: randomSeed() }),
        remove: () => {
          drawing.cancel();
          this.#gallery.remove(group);
        },
      },
      {
        open: (card) => this.details.open(card),
        more: (picture) => this.#moreLike(picture),
        remove: (card) => this.#gallery.removeCard(card),
      },
    );
    this.#gallery.add(group);
    drawing.into(group).then(() => this.#gallery.trim());
    if (NARROW.matches) group.root.scrollIntoView({ block: "nearest" });
    else scrollTo({ top: 0 });
  }

  /** @param {Picture} picture */
  #moreLike({ class: one, settings }) {
    this.#draw({ classes: [one], settings, seed: randomSeed() });
  }

  /** @param {Picture} picture */
  #use({ class: one, settings, seed }) {
    this.picker.choose([one]);
    this.settings.fill(settings, String(seed));
    count.value = "1";
    this.#formChanged();
    byId("settings", HTMLDetailsElement).open = true;
    drawButton.focus();
  }

  /** @param {Settings} settings */
  #unusual(settings) {
    const { defaults } = this.model.aim;
    return Object.fromEntries(
      SETTINGS.filter((name) => settings[name] !== defaults[name]).map((name) => [
        name,
        settings[name],
      ]),
    );
  }

  /**
   * Classes by chance, another one each as long as there are more.
   *
   * @param {number} images
   */
  #random(images) {
    const { classes } = this.names;
    const order = classes.map((one) => ({ one, at: Math.random() })).sort((a, b) => a.at - b.at);
    return Array.from({ length: images }, (_, index) => order[index % order.length]?.one).filter(
      (one) => one !== undefined,
    );
  }

  /** Pictures of each class; null, and a sentence, if that is no number that may be asked for. */
  #count() {
    const most = this.#most();
    const value = Number(count.value);
    const right = Number.isInteger(value) && value >= 1 && value <= most;
    const each =
      this.picker.chosen.length > 1 ? `${this.picker.chosen.length} classes leave` : "There may be";
    say(
      byId("count-error", HTMLElement),
      right
        ? ""
        : `${each} 1 to ${most} pictures${this.picker.chosen.length > 1 ? " of each" : ""}.`,
    );
    count.setAttribute("aria-invalid", String(!right));
    return right ? value : null;
  }

  #most() {
    return Math.floor(this.model.aim.limits.n / Math.max(1, this.picker.chosen.length));
  }

  /** @param {number} by */
  #step(by) {
    count.value = String(Math.min(Math.max((Number(count.value) || 0) + by, 1), this.#most()));
    this.#formChanged();
  }

  #formChanged() {
    const most = this.#most();
    const classes = Math.max(1, this.picker.chosen.length);
    count.max = String(most);
    if (Number(count.value) > most && classes > 1) count.value = String(most);
    const each = Number(count.value);
    const valid = this.#count() !== null;
    byId("fewer", HTMLButtonElement).disabled = each <= 1;
    byId("more", HTMLButtonElement).disabled = each >= most;
    drawButton.textContent = valid ? `Draw ${counted(classes * each, "picture")}` : "Draw";
  }
}

/** How the page looks before it knows what it draws with. */
export function prepare() {
  byId("settings", HTMLDetailsElement).open = !NARROW.matches;
}
