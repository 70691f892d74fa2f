/** All groups of pictures, the newest first, and no more of them than a browser's memory likes. */

import { byId } from "./dom.js";

/** @import { Card } from "./card.js" */
/** @import { Group } from "./group.js" */

const MOST_PICTURES = 200;

export class Gallery {
  /** @type {Group[]} */
  groups = [];
  #root = byId("gallery", HTMLElement);
  #empty = byId("empty", HTMLElement);

  /** Finished pictures, as they stand on the page. */
  get cards() {
    return this.groups.flatMap(({ cards }) => cards.filter(({ picture }) => picture));
  }

  /** @param {Group} group */
  add(group) {
    this.groups.unshift(group);
    this.#root.prepend(group.root);
    this.#empty.hidden = true;
  }

  /** @param {Group} group */
  remove(group) {
    const focused = group.root.contains(document.activeElement);
    const index = this.groups.indexOf(group);
    if (index < 0) return;
    this.groups.splice(index, 1);
    group.stop();
    for (const card of group.cards) card.drop();
    group.root.remove();
    this.#empty.hidden = this.groups.length > 0;
    if (focused) this.#focus(this.groups[index] ?? this.groups[index - 1]);
  }

  /** @param {Card} card */
  removeCard(card) {
    const group = this.groups.find(({ cards }) => cards.includes(card));
    if (!group) return;
    if (group.cards.length === 1) return group.actions.remove();
    const focused = card.root.contains(document.activeElement);
    const index = group.cards.indexOf(card);
    group.cards.splice(index, 1);
    card.drop();
    if (focused) (group.cards[index] ?? group.cards[index - 1])?.focus();
  }

  /** Let go of the oldest pictures beyond the limit. */
  trim() {
    for (const card of this.cards.slice(MOST_PICTURES)) this.removeCard(card);
  }

  /** @param {Group | undefined} group */
  #focus(group) {
    const card = group?.cards.find(({ picture }) => picture);
    if (card) card.focus();
    else byId("class-input", HTMLInputElement).focus();
  }
}
