/**
 * Steps that draw nothing, while nobody waits. Browsers run WebAssembly by quickly made code at first and
 * optimise what runs often: about a hundred steps take three times as long as those after them.
 */

import { breath } from "./breath.js";

/** @import { Engine } from "./engine.js" */

const STEPS = 96;
const LONGEST_MS = 4000;

/**
 * @param {Engine} engine
 * @param {() => boolean} idle Asked before each step; no more are taken once something waits.
 */
export async function rehearse(engine, idle) {
  if (engine.runtime.backend !== "wasm" || !idle()) return;
  const { num_tokens, num_classes } = engine.manifest.model;
  const until = performance.now() + LONGEST_MS;
  const rows = await engine.begin([0, num_classes]); // one image under guidance
  try {
    for (let step = 0; step < Math.min(STEPS, num_tokens); step++) {
      if (!idle() || performance.now() > until) return;
      await rows.step([0, 0], step);
      await breath();
    }
  } finally {
    rows.dispose();
  }
}
