/**
 * What the modules pass to each other. The names of settings and fields are the interface's own.
 *
 * @typedef {object} PictureClass
 * @property {number} id The number that means it.
 * @property {string} name
 *
 * @typedef {object} Settings
 * @property {number} cfg_scale
 * @property {number} temperature
 * @property {number} top_k
 * @property {number} top_p
 *
 * @typedef {{ [Name in keyof Settings | "seed"]: [number, number] } & { n: number }} Limits
 *
 * @typedef {object} Model
 * @property {string} id
 * @property {{
 *   width: number, height: number, num_tokens: number, grid: [number, number],
 *   num_classes: number, defaults: Settings, limits: Limits, version: string,
 * }} aim
 *
 * @typedef {{ columns: number, rows: number }} Grid Of tokens, which are drawn row by row.
 *
 * @typedef {object} Order What a person asked for: one class an image; image i has seed + i.
 * @property {PictureClass[]} classes
 * @property {number} seed A whole number, up to 2^53 - 1.
 * @property {Settings} settings
 *
 * @typedef {object} Picture A finished one.
 * @property {PictureClass} class
 * @property {number} seed
 * @property {Settings} settings
 * @property {Blob} file
 * @property {string} url Of `file`; whoever drops the picture revokes it.
 *
 * @typedef {{ index: number, b64_json: string, output_format: string }} DrawnImage
 *
 * @typedef {DrawnImage & { done_tokens: number }} PartialImage
 *
 * @typedef {{ type: "accepted" }
 *   | { type: "progress", done: number, total: number }
 *   | { type: "preview", images: PartialImage[] }
 *   | { type: "done", seconds: number, images: DrawnImage[] }} DrawEvent
 */

export {};
