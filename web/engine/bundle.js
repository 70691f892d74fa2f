/** A bundle over the network: its manifest, the graphs to take, and their files. */

import {
  DECODER_FILE,
  MAX_DESCRIPTION_BYTES,
  STEP_FILE,
  withCpuDecoder,
  withCpuStep,
} from "./cpu_graphs.js";
import { download, downloadChecked, sha256Of } from "./download.js";
import { EngineError } from "./errors.js";
import { MAX_MANIFEST_BYTES, manifestFromJson } from "./manifest.js";

/**
 * @import { Manifest } from "./types.js"
 * @typedef {(file: string, loaded: number, total: number) => void} FileProgress
 */

const MANIFEST = "manifest.json";

export class Bundle {
  /** @type {Map<string, Promise<Uint8Array<ArrayBuffer>>>} */
  #coming = new Map();

  /**
   * @param {Manifest} manifest Of the plain graphs.
   * @param {string} sha256 The manifest's own.
   * @param {Record<string, string>} urls
   * @param {FileProgress} progress
   */
  constructor(manifest, sha256, urls, progress) {
    this.manifest = manifest;
    this.sha256 = sha256;
    this.urls = urls;
    this.progress = progress;
  }

  /**
   * @param {Record<string, string>} urls Of the bundle's files, by name.
   * @param {FileProgress} progress
   */
  static async open(urls, progress) {
    const url = urls[MANIFEST];
    if (!url) throw new EngineError("bundle", `The bundle has no ${MANIFEST}.`);
    const data = await download(MANIFEST, url, MAX_MANIFEST_BYTES, (loaded, total) =>
      progress(MANIFEST, loaded, total),
    );
    return new Bundle(manifestFromJson(text(MANIFEST, data)), await sha256Of(data), urls, progress);
  }

  /**
   * The manifest with the graphs that ONNX Runtime's CPU provider takes, as far as the bundle and the
   * page have them and this version of ONNX Runtime runs them.
   *
   * @param {string} version
   */
  async forCpu(version) {
    let manifest = this.manifest;
    if (this.has(STEP_FILE))
      manifest = withCpuStep(await this.#description(STEP_FILE), manifest, version) ?? manifest;
    if (this.has(DECODER_FILE))
      manifest =
        withCpuDecoder(await this.#description(DECODER_FILE), manifest, version) ?? manifest;
    return manifest;
  }

  /** @param {string} name */
  has(name) {
    return name in this.manifest.files && name in this.urls;
  }

  /**
   * The checked bytes of a file. They are handed out once; who needs them again fetches them again.
   *
   * @param {string} name
   */
  async read(name) {
    const data = this.#coming.get(name) ?? this.#download(name);
    this.#coming.delete(name);
    return data;
  }

  /**
   * Let files come that will be read.
   *
   * @param {string[]} names
   */
  prefetch(names) {
    for (const name of new Set(names)) {
      if (this.#coming.has(name)) continue;
      const coming = this.#download(name);
      coming.catch(() => {}); // whoever reads it hears of it
      this.#coming.set(name, coming);
    }
  }

  /** @param {string} name */
  async #download(name) {
    const entry = this.manifest.files[name];
    const url = this.urls[name];
    if (!entry || !url) throw new EngineError("bundle", `The page has no file ${name}.`, name);
    return downloadChecked(name, url, entry, (loaded, total) =>
      this.progress(name, loaded, total),
    );
  }

  /** @param {string} name */
  async #description(name) {
    const size = this.manifest.files[name]?.size ?? 0;
    if (size > MAX_DESCRIPTION_BYTES)
      throw new EngineError(
        "bundle",
        `${name} has ${size} bytes; at most ${MAX_DESCRIPTION_BYTES} fit`,
        name,
      );
    return text(name, await this.read(name));
  }
}

/**
 * @param {string} name
 * @param {Uint8Array} data
 */
function text(name, data) {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(data);
  } catch {
    throw new EngineError("bundle", `${name} is not UTF-8 text`, name);
  }
}
