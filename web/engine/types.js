/**
 * The protocol between a page and `worker.js`, and what the engine's modules pass to each other.
 *
 * The worker is a module worker: `new Worker(url, { type: "module" })`. It takes one `load`, then any
 * number of orders, which it draws one after the other in the order in which they came; they may come
 * before it is ready. A worker whose `load` failed is of no more use. `terminate()` ends one at any
 * moment and gives its memory back.
 *
 * A file that arrives damaged is fetched once more with `cache: "reload"`: a service worker then takes
 * it from the network, and puts what comes in the place of what it has.
 *
 * @typedef {object} RuntimeFiles ONNX Runtime's, as npm's onnxruntime-web has them in `dist/`.
 * @property {string} module URL of `ort.wasm.min.mjs`.
 * @property {string} loader URL of `ort-wasm-simd-threaded.mjs`.
 * @property {string} wasm URL of `ort-wasm-simd-threaded.wasm`.
 * @property {{ module: string, wasm: string }} [webgpu] URLs of `ort.webgpu.bundle.min.mjs` and
 *   `ort-wasm-simd-threaded.asyncify.wasm`, for browsers that have WebGPU.
 *
 * @typedef {"auto" | "wasm" | "webgpu"} Backend
 *
 * @typedef {object} LoadOrder
 * @property {"load"} type
 * @property {Record<string, string>} files URL of each file of the bundle that the engine may want, by
 *   its name in the bundle; `manifest.json` is one. Those that no browser uses may be left out.
 * @property {RuntimeFiles} runtime
 * @property {number} [threads] 0, the default, for as many as the machine has cores, up to 8. More than
 *   one needs a page that is cross-origin isolated; elsewhere it is one whatever was asked for.
 * @property {Backend} [backend] "auto", the default, is WebGPU where there is an adapter and
 *   `runtime.webgpu` is given, else WebAssembly.
 *
 * @typedef {object} DrawOrder Several images; image i is of class `classes[i]`.
 * @property {"draw"} type
 * @property {number | string} id Names the order in all that is said about it; in use once at a time.
 * @property {number[]} classes Indices into the manifest's `class_names`.
 * @property {(number | string)[]} seeds One an image: whole numbers up to 2^64 - 1, those above
 *   2^53 - 1 as decimal text.
 * @property {number} [guidance] As `cfg_scale` everywhere else; left out, the bundle's default.
 * @property {number} [temperature] Left out, the bundle's default.
 * @property {number} [top_k] Left out, the bundle's default.
 * @property {number} [top_p] Left out, the bundle's default.
 * @property {number} [every] Tokens from one preview to the next, about, where there is time for as many;
 *   0, the default, for none.
 *
 * @typedef {{ type: "cancel", id: number | string }} CancelOrder Answered with `cancelled`, unless the
 *   order is done already or there is none, which is answered with nothing.
 *
 * @typedef {LoadOrder | DrawOrder | CancelOrder} ToWorker
 *
 * @typedef {{ type: "loading", file: string, loaded: number, total: number }} LoadingNews Bytes of one
 *   file; `total` is known from the first of them on. Of the runtime's WebAssembly `file` is
 *   "onnxruntime" and `total` 0 where the server does not say.
 *
 * @typedef {object} ReadyNews
 * @property {"ready"} type
 * @property {Manifest} manifest
 * @property {string} manifest_sha256 What a picture's settings call `bundle_sha256`.
 * @property {"wasm" | "webgpu"} backend
 * @property {number} threads
 * @property {{ step: string, decoder: string }} graphs The files of the graphs that were taken.
 * @property {string} note Why another backend or graph than the best was taken; "" if none was.
 *
 * @typedef {object} ProgressNews After every token of the images that are being drawn.
 * @property {"progress"} type
 * @property {number | string} id
 * @property {number} step Tokens that these images have.
 * @property {number} num_tokens Tokens that they will have.
 * @property {number} first The index of the first of these images.
 * @property {number} count How many they are: all of the order, unless memory is short.
 *
 * @typedef {object} PictureNews
 * @property {"picture"} type
 * @property {number | string} id
 * @property {number} index
 * @property {number} width
 * @property {number} height
 * @property {ArrayBuffer} rgba `height` rows of `width` pixels of four bytes; alpha is 255.
 * @property {number[]} tokens
 *
 * @typedef {object} PreviewNews A picture that is not finished, gray where nothing is decided.
 * @property {"preview"} type
 * @property {number | string} id
 * @property {number} index
 * @property {number} step Tokens that it shows.
 * @property {number} width
 * @property {number} height
 * @property {ArrayBuffer} rgba As of a finished one.
 *
 * @typedef {{ type: "done", id: number | string, seconds: number }} DoneNews After the last picture.
 *
 * @typedef {{ type: "cancelled", id: number | string }} CancelledNews
 *
 * @typedef {"browser" | "memory" | "network" | "truncated" | "altered" | "newer" | "bundle" | "request"
 *   | "backend"} ErrorCode What is at fault: the browser lacks something; there is too little memory;
 *   a file does not arrive; it arrives cut short; it is not the file that the manifest means; the
 *   bundle is for a newer runtime; it is no bundle that can be drawn with; the order asks for what there
 *   is not; computing failed.
 *
 * @typedef {object} ErrorNews
 * @property {"error"} type
 * @property {number | string | null} id The order that ended with it; null if loading did.
 * @property {ErrorCode} code
 * @property {string} message One sentence for people.
 * @property {string} [file] The file that is at fault, for codes "network", "truncated" and "altered";
 *   whoever keeps a copy of it drops it.
 *
 * @typedef {LoadingNews | ReadyNews | ProgressNews | PreviewNews | PictureNews | DoneNews | CancelledNews
 *   | ErrorNews} FromWorker
 */

/**
 * What a bundle says about itself, checked: `docs/bundle.md`. Names are those of its JSON.
 *
 * @typedef {"float32" | "float16" | "int64" | "int32" | "uint8"} DType
 *
 * @typedef {object} TensorSpec
 * @property {string} name
 * @property {DType} dtype
 * @property {["rows", ...number[]]} shape
 *
 * @typedef {object} GraphSpec
 * @property {string} file
 * @property {string} weights
 * @property {TensorSpec[]} inputs
 * @property {TensorSpec[]} outputs
 *
 * @typedef {{ input: string, output: string }} StatePair
 *
 * @typedef {object} ModelCard
 * @property {number} d_model
 * @property {number} num_layers
 * @property {number} d_state
 * @property {number} head_dim
 * @property {number} conv_width
 * @property {number} vocab_size
 * @property {number} num_classes
 * @property {number} num_tokens
 * @property {number} image_height
 * @property {number} image_width
 * @property {number} position_offset
 * @property {number} parameters
 * @property {number} decoder_parameters
 * @property {"adaln" | "adaln-group"} conditioning
 *
 * @typedef {object} SamplingOptions
 * @property {number} cfg_scale
 * @property {number} temperature
 * @property {number} top_k
 * @property {number} top_p
 *
 * @typedef {{ sha256: string, size: number }} FileEntry
 *
 * @typedef {object} Manifest
 * @property {"aim-bundle"} format
 * @property {number} format_version
 * @property {string} name
 * @property {string} description
 * @property {string} license
 * @property {ModelCard} model
 * @property {{ prologue: GraphSpec, step: GraphSpec, decoder: GraphSpec }} graphs
 * @property {StatePair[]} state
 * @property {SamplingOptions} sampling
 * @property {string[]} class_names
 * @property {string} precision
 * @property {Record<string, unknown>} provenance
 * @property {Record<string, FileEntry>} files
 */

export {};
