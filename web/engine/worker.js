/** The worker: messages in, messages out (`types.js`), one drawing at a time. */

import { Bundle } from "./bundle.js";
import { RUNTIME } from "./download.js";
import { draw } from "./drawing.js";
import { Engine } from "./engine.js";
import { EngineError, wrapped } from "./errors.js";
import { checkedOrder } from "./order.js";
import { rehearse } from "./rehearsal.js";
import { loadRuntime } from "./runtime.js";

/** @import { DrawOrder, FromWorker, LoadOrder, ToWorker } from "./types.js" */

/** @type {Engine | null} */
let engine = null;
/** @type {Promise<void>} */
let queue = Promise.resolve();
let loading = false;
/**
 * Orders that wait or are being drawn; false once they are cancelled.
 *
 * @type {Map<number | string, boolean>}
 */
const orders = new Map();

self.onmessage = ({ data }) => receive(data);

/** @param {ToWorker} message */
function receive(message) {
  if (message.type === "cancel") {
    if (orders.has(message.id)) orders.set(message.id, false);
  } else if (message.type === "load") {
    if (loading) return fail(null, new EngineError("request", "the worker has a model already"));
    loading = true;
    queue = queue
      .then(() => load(message))
      .then(rehearsed)
      .catch((error) => fail(null, error));
  } else if (message.type === "draw") {
    const { id } = message;
    if (orders.has(id))
      return fail(id, new EngineError("request", "an order of that id is being drawn"));
    orders.set(id, true);
    queue = queue
      .then(() => drawn(message))
      .catch((error) => fail(id, error))
      .finally(() => orders.delete(id));
  }
}

/** @param {LoadOrder} order */
async function load({ files, runtime: wanted, threads = 0, backend = "auto" }) {
  /** @type {(file: string, loaded: number, total: number) => void} */
  const progress = (file, loaded, total) => say({ type: "loading", file, loaded, total });
  const [bundle, runtime] = await Promise.all([
    Bundle.open(files, progress).then((opened) => {
      const { prologue, decoder, step } = opened.manifest.graphs;
      opened.prefetch([prologue.weights, decoder.weights, step.weights]);
      return opened;
    }),
    loadRuntime(wanted, backend, threads, (loaded, total) => progress(RUNTIME, loaded, total)),
  ]);
  engine = await Engine.load(bundle, runtime);
  const { step, decoder } = engine.manifest.graphs;
  say({
    type: "ready",
    manifest: bundle.manifest,
    manifest_sha256: bundle.sha256,
    backend: runtime.backend,
    threads: runtime.threads,
    graphs: { step: step.file, decoder: decoder.file },
    note: runtime.note,
  });
}

/** So that the first picture takes no longer than others. */
async function rehearsed() {
  const idle = () => orders.size === 0;
  // What fails here fails for whoever orders something, who is told then.
  if (engine) await rehearse(engine, idle).catch(() => {});
}

/** @param {DrawOrder} order */
async function drawn(order) {
  const { id } = order;
  if (!engine) throw new EngineError("request", "No model is loaded.");
  const checked = checkedOrder(order, engine.manifest);
  const began = performance.now();
  const wanted = () => orders.get(id) === true;
  if (wanted())
    for await (const news of draw(engine, checked)) {
      if (!wanted()) break;
      say({ ...news, id }, "rgba" in news ? [news.rgba] : []);
    }
  if (wanted()) say({ type: "done", id, seconds: (performance.now() - began) / 1000 });
  else say({ type: "cancelled", id });
}

/**
 * @param {number | string | null} id
 * @param {unknown} error
 */
function fail(id, error) {
  const { code, message, file } = wrapped(error, "backend", "Drawing in this browser failed");
  say({ type: "error", id, code, message: sentence(message), ...(file && { file }) });
}

/**
 * @param {FromWorker} message
 * @param {Transferable[]} [transfer]
 */
function say(message, transfer = []) {
  self.postMessage(message, { transfer });
}

/** @param {string} text */
function sentence(text) {
  // Names of files stay as they are.
  const capital = /^[a-z]+[ ']/.test(text) ? text.charAt(0).toUpperCase() + text.slice(1) : text;
  const line = capital.length > 300 ? `${capital.slice(0, 296)}...` : capital;
  return /[.!?]$/.test(line) ? line : `${line}.`;
}
