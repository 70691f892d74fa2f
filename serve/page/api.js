/** The server's interface, and the key that it may ask for. Addresses are relative to the page's. */

import { DrawingError } from "./errors.js";
import { serverEvents, withinSilence } from "./events.js";

/** @import { DrawEvent, DrawOrder, Model, PictureClass } from "./types.js" */

/** Seconds to wait for a place in the queue, where the server does not say. */
const SOON = 5;

/** An answer that is an error, or none at all (status 0). */
export class ApiError extends DrawingError {
  /**
   * @param {string} message
   * @param {number} status
   * @param {number} [retryAfter] seconds
   */
  constructor(message, status, retryAfter) {
    super(message, {
      wait: status === 429 ? Math.max(1, retryAfter ?? SOON) : 0,
      general: status === 0 || status === 503,
    });
    this.status = status;
  }
}

const UNREACHABLE = "The server does not answer. It may be restarting.";
const CUT_OFF = "The connection was lost before the pictures were done.";
const KEY = "aim-key";

export class Api {
  /** @type {Promise<string | null> | null} */
  #asking = null;

  /**
   * @param {(rejected: boolean) => Promise<string | null>} askKey Asks a person for the key; null
   *   if there is none to be had.
   */
  constructor(askKey) {
    this.askKey = askKey;
  }

  /** @returns {Promise<Model>} */
  async model() {
    const { data } = await this.#json("v1/models");
    return data[0];
  }

  /** @returns {Promise<PictureClass[]>} */
  async classes() {
    const { data } = await this.#json("v1/classes");
    return data;
  }

  /**
   * Why the server takes no requests now; empty if it does. Throws ApiError if it does not answer.
   *
   * @returns {Promise<string>}
   */
  async notReady() {
    const response = await reach("readyz", {
      cache: "no-store",
      signal: AbortSignal.timeout(5000),
    });
    return response.ok ? "" : (await errorOf(response)).message;
  }

  /**
   * Draw. Leaving the loop, or aborting, cancels it at the server.
   *
   * @param {DrawOrder} order
   * @param {AbortSignal} signal
   * @returns {AsyncGenerator<DrawEvent>}
   */
  async *draw({ classes, seed, settings, reference, every }, signal) {
    const response = await this.#request("v1/draw", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ classes: classes.map(reference), seed, ...settings, every }),
      signal,
    });
    if (!response.body) throw new ApiError(CUT_OFF, 0);
    try {
      for await (const { event, data } of serverEvents(response.body)) {
        const found = JSON.parse(data);
        if (event === "error")
          throw new ApiError(
            sentence(found.error.message),
            found.error.code === "draining" ? 503 : 500,
          );
        if (event === "progress") yield { type: "progress", ...found };
        else if (event === "preview") yield* found.images.map(preview);
        else if (event === "done") {
          yield* found.images.map(finished);
          yield { type: "done" };
          return;
        }
      }
    } catch (error) {
      if (signal.aborted || error instanceof ApiError) throw error;
    }
    throw new ApiError(CUT_OFF, 0);
  }

  /** @param {string} path */
  async #json(path) {
    const response = await this.#request(path, {});
    return response.json();
  }

  /**
   * @param {string} path
   * @param {RequestInit} init
   * @returns {Promise<Response>}
   */
  async #request(path, init) {
    for (;;) {
      const key = sessionStorage.getItem(KEY);
      const headers = new Headers(init.headers);
      if (key) headers.set("Authorization", `Bearer ${key}`);
      const response = await reach(path, { ...init, headers });
      if (response.ok) return response;
      const error = await errorOf(response);
      if (response.status !== 401) throw error;
      // Another request may have been told the right key meanwhile.
      if (sessionStorage.getItem(KEY) !== key) continue;
      this.#asking ??= this.askKey(key !== null);
      const given = await this.#asking;
      this.#asking = null;
      if (given === null) throw error;
      sessionStorage.setItem(KEY, given);
    }
  }
}

/**
 * @param {string} path
 * @param {RequestInit} init
 */
async function reach(path, init) {
  try {
    return await withinSilence(fetch(path, init));
  } catch (error) {
    if (init.signal?.aborted && init.signal.reason?.name === "AbortError") throw error;
    throw new ApiError(UNREACHABLE, 0);
  }
}

/**
 * @param {Response} response
 * @returns {Promise<ApiError>}
 */
async function errorOf(response) {
  const wait = Number.parseInt(response.headers.get("Retry-After") ?? "", 10);
  const found = await response.json().catch(() => null);
  const message = found?.error?.message;
  return new ApiError(
    typeof message === "string"
      ? sentence(message)
      : `The server answers ${response.status} ${response.statusText}.`,
    response.status,
    Number.isFinite(wait) ? wait : undefined,
  );
}

/**
 * @param {{ index: number, done_tokens: number, b64_json: string, output_format: string }} image
 * @returns {DrawEvent}
 */
function preview({ index, done_tokens, b64_json, output_format }) {
  const source = `data:image/${output_format};base64,${b64_json}`;
  return { type: "preview", index, tokens: done_tokens, source };
}

/**
 * @param {{ index: number, b64_json: string, output_format: string }} image
 * @returns {DrawEvent}
 */
function finished({ index, b64_json, output_format }) {
  const bytes = Uint8Array.from(atob(b64_json), (letter) => letter.charCodeAt(0));
  const file = new Blob([bytes], { type: `image/${output_format}` });
  return { type: "picture", index, file };
}

/** @param {string} text */
function sentence(text) {
  const capital = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(capital) ? capital : `${capital}.`;
}
