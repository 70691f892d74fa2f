/** How a class or a whole picture is told to others: in a link, on the command line, as a file. */

/** @import { Picture, PictureClass, Settings } from "./types.js" */

const NUMBER = /^[0-9]{1,18}$/;
/** @type {(keyof Settings)[]} */
export const SETTINGS = ["cfg_scale", "temperature", "top_k", "top_p"];
/** Letters of a class's name in a file's name. */
const LONGEST_STEM = 60;

/** Which class a text means, by the rules of the runtime. */
export class Names {
  /** @type {Map<string, PictureClass[]>} */
  #byName = new Map();

  /** @param {PictureClass[]} classes */
  constructor(classes) {
    this.classes = classes;
    for (const one of classes) {
      const name = folded(one.name);
      this.#byName.set(name, [...(this.#byName.get(name) ?? []), one]);
    }
  }

  /**
   * What means this class and no other: its name if that can be, else its number. (A name that is a
   * number could be another class's number.)
   *
   * @param {PictureClass} chosen
   * @returns {string | number}
   */
  reference(chosen) {
    const unique = this.#byName.get(folded(chosen.name))?.length === 1;
    return unique && !NUMBER.test(chosen.name.trim()) ? chosen.name : chosen.id;
  }

  /**
   * @param {string} text A name, one of the synonyms in a name, or a number.
   * @returns {PictureClass | undefined}
   */
  find(text) {
    const wanted = folded(text);
    const numbered = NUMBER.test(wanted) && this.classes.find(({ id }) => id === Number(wanted));
    if (numbered) return numbered;
    const named =
      this.#byName.get(wanted) ??
      this.classes.filter(({ name }) =>
        folded(name)
          .split(/\s*,\s*/)
          .includes(wanted),
      );
    return named.length === 1 ? named[0] : undefined;
  }

  /**
   * Those whose name has all the words of `text`, or whose number it is; the best first.
   *
   * @param {string} text
   * @returns {PictureClass[]}
   */
  search(text) {
    const words = folded(text).split(/\s+/).filter(Boolean);
    if (!words.length) return this.classes;
    /** @type {{ one: PictureClass, rank: number }[]} */
    const found = [];
    for (const one of this.classes) {
      const name = folded(one.name);
      if (words.join(" ") === name || words.join(" ") === String(one.id))
        found.push({ one, rank: 0 });
      else if (words.every((word) => name.includes(word))) {
        const word = words[0] ?? "";
        const begins = name.startsWith(word)
          ? 1
          : name.split(/[^\p{L}\p{N}]+/u).some((part) => part.startsWith(word))
            ? 2
            : 3;
        found.push({ one, rank: begins });
      } else if (words.length === 1 && String(one.id).startsWith(words[0] ?? ""))
        found.push({ one, rank: 4 });
    }
    return found.sort((a, b) => a.rank - b.rank || a.one.id - b.one.id).map(({ one }) => one);
  }
}

/**
 * A name as it is compared: without case, and however its accents are composed.
 *
 * @param {string} name
 */
export function folded(name) {
  return name.trim().toLowerCase().normalize("NFC");
}

/**
 * The address that opens this page and draws the picture again.
 *
 * @param {Picture} picture
 * @param {string | number} reference
 */
export function linkTo(picture, reference) {
  const query = new URLSearchParams({ class: String(reference), seed: String(picture.seed) });
  for (const name of SETTINGS) query.set(name, String(picture.settings[name]));
  query.set("draw", "1");
  return `${location.origin}${location.pathname}?${query}`;
}

/**
 * The command that draws the picture.
 *
 * @param {Picture} picture
 * @param {string | number} reference
 * @param {string} bundle Empty for the one that the command takes by itself.
 */
export function commandFor(picture, reference, bundle) {
  const options = SETTINGS.map((name) => `--${name.replace("_", "-")} ${picture.settings[name]}`);
  const chosen = `--class ${quoted(String(reference))} --seed ${picture.seed}`;
  return [
    "aim generate",
    ...(bundle ? [`--bundle ${quoted(bundle)}`] : []),
    chosen,
    ...options,
  ].join(" ");
}

/**
 * As the command names its files: of synonyms the first, letters and digits only.
 *
 * @param {Picture} picture
 */
export function fileName(picture) {
  const first = picture.class.name.split(",")[0] ?? "";
  const stem = folded(first)
    .replace(/[^\p{L}\p{N}_]+/gu, "-")
    .replace(/^-+|-+$/g, "")
    .slice(0, LONGEST_STEM);
  return `${stem || "class"}_seed${picture.seed}.png`;
}

/**
 * For a POSIX shell.
 *
 * @param {string} text
 */
function quoted(text) {
  return /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
}
