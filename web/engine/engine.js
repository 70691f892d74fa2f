/** The three graphs of a bundle, loaded: prologue, step and decoder. */

import { EngineError, wrapped } from "./errors.js";
import { FEW_BITS } from "./manifest.js";
import { concreteShape, elements } from "./parts.js";
import { WasmRows } from "./wasm_rows.js";
import { startedRuntime } from "./webassembly.js";

/**
 * @import { InferenceSession, Tensor } from "onnxruntime-web"
 * @import { Bundle } from "./bundle.js"
 * @import { Ort, Runtime } from "./runtime.js"
 * @import { GraphSpec, Manifest, TensorSpec } from "./types.js"
 *
 * @typedef {{ prologue: InferenceSession, step: InferenceSession, decoder: InferenceSession }} Sessions
 * @typedef {Record<string, Tensor>} Tensors
 */

export class Engine {
  /**
   * @param {Manifest} manifest Of the graphs that are loaded.
   * @param {Runtime} runtime
   * @param {Sessions} sessions
   */
  constructor(manifest, runtime, sessions) {
    this.manifest = manifest;
    this.runtime = runtime;
    this.sessions = sessions;
    /** What decoding the last image took, in ms; null before the first. @type {number | null} */
    this.decodeMs = null;
  }

  /**
   * Load a bundle; its files come while the first graphs are made ready.
   *
   * @param {Bundle} bundle
   * @param {Runtime} runtime
   */
  static async load(bundle, runtime) {
    const plain = bundle.manifest;
    if (runtime.backend === "webgpu") return Engine.#load(bundle, plain, runtime);
    const manifest = await bundle.forCpu(runtime.ort.env.versions.web ?? "0.0");
    try {
      return await Engine.#load(bundle, manifest, runtime);
    } catch (error) {
      // Built with fewer operators than it should have: the plain graphs need none of them.
      if (manifest === plain || !(error instanceof EngineError) || error.code !== "bundle")
        throw error;
      return Engine.#load(bundle, plain, runtime);
    }
  }

  /**
   * @param {Bundle} bundle
   * @param {Manifest} manifest
   * @param {Runtime} runtime
   */
  static async #load(bundle, manifest, runtime) {
    const { prologue, step, decoder } = manifest.graphs;
    bundle.prefetch([prologue, decoder, step].flatMap(({ file, weights }) => [file, weights]));
    /** @type {InferenceSession[]} */
    const made = [];
    try {
      // One after the other: what was loaded is let go before the next needs room.
      for (const graph of [prologue, decoder, step]) {
        const options = {
          outputs: stays(graph, manifest),
          often: graph !== prologue || !FEW_BITS.includes(manifest.precision),
          asIs: graph === decoder && decoder !== bundle.manifest.graphs.decoder,
        };
        made.push(await session(bundle, graph, runtime, options));
      }
    } catch (error) {
      await Promise.all(made.map((one) => one.release()));
      throw error;
    }
    const [first, second, third] = /** @type {[InferenceSession, InferenceSession, InferenceSession]} */ (
      made
    );
    return new Engine(manifest, runtime, { prologue: first, decoder: second, step: third });
  }

  /**
   * The conditioning of these classes, a row each.
   *
   * @param {number[]} classIds
   * @returns {Promise<Tensors>}
   */
  async prologue(classIds) {
    const rows = classIds.length;
    const feeds = { class_id: integers(this.runtime.ort, classIds, [rows]) };
    return run(this.sessions.prologue, feeds, this.manifest.graphs.prologue, rows);
  }

  /**
   * Rows that begin an image each.
   *
   * @param {number[]} classIds
   */
  async begin(classIds) {
    const conditioning = await this.prologue(classIds);
    const memory = startedRuntime();
    if (memory) return new WasmRows(this, memory, conditioning, classIds.length);
    return new Rows(this, conditioning, classIds.length);
  }

  /**
   * The pixels of one image: height rows of width pixels of red, green, blue and 255.
   *
   * @param {ArrayLike<number>} tokens
   */
  async decode(tokens) {
    const { ort } = this.runtime;
    const began = performance.now();
    const feeds = { tokens: integers(ort, Array.from(tokens), [1, tokens.length]) };
    const { image } = await run(this.sessions.decoder, feeds, this.manifest.graphs.decoder, 1);
    const rgb = /** @type {Uint8Array} */ (await image?.getData());
    image?.dispose();
    this.decodeMs = performance.now() - began;
    const rgba = new Uint8ClampedArray((rgb.length / 3) * 4).fill(255);
    for (let from = 0, to = 0; from < rgb.length; to++) // alpha stays
      if (to % 4 !== 3) rgba[to] = rgb[from++] ?? 0;
    return rgba;
  }

  /** Give the memory back; the object is useless afterwards. */
  async dispose() {
    await Promise.all(Object.values(this.sessions).map((one) => one.release()));
  }
}

/** Rows that advance together, each with its state, which stays where the step computes. */
export class Rows {
  /**
   * @param {Engine} engine
   * @param {Tensors} conditioning
   * @param {number} rows
   */
  constructor(engine, conditioning, rows) {
    const { graphs, state } = engine.manifest;
    this.engine = engine;
    this.rows = rows;
    this.conditioning = conditioning;
    /** @type {Tensors} */
    this.states = {};
    for (const spec of graphs.step.inputs)
      if (state.some(({ input }) => input === spec.name))
        this.states[spec.name] = zeros(engine.runtime.ort, spec, rows);
  }

  /**
   * Advance every row by one token; returns the scores, a row after the other.
   *
   * @param {number[]} tokens
   * @param {number} position Of all of them.
   * @returns {Promise<Float32Array>}
   */
  async step(tokens, position) {
    const { engine, rows } = this;
    const { ort } = engine.runtime;
    const feeds = {
      token: integers(ort, tokens, [rows]),
      position: integers(ort, Array(rows).fill(position), [rows]),
      ...this.conditioning,
      ...this.states,
    };
    const found = await run(engine.sessions.step, feeds, engine.manifest.graphs.step, rows);
    const old = this.states;
    this.states = {};
    for (const { input, output } of engine.manifest.state) {
      const value = found[output];
      if (value) this.states[input] = value;
    }
    dispose(old);
    return /** @type {Float32Array} */ (await found.logits?.getData());
  }

  dispose() {
    dispose(this.states);
    dispose(this.conditioning);
  }
}

/**
 * Where the outputs of a graph stay, under WebGPU: what the step reads again never leaves the GPU.
 *
 * @param {GraphSpec} graph
 * @param {Manifest} manifest
 * @returns {Record<string, "cpu" | "gpu-buffer">}
 */
function stays(graph, manifest) {
  const back = graph === manifest.graphs.decoder ? ["image"] : ["logits"];
  return Object.fromEntries(
    graph.outputs.map(({ name }) => [name, back.includes(name) ? "cpu" : "gpu-buffer"]),
  );
}

/**
 * @param {Bundle} bundle
 * @param {GraphSpec} graph
 * @param {Runtime} runtime
 * @param {object} options
 * @param {Record<string, "cpu" | "gpu-buffer">} options.outputs Where they stay, under WebGPU.
 * @param {boolean} options.often Weights of few bits that it makes float32 of are made so once.
 * @param {boolean} options.asIs It was made to be run as it is: looking for a better graph takes longer
 *   than running this one.
 */
async function session(bundle, graph, { ort, backend }, { outputs, often, asIs }) {
  const [model, weights] = await Promise.all([bundle.read(graph.file), bundle.read(graph.weights)]);
  try {
    return await ort.InferenceSession.create(model, {
      executionProviders: [backend],
      graphOptimizationLevel: asIs ? "disabled" : "all",
      logSeverityLevel: 3, // errors: a page's console is not the place for warnings of graphs
      externalData: weights.length ? [{ path: graph.weights, data: weights }] : [],
      extra: { session: { disable_quant_qdq: often ? "1" : "0", load_model_format: "ONNX" } },
      ...(backend === "webgpu" && { preferredOutputLocation: outputs }),
    });
  } catch (error) {
    if (String(error).includes("no available backend"))
      throw wrapped(error, "browser", "ONNX Runtime does not start in this browser");
    throw wrapped(error, "bundle", `${graph.file} is not a graph that runs in this browser`);
  }
}

/**
 * @param {InferenceSession} session
 * @param {Tensors} feeds
 * @param {GraphSpec} graph
 * @param {number} rows
 * @returns {Promise<Tensors>}
 */
async function run(session, feeds, graph, rows) {
  /** @type {Tensors} */
  let found;
  try {
    found = await session.run(feeds);
  } catch (error) {
    throw wrapped(error, "backend", "Drawing failed");
  }
  for (const spec of graph.outputs) {
    const dims = found[spec.name]?.dims ?? [];
    const wanted = concreteShape(spec, rows);
    if (dims.join() !== wanted.join())
      throw new EngineError(
        "bundle",
        `${graph.file} returned ${spec.name} of shape [${dims}]; its manifest says [${wanted}]`,
      );
  }
  return found;
}

/**
 * @param {Ort} ort
 * @param {number[]} values
 * @param {number[]} shape
 */
function integers(ort, values, shape) {
  return new ort.Tensor("int64", BigInt64Array.from(values, BigInt), shape);
}

const ARRAYS = {
  float32: Float32Array,
  float16: Uint16Array,
  int64: BigInt64Array,
  int32: Int32Array,
  uint8: Uint8Array,
};

/**
 * @param {Ort} ort
 * @param {TensorSpec} spec
 * @param {number} rows
 * @returns {Tensor}
 */
function zeros(ort, spec, rows) {
  try {
    const data = new ARRAYS[spec.dtype](elements(spec, rows));
    return new ort.Tensor(spec.dtype, data, concreteShape(spec, rows));
  } catch (error) {
    throw wrapped(error, "memory", "There is too little memory for the model's state");
  }
}

/** @param {Tensors} tensors */
function dispose(tensors) {
  for (const tensor of Object.values(tensors)) tensor.dispose();
}
