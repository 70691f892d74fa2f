/**
 * What the page is told of its site, in the HTML. Addresses are relative to the page's.
 *
 * @import { Model, PictureClass } from "../../serve/page/types.js"
 * @import { RuntimeFiles } from "../engine/types.js"
 *
 * @typedef {object} Site
 * @property {Model} model
 * @property {PictureClass[]} classes In the order of their indices.
 * @property {string} precision In which the weights are stored.
 * @property {Record<string, string>} files Of the bundle, by their names in it.
 * @property {RuntimeFiles} runtime
 * @property {number} bytes About how much is loaded before the first picture.
 */

export {};
