/**
 * Speaks the engine's protocol and draws pictures made up on the spot: they follow from class and seed
 * alone. It loads all files, as the engine does, and compares their sizes with the manifest. A seed of
 * 666 fails as a wrong order does, 667 for want of memory, images from seed 600 on are drawn one after the
 * other, and a guidance above 10 slows each token (in ms).
 */

let manifest = { files: {}, model: { num_tokens: 0, image_width: 0 } };
const cancelled = new Set();
let before = Promise.resolve();

self.onmessage = ({ data }) => {
  if (data.type === "load") load(data);
  else if (data.type === "cancel") cancelled.add(data.id);
  else before = before.then(() => draw(data));
};

async function load({ files, runtime }) {
  try {
    manifest = JSON.parse(new TextDecoder().decode(await fetched("manifest.json", files["manifest.json"], 0)));
    for (const [name, { size }] of Object.entries(manifest.files)) {
      const found = (await fetched(name, files[name], size)).length;
      if (found !== size) return failed("truncated", `The model's file ${name} came cut short.`);
    }
    await fetched("onnxruntime", runtime.wasm, 0);
    const backend = { backend: "wasm", threads: self.crossOriginIsolated ? 2 : 1, note: "" };
    self.postMessage({ type: "ready", manifest, manifest_sha256: "0".repeat(64), ...backend });
  } catch {
    failed("network", "A file of the model does not arrive. Is there a network?");
  }
}

function failed(code, message, id = null) {
  self.postMessage({ type: "error", id, code, message });
}

async function fetched(file, url, total) {
  const response = await fetch(url);
  if (!response.ok) throw new Error("not there");
  const pieces = [];
  let loaded = 0;
  for await (const piece of response.body) {
    pieces.push(piece);
    loaded += piece.length;
    self.postMessage({ type: "loading", file, loaded, total });
  }
  return new Uint8Array(await new Blob(pieces).arrayBuffer());
}

async function draw({ id, classes, seeds, guidance, every }) {
  const { num_tokens } = manifest.model;
  const say = (news) => self.postMessage({ id, ...news });
  const images = classes.map((one, index) => ({ one, seed: seeds[index], index }));
  const batches = seeds[0] >= 600 ? images.map((image) => [image]) : [images];
  for (const batch of batches) {
    for (let step = 1; step <= num_tokens; step++) {
      await new Promise((resolve) => setTimeout(resolve, guidance > 10 ? guidance : 0));
      if (cancelled.has(id)) return say({ type: "cancelled" });
      say({ type: "progress", step, num_tokens, first: batch[0].index, count: batch.length });
      if (step !== Math.floor(num_tokens / 2)) continue;
      if (seeds.includes(666)) return failed("request", "The order cannot be drawn.", id);
      if (seeds.includes(667)) return failed("memory", "There is too little memory for it.", id);
      if (every) for (const image of batch) say({ type: "preview", step, ...picture(image, step) });
    }
    for (const image of batch) say({ type: "picture", tokens: [], ...picture(image, num_tokens) });
  }
  say({ type: "done", seconds: 1 });
}

function picture({ one, seed, index }, tokens) {
  const { num_tokens, image_width: SIDE } = manifest.model;
  const GRID = Math.sqrt(num_tokens);
  const rgba = new Uint8Array(4 * SIDE * SIDE).fill(255);
  for (let pixel = 0; pixel < SIDE * SIDE; pixel++) {
    const cell = Math.floor(pixel / SIDE / (SIDE / GRID)) * GRID + Math.floor((pixel % SIDE) / (SIDE / GRID));
    for (let colour = 0; colour < 3; colour++)
      rgba[4 * pixel + colour] =
        cell < tokens ? (Number(seed) * 31 + one * 57 + cell * 37 + colour * 71) % 256 : 128;
  }
  return { index, width: SIDE, height: SIDE, rgba: rgba.buffer };
}
