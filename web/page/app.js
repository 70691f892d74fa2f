/** The page of a site: what draws is the engine, in a worker of this page. */

import { byId, element, say } from "../../serve/page/dom.js";
import { Page, prepare } from "../../serve/page/page.js";
import { Engine } from "./engine.js";
import { Loading } from "./loading.js";
import { keepForOffline } from "./offline.js";

/** @import { Site } from "./types.js" */

/** Each takes as long as several tokens. */
const MOST_PREVIEWS = 8;
const NO_ROOM =
  "This browser has no room to keep the model: it will be loaded again at the next visit.";
/** Below the command that draws a picture in Python, with weights of few bits. */
const ANOTHER =
  "This page draws with weights of few bits. Python, which adds in another order, draws another picture.";
/** Milliseconds that it stays to be read. */
const NO_ROOM_FOR = 10_000;

async function start() {
  prepare();
  /** @type {Site} */
  const site = JSON.parse(byId("site", HTMLScriptElement).text);
  await keepForOffline(sayNoRoom);
  const loading = new Loading(site.bytes, () => load());
  const engine = new Engine(site, loading);
  // How it fails is told by `loading`, and by the pictures that wait for it.
  const load = () => engine.load().catch(() => {});
  const page = new Page(site.model, site.classes, {
    atOnce: 1,
    atFirst: 1,
    previews: MOST_PREVIEWS,
    draw: (order, signal) => engine.draw(order, signal),
    trouble: () => {},
  });
  if (["int8", "int4"].includes(site.precision))
    byId("command-title", HTMLElement).after(element("p", { class: "hint" }, ANOTHER));
  if (savesData()) loading.later();
  else load();
  page.open(new URLSearchParams(location.search));
}

function sayNoRoom() {
  const notice = byId("notice", HTMLElement);
  say(notice, NO_ROOM);
  setTimeout(() => notice.textContent === NO_ROOM && say(notice, ""), NO_ROOM_FOR);
}

/** Whether the person asked their browser to load little. */
function savesData() {
  const { connection } = /** @type {{ connection?: { saveData?: boolean } }} */ (navigator);
  return connection?.saveData === true;
}

start();
