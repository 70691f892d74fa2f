/**
 * The parts of a manifest, made from a stranger's JSON: every key known and present, every number in a
 * sane range. The Python runtime's `aim_runtime/bundle/parts.py` says the same.
 */

import { CheckedJson } from "./checked_json.js";
import { shown } from "./quoting.js";

/**
 * @import { JsonValue } from "./strict_json.js"
 * @import { DType, FileEntry, GraphSpec, ModelCard, SamplingOptions, StatePair, TensorSpec }
 *   from "./types.js"
 */

export const MAX_CFG_SCALE = 1000;

/** @type {Record<DType, number>} */
export const DTYPE_BYTES = { float32: 4, float16: 2, int64: 8, int32: 4, uint8: 1 };

const MAX_FILE_BYTES = 64 * 2 ** 30;
const MAX_FILES = 1024;
const MAX_TENSOR_BYTES_PER_ROW = 2 ** 30;

const FILE_NAME = /^[A-Za-z0-9](?:[A-Za-z0-9._-]{0,126}[A-Za-z0-9_-])?$/;
const TENSOR_NAME = /^[A-Za-z_][A-Za-z0-9_./:-]{0,127}$/;
const SHA256 = /^[0-9a-f]{64}$/;
const UNPRINTABLE = /[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]/u;

export const JSON_OF_MANIFEST = new CheckedJson("the manifest");
const JSON_ = JSON_OF_MANIFEST;

/** @param {string} name */
export function isPlainFileName(name) {
  return FILE_NAME.test(name) && name.toLowerCase() !== "manifest.json";
}

/** @param {string} name */
export function isEngineFileName(name) {
  const [folder, ...rest] = name.split("/");
  return folder === "engines" && rest.length === 2 && rest.every(isPlainFileName);
}

/** @param {TensorSpec[]} specs */
export function byName(specs) {
  return new Map(specs.map((spec) => [spec.name, spec]));
}

/**
 * @param {TensorSpec} spec
 * @param {number} rows
 */
export function elements(spec, rows) {
  return concreteShape(spec, rows).reduce((product, size) => product * size, 1);
}

/**
 * @param {TensorSpec} spec
 * @param {number} rows
 * @returns {number[]}
 */
export function concreteShape(spec, rows) {
  return spec.shape.map((size) => (size === "rows" ? rows : size));
}

/** @param {TensorSpec} spec */
export function bytesPerRow(spec) {
  return elements(spec, 1) * DTYPE_BYTES[spec.dtype];
}

/**
 * A text without control characters.
 *
 * @param {JsonValue | undefined} value
 * @param {string} where
 * @param {number} [limit]
 * @param {boolean} [empty]
 */
export function textFromJson(value, where, limit = 256, empty = false) {
  const long = typeof value === "string" && value.length > limit && [...value].length > limit;
  if (typeof value !== "string" || long || !(value.trim() || empty))
    throw JSON_.wrong(where, value, `a text of ${empty ? 0 : 1} to ${limit} characters`);
  if (UNPRINTABLE.test(value))
    throw JSON_.wrong(where, value, "a text without control characters or broken surrogates");
  return value;
}

/** @type {[Exclude<keyof ModelCard, "conditioning">, number, number][]} */
const MODEL_RANGES = [
  ["d_model", 1, 2 ** 16],
  ["num_layers", 1, 2 ** 12],
  ["d_state", 1, 2 ** 16],
  ["head_dim", 1, 2 ** 16],
  ["conv_width", 1, 2 ** 8],
  ["vocab_size", 1, 2 ** 24],
  ["num_classes", 1, 2 ** 20],
  ["num_tokens", 1, 2 ** 16],
  ["image_height", 1, 2 ** 14],
  ["image_width", 1, 2 ** 14],
  ["position_offset", 0, 1],
  ["parameters", 0, 2 ** 44],
  ["decoder_parameters", 0, 2 ** 44],
];

/**
 * The model's geometry, whose tokens must cut an image into squares.
 *
 * @param {JsonValue} value
 * @returns {ModelCard}
 */
export function modelFromJson(value) {
  const keys = MODEL_RANGES.map(([name]) => name);
  const found = JSON_.fields(value, "model", [...keys, "conditioning"]);
  const numbers = MODEL_RANGES.map(([name, low, high]) => [
    name,
    JSON_.integer(found[name], `model.${name}`, low, high),
  ]);
  /** @type {("adaln" | "adaln-group")[]} */
  const kinds = ["adaln", "adaln-group"];
  const conditioning = JSON_.choice(found.conditioning, "model.conditioning", kinds);
  /** @type {ModelCard} */
  const model = { ...Object.fromEntries(numbers), conditioning };
  if (!tokenSide(model))
    throw JSON_.error(
      `'s model.num_tokens is ${model.num_tokens}, which does not cut an image of ` +
        `${model.image_height}x${model.image_width} pixels into equal squares`,
    );
  return model;
}

/**
 * Side in pixels of the square that one token stands for; 0 if there is no such square.
 *
 * @param {ModelCard} model
 */
export function tokenSide({ image_height, image_width, num_tokens }) {
  const side = Math.sqrt((image_height * image_width) / num_tokens);
  const fits = Number.isInteger(side) && image_height % side === 0 && image_width % side === 0;
  return fits ? side : 0;
}

/**
 * @param {JsonValue | undefined} value
 * @param {string} where
 * @param {number} most Inputs, and as many outputs.
 * @param {CheckedJson} [document]
 * @returns {GraphSpec}
 */
export function graphFromJson(value, where, most, document = JSON_) {
  const found = document.fields(value, where, ["file", "weights", "inputs", "outputs"]);
  return {
    file: fileName(found.file, `${where}.file`, document),
    weights: fileName(found.weights, `${where}.weights`, document),
    inputs: tensors(found.inputs, `${where}.inputs`, most, document),
    outputs: tensors(found.outputs, `${where}.outputs`, most, document),
  };
}

/**
 * @param {JsonValue} value
 * @param {string} where
 * @param {CheckedJson} document
 */
function fileName(value, where, document) {
  if (typeof value !== "string" || !isPlainFileName(value))
    throw document.wrong(
      where,
      value,
      "a plain file name inside the bundle: letters, digits and ._- only, no folders",
    );
  return value;
}

/**
 * @param {JsonValue} value
 * @param {string} where
 * @param {number} most
 * @param {CheckedJson} document
 */
function tensors(value, where, most, document) {
  const specs = document
    .items(value, where, 1, most)
    .map((item, index) => tensor(item, `${where}[${index}]`, document));
  if (byName(specs).size !== specs.length) throw document.error(`'s ${where} names a tensor twice`);
  return specs;
}

/**
 * @param {JsonValue} value
 * @param {string} where
 * @param {CheckedJson} document
 * @returns {TensorSpec}
 */
function tensor(value, where, document) {
  const found = document.fields(value, where, ["name", "dtype", "shape"]);
  const [rows, ...rest] = document.items(found.shape, `${where}.shape`, 1, 8);
  if (rows !== "rows") throw document.wrong(`${where}.shape[0]`, rows, 'the symbol "rows"');
  const sizes = rest.map((size, index) =>
    document.integer(size, `${where}.shape[${index + 1}]`, 1, 2 ** 30),
  );
  const dtypes = /** @type {DType[]} */ (Object.keys(DTYPE_BYTES));
  /** @type {TensorSpec} */
  const spec = {
    name: tensorName(found.name, `${where}.name`, document),
    dtype: document.choice(found.dtype, `${where}.dtype`, dtypes),
    shape: ["rows", ...sizes],
  };
  if (bytesPerRow(spec) > MAX_TENSOR_BYTES_PER_ROW)
    throw document.error(
      `'s ${where} takes ${BigInt(bytesPerRow(spec))} bytes a row; ` +
        `at most ${MAX_TENSOR_BYTES_PER_ROW} are allowed`,
    );
  return spec;
}

/**
 * @param {JsonValue} value
 * @param {string} where
 * @param {CheckedJson} document
 */
export function tensorName(value, where, document) {
  return document.matching(value, where, TENSOR_NAME, "a plain tensor name");
}

/**
 * @param {JsonValue} value
 * @param {string} where
 * @param {CheckedJson} [document]
 * @returns {StatePair}
 */
export function statePairFromJson(value, where, document = JSON_) {
  const found = document.fields(value, where, ["input", "output"]);
  return {
    input: tensorName(found.input, `${where}.input`, document),
    output: tensorName(found.output, `${where}.output`, document),
  };
}

/**
 * The settings that the bundle's author recommends.
 *
 * @param {JsonValue} value
 * @returns {SamplingOptions}
 */
export function samplingFromJson(value) {
  const keys = /** @type {const} */ (["cfg_scale", "temperature", "top_k", "top_p"]);
  const found = JSON_.fields(value, "sampling", keys);
  const top_p = JSON_.number(found.top_p, "sampling.top_p", 0, 1);
  if (top_p === 0)
    throw JSON_.wrong("sampling.top_p", found.top_p, "a number above 0, up to 1");
  return {
    cfg_scale: JSON_.number(found.cfg_scale, "sampling.cfg_scale", 0, MAX_CFG_SCALE),
    temperature: JSON_.number(found.temperature, "sampling.temperature", 0, 1000),
    top_k: JSON_.integer(found.top_k, "sampling.top_k", 0, 2 ** 24),
    top_p,
  };
}

/**
 * The table of files in this version of the format.
 *
 * @param {JsonValue} value
 * @param {number} version
 */
export function filesFromJson(value, version) {
  const allowed = `an object of at most ${MAX_FILES} keys`;
  const entries = Object.entries(JSON_.object(value, "files", allowed));
  if (entries.length > MAX_FILES) throw JSON_.wrong("files", value, allowed);
  /** @type {Record<string, FileEntry>} */
  const files = Object.create(null);
  for (const [name, entry] of entries) {
    if (version < 2 || !isEngineFileName(name)) fileName(name, "files key", JSON_);
    const where = `files[${shown(name)}]`;
    const found = JSON_.fields(entry, where, ["sha256", "size"]);
    files[name] = {
      sha256: JSON_.matching(
        found.sha256,
        `${where}.sha256`,
        SHA256,
        "64 lower-case hexadecimal digits",
      ),
      size: JSON_.integer(found.size, `${where}.size`, 0, MAX_FILE_BYTES),
    };
  }
  if (new Set(entries.map(([name]) => name.toLowerCase())).size !== entries.length)
    throw JSON_.error("'s files holds two names that differ only in case");
  return files;
}
