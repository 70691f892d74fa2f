"""Draw the GPU's part of `results/serving-*.json`: `plot_serving.py ROWS.json OUT.png`.

Needs matplotlib, which nothing else here does.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
from matplotlib import pyplot

RUNS = {"gpu_poisson": "arrivals at 80 %", "gpu_saturated": "96 clients"}


@click.command()
@click.argument("rows", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
def main(rows: Path, out: Path) -> None:
    """Latency, and time from step to step with and without images that join."""
    found = json.loads(rows.read_text(encoding="utf-8"))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for shift, (name, label) in enumerate(RUNS.items()):
        latency = found[name]["latency_seconds"]
        places = [position + 0.4 * shift for position in range(2)]
        left.bar(places, [latency["p50"], latency["p99"]], 0.38, label=label)
        steps = found[name]["step_seconds"]
        kinds = [(kind, share) for kind in ("without", "with_joins") for share in ("p50", "p99")]
        places = [position + 0.4 * shift for position in range(len(kinds))]
        right.bar(places, [1e3 * steps[kind][share] for kind, share in kinds], 0.38, label=label)
    left.set_xticks([0.2, 1.2], ["p50", "p99"])
    left.set_ylabel("seconds from asking to the last image")
    left.legend()
    names = ["p50", "p99", "p50, joins", "p99, joins"]
    right.set_xticks([position + 0.2 for position in range(4)], names)
    right.set_ylabel("ms from step to step")
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
