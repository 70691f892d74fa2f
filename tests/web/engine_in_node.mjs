/** Runs one part of the engine in Node: a task as JSON on standard input, its result as JSON out. */

import { readFileSync } from "node:fs";

const { engine, task, ...given } = JSON.parse(readFileSync(0, "utf8"));
const load = (name) => import(`${engine}/${name}`);

/** What a call returns, or how it refuses. */
async function outcome(call) {
  try {
    return { value: await call() };
  } catch (error) {
    if (!error.code) throw error;
    return { code: error.code, message: error.message, file: error.file };
  }
}

/** A bundle and the engine that it makes. */
async function loaded(files, runtime) {
  const { Bundle } = await load("bundle.js");
  const { Engine } = await load("engine.js");
  const { loadRuntime } = await load("runtime.js");
  const bundle = await Bundle.open(files, () => {});
  const ort = await loadRuntime(runtime, "wasm", 1, () => {});
  return { bundle, ready: await Engine.load(bundle, ort) };
}

const tasks = {
  async noise({ seeds, steps }) {
    const { uniform } = await load("noise.js");
    return seeds.map((seed) =>
      Array.from({ length: steps }, (_, step) => uniform(BigInt(seed), step)),
    );
  },

  async sample({ rows }) {
    const { guide, sample } = await load("sampling.js");
    return rows.map(({ cond, uncond, u, options }) => {
      const given = Float32Array.from(cond);
      const scores = uncond ? guide(given, Float32Array.from(uncond), options.cfg_scale) : given;
      return { scores: [...scores], token: sample(scores, u, options) };
    });
  },

  async manifests({ texts }) {
    const { manifestFromJson } = await load("manifest.js");
    return Promise.all(texts.map((text) => outcome(() => manifestFromJson(text))));
  },

  async cpuGraphs({ manifest, steps, decoders, version }) {
    const { manifestFromJson } = await load("manifest.js");
    const { withCpuDecoder, withCpuStep } = await load("cpu_graphs.js");
    const plain = manifestFromJson(manifest);
    const taken = (changed, name) => changed && changed.graphs[name].file;
    return {
      steps: await Promise.all(
        steps.map((text) => outcome(() => taken(withCpuStep(text, plain, version), "step"))),
      ),
      decoders: await Promise.all(
        decoders.map((text) => outcome(() => taken(withCpuDecoder(text, plain, version), "decoder"))),
      ),
    };
  },

  async downloads({ wanted }) {
    const { downloadChecked } = await load("download.js");
    const found = [];
    for (const { name, url, entry } of wanted) {
      const seen = [];
      const result = await outcome(() =>
        downloadChecked(name, url, entry, (loaded, total) => seen.push([loaded, total])),
      );
      if (result.value) result.value = result.value.length;
      found.push({ ...result, seen });
    }
    return found;
  },

  async orders({ manifest, orders }) {
    const { manifestFromJson } = await load("manifest.js");
    const { checkedOrder } = await load("order.js");
    const checked = manifestFromJson(manifest);
    return Promise.all(
      orders.map((order) =>
        outcome(() => {
          const found = checkedOrder(order, checked);
          return { ...found, seeds: found.seeds.map(String) };
        }),
      ),
    );
  },

  async previews({ paces }) {
    const { PreviewPace } = await load("previews.js");
    return paces.map(({ every, images, tokens, stepMs, pictureMs }) => {
      const pace = new PreviewPace(every, images, tokens);
      return Array.from({ length: tokens - 1 }, (_, step) => [
        step + 1,
        pace.due(step + 1, stepMs * (step + 1), pictureMs),
      ]).filter(([, due]) => due.length);
    });
  },

  async scores({ files, runtime, classes, tokens }) {
    const { ready } = await loaded(files, runtime);
    const rows = await ready.begin(classes);
    const found = [];
    for (let step = 0; step < tokens[0].length; step++) {
      const last = tokens.map((row) => (step ? row[step - 1] : 0));
      found.push([...(await rows.step(last, step))]);
    }
    return found;
  },

  async draw({ files, runtime, orders }) {
    const { draw } = await load("drawing.js");
    const { checkedOrder } = await load("order.js");
    const { bundle, ready } = await loaded(files, runtime);
    let copied = 0;
    const { prototype } = Object.getPrototypeOf(ready.sessions.step).constructor;
    const { run } = prototype;
    prototype.run = function (...given) {
      copied++;
      return run.apply(this, given);
    };
    // So that there is time for previews.
    Object.defineProperty(ready, "decodeMs", { get: () => 1e-3, set: () => {} });
    const drawn = [];
    for (const order of orders) {
      const pictures = [];
      const previews = [];
      const steps = [];
      for await (const news of draw(ready, checkedOrder(order, ready.manifest))) {
        const pixels = news.rgba && [...new Uint8Array(news.rgba)];
        if (news.type === "picture") pictures[news.index] = { tokens: news.tokens, pixels };
        else if (news.type === "preview")
          previews.push({ index: news.index, step: news.step, pixels });
        else steps.push([news.first, news.count, news.step]);
      }
      drawn.push({ pictures, previews, steps });
    }
    const { step, decoder } = ready.manifest.graphs;
    await ready.dispose();
    return { graphs: [step.file, decoder.file], sha256: bundle.sha256, copied, drawn };
  },
};

process.stdout.write(JSON.stringify(await tasks[task](given)), () => process.exit(0));
