"""`aim eval`: the figures of pictures, tokenizers and models, with all that they depend on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aim_cli.errors import Interrupted, requires
from aim_cli.eval_options import How, Wanted, how_options, wanted_options
from aim_cli.eval_subject import Drawing, Target, draw_sample, open_model
from aim_cli.options import EngineOptions, backend_option, engine_options, request_options
from aim_cli.terminal import as_json, finish
from aim_cli.torch_threads import limit_torch_threads

if TYPE_CHECKING:
    from aim_cli.eval_measure import Measuring
    from aim_runtime.request import RequestOptions

_MAX_IMAGES = 10_000_000
_MOST_CLASSES = 30
"""Classes that have a row each on standard output; of more the table is in the report alone."""


@click.command("eval")
@click.argument(
    "target", required=False, type=click.Path(path_type=Path), metavar="[SAMPLES|BUNDLE]"
)
@wanted_options
@click.option(
    "--ckpt",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Checkpoint whose encoder turns pictures into codes; without a bundle it is what is "
    "measured.",
)
@click.option(
    "-n",
    "count",
    type=click.IntRange(1, _MAX_IMAGES),
    metavar="N",
    help="Pictures to draw of a bundle. More than before adds to what is there.",
)
@click.option(
    "--preset",
    type=click.Choice(["fid", "preview"]),
    default="fid",
    show_default=True,
    help="How they are drawn, as in 'aim sample': the model's distribution as it is, or the "
    "bundle's own settings.",
)
@request_options
@how_options
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("aim-eval"),
    show_default=True,
    metavar="DIR",
    help="Folder for the report, pictures to look at, the sample and the features' cache.",
)
@backend_option
@engine_options
@click.option("--json", "as_object", is_flag=True, help="Print the report as one JSON object.")
@click.option("--quiet", "-q", is_flag=True, help="Show no progress.")
def command(
    target: Path | None,
    wanted: Wanted,
    ckpt: Path | None,
    count: int | None,
    preset: str,
    asked: RequestOptions,
    how: How,
    out: Path,
    backend: str,
    engine: EngineOptions,
    as_object: bool,
    quiet: bool,
) -> None:
    """Measure pictures, a bundle or a checkpoint.

    \b
    aim eval aim-sample --real val --crop centre                    pictures that are there
    aim eval BUNDLE -n 50000 --real VIRTUAL_imagenet256_labeled.npz --features inception
    aim eval BUNDLE --ckpt model.safetensors --reconstruction val --likelihood val
    aim eval --ckpt tokenizer.safetensors --reconstruction val
    aim eval -n 500 --real val --crop centre                        the model in the box

    SAMPLES is a folder of pictures, that of 'aim sample' or an .npz of such. Compared with --real
    they get FID, KID, inception score, precision and recall, density and coverage, and how near
    they come to single pictures. Of a BUNDLE -n pictures are drawn first.

    DIR holds the report, as JSON and as Markdown: the figures with all that they depend on, such as
    checksums of bundle, pictures and features, settings, seeds and resizing. What was stopped goes
    on when the same command is given again. docs/evaluation.md tells what each figure means.
    """
    with requires("eval", "aim eval"):
        import torch
    started = time.perf_counter()
    limit_torch_threads()
    if engine.threads is not None:
        torch.set_num_threads(engine.threads)
    drawing = Drawing(count, preset, asked, backend, engine)
    chosen = checked_target(target, ckpt, wanted, drawing)
    try:
        report = evaluate(chosen, wanted, how, drawing, out, quiet=quiet)
    except KeyboardInterrupt:
        raise Interrupted("stopped; the same command goes on from what is done") from None
    from aim_evaluation.report import head, markdown, write_report

    report = head(time.perf_counter() - started) | report
    write_report(out, report)
    few = len(report.get("classes", [])) <= _MOST_CLASSES
    text = as_json(report, indent=2) if as_object else markdown(report, classes=few)
    finish(text, f"the report is in {out}")


def checked_target(
    target: Path | None, ckpt: Path | None, wanted: Wanted, drawing: Drawing
) -> Target:
    """What is to be measured; without a target, but pictures to draw, the model in the box.

    Raises UsageError where that is not enough for what is asked.
    """
    if target is None and drawing.count is not None:
        from aim_runtime import Bundle

        target = Bundle.open(None).path
    found = Target.of(target, ckpt)
    if not (wanted.real or wanted.reconstruction or wanted.likelihood):
        raise click.UsageError(
            "there is nothing to measure: give --real, --reconstruction or --likelihood"
        )
    if wanted.real and not (found.samples or found.bundle):
        raise click.UsageError("--real compares pictures: name their folder, an .npz or a bundle")
    if found.samples and drawing.changes_pictures:
        raise click.UsageError(
            f"{found.samples} holds pictures that are drawn already: -n and the options of drawing "
            "are for a bundle"
        )
    if wanted.train and not wanted.real:
        raise click.UsageError("--train tells of generated pictures, and takes --real beside it")
    for path in (wanted.real, wanted.train, wanted.reconstruction, wanted.likelihood):
        if path is not None and not path.exists():
            raise click.UsageError(f"{path} does not exist; expected pictures")
    return found


def evaluate(
    target: Target, wanted: Wanted, how: How, drawing: Drawing, out: Path, *, quiet: bool
) -> dict[str, Any]:
    """Measure what is wanted; returns the report without its head."""
    from aim_cli import eval_measure as measure
    from aim_evaluation.features import load_features

    device = torch_device(drawing.engine.device)
    # Whatever is wrong with features, checkpoint or pictures is said before anything is drawn.
    features = load_features(how.features, how.weights, download=how.download, device=device)
    measuring = measure.Measuring(
        out,
        features,
        how.crop,
        how.resize_factor,
        drawing.asked["seed"],
        how.batch_size,
        quiet,
    )
    if wanted.real and target.bundle is not None:
        check_before_drawing(measuring, target.bundle, wanted.real, drawing)
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {}
    if wanted.reconstruction or wanted.likelihood:
        report |= measure_model(measuring, target, wanted, drawing, device)
    if wanted.real:
        source = target.samples
        if target.bundle is not None:
            source = out / "sample"
            draw_sample(target.bundle, drawing, source, quiet=quiet)
        assert source is not None
        samples = measure.Samples.open(source)
        part, real = measure.measure_comparison(
            measuring, samples, wanted.real, allow_duplicates=how.allow_duplicates
        )
        report |= part
        report["memorisation"] = measure.measure_memorisation(
            measuring, samples, real, wanted.train
        )
    return report


def check_before_drawing(measuring: Measuring, bundle: Path, real: Path, drawing: Drawing) -> None:
    """Say now, not after hours of drawing, why pictures could not be compared."""
    from aim_cli import eval_measure as measure
    from aim_runtime import Bundle

    if drawing.count is None:
        raise click.UsageError("-n says how many pictures are drawn of a bundle; it is missing")
    model = Bundle.open(bundle).manifest.model
    size = (model.image_height, model.image_width)
    measure.check_before_drawing(measuring, size, drawing.count, real)


def measure_model(
    measuring: Measuring, target: Target, wanted: Wanted, drawing: Drawing, device: str
) -> dict[str, Any]:
    """Reconstruction and likelihood."""
    from aim_cli import eval_measure as measure

    model = open_model(target, drawing, device)
    report: dict[str, Any] = {"model": model.about, "features": measuring.features.describe()}
    coded: dict[Path, measure.Coded] = {}
    for path in (wanted.reconstruction, wanted.likelihood):
        if path is not None and path not in coded:
            coded[path] = measure.Coded(measuring, model, path, wanted.most)
    if wanted.reconstruction is not None:
        of = coded[wanted.reconstruction]
        report["reconstruction"] = measure.measure_reconstruction(measuring, model, of)
    if wanted.likelihood is not None:
        of = coded[wanted.likelihood]
        report["likelihood"] = measure.measure_likelihood(measuring, model, of)
    return report


def torch_device(name: str) -> str:
    """PyTorch's name of a device; "auto" is the GPU that it sees, if any."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu" and not torch.cuda.is_available():
        raise click.UsageError(f"--device is '{name}', and PyTorch sees no GPU; use cpu")
    return name
