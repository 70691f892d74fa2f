/** Small helpers over the document. */

/**
 * The element of that id, which the page has.
 *
 * @template {Element} T
 * @param {string} id
 * @param {new (...args: any[]) => T} kind
 * @returns {T}
 */
export function byId(id, kind) {
  const found = document.getElementById(id);
  if (!(found instanceof kind)) throw new Error(`the page has no ${kind.name} called ${id}`);
  return found;
}

/**
 * A new element. Attributes that are undefined or false are left out.
 *
 * @template {keyof HTMLElementTagNameMap} K
 * @param {K} tag
 * @param {Record<string, string | number | boolean | undefined>} [attributes]
 * @param {...(Node | string)} children
 * @returns {HTMLElementTagNameMap[K]}
 */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== false)
      made.setAttribute(name, value === true ? "" : String(value));
  }
  made.append(...children);
  return made;
}

/**
 * One of the symbols at the top of the page.
 *
 * @param {string} name
 */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

/**
 * A button that shows a symbol only.
 *
 * @param {string} symbol
 * @param {string} label
 * @param {() => void} press
 */
export function iconButton(symbol, label, press) {
  const made = element(
    "button",
    { type: "button", class: "icon", "aria-label": label, title: label },
    icon(symbol),
  );
  made.addEventListener("click", press);
  return made;
}

/**
 * Show a sentence in an element that is hidden without one.
 *
 * @param {HTMLElement} place
 * @param {string} sentence
 */
export function say(place, sentence) {
  place.textContent = sentence;
  place.hidden = !sentence;
}

/**
 * Tell those who hear the page; what is said once at a time replaces what was said before.
 *
 * @param {string} sentence
 */
export function announce(sentence) {
  byId("live", HTMLElement).textContent = sentence;
}

/**
 * @param {number} count
 * @param {string} thing
 * @param {string} [things]
 */
export function counted(count, thing, things = `${thing}s`) {
  return `${count} ${count === 1 ? thing : things}`;
}

/**
 * What somebody typed, short enough for a sentence.
 *
 * @param {string} text
 */
export function shortened(text) {
  return text.length > 40 ? `${text.slice(0, 40)}…` : text;
}
