/** The server's interface, and the key that it may ask for. Addresses are relative to the page's. */

import { serverEvents, withinSilence } from "./events.js";

/** @import { DrawEvent, Model, Order, PictureClass } from "./types.js" */

/** An answer that is an error, or none at all (status 0). The message is a sentence for people. */
export class ApiError extends Error {
  /**
   * @param {string} message
   * @param {number} status
   * @param {number} [retryAfter] seconds
   */
  constructor(message, status, retryAfter) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
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
   * @param {Order} order
   * @param {(chosen: PictureClass) => number | string} reference How to name a class.
   * @param {number} every Steps between two previews.
   * @param {AbortSignal} signal
   * @returns {AsyncGenerator<DrawEvent>}
   */
  async *draw(order, reference, every, signal) {
    const { classes, seed, settings } = order;
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
        yield { type: event, ...found };
        if (event === "done") return;
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

/** @param {string} text */
function sentence(text) {
  const capital = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(capital) ? capital : `${capital}.`;
}
