"""`aim sample`: a balanced set of images for an evaluation, restartable, with its record.

Image i is of class `i mod C` and has the seed `seed + i`, however many there are: any image can be
drawn again alone, a run that was killed goes on where it stopped, and the first images of a large
set are the small one, which grows where it lies. `sample.json` says what the images are; a folder
never mixes two settings.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from aim_cli import human
from aim_cli.errors import Interrupted, bad_arguments
from aim_cli.options import (
    EngineOptions,
    backend_option,
    bundle_option,
    engine_options,
    load_generator,
    request_options,
)
from aim_cli.ray_cluster import ADDRESSES, connected
from aim_cli.sample_drawing import Drawer, OneMachine
from aim_cli.sample_folder import Sample
from aim_cli.terminal import finish

if TYPE_CHECKING:
    from aim_runtime import SamplingOptions
    from aim_runtime.request import RequestOptions

_MAX_IMAGES = 10_000_000
"""Far more than any evaluation takes, few enough to keep in one folder."""


@click.command("sample")
@click.option(
    "-n",
    "count",
    type=click.IntRange(min=1, max=_MAX_IMAGES),
    required=True,
    metavar="N",
    help="Images in all. More than before adds to what is there.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("aim-sample"),
    show_default=True,
    metavar="DIR",
    help="Folder for images/, the .npz and sample.json; a run that was stopped goes on in it.",
)
@click.option(
    "--preset",
    type=click.Choice(["preview", "fid"]),
    default="preview",
    show_default=True,
    help="preview: the bundle's own settings, made to look good. fid: the model's distribution as "
    "it is (temperature 1, all tokens, the bundle's guidance), for figures to compare.",
)
@request_options
@bundle_option
@backend_option
@engine_options
@click.option(
    "--ray",
    metavar="ADDRESS",
    help=f"Let the workers of a Ray cluster draw: {ADDRESSES}.",
)
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors.")
def command(
    count: int,
    out: Path,
    preset: str,
    asked: RequestOptions,
    bundle: Path | None,
    backend: str,
    engine: EngineOptions,
    ray: str | None,
    quiet: bool,
) -> None:
    """Draw N images balanced over all classes, and pack them for FID.

    \b
    aim sample -n 50000 --preset fid --out fid-50k
    aim sample -n 50000 --preset fid --out fid-50k --ray auto

    Writes images/000000.png and so on, at the end one .npz in ADM's format (arr_0: uint8, images x
    height x width x 3), and in sample.json what they were drawn with: bundle and checkpoint hash,
    settings, seeds, backend, precision. Stopped at any moment, the same command goes on; with a
    larger N it adds the images that are missing. Single settings such as --cfg-scale replace those
    of the preset.

    With --ray the workers of a cluster draw: one for each GPU, or for every 4 CPUs (--threads says
    otherwise). The images, the files and the record are the same, and all lie here.
    """
    from aim_runtime.request import check_seed

    with opened_drawer(ray, bundle, backend, engine, quiet=quiet) as drawer:
        with bad_arguments():
            seed = check_seed(asked.pop("seed"), count)
            options = preset_options(drawer.bundle.manifest.sampling, preset).replace(**asked)
            batch_size = drawer.batch_size(count, options.cfg_scale)
        sample = Sample(out, count, seed, options, drawer)
        with sample.open(preset):
            try:
                summary = sample.run(batch_size, quiet=quiet)
            except KeyboardInterrupt:
                raise Interrupted(
                    f"stopped with {sample.finished:,} of {human.count(count, 'image')} drawn; "
                    "the same command goes on from there"
                ) from None
    if not quiet:
        finish(summary, f"the sample is in {out}")


@contextlib.contextmanager
def opened_drawer(
    ray: str | None, bundle: Path | None, backend: str, engine: EngineOptions, *, quiet: bool
) -> Iterator[Drawer]:
    """This process, or the workers of the cluster at the address `ray`."""
    from aim_runtime import Bundle

    if ray is None:
        with load_generator(bundle, backend, engine, quiet=quiet) as generator:
            yield OneMachine(generator)
        return
    Bundle.open(bundle)  # before a cluster, which takes time to start
    with connected(ray, "aim sample --ray"):
        from aim_cli.sample_ray import Cluster

        with contextlib.closing(Cluster(bundle, backend, engine)) as cluster:
            yield cluster


def preset_options(defaults: SamplingOptions, preset: str) -> SamplingOptions:
    """The settings of a preset for a bundle with these defaults."""
    if preset == "fid":
        return defaults.replace(temperature=1.0, top_k=0, top_p=1.0)
    return defaults
