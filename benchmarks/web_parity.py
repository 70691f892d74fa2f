"""Tokens of the engine for browsers, and Python's: `python benchmarks/web_parity.py --pictures 64`.

Draws the same pictures, 16 at a time, by the engine in Node and by the backend `cpu`, and counts
those of the same tokens. Needs `npm ci --prefix web`. With --json the row goes into a file, in the
place of the one that has its model.
"""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from aim_runtime import Bundle, Generator, models_dir
from web import DIST, RUNTIME, WEB, put, served, wanted_files

TOGETHER = 16
SEED = 1000
SCRIPT = """
const { engine, files, runtime, orders } = JSON.parse(process.argv[1]);
const load = (name) => import(`${engine}/${name}`);
const [{ Bundle }, { Engine }, { draw }, { checkedOrder }, { loadRuntime }] = await Promise.all(
  ["bundle.js", "engine.js", "drawing.js", "order.js", "runtime.js"].map(load));
const bundle = await Bundle.open(files, () => {});
const ready = await Engine.load(bundle, await loadRuntime(runtime, "wasm", 1, () => {}));
for (const order of orders) {
  const tokens = [];
  for await (const news of draw(ready, checkedOrder(order, ready.manifest)))
    if (news.type === "picture") tokens[news.index] = news.tokens;
  console.log(JSON.stringify(tokens));
}
process.exit(0);
"""


def by_the_engine(path: Path, orders: list[dict[str, Any]]) -> np.ndarray:
    """Tokens of all pictures, by one thread."""
    with served({"model": path}) as url:
        runtime = {kind: str(DIST / name) for kind, name in RUNTIME.items()}
        given = {
            "engine": str(WEB / "engine"),
            "files": {name: f"{url}/model/{name}" for name in wanted_files(path)},
            "runtime": runtime | {"wasm": f"{url}/ort/{RUNTIME['wasm']}"},
            "orders": orders,
        }
        command = ["node", "--input-type=module", "-e", SCRIPT, json.dumps(given)]
        lines = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return np.concatenate([np.array(json.loads(line)) for line in lines.splitlines()])


def by_python(path: Path, orders: list[dict[str, Any]]) -> np.ndarray:
    """The same by the backend `cpu`."""
    with Generator.load(path, backend="cpu", threads=1) as generator:
        return np.concatenate(
            [generator.generate(one["classes"], seed=one["seeds"][0]).tokens for one in orders]
        )


def compared(label: str, path: Path, pictures: int) -> dict[str, Any]:
    """A row of how many pictures and tokens are the same."""
    manifest = Bundle.open(path).manifest
    number = np.arange(pictures)
    orders = [
        {
            "classes": (7 * some % manifest.model.num_classes).tolist(),
            "seeds": (SEED + some).tolist(),
        }
        for some in np.split(number, range(TOGETHER, pictures, TOGETHER))
    ]
    began = time.perf_counter()
    engine, python = by_the_engine(path, orders), by_python(path, orders)
    same = engine == python
    # Once a token is another, what follows is another picture.
    first = np.where(same.all(1), same.shape[1], same.argmin(1))
    return {
        "model": label,
        "what": "parity",
        "graph": "step-cpu" if "step-cpu.onnx" in manifest.files else "step",
        "pictures": pictures,
        "same_pictures": int(same.all(1).sum()),
        "same_tokens_before_the_first_other": int(first.sum()),
        "tokens": int(same.size),
        "seconds": round(time.perf_counter() - began),
    }


@click.command()
@click.argument("bundles", nargs=-1, metavar="[LABEL=BUNDLE...]")
@click.option("--pictures", default=64, show_default=True, type=click.IntRange(min=1))
@click.option("--json", "target", type=click.Path(path_type=Path), help="Put the rows here.")
def main(bundles: tuple[str, ...], pictures: int, target: Path | None) -> None:
    """Compare over each bundle; over the model in the box if none is named."""
    if not DIST.is_dir():
        raise click.UsageError("ONNX Runtime for the web is missing; run npm ci --prefix web")
    for label, _, path in (one.partition("=") for one in bundles or (f"box={models_dir()}/emoji",)):
        row = compared(label, Path(path), pictures)
        click.echo(json.dumps(row))
        if target is not None:
            put(target, [row])


if __name__ == "__main__":
    main()
