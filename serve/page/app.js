/** The page: what was picked and set becomes an order, an order becomes a group of pictures. */

import { Api, ApiError } from "./api.js";
import { Details } from "./details.js";
import { announce, byId, counted, say, shortened } from "./dom.js";
import { Drawing } from "./drawing.js";
import { Gallery } from "./gallery.js";
import { Group } from "./group.js";
import { Health } from "./health.js";
import { askKey } from "./key.js";
import { Picker } from "./picker.js";
import { Names, SETTINGS } from "./references.js";
import { SettingsForm, randomSeed } from "./settings.js";
import { Turns } from "./turns.js";

/** @import { Model, Order, Picture, PictureClass, Settings } from "./types.js" */

/** Browsers open six connections to a server; two are left for everything else. */
const MOST_STREAMS = 4;
const MOST_PREVIEWS = 16;
/** Wider pictures (in pixels) have more room; of narrower ones each pixel is a square. */
const LARGE = 200;
const TINY = 64;
const NARROW = matchMedia("(max-width: 56rem)");

const notice = byId("notice", HTMLElement);
const drawButton = byId("draw", HTMLButtonElement);
const count = byId("count", HTMLInputElement);
const turns = new Turns(MOST_STREAMS);
const api = new Api(askKey);

class Page {
  #gallery = new Gallery();

  /**
   * @param {Model} model
   * @param {PictureClass[]} classes
   */
  constructor(model, classes) {
    const { aim, id } = model;
    this.model = model;
    this.names = new Names(classes);
    this.settings = new SettingsForm(model);
    this.picker = new Picker(this.names, aim.limits.n, () => this.#formChanged());
    this.details = new Details(this.#gallery, model, this.names, {
      more: (picture) => this.#moreLike(picture),
      use: (picture) => this.#use(picture),
    });
    this.health = new Health(
      api,
      notice,
      () => turns.active > 0,
      () => this.#compare(),
    );
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
    count.value = String(Math.min(4, aim.limits.n));
    drawButton.disabled = false;
    this.#formChanged();
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
    const every = Math.max(aim.grid[1], Math.ceil(aim.num_tokens / MOST_PREVIEWS));
    const reference = this.names.reference.bind(this.names);
    const source = (/** @type {AbortSignal} */ signal) => api.draw(order, reference, every, signal);
    const drawing = new Drawing(source, turns, (error) => this.health.trouble(error.message));
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

  /** After the server was away: is it the one that this page was made for? */
  async #compare() {
    const { id, aim } = await api.model();
    if (
      id === this.model.id &&
      aim.num_classes === this.model.aim.num_classes &&
      aim.version === this.model.aim.version
    )
      return;
    this.health.trouble(`The server is another one now (${id}). Reload the page to draw with it.`);
    drawButton.disabled = true;
  }
}

async function start() {
  byId("settings", HTMLDetailsElement).open = !NARROW.matches;
  for (;;) {
    try {
      const [model, classes] = [await api.model(), await api.classes()];
      say(notice, "");
      new Page(model, classes).open(new URLSearchParams(location.search));
      return;
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      say(
        notice,
        error.status === 401
          ? "Without its key this server draws nothing. Reload the page to enter it."
          : error.message,
      );
      if (error.status === 401) return;
      await new Promise((resolve) => setTimeout(resolve, 2000));
    }
  }
}

start();
