/** The settings: what a person typed, checked against what the model takes. */

import { byId, say } from "./dom.js";
import { SETTINGS } from "./references.js";

/** @import { Model, Settings } from "./types.js" */

const LABELS = {
  cfg_scale: "Guidance",
  temperature: "Temperature",
  top_k: "Top-k",
  top_p: "Top-p",
};

/** One setting: a number to type, for some a slider too, and a place for what is wrong with it. */
class Field {
  /**
   * @param {keyof Settings} name
   * @param {[number, number]} limits
   * @param {number} preset
   * @param {() => void} changed
   */
  constructor(name, [low, high], preset, changed) {
    this.name = name;
    this.low = low;
    this.high = high;
    this.preset = preset;
    this.input = byId(name, HTMLInputElement);
    this.error = byId(`${name}-error`, HTMLElement);
    this.input.min = String(low);
    this.input.max = String(high);
    /** @type {HTMLInputElement | null | undefined} */
    this.slider = this.input.parentElement?.querySelector("input[type=range]");
    if (this.slider) {
      const slider = this.slider;
      // The limits are those of numbers; a slider covers where settings differ to the eye.
      slider.max = String(
        Math.min(
          high,
          {
            cfg_scale: Math.max(10, 2 * preset),
            temperature: Math.max(2, preset),
            top_p: 1,
            top_k: high,
          }[name],
        ),
      );
      slider.min = String(name === "top_p" ? 0.01 : low);
      slider.addEventListener("input", () => {
        this.input.value = String(Number(slider.value));
        this.#edited(changed);
      });
    }
    this.input.addEventListener("input", () => this.#edited(changed));
    this.fill(String(preset));
  }

  /** @param {string} text */
  fill(text) {
    this.input.value = text;
    this.#matchSlider();
    say(this.error, "");
    this.input.removeAttribute("aria-invalid");
  }

  /** @returns {number | null} null, and a sentence below the field, if it is wrong. */
  read() {
    const value = this.input.value.trim() === "" ? NaN : Number(this.input.value);
    const whole = this.name !== "top_k" || Number.isInteger(value);
    // Nothing at all has probability 0.
    const enough = this.name === "top_p" ? value > this.low : value >= this.low;
    const right = whole && enough && value <= this.high;
    const from =
      this.name === "top_p"
        ? `above ${this.low}, up to ${this.high}`
        : `from ${this.low} to ${this.high}`;
    const kind = this.name === "top_k" ? "a whole number" : "a number";
    say(this.error, right ? "" : `${LABELS[this.name]} must be ${kind} ${from}.`);
    this.input.setAttribute("aria-invalid", String(!right));
    return right ? value : null;
  }

  /** @param {() => void} changed */
  #edited(changed) {
    if (!this.error.hidden) this.read();
    this.#matchSlider();
    changed();
  }

  #matchSlider() {
    if (!this.slider) return;
    this.slider.value = this.input.value;
    const { min, max, value } = this.slider;
    this.slider.style.setProperty(
      "--at",
      `${(100 * (Number(value) - Number(min))) / (Number(max) - Number(min))}%`,
    );
  }
}

export class SettingsForm {
  #seed = byId("seed", HTMLInputElement);
  #seedError = byId("seed-error", HTMLElement);
  #state = byId("settings-state", HTMLElement);
  #box = byId("settings", HTMLDetailsElement);

  /** @param {Model} model */
  constructor({ aim }) {
    this.limits = aim.limits;
    const changed = () => this.#summarise();
    this.fields = SETTINGS.map(
      (name) => new Field(name, aim.limits[name], aim.defaults[name], changed),
    );
    this.#seed.addEventListener("input", () => {
      if (!this.#seedError.hidden) this.#readSeed(1);
      changed();
    });
    byId("reset", HTMLButtonElement).addEventListener("click", () => this.fill({}, ""));
    changed();
  }

  /**
   * Put in what is given; the rest becomes the defaults.
   *
   * @param {Partial<Record<keyof Settings, string | number>>} settings
   * @param {string} seed
   */
  fill(settings, seed) {
    for (const field of this.fields) field.fill(String(settings[field.name] ?? field.preset));
    this.#seed.value = seed;
    say(this.#seedError, "");
    this.#seed.removeAttribute("aria-invalid");
    this.#summarise();
  }

  /**
   * What is set; null if something is wrong, which is then shown and has the focus.
   *
   * @param {number} images That are asked for.
   * @returns {{ settings: Settings, seed: number } | null}
   */
  read(images) {
    const values = this.fields.map((field) => field.read());
    const seed = this.#readSeed(images);
    const wrong =
      this.fields.find((_, index) => values[index] === null)?.input ??
      (seed === null ? this.#seed : null);
    if (wrong || seed === null) {
      this.#box.open = true;
      wrong?.focus();
      wrong?.parentElement?.scrollIntoView({ block: "nearest" });
      return null;
    }
    const settings = /** @type {Settings} */ (
      Object.fromEntries(this.fields.map(({ name }, index) => [name, values[index]]))
    );
    return { settings, seed };
  }

  /**
   * @param {number} images
   * @returns {number | null}
   */
  #readSeed(images) {
    const text = this.#seed.value.trim();
    const highest = this.limits.seed[1] - (images - 1);
    const seed = text === "" ? randomSeed() : /^[0-9]+$/.test(text) ? Number(text) : NaN;
    const right = seed <= highest;
    say(
      this.#seedError,
      right ? "" : `The seed must be a whole number from 0 to ${highest}, or empty.`,
    );
    this.#seed.setAttribute("aria-invalid", String(!right));
    return right ? seed : null;
  }

  #summarise() {
    const changed =
      this.fields.filter(({ input, preset }) => Number(input.value) !== preset).length +
      (this.#seed.value.trim() ? 1 : 0);
    this.#state.textContent = changed ? `${changed} changed` : "defaults";
  }
}

/** A seed short enough to read out. */
export function randomSeed() {
  return (crypto.getRandomValues(new Uint32Array(1))[0] ?? 0) >>> 8;
}
