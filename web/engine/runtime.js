/** ONNX Runtime in a browser: which of its builds can run here, with how many threads. */

import { RUNTIME, download } from "./download.js";
import { EngineError, wrapped } from "./errors.js";
import { MAX_WASM_BYTES, prepare } from "./webassembly.js";

/**
 * @import * as ONNXRuntime from "onnxruntime-web"
 * @import { Progress } from "./download.js"
 * @import { Backend, RuntimeFiles } from "./types.js"
 *
 * @typedef {typeof ONNXRuntime} Ort
 *
 * @typedef {object} Runtime
 * @property {Ort} ort
 * @property {"wasm" | "webgpu"} backend
 * @property {number} threads
 * @property {string} note Why not the best; "" if it is.
 */

// Products of one image's rows are too small for more.
const MOST_THREADS = 8;

// A module of one function that multiplies vectors of 16-bit numbers.
const SIMD = Uint8Array.of(
  ...[0, 97, 115, 109, 1, 0, 0, 0, 1, 4, 1, 96, 0, 0, 3, 2, 1, 0, 10, 30, 1, 28, 0, 65, 0, 253],
  ...[15, 253, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 253, 186, 1, 26, 11],
);

/**
 * Load ONNX Runtime. Once in the life of a worker.
 *
 * @param {RuntimeFiles} files
 * @param {Backend} wanted
 * @param {number} threads 0 for as many as are of use.
 * @param {Progress} progress
 * @returns {Promise<Runtime>}
 */
export async function loadRuntime(files, wanted, threads, progress) {
  checkBrowser();
  const reason = await webgpuLacking(files);
  if (wanted === "webgpu" && reason) throw new EngineError("browser", reason);
  const backend = wanted === "wasm" || reason ? "wasm" : "webgpu";
  const { webgpu } = files;
  // One after the other: modules are small, and a name that is wrong is found before megabytes.
  /** @type {Ort} */
  const ort = await imported(backend === "webgpu" && webgpu ? webgpu.module : files.module);
  if (backend === "webgpu" && webgpu) {
    const binary = await download(RUNTIME, webgpu.wasm, MAX_WASM_BYTES, progress);
    ort.env.wasm.wasmBinary = binary.buffer;
  } else {
    const { default: loader } = await imported(files.loader);
    ort.env.wasm.wasmPaths = { mjs: await prepare(loader, files.wasm, progress) };
  }
  ort.env.wasm.numThreads = threadsFor(threads);
  ort.env.logLevel = "error";
  return { ort, backend, threads: ort.env.wasm.numThreads, note: wanted === "auto" ? reason : "" };
}

function checkBrowser() {
  if (typeof WebAssembly === "undefined")
    throw new EngineError(
      "browser",
      "This browser has no WebAssembly, or it is switched off, and cannot draw here; a current one can.",
    );
  if (!WebAssembly.validate(SIMD))
    throw new EngineError(
      "browser",
      "This browser's WebAssembly has no SIMD, which drawing needs; update it, or use a current one.",
    );
}

/**
 * Why WebGPU is not to be had, in a sentence; "" if it is.
 *
 * @param {RuntimeFiles} files
 */
async function webgpuLacking(files) {
  if (!files.webgpu) return "This page was built without WebGPU.";
  const gpu = /** @type {{ gpu?: { requestAdapter(): Promise<unknown> } }} */ (
    globalThis.navigator ?? {}
  ).gpu;
  if (!gpu) return "This browser has no WebGPU.";
  const adapter = await gpu.requestAdapter().catch(() => null);
  return adapter ? "" : "This browser has WebGPU, but no GPU that it may use.";
}

/** @param {number} wanted */
function threadsFor(wanted) {
  // Threads share memory, which only pages get that keep strangers out.
  if (!globalThis.crossOriginIsolated || typeof SharedArrayBuffer === "undefined") return 1;
  return wanted || Math.min(globalThis.navigator?.hardwareConcurrency || 1, MOST_THREADS);
}

/** @param {string} url */
async function imported(url) {
  try {
    return await import(url);
  } catch (error) {
    throw wrapped(error, "network", "ONNX Runtime's module cannot be loaded");
  }
}
