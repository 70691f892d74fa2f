/** A turn for other tasks, such as a message that cancels: ONNX Runtime's promises give none. */

/** @returns {Promise<void>} */
export function breath() {
  return new Promise((resolve) => {
    // Not a timer: browsers make nested ones wait for 4 ms.
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(null);
  });
}
