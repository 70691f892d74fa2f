"""Draw what `serving.py` measured at several loads: `plot_serving.py ROWS OUT.png`.

ROWS has a line of its JSON a run with `--load`. Needs matplotlib, which nothing else here does.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
from matplotlib import pyplot


@click.command()
@click.argument("rows", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
def main(rows: Path, out: Path) -> None:
    """Latency by load, in a picture."""
    runs = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    runs.sort(key=lambda run: run["load"])
    loads = [100 * run["load"] for run in runs]
    figure, axes = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    for share, style in (("p50", "o-"), ("p99", "s--")):
        axes.plot(loads, [run["latency_seconds"][share] for run in runs], style, label=share)
    axes.set_xlabel("arrivals, % of what a full static batch keeps up with")
    axes.set_ylabel("seconds from asking to the last image")
    axes.set_ylim(bottom=0)
    axes.legend()
    axes.set_title(f"{runs[0]['slots']} slots, {runs[0]['device']}, Poisson arrivals", fontsize=10)
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    main()
