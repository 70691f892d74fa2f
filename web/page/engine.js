/** The engine in its worker, as a source of pictures. */

import { DrawingError } from "../../serve/page/errors.js";
import { SETTINGS } from "../../serve/page/references.js";
import { forgetFiles } from "./offline.js";
import { png } from "./png.js";

/** @import { DrawEvent, DrawOrder } from "../../serve/page/types.js" */
/** @import { ErrorNews, FromWorker, PictureNews, ReadyNews, ToWorker } from "../engine/types.js" */
/** @import { Loading } from "./loading.js" */
/** @import { Site } from "./types.js" */

const STOPPED = "The engine stopped, perhaps for want of memory. Try again with fewer pictures.";
/** Of a file that is not the right one: what is kept of it must not come back. */
const WRONG_FILE = ["truncated", "altered"];
/** After these the worker's memory cannot be relied on. */
const BROKEN = ["memory", "backend"];

export class Engine {
  #last = 0;
  /** @type {Worker | null} */
  #worker = null;
  /** @type {Promise<ReadyNews> | null} */
  #ready = null;
  /** Who hears about the orders, by their ids. @type {Map<number, Mail>} */
  #orders = new Map();

  /**
   * @param {Site} site
   * @param {Loading} loading
   */
  constructor(site, loading) {
    this.site = site;
    this.loading = loading;
  }

  /**
   * Load the model, unless that is done or on its way.
   *
   * @returns {Promise<ReadyNews>} Rejects with DrawingError.
   */
  load() {
    this.#ready ??= this.#load().catch((error) => {
      this.#end();
      throw error;
    });
    return this.#ready;
  }

  /**
   * @param {DrawOrder} order
   * @param {AbortSignal} signal
   * @returns {AsyncGenerator<DrawEvent>}
   */
  async *draw(order, signal) {
    const ready = await unlessAborted(this.load(), signal);
    const id = ++this.#last;
    const mail = new Mail();
    const leave = () => mail.fail(signal.reason);
    signal.addEventListener("abort", leave);
    this.#orders.set(id, mail);
    this.#tell({
      type: "draw",
      id,
      classes: order.classes.map((one) => this.site.classes.indexOf(one)),
      seeds: order.classes.map((_, index) => order.seed + index),
      guidance: order.settings.cfg_scale,
      temperature: order.settings.temperature,
      top_k: order.settings.top_k,
      top_p: order.settings.top_p,
      every: order.every,
    });
    try {
      for await (const news of mail) {
        if (news.type === "progress") {
          const { first, count, step: tokens, num_tokens } = news;
          const done = first * num_tokens + count * tokens;
          const total = order.classes.length * num_tokens;
          yield { type: "progress", done, total, of: { first, count, tokens } };
        } else if (news.type === "preview") {
          yield { type: "preview", index: news.index, tokens: news.step, source: shown(news) };
        } else if (news.type === "picture") {
          const file = await png(news, this.#settings(order, news, ready));
          yield { type: "picture", index: news.index, file };
        } else if (news.type === "done") {
          yield { type: "done" };
          return;
        }
      }
    } finally {
      signal.removeEventListener("abort", leave);
      this.#orders.delete(id);
      // Nothing is answered where it is over already.
      if (this.#worker) this.#tell({ type: "cancel", id });
    }
  }

  /** @returns {Promise<ReadyNews>} */
  #load() {
    this.loading.begin();
    return new Promise((resolve, reject) => {
      const worker = new Worker(new URL("../engine/worker.js", import.meta.url), {
        type: "module",
      });
      this.#worker = worker;
      const failed = (/** @type {string} */ sentence) => {
        this.loading.failed(sentence);
        reject(new DrawingError(sentence));
      };
      worker.addEventListener("error", (event) => {
        event.preventDefault();
        failed(STOPPED);
        this.#fail(new DrawingError(STOPPED));
      });
      worker.addEventListener("message", async (event) => {
        /** @type {FromWorker} */
        const news = event.data;
        if (news.type === "loading") this.loading.progress(news.file, news.loaded, news.total);
        else if (news.type === "ready") {
          this.loading.ready(news);
          resolve(news);
        } else if (news.type === "error" && news.id === null) {
          if (WRONG_FILE.includes(news.code)) await forgetFiles();
          failed(news.message);
        } else this.#deliver(news);
      });
      this.#tell({
        type: "load",
        files: Object.fromEntries(
          Object.entries(this.site.files).map(([name, path]) => [name, absolute(path)]),
        ),
        runtime: runtimeOf(this.site),
      });
    });
  }

  /** @param {ToWorker} order */
  #tell(order) {
    this.#worker?.postMessage(order);
  }

  /** @param {Exclude<FromWorker, { type: "loading" | "ready" }>} news */
  #deliver(news) {
    const mail = this.#orders.get(Number(news.id));
    if (news.type !== "error") mail?.put(news);
    else if (BROKEN.includes(news.code)) this.#fail(new DrawingError(news.message));
    else mail?.fail(new DrawingError(news.message));
  }

  /**
   * End it with all that it draws; the next order starts another.
   *
   * @param {DrawingError} error
   */
  #fail(error) {
    this.#end();
    for (const mail of this.#orders.values()) mail.fail(error);
  }

  #end() {
    this.#worker?.terminate();
    this.#worker = null;
    this.#ready = null;
  }

  /**
   * Everything that draws a picture again, by the names that a PNG of `aim generate` has.
   *
   * @param {DrawOrder} order
   * @param {PictureNews} news
   * @param {ReadyNews} ready
   * @returns {Record<string, string | number>}
   */
  #settings({ classes, seed, settings }, { index }, { manifest, manifest_sha256, backend }) {
    const one = classes[index];
    if (!one) throw new RangeError("no such picture");
    const computed = ["int8", "int4"].includes(manifest.precision) ? manifest.precision : "fp32";
    return {
      class: this.site.classes.indexOf(one),
      class_name: one.name,
      seed: seed + index,
      ...Object.fromEntries(SETTINGS.map((name) => [name, settings[name]])),
      bundle: manifest.name,
      bundle_sha256: manifest_sha256,
      backend,
      precision: computed,
      version: this.site.model.aim.version,
    };
  }
}

/** @typedef {Exclude<FromWorker, ErrorNews | { type: "loading" | "ready" }>} News */

/** What one order hears, in order. */
class Mail {
  /** @type {News[]} */
  #waiting = [];
  /** @type {unknown} */
  #error = null;
  #wake = () => {};

  /** @param {News} news */
  put(news) {
    this.#waiting.push(news);
    this.#wake();
  }

  /** @param {unknown} error */
  fail(error) {
    this.#error ??= error;
    this.#wake();
  }

  /** @returns {AsyncGenerator<News>} */
  async *[Symbol.asyncIterator]() {
    for (;;) {
      if (this.#error) throw this.#error;
      const next = this.#waiting.shift();
      if (next) yield next;
      else await new Promise((resolve) => (this.#wake = () => resolve(undefined)));
    }
  }
}

/**
 * @template T
 * @param {Promise<T>} promise
 * @param {AbortSignal} signal
 * @returns {Promise<T>}
 */
function unlessAborted(promise, signal) {
  return new Promise((resolve, reject) => {
    signal.addEventListener("abort", () => reject(signal.reason), { once: true });
    promise.then(resolve, reject);
  });
}

/**
 * An address of a picture that is not finished.
 *
 * @param {{ width: number, height: number, rgba: ArrayBuffer }} image
 */
function shown({ width, height, rgba }) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [width, height];
  const pixels = new ImageData(new Uint8ClampedArray(rgba), width, height);
  canvas.getContext("2d")?.putImageData(pixels, 0, 0);
  return canvas.toDataURL();
}

/** @param {string} path */
function absolute(path) {
  return new URL(path, document.baseURI).href;
}

/** @param {Site} site */
function runtimeOf({ runtime }) {
  const { webgpu } = runtime;
  return {
    module: absolute(runtime.module),
    wasm: absolute(runtime.wasm),
    loader: absolute(runtime.loader),
    ...(webgpu && {
      webgpu: { module: absolute(webgpu.module), wasm: absolute(webgpu.wasm) },
    }),
  };
}
