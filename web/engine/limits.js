/**
 * What a bundle of a given geometry can need, with room for what is still to come: nothing in a bundle
 * may be larger than a model of the geometry that its manifest declares.
 */

/** @import { ModelCard } from "./types.js" */

export const MAX_GRAPH_BYTES = 8 * 2 ** 20;

const FREE_BYTES = 64 * 2 ** 20;
const FREE_TENSORS = 64;
const TENSORS_A_LAYER = 16;
const BYTES_A_PARAMETER = 8;

/**
 * How many inputs or outputs a graph may have, and how many states the step.
 *
 * @param {ModelCard} model
 */
export function maxTensors(model) {
  return TENSORS_A_LAYER * model.num_layers + FREE_TENSORS;
}

/**
 * How large the file of the weights of a graph may be.
 *
 * @param {ModelCard} model
 * @param {"prologue" | "step" | "decoder"} graph
 */
export function maxWeightsBytes(model, graph) {
  const parameters = graph === "decoder" ? model.decoder_parameters : modelParameters(model);
  return BYTES_A_PARAMETER * parameters + FREE_BYTES;
}

/**
 * At least the parameters of prologue and step, with an adaLN of its own in every layer.
 *
 * @param {ModelCard} model
 */
function modelParameters(model) {
  const d = model.d_model;
  const inner = 2 * d;
  const s = model.d_state;
  const layer =
    d * (2 * inner + 2 * s) + // in_proj, but for the heads
    4 * d * inner + // the heads, of which there are at most `inner`, and out_proj
    (model.conv_width + 1) * (inner + 2 * s) +
    4 * inner +
    3 * d * (d + 8); // adaLN, its tables, norms
  const tables = model.vocab_size + model.num_tokens + 1 + model.num_classes + 1;
  return model.num_layers * layer + (tables + 2 * d + 8) * d;
}
