/** The page of a server: what draws is behind `/v1/draw`. */

import { Api, ApiError } from "./api.js";
import { byId, say } from "./dom.js";
import { Health } from "./health.js";
import { askKey } from "./key.js";
import { Page, prepare } from "./page.js";

/** @import { Model, PictureClass, Source } from "./types.js" */

/** Browsers open six connections to a server; two are left for everything else. */
const MOST_STREAMS = 4;
const MOST_PREVIEWS = 16;
const PICTURES = 4;
/** Milliseconds between two tries to reach the server. */
const PATIENCE = 2000;

const notice = byId("notice", HTMLElement);
const api = new Api(askKey);

/**
 * @param {Model} model
 * @param {PictureClass[]} classes
 */
function open(model, classes) {
  /** @type {Source} */
  const source = {
    atOnce: MOST_STREAMS,
    atFirst: PICTURES,
    previews: MOST_PREVIEWS,
    draw: (order, signal) => api.draw(order, signal),
    trouble: (sentence) => health.trouble(sentence),
  };
  const page = new Page(model, classes, source);
  const health = new Health(
    api,
    notice,
    () => page.busy,
    () => compare(page, health),
  );
  page.open(new URLSearchParams(location.search));
}

/**
 * After the server was away: is it the one that this page was made for?
 *
 * @param {Page} page
 * @param {Health} health
 */
async function compare(page, health) {
  const { id, aim } = await api.model();
  const known = page.model;
  if (
    id === known.id &&
    aim.num_classes === known.aim.num_classes &&
    aim.version === known.aim.version
  )
    return;
  health.trouble(`The server is another one now (${id}). Reload the page to draw with it.`);
  page.close();
}

async function start() {
  prepare();
  for (;;) {
    try {
      const [model, classes] = [await api.model(), await api.classes()];
      say(notice, "");
      open(model, classes);
      return;
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      say(
        notice,
        error.status === 401
          ? "Without its key this server draws nothing. Reload the page to enter it."
          : error.message,
      );
      if (error.status === 401) return;
      await new Promise((resolve) => setTimeout(resolve, PATIENCE));
    }
  }
}

start();
