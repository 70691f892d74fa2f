/**
 * Rows whose states stay in WebAssembly's memory. `InferenceSession.run` copies every input into it and
 * every output out of it, the state twice a step; here the outputs of a step are the inputs of the next,
 * by the C interface that `run` itself calls.
 */

import { EngineError, wrapped } from "./errors.js";
import { DTYPE_BYTES, concreteShape, elements } from "./parts.js";

/**
 * @import { Engine, Tensors } from "./engine.js"
 * @import { DType, TensorSpec } from "./types.js"
 * @import { WebAssemblyRuntime } from "./webassembly.js"
 *
 * @typedef {{ address: number, bytes: number, tensor: number }} Place A tensor in that memory.
 */

/** As the C interface numbers them. @type {Record<DType, number>} */
const TYPES = { float32: 1, uint8: 2, int32: 6, int64: 7, float16: 10 };
const ON_CPU = 1; // where a tensor is, there
const WARNINGS = 2;
const POINTER_BYTES = 4;

export class WasmRows {
  /** @type {Place[]} */
  #places = [];
  /** Of names and lists. @type {number[]} */
  #addresses = [];
  #options = 0;
  /** Of inputs and outputs, for even and for odd steps. @type {[number, number][]} */
  #values = [];

  /**
   * @param {Engine} engine
   * @param {WebAssemblyRuntime} memory
   * @param {Tensors} conditioning
   * @param {number} rows
   */
  constructor(engine, memory, conditioning, rows) {
    const { inputs, outputs } = engine.manifest.graphs.step;
    this.memory = memory;
    this.session = handle(engine.sessions.step);
    this.rows = rows;
    this.steps = 0;
    this.counts = [inputs.length, outputs.length];
    try {
      const given = new Map(inputs.map((spec) => [spec.name, this.#place(spec)]));
      const found = new Map(outputs.map((spec) => [spec.name, this.#place(spec)]));
      for (const [name, tensor] of Object.entries(conditioning))
        this.#fill(given.get(name), /** @type {ArrayBufferView} */ (tensor.data));
      this.token = given.get("token");
      this.position = given.get("position");
      this.logits = found.get("logits");
      this.inputNames = this.#list(inputs.map(({ name }) => this.#text(name)));
      this.outputNames = this.#list(outputs.map(({ name }) => this.#text(name)));
      // What one step writes the next one reads, and the other way round.
      this.#values.push(this.#bound(given, found));
      for (const { input, output } of engine.manifest.state) {
        const old = given.get(input);
        given.set(input, /** @type {Place} */ (found.get(output)));
        found.set(output, /** @type {Place} */ (old));
      }
      this.#values.push(this.#bound(given, found));
      this.#options = memory._OrtCreateRunOptions(WARNINGS, 0, false, 0);
    } catch (error) {
      this.dispose();
      throw wrapped(error, "memory", "There is too little memory for the model's state");
    }
  }

  /**
   * Advance every row by one token; returns the scores, a row after the other, until the next step.
   *
   * @param {number[]} tokens
   * @param {number} position Of all of them.
   * @returns {Promise<Float32Array>}
   */
  async step(tokens, position) {
    const { memory, rows, logits } = this;
    this.#fill(this.token, BigInt64Array.from(tokens, BigInt));
    this.#fill(this.position, new BigInt64Array(rows).fill(BigInt(position)));
    const [inputs, outputs] = this.#values[this.steps++ % 2] ?? [0, 0];
    const [inputCount = 0, outputCount = 0] = this.counts;
    let code = 0;
    try {
      code = await memory._OrtRun(
        this.session,
        this.inputNames ?? 0,
        inputs,
        inputCount,
        this.outputNames ?? 0,
        outputCount,
        outputs,
        this.#options,
      );
    } catch (error) {
      throw wrapped(error, "backend", "Drawing failed");
    }
    if (code || !logits) throw wrapped(lastError(memory), "backend", "Drawing failed");
    return new Float32Array(memory.HEAPU8.buffer, logits.address, logits.bytes / 4);
  }

  dispose() {
    const { memory } = this;
    for (const { address, tensor } of this.#places) {
      if (tensor) memory._OrtReleaseTensor(tensor);
      memory._free(address);
    }
    for (const address of this.#addresses) memory._free(address);
    if (this.#options) memory._OrtReleaseRunOptions(this.#options);
    this.#places = [];
    this.#addresses = [];
    this.#options = 0;
  }

  /**
   * Room for a tensor of zeros.
   *
   * @param {TensorSpec} spec
   * @returns {Place}
   */
  #place(spec) {
    const { memory, rows } = this;
    const bytes = elements(spec, rows) * DTYPE_BYTES[spec.dtype];
    const place = { address: this.#allocated(bytes), bytes, tensor: 0 };
    this.#places.push(place);
    memory.HEAPU8.fill(0, place.address, place.address + bytes);
    const shape = concreteShape(spec, rows);
    const stack = memory.stackSave();
    const sizes = memory.stackAlloc(POINTER_BYTES * shape.length);
    shape.forEach((size, axis) => memory.setValue(sizes + POINTER_BYTES * axis, size, "i32"));
    const type = TYPES[spec.dtype];
    place.tensor = memory._OrtCreateTensor(type, place.address, bytes, sizes, shape.length, ON_CPU);
    memory.stackRestore(stack);
    if (!place.tensor) throw lastError(memory);
    return place;
  }

  /**
   * @param {Place | undefined} place
   * @param {ArrayBufferView} data
   */
  #fill(place, data) {
    const bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
    if (place?.bytes !== bytes.length)
      throw new EngineError("bundle", "The bundle's graphs do not fit together.");
    this.memory.HEAPU8.set(bytes, place.address);
  }

  /**
   * The addresses of lists of all inputs and all outputs, in the order of their names.
   *
   * @param {Map<string, Place>} given
   * @param {Map<string, Place>} found
   * @returns {[number, number]}
   */
  #bound(given, found) {
    const tensors = (/** @type {Map<string, Place>} */ places) =>
      this.#list(Array.from(places.values(), ({ tensor }) => tensor));
    return [tensors(given), tensors(found)];
  }

  /** @param {number[]} pointers */
  #list(pointers) {
    const address = this.#kept(POINTER_BYTES * pointers.length);
    pointers.forEach((one, index) =>
      this.memory.setValue(address + POINTER_BYTES * index, one, "*"),
    );
    return address;
  }

  /** @param {string} text */
  #text(text) {
    const bytes = this.memory.lengthBytesUTF8(text) + 1;
    const address = this.#kept(bytes);
    this.memory.stringToUTF8(text, address, bytes);
    return address;
  }

  /** @param {number} bytes */
  #kept(bytes) {
    const address = this.#allocated(bytes);
    this.#addresses.push(address);
    return address;
  }

  /** @param {number} bytes */
  #allocated(bytes) {
    const address = this.memory._malloc(bytes);
    if (!address) throw new Error("failed to allocate");
    return address;
  }
}

/**
 * A session as the C interface knows it.
 *
 * @param {object} session
 */
function handle(session) {
  const { handler } = /** @type {{ handler?: { sessionId?: number } }} */ (session);
  if (!handler?.sessionId) throw new Error("this ONNX Runtime is another than the one that was pinned");
  return handler.sessionId;
}

/** @param {WebAssemblyRuntime} memory */
function lastError(memory) {
  const stack = memory.stackSave();
  const places = memory.stackAlloc(2 * POINTER_BYTES);
  memory._OrtGetLastError(places, places + POINTER_BYTES);
  const message = memory.UTF8ToString(memory.getValue(places + POINTER_BYTES, "*"));
  memory.stackRestore(stack);
  return new Error(message);
}
