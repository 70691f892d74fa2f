/** Asking a person for the server's key. */

import { element } from "./dom.js";

/**
 * @param {boolean} rejected Whether a key was given before, and was wrong.
 * @returns {Promise<string | null>} null if they would rather not.
 */
export function askKey(rejected) {
  const input = element("input", {
    id: "key-input",
    type: "password",
    autocomplete: "current-password",
    required: true,
    "aria-describedby": "key-hint",
  });
  const error = element("p", { id: "key-error", class: "wrong", role: "alert", hidden: !rejected });
  if (rejected) error.textContent = "The server did not accept this key.";
  const cancel = element("button", { type: "button" }, "Cancel");
  const form = element(
    "form",
    {},
    element("h2", { id: "key-title" }, "This server asks for a key"),
    // For programs that keep passwords.
    element("input", {
      type: "text",
      autocomplete: "username",
      value: "aim",
      readonly: true,
      hidden: true,
    }),
    element("label", { for: "key-input" }, "Key"),
    input,
    element("p", { id: "key-hint", class: "hint" }, "Kept in this tab until it is closed."),
    error,
    element(
      "div",
      { class: "actions" },
      element("button", { class: "primary", type: "submit" }, "Continue"),
      cancel,
    ),
  );
  const dialog = element(
    "dialog",
    { id: "key", class: "key", "aria-labelledby": "key-title" },
    form,
  );
  return new Promise((resolve) => {
    /** @type {string | null} */
    let given = null;
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      given = input.value.trim() || null;
      if (given) dialog.close();
    });
    cancel.addEventListener("click", () => dialog.close());
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(given);
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}
