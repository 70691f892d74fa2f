/**
 * ONNX Runtime's WebAssembly, and its memory.
 *
 * ONNX Runtime imports this module in the place of its loader, which it calls. It compiles the answer of
 * an address, and not bytes: so the code that the browser has optimised is kept with what it keeps of
 * that address, and a later visit begins with it, where the first one's steps take three times as long
 * until it is there.
 */

import { RUNTIME, download } from "./download.js";

/**
 * @import { Progress } from "./download.js"
 *
 * @typedef {object} WebAssemblyRuntime What ONNX Runtime's loader makes, as far as it is used here.
 * @property {Uint8Array<ArrayBuffer>} HEAPU8 Of all of its memory; another one when that has grown.
 * @property {(bytes: number) => number} _malloc
 * @property {(address: number) => void} _free
 * @property {() => number} stackSave
 * @property {(stack: number) => void} stackRestore
 * @property {(bytes: number) => number} stackAlloc
 * @property {(address: number, type: string) => number} getValue
 * @property {(address: number, value: number, type: string) => void} setValue
 * @property {(text: string) => number} lengthBytesUTF8
 * @property {(text: string, address: number, most: number) => void} stringToUTF8
 * @property {(address: number) => string} UTF8ToString
 * @property {(type: number, address: number, bytes: number, sizes: number, rank: number, location: number) => number} _OrtCreateTensor
 * @property {(tensor: number) => number} _OrtReleaseTensor
 * @property {(severity: number, verbosity: number, terminate: boolean, tag: number) => number} _OrtCreateRunOptions
 * @property {(options: number) => number} _OrtReleaseRunOptions
 * @property {(session: number, inputNames: number, inputs: number, inputCount: number, outputNames: number, outputCount: number, outputs: number, options: number) => number | Promise<number>} _OrtRun
 * @property {(code: number, message: number) => void} _OrtGetLastError
 *
 * @typedef {(imports: WebAssembly.Imports, done: (instance: WebAssembly.Instance, module: WebAssembly.Module) => void) => object} Instantiate
 * @typedef {(options: object & { instantiateWasm?: Instantiate }) => Promise<WebAssemblyRuntime>} Loader
 */

export const MAX_WASM_BYTES = 2 ** 28;

/** @type {{ loader: Loader, wasm: string, bytes: Uint8Array<ArrayBuffer> } | null} */
let prepared = null;
/** @type {WebAssemblyRuntime | null} */
let started = null;

/**
 * Download for a loader; returns the URL to name to ONNX Runtime in that one's place.
 *
 * @param {Loader} loader
 * @param {string} wasm
 * @param {Progress} progress
 */
export async function prepare(loader, wasm, progress) {
  prepared = { loader, wasm, bytes: await download(RUNTIME, wasm, MAX_WASM_BYTES, progress) };
  return import.meta.url;
}

/** What runs, once a first graph is loaded; null where ONNX Runtime did without this module. */
export function startedRuntime() {
  return started;
}

/**
 * @param {object} options
 * @returns {Promise<WebAssemblyRuntime>}
 */
export default async function start(options) {
  if (!prepared) throw new Error("nothing was prepared");
  const { loader, wasm, bytes } = prepared;
  prepared = null;
  const module = await compiled(wasm, bytes);
  /** @type {Promise<WebAssemblyRuntime>} */
  const running = new Promise((resolve, reject) => {
    const instantiateWasm = (
      /** @type {WebAssembly.Imports} */ imports,
      /** @type {(instance: WebAssembly.Instance, module: WebAssembly.Module) => void} */ done,
    ) => {
      // Nothing else hears of it where there is no memory.
      WebAssembly.instantiate(module, imports).then((made) => done(made, module), reject);
      return {};
    };
    loader({ ...options, instantiateWasm }).then(resolve, reject);
  });
  started = await running;
  return started;
}

/**
 * The answer is fetched once more, of what is kept: a service worker makes the first one up while it
 * keeps the file, and browsers keep no code with such an answer.
 *
 * @param {string} url
 * @param {Uint8Array<ArrayBuffer>} bytes For hosts that call it something else, or where nothing is kept.
 */
async function compiled(url, bytes) {
  try {
    return await WebAssembly.compileStreaming(fetch(url, { cache: "force-cache" }));
  } catch {
    return WebAssembly.compile(bytes);
  }
}
