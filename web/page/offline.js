/** The service worker: it keeps the site for the next time, and allows threads where a host does not. */

/** Milliseconds that the page waits for it. */
const PATIENCE = 4000;
const RELOADED = "aim-reloaded-for-threads";

/**
 * Let the service worker take over, if there can be one. May reload the page, once: it is allowed to
 * use threads only when the service worker has answered with it.
 *
 * @param {() => void} noRoom Hears that the browser has no room to keep the site.
 */
export async function keepForOffline(noRoom) {
  const workers = navigator.serviceWorker;
  if (!workers) return; // over http, and in some private windows
  workers.addEventListener("message", ({ data }) => data?.type === "no-room" && noRoom());
  try {
    await workers.register(new URL("sw.js", document.baseURI));
  } catch {
    return; // not allowed, no room, or the host does not have it: it works without
  }
  const controlled = await withinPatience(controller(workers));
  if (controlled && !crossOriginIsolated && firstTime()) {
    location.reload();
    await new Promise(() => {}); // the page is going
  }
}

/** Forget the files that are kept, one of which was wrong. */
export async function forgetFiles() {
  const worker = navigator.serviceWorker?.controller;
  if (!worker) return;
  const { port1, port2 } = new MessageChannel();
  const answered = new Promise((resolve) => (port1.onmessage = () => resolve(true)));
  worker.postMessage({ type: "forget" }, [port2]);
  await withinPatience(answered);
}

/** @param {ServiceWorkerContainer} workers */
async function controller(workers) {
  if (!workers.controller)
    await new Promise((resolve) =>
      workers.addEventListener("controllerchange", resolve, { once: true }),
    );
  return true;
}

/**
 * @template T
 * @param {Promise<T>} promise
 * @returns {Promise<T | undefined>}
 */
function withinPatience(promise) {
  return Promise.race([
    promise,
    new Promise((resolve) => setTimeout(() => resolve(undefined), PATIENCE)),
  ]);
}

/** Whether this tab has not been reloaded for threads yet; false where it could not be remembered. */
function firstTime() {
  try {
    if (sessionStorage.getItem(RELOADED)) return false;
    sessionStorage.setItem(RELOADED, "1");
    return true;
  } catch {
    return false;
  }
}
