/** Files over the network: counted as they come, and the ones that the manifest means. */

import { EngineError, wrapped } from "./errors.js";
import { shortened } from "./quoting.js";

/** @import { FileEntry } from "./types.js" */

/** @typedef {(loaded: number, total: number) => void} Progress */

/** What stands for the name of ONNX Runtime's WebAssembly. */
export const RUNTIME = "onnxruntime";

// Between two reports of one file's progress.
const REPORT_MS = 50;

/**
 * The bytes of a file of the bundle, whose size and SHA-256 are its entry's.
 *
 * What arrives damaged is asked for once more, past the caches: a copy there may be what is damaged.
 *
 * @param {string} name
 * @param {string} url
 * @param {FileEntry} entry
 * @param {Progress} progress
 */
export async function downloadChecked(name, url, entry, progress) {
  try {
    return await checked(name, url, entry, progress, "default");
  } catch (error) {
    const again = error instanceof EngineError && /^(truncated|altered)$/.test(error.code);
    if (!again) throw error;
    return checked(name, url, entry, progress, "reload");
  }
}

/**
 * The bytes of a file of unknown size, at most `most`.
 *
 * @param {string} name
 * @param {string} url
 * @param {number} most
 * @param {Progress} [progress]
 */
export async function download(name, url, most, progress = () => {}) {
  const response = await reach(name, url, "default");
  // Of a packed answer the length is that of what is packed.
  const packed = response.headers.get("Content-Encoding");
  const total = packed ? 0 : Number(response.headers.get("Content-Length") ?? 0);
  /** @type {Uint8Array[]} */
  const pieces = [];
  let loaded = 0;
  await received(name, response, (piece) => {
    loaded += piece.length;
    if (loaded > most) throw new EngineError("bundle", `${name} has more than ${most} bytes`, name);
    pieces.push(piece);
    progress(loaded, total);
  });
  if (loaded < total) throw truncated(name, loaded, total);
  const data = room(name, loaded);
  let at = 0;
  for (const piece of pieces) {
    data.set(piece, at);
    at += piece.length;
  }
  return data;
}

/**
 * @param {string} name
 * @param {string} url
 * @param {FileEntry} entry
 * @param {Progress} progress
 * @param {RequestCache} cache
 */
async function checked(name, url, { size, sha256 }, progress, cache) {
  const response = await reach(name, url, cache);
  const data = room(name, size);
  let loaded = 0;
  let reported = -Infinity;
  progress(0, size);
  await received(name, response, (piece) => {
    if (loaded + piece.length > size) throw altered(name);
    data.set(piece, loaded);
    loaded += piece.length;
    if (performance.now() - reported < REPORT_MS && loaded < size) return;
    reported = performance.now();
    progress(loaded, size);
  });
  if (loaded < size) throw truncated(name, loaded, size);
  if ((await sha256Of(data)) !== sha256) throw altered(name);
  return data;
}

/**
 * In lower-case hexadecimal digits.
 *
 * @param {Uint8Array<ArrayBuffer>} data
 */
export async function sha256Of(data) {
  if (!globalThis.crypto?.subtle)
    throw new EngineError(
      "browser",
      "This page must come over HTTPS, or from this machine: elsewhere browsers do not let it check the model's files.",
    );
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", data));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/**
 * @param {string} name
 * @param {string} url
 * @param {RequestCache} cache
 */
async function reach(name, url, cache) {
  const response = await fetch(url, { cache }).catch(() => {
    throw new EngineError(
      "network",
      `${named(name)} cannot be fetched: the server does not answer; try again once you are online`,
      name,
    );
  });
  if (response.ok) return response;
  throw new EngineError(
    "network",
    `${named(name)} cannot be fetched: the server answers ${response.status}`,
    name,
  );
}

/**
 * @param {string} name
 * @param {Response} response
 * @param {(piece: Uint8Array) => void} take
 */
async function received(name, response, take) {
  const reader = response.body?.getReader();
  try {
    for (;;) {
      const { done, value } = (await reader?.read()) ?? { done: true };
      if (done || !value) return;
      take(value);
    }
  } catch (error) {
    await reader?.cancel().catch(() => {});
    if (error instanceof EngineError) throw error;
    throw new EngineError(
      "truncated",
      `${named(name)} was cut short on its way: the connection broke; try again`,
      name,
    );
  }
}

/**
 * @param {string} name
 * @param {number} size
 */
function room(name, size) {
  try {
    return new Uint8Array(size);
  } catch (error) {
    throw wrapped(error, "memory", `There is too little memory for ${name}`);
  }
}

/**
 * @param {string} name
 * @param {number} loaded
 * @param {number} size
 */
function truncated(name, loaded, size) {
  return new EngineError(
    "truncated",
    `${named(name)} was cut short on its way (${loaded} of ${size} bytes came); try again`,
    name,
  );
}

/** @param {string} name */
function altered(name) {
  return new EngineError(
    "altered",
    `${named(name)} is not the file that the bundle's manifest means; the site must be built again`,
    name,
  );
}

/** @param {string} name */
function named(name) {
  return name === RUNTIME ? "ONNX Runtime" : `The model's file ${shortened(name, 80)}`;
}
