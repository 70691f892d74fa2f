"""Measure the product on an NVIDIA GPU, with rivals beside it in the same run.

    python benchmarks/gpu.py --size L --engines compiled --json gpu-L.json

Networks of the published sizes with **random weights**, for speed; the model in the box, for how
far other number formats are from float32. Every section is a process of its own, so that a fault in
one costs no other; rows are printed as they come and the JSON file is written after each section.
The sections are in `gpu_benchmark`, a module each.

Bundles are made once and kept in the cache. `--prepare`, on a machine with more time, compiles
kernels into ENGINES/SIZE and, for the model in the box, into ENGINES/box; leaves in
ENGINES/outline-SIZE what makes a bundle of the same layout out of random numbers in seconds; and
draws the pictures of the CPU that the GPU's are compared with (ENGINES/cpu-tokens.npy).

Seconds are of whole requests, `Generator.generate` with guidance (two rows an image), top-k 600 and
top-p 0.98, decoding included.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import click
from gpu_benchmark.agreement import compare_formats, draw_on_cpu
from gpu_benchmark.bundles import make_box, make_bundle, prepare_all
from gpu_benchmark.report import Report
from gpu_benchmark.rival_llamagen import measure_llamagen
from gpu_benchmark.rival_published import measure_published
from gpu_benchmark.rival_torch import measure_torch
from gpu_benchmark.sections import in_process
from gpu_benchmark.speed import measure_copy, measure_speed

from aim_cli.dataclass_options import CommaSeparated

SECTIONS = ("copy", "speed", "agreement", "torch", "published", "llamagen")


@click.command()
@click.option("--size", type=click.Choice(["B", "L", "XL"]), default="L", show_default=True)
@click.option("--bundle", type=click.Path(path_type=Path), help="Instead of random weights.")
@click.option(
    "--engines",
    type=click.Path(path_type=Path),
    help="Compiled kernels: folders 'L' and so on, and 'box'. [default: in the cache]",
)
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    default=Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "aim-runtime",
    show_default=True,
    help="Where random bundles are kept between runs.",
)
@click.option(
    "--backend",
    "backends",
    type=CommaSeparated(str),
    default="cuda,onnxruntime-cuda",
    show_default=True,
    help="Which of ours to measure.",
)
@click.option(
    "--precision",
    "precisions",
    type=CommaSeparated(str),
    default="fp16,fp16-state16,fp16-state8,int8,fp32",
    show_default=True,
    help="Of the cuda backend, as far as the bundle has them.",
)
@click.option(
    "--images",
    "batches",
    type=CommaSeparated(int),
    default="1,16,64",
    show_default=True,
    help="Images a request.",
)
@click.option(
    "--separate-launches",
    "separate",
    is_flag=True,
    help="Leave out buckets whose layers are one launch, as on GPUs that cannot hold it.",
)
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True)
@click.option(
    "--compared",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Images of the model in the box that number formats are compared over.",
)
@click.option("--published", type=click.Path(path_type=Path), help="A checkout of hp-l33/AiM.")
@click.option(
    "--mamba",
    type=click.Path(path_type=Path),
    help="A checkout of state-spaces/mamba for it. [default: the installed mamba_ssm]",
)
@click.option(
    "--llamagen", type=click.Path(path_type=Path), help="A checkout of FoundationVision/LlamaGen."
)
@click.option(
    "--section", "sections", type=CommaSeparated(str), default=",".join(SECTIONS), show_default=True
)
@click.option("--json", "target", type=click.Path(path_type=Path), help="Write all figures here.")
@click.option("--prepare", is_flag=True, help="Make bundles and compile kernels, then stop.")
@click.option("--quick", is_flag=True, help="One precision, few images, one repeat: a smoke test.")
def main(
    size: str,
    bundle: Path | None,
    engines: Path | None,
    cache: Path,
    backends: tuple[str, ...],
    precisions: tuple[str, ...],
    batches: tuple[int, ...],
    separate: bool,
    repeats: int,
    compared: int,
    published: Path | None,
    mamba: Path | None,
    llamagen: Path | None,
    sections: tuple[str, ...],
    target: Path | None,
    prepare: bool,
    quick: bool,
) -> None:
    """Measure this machine's GPU."""
    if unknown := set(sections) - set(SECTIONS):
        raise click.BadParameter(f"{unknown.pop()!r} is none of {', '.join(SECTIONS)}.")
    if quick:
        precisions, batches, repeats, compared = precisions[:1], batches[:2], 1, min(compared, 8)
    if prepare:
        prepare_all(size, cache, engines or cache / "engines", precisions, compared)
        return
    report = Report(target, size if bundle is None else bundle.name, repeats)
    report.found["separate_launches"] = separate
    engines = engines or cache / "engines"
    runs = [("cuda", precision) for precision in precisions if "cuda" in backends]
    runs += [(backend, "auto") for backend in backends if backend != "cuda"]

    if "copy" in sections:
        report.add("copy", in_process(measure_copy))
    if "speed" in sections:
        path = bundle
        if path is None:
            made = in_process(make_bundle, size, cache, engines, separate)
            report.add("bundle", made)
            path = Path(made["path"]) if "path" in made else None
        for backend, precision in runs if path is not None else []:
            found = in_process(
                measure_speed, str(path), backend, precision, batches, repeats, started=time.time()
            )
            report.add(f"speed {backend} {precision}", found)
    if "agreement" in sections:
        with tempfile.TemporaryDirectory() as scratch:
            made = in_process(make_box, cache, engines)
            report.add("box", made)
            # The first is what the others are compared with.
            ordered = sorted(runs, key=lambda run: run != ("cuda", "fp32"))
            if "path" in made:
                drawn = in_process(draw_on_cpu, made["path"], compared, engines, scratch)
                report.add("drawing on the CPU", drawn)
            for backend, precision in ordered if "path" in made else []:
                found = in_process(
                    compare_formats, made["path"], backend, precision, compared, scratch
                )
                report.add(f"agreement {backend} {precision}", found)
    if "torch" in sections and bundle is None:
        report.add("torch", in_process(measure_torch, size, batches, repeats))
    if "published" in sections and bundle is None:
        found = {"error": "not asked for; --published names a checkout"}
        if published is not None:
            checkouts = str(published), str(mamba or "")
            found = in_process(measure_published, *checkouts, size, batches, repeats)
        report.add("published", found)
    if "llamagen" in sections and bundle is None:
        found = {"error": "not asked for; --llamagen names a checkout"}
        if llamagen is not None:
            found = in_process(measure_llamagen, str(llamagen), size, batches, repeats)
        report.add("llamagen", found)
    report.finish()


if __name__ == "__main__":
    main()
