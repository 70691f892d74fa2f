/**
 * Keeps a site in the browser, so that it loads once and then works without a network, and gives its
 * answers the headers by which browsers allow several threads, where the host does not send them.
 *
 * Folders of a site are called after a hash of what they hold: a file that is kept never changes.
 * Nothing is kept before all of it has come and its checksum is right.
 */

const worker = /** @type {ServiceWorkerGlobalScope} */ (/** @type {unknown} */ (self));
const PREFIX = `aim-site ${worker.registration.scope} `;
const SHELL = `${PREFIX}shell ${SITE.version}`;
const FILES = `${PREFIX}files`;
/** After so many milliseconds without an answer the page is taken from what is kept. */
const PATIENCE = 4000;
const HEADERS = {
  "Content-Security-Policy": SITE.policy,
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
  "Cross-Origin-Resource-Policy": "same-origin",
};

const address = (/** @type {string} */ path) => new URL(path, worker.registration.scope).href;
const INDEX = address(SITE.index);
/** @type {Map<string, [string, number]>} */
const known = new Map(Object.entries(SITE.files).map(([path, file]) => [address(path), file]));
/** Addresses whose last answer was wrong, and of which the browser's own cache may hold it. */
const suspected = new Set();

worker.addEventListener("install", (event) => {
  event.waitUntil(install().then(() => worker.skipWaiting()));
});

worker.addEventListener("activate", (event) => {
  event.waitUntil(clean().then(() => worker.clients.claim()));
});

worker.addEventListener("fetch", (event) => {
  const { request } = event;
  if (request.method !== "GET") return;
  const url = new URL(request.url);
  if (request.mode === "navigate") {
    const place = url.origin + url.pathname;
    if (place === INDEX || place === worker.registration.scope) event.respondWith(page(request));
    return;
  }
  const file = known.get(url.href);
  if (file) event.respondWith(answer(event, url.href, file, request.cache === "reload"));
});

worker.addEventListener("message", (event) => {
  if (event.data?.type !== "forget") return;
  event.waitUntil(caches.delete(FILES).then(() => event.ports[0]?.postMessage("forgotten")));
});

/** Keep what the page is made of; all of it or nothing. */
async function install() {
  const cache = await caches.open(SHELL);
  try {
    await Promise.all(SITE.shell.map((path) => keepOfShell(cache, path)));
  } catch (error) {
    await caches.delete(SHELL);
    throw error;
  }
}

/**
 * @param {Cache} cache
 * @param {string} path
 */
async function keepOfShell(cache, path) {
  const url = address(path);
  const response = await fetch(url, { cache: url === INDEX ? "no-cache" : "default" });
  const bytes = await response.arrayBuffer();
  const file = known.get(url);
  // A host may add to the page, but it must be the one of this version.
  const right = file
    ? await matches(bytes, file)
    : new TextDecoder().decode(bytes).includes(SITE.page);
  if (!response.ok || !right) throw new Error(`${path} is not that of this site`);
  await cache.put(url, kept(bytes, response));
}

/** Let go of what older versions kept. */
async function clean() {
  const names = await caches.keys();
  const old = names.filter((name) => name.startsWith(`${PREFIX}shell `) && name !== SHELL);
  await Promise.all(old.map((name) => caches.delete(name)));
  const cache = await caches.open(FILES);
  const requests = await cache.keys();
  await Promise.all(
    requests.filter(({ url }) => !known.has(url)).map((request) => cache.delete(request)),
  );
}

/**
 * The page: the host's, which may be newer, unless that takes too long.
 *
 * @param {Request} request
 * @returns {Promise<Response>}
 */
async function page(request) {
  const cached = await (await caches.open(SHELL)).match(INDEX);
  try {
    const signal = cached && AbortSignal.timeout(PATIENCE);
    const response = await fetch(request, signal ? { signal } : {});
    if (response.status < 500 || !cached) return isolated(response);
  } catch (error) {
    if (!cached) throw error;
  }
  return cached;
}

/**
 * A file: what is kept, or else the host's, which is kept once all of it has come.
 *
 * @param {FetchEvent} event
 * @param {string} url
 * @param {[string, number]} file
 * @param {boolean} again Whether what is kept was not the right file.
 * @returns {Promise<Response>}
 */
async function answer(event, url, file, again) {
  const found = !again && (await fromCaches(url));
  if (found) return found;
  const response = await fetch(url, { cache: again || suspected.has(url) ? "reload" : "default" });
  if (response.status !== 200) return response;
  event.waitUntil(keep(url, file, response.clone()));
  return isolated(response);
}

/** @param {string} url */
async function fromCaches(url) {
  try {
    const [shell, files] = [await caches.open(SHELL), await caches.open(FILES)];
    return (await shell.match(url)) ?? (await files.match(url));
  } catch {
    return undefined; // storage that fails is no reason not to ask the host
  }
}

/**
 * @param {string} url
 * @param {[string, number]} file
 * @param {Response} response
 */
async function keep(url, file, response) {
  let bytes;
  try {
    bytes = await response.arrayBuffer();
  } catch {
    return; // cut off, or given up
  }
  if (!(await matches(bytes, file))) {
    suspected.add(url);
    return;
  }
  suspected.delete(url);
  try {
    await (await caches.open(FILES)).put(url, kept(bytes, response));
  } catch {
    for (const client of await worker.clients.matchAll()) client.postMessage({ type: "no-room" });
  }
}

/**
 * @param {ArrayBuffer} bytes
 * @param {[string, number]} file
 */
async function matches(bytes, [sha256, size]) {
  if (bytes.byteLength !== size) return false;
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return [...digest].map((byte) => byte.toString(16).padStart(2, "0")).join("") === sha256;
}

/**
 * An answer to keep: the bytes are unpacked, and so nothing is said of how they were packed.
 *
 * @param {ArrayBuffer} bytes
 * @param {Response} response
 */
function kept(bytes, response) {
  const type = response.headers.get("Content-Type") ?? "application/octet-stream";
  const headers = { ...HEADERS, "Content-Type": type, "Content-Length": String(bytes.byteLength) };
  return new Response(bytes, { headers });
}

/**
 * The same answer with our headers.
 *
 * @param {Response} response
 */
function isolated(response) {
  if (response.type === "opaqueredirect" || !response.ok) return response;
  const headers = new Headers(response.headers);
  for (const [name, value] of Object.entries(HEADERS)) headers.set(name, value);
  return new Response(response.body, { status: response.status, headers });
}
