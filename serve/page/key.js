/** Asking a person for the server's key. */

import { byId, say } from "./dom.js";

/**
 * @param {boolean} rejected Whether a key was given before, and was wrong.
 * @returns {Promise<string | null>} null if they would rather not.
 */
export function askKey(rejected) {
  const dialog = byId("key", HTMLDialogElement);
  const form = byId("key-form", HTMLFormElement);
  const input = byId("key-input", HTMLInputElement);
  say(byId("key-error", HTMLElement), rejected ? "The server did not accept this key." : "");
  input.value = "";
  return new Promise((resolve) => {
    /** @type {string | null} */
    let given = null;
    form.onsubmit = (event) => {
      event.preventDefault();
      given = input.value.trim() || null;
      if (given) dialog.close();
    };
    byId("key-cancel", HTMLButtonElement).onclick = () => dialog.close();
    dialog.addEventListener("close", () => resolve(given), { once: true });
    dialog.showModal();
  });
}
