/** PNG files that say how they were drawn, as `aim generate` writes them. */

const SIGNATURE = Uint8Array.of(0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a);
const CRC = Uint32Array.from({ length: 256 }, (_, value) => {
  for (let bit = 0; bit < 8; bit++) value = value & 1 ? 0xedb88320 ^ (value >>> 1) : value >>> 1;
  return value;
});

/**
 * @param {{ width: number, height: number, rgba: ArrayBuffer }} image Opaque.
 * @param {Record<string, string | number>} settings
 * @returns {Promise<Blob>}
 */
export async function png({ width, height, rgba }, settings) {
  const header = new DataView(new ArrayBuffer(13));
  header.setUint32(0, width);
  header.setUint32(4, height);
  header.setUint8(8, 8); // bits
  header.setUint8(9, 2); // red, green, blue
  const readable = Object.entries(settings).map(([name, value]) => `${name}: ${value}`);
  return new Blob(
    [
      SIGNATURE,
      chunk("IHDR", new Uint8Array(header.buffer)),
      text("aim", JSON.stringify(settings)),
      text("parameters", readable.join(", ")),
      chunk("IDAT", await deflated(rows(width, height, new Uint8Array(rgba)))),
      chunk("IEND", new Uint8Array()),
    ],
    { type: "image/png" },
  );
}

/**
 * The rows of an image, each after a byte that says it is not filtered.
 *
 * @param {number} width
 * @param {number} height
 * @param {Uint8Array} rgba
 */
function rows(width, height, rgba) {
  const data = new Uint8Array(height * (1 + 3 * width));
  let at = 0;
  for (let pixel = 0; pixel < width * height; pixel++) {
    if (pixel % width === 0) at++;
    for (let colour = 0; colour < 3; colour++) data[at++] = rgba[4 * pixel + colour] ?? 0;
  }
  return data;
}

/** @param {Uint8Array<ArrayBuffer>} data */
async function deflated(data) {
  const packed = new Blob([data]).stream().pipeThrough(new CompressionStream("deflate"));
  return new Uint8Array(await new Response(packed).arrayBuffer());
}

/**
 * Text in UTF-8, not packed.
 *
 * @param {string} keyword
 * @param {string} value
 */
function text(keyword, value) {
  return chunk("iTXt", new TextEncoder().encode(`${keyword}\0\0\0\0\0${value}`));
}

/**
 * @param {string} type
 * @param {Uint8Array} content
 */
function chunk(type, content) {
  const bytes = new Uint8Array(12 + content.length);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, content.length);
  bytes.set(new TextEncoder().encode(type), 4);
  bytes.set(content, 8);
  let crc = 0xffffffff;
  for (const byte of bytes.subarray(4, 8 + content.length))
    crc = (CRC[(crc ^ byte) & 255] ?? 0) ^ (crc >>> 8);
  view.setUint32(8 + content.length, ~crc >>> 0);
  return bytes;
}
