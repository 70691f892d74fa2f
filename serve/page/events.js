/** Server-sent events out of the body of a fetch: EventSource itself can only GET. */

/** The server says something every 15 s; after this silence (ms) it is taken for dead. */
const LONGEST_SILENCE = 60_000;

/**
 * @typedef {{ event: string, data: string }} ServerEvent
 */

/**
 * The events of a text/event-stream, as they arrive. Leaving the loop closes the connection.
 *
 * @param {ReadableStream<Uint8Array>} body
 * @returns {AsyncGenerator<ServerEvent>}
 */
export async function* serverEvents(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  /** @type {ServerEvent} */
  let next = { event: "message", data: "" };
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await withinSilence(reader.read());
      if (done) return;
      // A chunk that ends in \r may have cut a \r\n apart: its line waits for what follows.
      const lines = (rest + decoder.decode(value, { stream: true })).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop() ?? "";
      for (const line of lines) {
        if (line === "") {
          if (next.data) yield { event: next.event, data: next.data.slice(0, -1) };
          next = { event: "message", data: "" };
          continue;
        }
        const [, name, text] = /^([^:]*):? ?(.*)$/s.exec(line) ?? ["", "", ""];
        if (name === "event") next.event = text ?? "";
        if (name === "data") next.data += `${text}\n`;
      }
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}

/**
 * Throws TypeError, as fetch does for a connection that broke, when nothing comes for too long.
 *
 * @template T
 * @param {Promise<T>} promise
 * @returns {Promise<T>}
 */
export function withinSilence(promise) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(() => reject(new TypeError("silent")), LONGEST_SILENCE);
    promise.then(resolve, reject).finally(() => clearTimeout(timer));
  });
}
