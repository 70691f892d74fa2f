/**
 * What a bundle says about itself, checked before anything else is read: `Manifest.from_json` of the
 * Python runtime, with its refusals and its sentences.
 */

import { EngineError } from "./errors.js";
import { isObject } from "./checked_json.js";
import { MAX_GRAPH_BYTES, maxTensors, maxWeightsBytes } from "./limits.js";
import { JsonNumber } from "./strict_json.js";
import {
  JSON_OF_MANIFEST,
  bytesPerRow,
  byName,
  filesFromJson,
  graphFromJson,
  modelFromJson,
  samplingFromJson,
  statePairFromJson,
  textFromJson,
} from "./parts.js";
import { shortened, shown } from "./quoting.js";

/**
 * @import { CheckedJson } from "./checked_json.js"
 * @import { JsonValue } from "./strict_json.js"
 * @import { GraphSpec, Manifest, StatePair, TensorSpec } from "./types.js"
 * @typedef {"prologue" | "step" | "decoder"} GraphName
 */

export const FORMAT_VERSION = 3;
export const MAX_MANIFEST_BYTES = 4 * 2 ** 20;

const MAX_STATE_BYTES_PER_ROW = 4 * 2 ** 30;
const MAX_PROVENANCE_DEPTH = 8;
const MAX_PROVENANCE_ITEMS = 2 ** 14;
/** @type {GraphName[]} */
const GRAPHS = ["prologue", "step", "decoder"];
const PRECISIONS = ["fp32", "fp16"];
export const FEW_BITS = ["int8", "int4"];
const KEYS = /** @type {const} */ ([
  "format",
  "format_version",
  "name",
  "description",
  "license",
  "model",
  "graphs",
  "state",
  "sampling",
  "class_names",
  "precision",
  "provenance",
  "files",
]);

const JSON_ = JSON_OF_MANIFEST;

/**
 * Parse and check a manifest. Throws EngineError for anything that is not one.
 *
 * @param {string} text
 * @returns {Manifest}
 */
export function manifestFromJson(text) {
  const value = JSON_.parse(text, MAX_MANIFEST_BYTES);
  if (!isObject(value) || value.format !== "aim-bundle")
    throw JSON_.error(' is not one of a bundle: it lacks "format": "aim-bundle"');
  const version = JSON_.integer(value.format_version, "format_version", 1, 2 ** 31);
  if (version > FORMAT_VERSION)
    throw new EngineError(
      "newer",
      `the bundle was made by a newer aim-runtime (bundle format ${version}, this page reads up to ` +
        `${FORMAT_VERSION}); build the page again with that aim-runtime`,
    );
  const top = JSON_.fields(value, "top level", KEYS);
  const model = modelFromJson(top.model);
  const most = maxTensors(model);
  const graphs = JSON_.fields(top.graphs, "graphs", GRAPHS);
  /** @type {Manifest} */
  const manifest = {
    format: "aim-bundle",
    format_version: version,
    name: textFromJson(top.name, "name"),
    description: textFromJson(top.description, "description", 4096, true),
    license: textFromJson(top.license, "license", 1024, true),
    model,
    graphs: {
      prologue: graphFromJson(graphs.prologue, "graphs.prologue", most),
      step: graphFromJson(graphs.step, "graphs.step", most),
      decoder: graphFromJson(graphs.decoder, "graphs.decoder", most),
    },
    state: JSON_.items(top.state, "state", 1, most).map((item, index) =>
      statePairFromJson(item, `state[${index}]`),
    ),
    sampling: samplingFromJson(top.sampling),
    class_names: JSON_.items(top.class_names, "class_names", 1, 2 ** 20).map((item, index) =>
      textFromJson(item, `class_names[${index}]`, 1024),
    ),
    precision: JSON_.choice(top.precision, "precision", [
      ...PRECISIONS,
      ...(version >= 3 ? FEW_BITS : []),
    ]),
    provenance: provenanceFromJson(top.provenance),
    files: filesFromJson(top.files, version),
  };
  checkConsistency(manifest);
  return manifest;
}

/** @param {JsonValue} value */
function provenanceFromJson(value) {
  let items = 0;
  /**
   * @param {JsonValue} item
   * @param {string} where
   * @param {number} depth
   * @returns {unknown}
   */
  function plain(item, where, depth) {
    if (++items > MAX_PROVENANCE_ITEMS)
      throw JSON_.error(`'s provenance holds more than ${MAX_PROVENANCE_ITEMS} values`);
    if (depth > MAX_PROVENANCE_DEPTH)
      throw JSON_.error(`'s provenance is nested more than ${MAX_PROVENANCE_DEPTH} levels deep`);
    if (Array.isArray(item))
      return item.map((inner, index) => plain(inner, `${where}[${index}]`, depth + 1));
    if (isObject(item)) {
      const found = Object.create(null);
      for (const [key, inner] of Object.entries(item)) {
        textFromJson(key, `${where} key`, 128);
        found[key] = plain(inner, `${where}.${key}`, depth + 1);
      }
      return found;
    }
    if (typeof item === "string") return textFromJson(item, where, 4096, true);
    if (!(item instanceof JsonNumber)) return item;
    if (!item.whole && !Number.isFinite(item.value)) throw JSON_.wrong(where, item, "finite");
    return item.value;
  }
  JSON_.object(value, "provenance", "an object");
  return /** @type {Record<string, unknown>} */ (plain(value, "provenance", 0));
}

// -- what must agree across parts ------------------------------------------------------------------

/** @param {Manifest} manifest */
function checkConsistency(manifest) {
  const { model, class_names, graphs } = manifest;
  if (class_names.length !== model.num_classes)
    throw JSON_.error(
      `'s class_names has ${class_names.length} names; model.num_classes says ${model.num_classes}`,
    );
  for (const name of GRAPHS) checkFiles(manifest, name, JSON_);
  expect(graphs.prologue.inputs, "graphs.prologue.inputs", [tensor("class_id", "int64")], JSON_);
  checkDecoder(manifest, JSON_);
  checkStep(manifest, JSON_);
}

/**
 * @param {Manifest} manifest
 * @param {GraphName} name
 * @param {CheckedJson} document
 */
function checkFiles(manifest, name, document) {
  const graph = manifest.graphs[name];
  /** @type {["file" | "weights", number][]} */
  const parts = [
    ["file", MAX_GRAPH_BYTES],
    ["weights", maxWeightsBytes(manifest.model, name)],
  ];
  for (const [part] of parts)
    if (!(graph[part] in manifest.files))
      throw document.error(
        `'s graphs.${name}.${part} is ${shown(graph[part])}, which the manifest's files does not list`,
      );
  for (const [part, most] of parts) {
    const size = manifest.files[graph[part]]?.size ?? 0;
    if (size > most)
      throw new EngineError(
        "bundle",
        `the manifest's files[${shown(graph[part])}].size is ${size}; ` +
          `a ${name} of the manifest's geometry needs at most ${most} bytes`,
      );
  }
}

/**
 * @param {Manifest} manifest
 * @param {CheckedJson} document
 */
function checkDecoder({ model, graphs }, document) {
  const tokens = tensor("tokens", "int64", model.num_tokens);
  const pixels = tensor("image", "uint8", model.image_height, model.image_width, 3);
  expect(graphs.decoder.inputs, "graphs.decoder.inputs", [tokens], document);
  expect(graphs.decoder.outputs, "graphs.decoder.outputs", [pixels], document);
}

/**
 * @param {Manifest} manifest
 * @param {CheckedJson} document
 */
function checkStep(manifest, document) {
  const { prologue, step } = manifest.graphs;
  const inputs = byName(step.inputs);
  const outputs = byName(step.outputs);
  /** @type {TensorSpec[]} */
  const before = [];
  /** @type {TensorSpec[]} */
  const after = [];
  manifest.state.forEach(({ input, output }, index) => {
    const state = inputs.get(input);
    if (!state) throw document.wrong(`state[${index}].input`, input, "an input of graphs.step");
    if (!outputs.has(output))
      throw document.wrong(`state[${index}].output`, output, "an output of graphs.step");
    before.push(state);
    // The new state is fed back as the next old one, so it must look the same.
    after.push({ ...state, name: output });
  });
  const fixed = [tensor("token", "int64"), tensor("position", "int64")];
  const logits = tensor("logits", "float32", manifest.model.vocab_size);
  const wanted = [...fixed, ...prologue.outputs, ...before];
  expect(step.inputs, "graphs.step.inputs", wanted, document);
  expect(step.outputs, "graphs.step.outputs", [logits, ...after], document);
  if (stateBytesPerRow(manifest) > MAX_STATE_BYTES_PER_ROW)
    throw document.error(
      `'s state takes ${stateBytesPerRow(manifest)} bytes a row; ` +
        `at most ${MAX_STATE_BYTES_PER_ROW} are allowed`,
    );
}

/**
 * Check that `found` holds exactly the `wanted` tensors, in any order.
 *
 * @param {TensorSpec[]} found
 * @param {string} where
 * @param {TensorSpec[]} wanted
 * @param {CheckedJson} document
 */
function expect(found, where, wanted, document) {
  const there = byName(found);
  const expected = byName(wanted);
  if (expected.size !== wanted.length)
    throw document.error(` gives one tensor of ${where} two meanings`);
  for (const name of [...expected.keys(), ...there.keys()]) {
    const is = there.get(name);
    const should = expected.get(name);
    if (!is) throw document.error(`'s ${where} lacks the tensor ${shown(name)}`);
    if (!should)
      throw document.error(`'s ${where} has the tensor ${shown(name)}, which has no use`);
    if (typed(is) !== typed(should))
      throw document.error(
        `'s ${where} gives ${shown(name)} as ${shortened(typed(is), 60)}; ` +
          `it must be ${shortened(typed(should), 60)}`,
      );
  }
}

/** @param {TensorSpec} spec */
function typed(spec) {
  return `${spec.dtype} [${spec.shape.join(", ")}]`;
}

/**
 * @param {string} name
 * @param {import("./types.js").DType} dtype
 * @param {...number} sizes
 * @returns {TensorSpec}
 */
function tensor(name, dtype, ...sizes) {
  return { name, dtype, shape: ["rows", ...sizes] };
}

/**
 * Bytes of recurrent state that one row carries from step to step.
 *
 * @param {Manifest} manifest
 */
export function stateBytesPerRow({ graphs, state }) {
  const inputs = byName(graphs.step.inputs);
  return state.reduce((sum, { input }) => {
    const spec = inputs.get(input);
    return sum + (spec ? bytesPerRow(spec) : 0);
  }, 0);
}

/**
 * The manifest with another graph for its step, as `document` of its bundle gives it.
 *
 * @param {Manifest} manifest
 * @param {GraphSpec} graph
 * @param {StatePair[]} state
 * @param {CheckedJson} document
 * @returns {Manifest}
 */
export function withStep(manifest, graph, state, document) {
  const changed = { ...manifest, graphs: { ...manifest.graphs, step: graph }, state };
  checkFiles(changed, "step", document);
  checkStep(changed, document);
  return changed;
}

/**
 * The manifest with another graph for its decoder, as `document` of its bundle gives it.
 *
 * @param {Manifest} manifest
 * @param {GraphSpec} graph
 * @param {CheckedJson} document
 * @returns {Manifest}
 */
export function withDecoder(manifest, graph, document) {
  const changed = { ...manifest, graphs: { ...manifest.graphs, decoder: graph } };
  checkFiles(changed, "decoder", document);
  checkDecoder(changed, document);
  return changed;
}
