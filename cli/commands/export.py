"""`aim export`: from a checkpoint to a bundle that was held against it."""

from __future__ import annotations

import codecs
import functools
import os
import stat
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from aim_cli import human
from aim_cli.errors import Interrupted, bad_arguments, requires
from aim_cli.export_engines import Report, add_engines, chosen_engines, late_bar
from aim_cli.options import sampling_options
from aim_cli.terminal import fields, finish, table
from aim_cli.torch_threads import limit_torch_threads

if TYPE_CHECKING:
    from aim_export import ParityReport

_MAX_NAMES_BYTES = 16 << 20
_SAMPLING = ("cfg_scale", "temperature", "top_k", "top_p")


@click.command("export")
@click.option(
    "--ckpt",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="AiM weights, ours or published: .safetensors, .bin or .pt, whole or in shards; a folder "
    "with one, or the run folder of a training, stopped or running.",
)
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="VQ tokenizer. [default: the one inside the checkpoint]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of the new bundle. [default: the checkpoint's name without its ending, here]",
)
@click.option(
    "--bundle",
    "bundle_dir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Instead of --ckpt: add engines to this bundle.",
)
@click.option(
    "--cpu",
    is_flag=True,
    help="Add the step and the decoder that make the backend 'cpu' faster. New bundles have them "
    "already; older ones get them without their checkpoint. With --precision int8 a decoder of "
    "8-bit convolutions, where its pictures are near enough.",
)
@click.option(
    "--cuda",
    is_flag=True,
    help="Compile the CUDA kernels of the backend 'cuda' too. Needs Triton and some minutes, but "
    "no GPU.",
)
@click.option(
    "--cuda-precision",
    "cuda_precisions",
    multiple=True,
    metavar="NAME,...",
    help="Number formats to compile for: fp32, fp16, fp16-state16, fp16-state8, int8, "
    "int8-state16, int8-state8. [default: the first four]",
)
@click.option(
    "--cuda-arch",
    "cuda_archs",
    multiple=True,
    metavar="X.Y,...",
    help="Compute capabilities to compile for: 8.0, 8.6, 8.9, 9.0, 10.0, 12.0. [default: all]",
)
@click.option(
    "--trt",
    is_flag=True,
    help="Build TensorRT engines for the GPU of this machine too; with TensorRT for RTX installed "
    "instead, engines for any GPU that it supports, without one.",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "int8", "int4"]),
    default="fp32",
    show_default=True,
    help="How weights are stored. fp16 halves the bundle; a CPU computes in fp32 either way. int8 "
    "and int4 are for CPUs: what every step reads is a quarter or less, and steps are faster.",
)
@click.option(
    "--position-offset",
    metavar="0|1",
    type=click.IntRange(0, 1),
    help="Position embedding of the token at s: row s-1 plus this. 0 is what training uses, 1 what "
    "the published sampler does. [default: what the checkpoint says, else 1]",
)
@click.option(
    "--class-names",
    "class_names_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Text file in UTF-8, one class name a line. [default: the checkpoint's, or ImageNet's for "
    "1000]",
)
@click.option("--name", metavar="TEXT", help="Name of the bundle. [default: the checkpoint's]")
@click.option("--description", metavar="TEXT", help="A sentence for the model card.")
@click.option("--license", "license_", metavar="TEXT", help="Licence of the weights.")
@sampling_options
@click.option(
    "--include",
    "extra_files",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Put this file into the bundle too, a licence's text for example; several with several "
    "--include; 64 MiB each at most.",
)
@click.option("--overwrite", is_flag=True, help="Replace a bundle that is already there.")
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors.")
@click.pass_context
def command(
    context: click.Context,
    ckpt: Path | None,
    out: Path | None,
    bundle_dir: Path | None,
    cpu: bool,
    cuda: bool,
    cuda_precisions: tuple[str, ...],
    cuda_archs: tuple[str, ...],
    trt: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Turn a checkpoint into a bundle of ONNX graphs, or add engines to a bundle.

    \b
    aim export --ckpt aim_l.pt                              # makes the folder aim_l
    aim export --ckpt aim_l.safetensors --tokenizer vq_ds16_c2i.pt --out aim-l
    aim export --ckpt runs/model                            # a training's best model so far
    aim export --ckpt aim_l.pt --trt --cuda                 # and its engines
    aim export --bundle aim_l --cuda --cuda-precision fp16,fp32 --cuda-arch 8.0,9.0
    aim export --bundle aim_l --cpu                         # a faster step for CPUs
    aim export --bundle aim_l --cpu --precision int8        # and a faster decoder
    aim export --ckpt aim_l.pt --precision int8             # small, and fast on CPUs

    The bundle is compared with PyTorch over every step before it is written; if they differ by
    more than rounding, or than a --precision of few bits may, nothing is.

    Where --trt or --cuda cannot be done on this machine, the bundle is made all the same, and the
    last line says what is missing and which command adds the engines later.

    Guidance, temperature, top-k and top-p are what the bundle will recommend; where not given, what
    the checkpoint says, or else the published ones.
    """
    report = None if quiet else functools.partial(click.echo, err=True)
    started = time.perf_counter()
    engines = chosen_engines(
        cuda, cuda_precisions, cuda_archs, trt=trt, cpu=cpu and bundle_dir is not None
    )
    if bundle_dir is not None:
        _check_only_engines(context)
        engines = replace(engines, cpu_decoder=options["precision"] == "int8")
        add_engines(bundle_dir, engines, useful=False, report=report, quiet=quiet)
        if not quiet:
            finish(_outcome(bundle_dir, started), f"the engines are in {bundle_dir}")
        return
    if ckpt is None:
        raise click.UsageError(
            "--ckpt is missing; or give --bundle and what to add to it, --cpu, --cuda or --trt"
        )
    _check_engines_of_few_bits(options["precision"], cuda=cuda, trt=trt)
    out, parity = _export(ckpt, out, options, report=report, quiet=quiet)
    add_engines(out, engines, useful=True, report=report, quiet=quiet)
    if not quiet:
        finish(f"{parity_table(parity)}\n\n{_outcome(out, started)}", f"the bundle is {out}")


def _export(
    ckpt: Path, out: Path | None, options: dict[str, Any], *, report: Report | None, quiet: bool
) -> tuple[Path, ParityReport]:
    """Make the bundle; returns where it is and how well it agrees with PyTorch."""
    with requires("export", "aim export"):
        from aim_export import export_bundle
        from aim_export.bundle import check_sampling, default_name
    limit_torch_threads()
    given = {name: options.pop(name) for name in _SAMPLING}
    sampling = {name: value for name, value in given.items() if value is not None}
    with bad_arguments():
        check_sampling(sampling)
    names_file = options.pop("class_names_file")
    class_names = None if names_file is None else read_class_names(names_file)
    if out is None:
        out = Path(default_name(ckpt))
        if os.path.abspath(out) == os.path.abspath(ckpt):
            out = Path(f"{out}-bundle")
    try:
        with late_bar("PyTorch, step by step", quiet=quiet) as progress:
            _, parity = export_bundle(
                ckpt,
                out,
                class_names=class_names,
                license=options.pop("license_"),
                sampling=sampling,
                report=report,
                progress=progress,
                **options,
            )
    except KeyboardInterrupt:
        raise Interrupted("interrupted; nothing was written") from None
    return out, parity


def _check_engines_of_few_bits(precision: str, *, cuda: bool, trt: bool) -> None:
    """Kernels and engines for GPUs are made of weights that are stored wide."""
    for option, asked in (("--cuda", cuda), ("--trt", trt)):
        if asked and precision in ("int8", "int4"):
            own = ", and --cuda-precision int8" if option == "--cuda" else ""
            raise click.UsageError(
                f"--precision {precision} is for CPUs; {option} takes --precision fp32 or fp16{own}"
            )


def _check_only_engines(context: click.Context) -> None:
    """With `--bundle` the bundle stays as it is: only engines can be asked for."""
    asked_for = {"cpu", "cuda", "trt"}
    allowed = {"bundle_dir", "cuda_precisions", "cuda_archs", "quiet", *asked_for}
    if context.params["cpu"] and context.params["precision"] == "int8":
        allowed.add("precision")  # what the graphs for CPUs compute in
    for parameter in context.command.params:
        name = parameter.name or ""
        if (
            name not in allowed
            and context.get_parameter_source(name) is not ParameterSource.DEFAULT
        ):
            raise click.UsageError(
                f"{parameter.opts[0]} makes a new bundle; --bundle adds engines to one that exists"
            )
    if not any(context.params[name] for name in asked_for):
        raise click.UsageError(
            "--bundle wants to know what to add to the bundle: --cpu, --cuda or --trt"
        )


def _outcome(bundle_dir: Path, started: float) -> str:
    """What there is now, and how long it took since `started`."""
    from aim_runtime import Bundle

    files = Bundle.open(bundle_dir).manifest.files.values()
    stored = human.size(sum(entry.size for entry in files))
    took = human.duration(time.perf_counter() - started)
    return fields([("bundle", f"{bundle_dir} ({stored})"), ("time", took)])


def read_class_names(path: Path) -> list[str]:
    """The lines of a text file; a blank one is no name and only allowed at the end.

    UTF-8 with or without its mark, or UTF-16 with it, as some editors write; any line ends.

    Raises:
        UsageError: the file is not text, or cannot be a list of names.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise click.UsageError(f"--class-names: {path} is no regular file")
    if status.st_size > _MAX_NAMES_BYTES:
        raise click.UsageError(
            f"--class-names: {path} has {status.st_size} bytes; at most {_MAX_NAMES_BYTES} are read"
        )
    data = path.read_bytes()
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise click.UsageError(f"--class-names: {path} is not a text file in UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n").rstrip().split("\n")


def parity_table(parity: ParityReport) -> str:
    """What was measured beside what is allowed."""
    from aim_export.parity import TOLERANCES

    allowed = TOLERANCES[parity.precision]
    exact = "identical" if parity.psnr_db >= 999 else f"{parity.psnr_db:.1f} dB"
    rows = [
        (f"parity over {parity.steps} steps, {parity.images} images", "measured", "allowed"),
        (
            "PyTorch step by step and whole sequence, relative error",
            f"{parity.sequence_error:.1e}",
            f"{allowed.sequence_error:.0e}",
        ),
        (
            "logits of ONNX Runtime and PyTorch, relative error",
            f"{parity.logits_error:.1e}",
            f"{allowed.logits_error:.0e}",
        ),
        ("    largest difference of one logit", f"{parity.logits_max_error:.1e}", ""),
        (
            "Kullback-Leibler divergence, nats",
            f"{parity.divergence:.1e}",
            f"{allowed.divergence:.0e}",
        ),
        ("same best token", f"{parity.best_token_agreement:.2%}", ""),
        ("    step graphs compared, of which the worst counts", ", ".join(parity.step_graphs), ""),
        (
            "same token drawn",
            f"{parity.token_agreement:.2%}",
            f"{allowed.token_agreement:.0%}",
        ),
        ("decoded pixels, PSNR", exact, f"{allowed.psnr_db:.0f} dB"),
    ]
    return table(rows)
