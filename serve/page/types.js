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
 * @typedef {Order & { reference: (chosen: PictureClass) => string | number, every: number }} DrawOrder
 *   And how to name its classes, and the steps between two previews.
 *
 * @typedef {{ type: "progress", done: number, total: number, of?: Drawn }
 *   | { type: "preview", index: number, tokens: number, source: string }
 *   | { type: "picture", index: number, file: Blob }
 *   | { type: "done" }} DrawEvent Progress counts the tokens of all images. A preview shows so many
 *   tokens; its source is an address. Of each image there is one picture, and one "done" after all.
 *
 * @typedef {{ first: number, count: number, tokens: number }} Drawn The images that are being drawn side
 *   by side, if those are not all, and the tokens that each of them has.
 *
 * @typedef {object} Source Where pictures come from.
 * @property {number} atOnce Orders that it takes at a time; the page keeps the others waiting.
 * @property {number} atFirst Pictures that are offered at first.
 * @property {number} previews The most previews of a picture that are worth their time.
 * @property {(order: DrawOrder, signal: AbortSignal) => AsyncIterable<DrawEvent>} draw Throws
 *   DrawingError. Leaving the loop, or aborting, cancels the order.
 * @property {(sentence: string) => void} trouble Hears why no order can be drawn now.
 */

export {};
