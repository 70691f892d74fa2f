/**
 * The graphs that a bundle may have for ONNX Runtime's CPU provider, which WebAssembly is: `step-cpu`
 * and `decoder-cpu` of `docs/bundle.md`. Read as a stranger's, as everything.
 */

import { CheckedJson, isObject } from "./checked_json.js";
import { maxTensors } from "./limits.js";
import { withDecoder, withStep } from "./manifest.js";
import { graphFromJson, statePairFromJson, tensorName } from "./parts.js";

/**
 * @import { JsonValue } from "./strict_json.js"
 * @import { Manifest } from "./types.js"
 */

export const STEP_FILE = "step-cpu.json";
export const DECODER_FILE = "decoder-cpu.json";
export const MAX_DESCRIPTION_BYTES = 4 * 2 ** 20;

const VERSION = /^[0-9]{1,4}\.[0-9]{1,4}$/;
const FORMAT_VERSION = 1;

/**
 * The manifest with this step in the place of the plain one; null where its description is of a newer
 * format, or asks for a newer ONNX Runtime than `version`.
 *
 * @param {string} text
 * @param {Manifest} manifest
 * @param {string} version
 */
export function withCpuStep(text, manifest, version) {
  const document = new CheckedJson(STEP_FILE);
  const keys = ["format", "format_version", "onnxruntime", "graphs", "state", "in_place"];
  const top = fieldsOf(document, text, "step graph", "aim-step-graph", keys);
  if (!top) return null;
  const most = maxTensors(manifest.model);
  const { step } = document.fields(top.graphs, "graphs", ["step"]);
  const pairs = document
    .items(top.state, "state", 1, most)
    .map((item, index) => statePairFromJson(item, `state[${index}]`, document));
  const inputs = new Set(pairs.map(({ input }) => input));
  document.items(top.in_place, "in_place", 0, most).forEach((item, index) => {
    const where = `in_place[${index}]`;
    if (!inputs.has(tensorName(item, where, document)))
      throw document.wrong(where, item, "the input of a state");
  });
  const graph = graphFromJson(step, "graphs.step", most, document);
  const changed = withStep(manifest, graph, pairs, document);
  return runsOn(document, top.onnxruntime, "1.26", version) ? changed : null;
}

/**
 * The manifest with this decoder in the place of the plain one; null as above.
 *
 * @param {string} text
 * @param {Manifest} manifest
 * @param {string} version
 */
export function withCpuDecoder(text, manifest, version) {
  const document = new CheckedJson(DECODER_FILE);
  const keys = ["format", "format_version", "onnxruntime", "precision", "psnr_db", "graphs"];
  const top = fieldsOf(document, text, "decoder graph", "aim-decoder-graph", keys);
  if (!top) return null;
  const { decoder } = document.fields(top.graphs, "graphs", ["decoder"]);
  document.choice(top.precision, "precision", ["int8", "fp32"]);
  document.number(top.psnr_db, "psnr_db", 0, 999);
  const graph = graphFromJson(decoder, "graphs.decoder", maxTensors(manifest.model), document);
  const changed = withDecoder(manifest, graph, document);
  return runsOn(document, top.onnxruntime, "1.24", version) ? changed : null;
}

/**
 * The fields of a description; null where it is of a newer format.
 *
 * @param {CheckedJson} document
 * @param {string} text
 * @param {string} what
 * @param {string} format
 * @param {string[]} keys
 */
function fieldsOf(document, text, what, format, keys) {
  const value = document.parse(text, MAX_DESCRIPTION_BYTES);
  if (!isObject(value) || value.format !== format)
    throw document.error(` is no ${what}: it lacks "format": "${format}"`);
  const version = document.integer(value.format_version, "format_version", 1, 2 ** 31);
  return version > FORMAT_VERSION ? null : document.fields(value, "top level", keys);
}

/**
 * @param {CheckedJson} document
 * @param {JsonValue | undefined} value The first version that has the graph's operators.
 * @param {string} example
 * @param {string} installed
 */
function runsOn(document, value, example, installed) {
  const allowed = `a version of two numbers, '${example}'`;
  const first = document.matching(value, "onnxruntime", VERSION, allowed).split(".").map(Number);
  const [major = 0, minor = 0] = installed.split(".").map(Number);
  const [firstMajor = 0, firstMinor = 0] = first;
  return major > firstMajor || (major === firstMajor && minor >= firstMinor);
}
