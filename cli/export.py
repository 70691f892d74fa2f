"""``aim export``: from a checkpoint to a bundle that was held against it."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click
from click.core import ParameterSource

from aim_cli import human
from aim_cli.errors import Interrupted, bad_arguments, requires
from aim_cli.options import sampling_options
from aim_cli.terminal import Show, fields, progress_bar, table

if TYPE_CHECKING:
    from aim_export import ParityReport


@dataclass(frozen=True)
class Engines:
    """What to put into a bundle beside its graphs; checked, so that it only has to be done.

    Attributes:
        trt: TensorRT's engines.
        precisions: number formats to compile CUDA kernels for; none where none are wanted.
        capabilities: compute capabilities to compile them for, 90 stands for 9.0.
    """

    trt: bool
    precisions: tuple[str, ...] = ()
    capabilities: tuple[int, ...] = ()


@click.command("export")
@click.option(
    "--ckpt",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="AiM weights: ours or published, .safetensors, .bin or .pt, or a folder with one.",
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
    help="Folder of the new bundle.",
)
@click.option(
    "--bundle",
    "bundle_dir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Instead of --ckpt and --out: add engines to this bundle.",
)
@click.option(
    "--cuda",
    is_flag=True,
    help="Compile the CUDA kernels of the backend 'cuda'. Needs no GPU, and some minutes.",
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
    help="Build TensorRT engines for the GPU of this machine; with TensorRT for RTX installed "
    "instead, engines for any GPU that it supports, without one.",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16"]),
    default="fp32",
    show_default=True,
    help="How weights are stored; fp16 halves the bundle. A CPU computes in fp32 either way.",
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
    help="Text file, one class name a line. [default: the checkpoint's, or ImageNet's for 1000]",
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
    "--include.",
)
@click.option("--overwrite", is_flag=True, help="Replace a bundle that is already there.")
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors.")
@click.pass_context
def command(
    context: click.Context,
    ckpt: Path | None,
    tokenizer: Path | None,
    out: Path | None,
    bundle_dir: Path | None,
    cuda: bool,
    cuda_precisions: tuple[str, ...],
    cuda_archs: tuple[str, ...],
    trt: bool,
    precision: Literal["fp32", "fp16"],
    position_offset: int | None,
    class_names_file: Path | None,
    name: str | None,
    description: str | None,
    license_: str | None,
    cfg_scale: float | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    extra_files: tuple[Path, ...],
    overwrite: bool,
    quiet: bool,
) -> None:
    """Turn a checkpoint into a bundle of ONNX graphs, or add engines to a bundle.

    \b
    aim export --ckpt aim_l.safetensors --tokenizer vq_ds16_c2i.pt --out aim-l
    aim export --bundle aim-l --cuda --cuda-precision fp16,fp32 --cuda-arch 8.0,9.0
    aim export --bundle aim-l --trt

    The bundle is compared with PyTorch over every step before it is written; if they differ by
    more than rounding, nothing is.

    Guidance, temperature, top-k and top-p are what the bundle will recommend; where not given, what
    the checkpoint says, or else the published ones.
    """
    report = None if quiet else functools.partial(click.echo, err=True)
    started = time.perf_counter()
    if not cuda and (cuda_precisions or cuda_archs):
        given = "--cuda-precision" if cuda_precisions else "--cuda-arch"
        raise click.UsageError(f"{given} says what --cuda compiles for; give --cuda too")
    if bundle_dir is not None:
        _check_only_engines(context)
        engines = _check_engines(cuda, cuda_precisions, cuda_archs, trt=trt)
        _add_engines(bundle_dir, engines, report=report, quiet=quiet)
        if not quiet:
            click.echo(_outcome(bundle_dir, started))
        return
    if ckpt is None or out is None:
        raise click.UsageError(
            "--ckpt and --out are missing; or give --bundle and what to add to it, --cuda or --trt"
        )
    with requires("export", "aim export"):
        from aim_export import export_bundle
        from aim_export.bundle import check_sampling
    engines = _check_engines(cuda, cuda_precisions, cuda_archs, trt=trt)
    settings = {
        "cfg_scale": cfg_scale,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
    }
    sampling = {name: value for name, value in settings.items() if value is not None}
    with bad_arguments():
        check_sampling(sampling)
    class_names = None if class_names_file is None else read_class_names(class_names_file)
    try:
        with late_bar("PyTorch, step by step", quiet=quiet) as progress:
            _, parity = export_bundle(
                ckpt,
                out,
                tokenizer=tokenizer,
                precision=precision,
                position_offset=position_offset,
                class_names=class_names,
                name=name,
                description=description,
                license=license_,
                sampling=sampling,
                extra_files=extra_files,
                overwrite=overwrite,
                report=report,
                progress=progress,
            )
    except KeyboardInterrupt:
        raise Interrupted("interrupted; nothing was written") from None
    _add_engines(out, engines, report=report, quiet=quiet)
    if quiet:
        return
    click.echo(parity_table(parity))
    click.echo()
    click.echo(_outcome(out, started))


def _check_only_engines(context: click.Context) -> None:
    """With ``--bundle`` the bundle stays as it is: only engines can be asked for."""
    asked_for = {"cuda", "trt"}
    allowed = {"bundle_dir", "cuda_precisions", "cuda_archs", "quiet", *asked_for}
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
        raise click.UsageError("--bundle wants to know what to add to the bundle, --cuda or --trt")


def _check_engines(
    cuda: bool, precisions: tuple[str, ...], archs: tuple[str, ...], *, trt: bool
) -> Engines:
    """What was asked for; asked before an export spends minutes on something else.

    Raises:
        MissingExtra: packages that it takes are not installed.
        UsageError: kernels cannot be compiled for a format or compute capability.
        ExportError: no TensorRT can be used.
    """
    if trt:
        with requires("export", "aim export --trt"):
            from aim_export.tensorrt import check_library
        check_library()
    if not cuda:
        return Engines(trt)
    with requires("export", "aim export --cuda"):
        from aim_export.cuda.bundle import CAPABILITIES, PRECISIONS
        from aim_export.cuda.precision import FORMATS
    known = {f"{capability / 10}": capability for capability in CAPABILITIES}
    chosen = _chosen("--cuda-arch", archs, known)
    return Engines(
        trt,
        _chosen("--cuda-precision", precisions, FORMATS) or PRECISIONS,
        tuple(known[arch] for arch in chosen) or CAPABILITIES,
    )


def _chosen(option: str, given: Iterable[str], known: Iterable[str]) -> tuple[str, ...]:
    """The names in the values of an option, which may hold several with commas, each once.

    Raises UsageError for one that is not among ``known``.
    """
    names = dict.fromkeys(name.strip() for value in given for name in value.split(","))
    known = tuple(known)
    for name in names:
        if name not in known:
            raise click.UsageError(f"{option} is {name!r}; kernels can be for {', '.join(known)}")
    return tuple(names)


def _add_engines(
    bundle_dir: Path, engines: Engines, *, report: Callable[[str], None] | None, quiet: bool
) -> None:
    """Add the engines asked for to a bundle that is complete without them."""
    if engines.precisions:
        from aim_export.cuda.bundle import add_engines as add_kernels

        with (
            _whole_if_interrupted(bundle_dir, "CUDA kernels"),
            late_bar("compiling kernels", quiet=quiet) as progress,
        ):
            add_kernels(
                bundle_dir,
                precisions=engines.precisions,
                capabilities=engines.capabilities,
                report=report,
                progress=progress,
            )
    if engines.trt:
        from aim_export.tensorrt import add_engines

        with _whole_if_interrupted(bundle_dir, "TensorRT engines"):
            add_engines(bundle_dir, report)


@contextlib.contextmanager
def _whole_if_interrupted(bundle_dir: Path, without: str) -> Iterator[None]:
    """Say, after Ctrl-C, that the bundle is as it was."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {bundle_dir} is whole, without new {without}") from None


def _outcome(bundle_dir: Path, started: float) -> str:
    """What there is now, and how long it took since ``started``."""
    from aim_runtime import Bundle

    files = Bundle.open(bundle_dir).manifest.files.values()
    stored = human.size(sum(entry.size for entry in files))
    took = human.duration(time.perf_counter() - started)
    return fields([("bundle", f"{bundle_dir} ({stored})"), ("time", took)])


@contextlib.contextmanager
def late_bar(label: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar that appears with the first (done, in all) and goes once all is done."""
    with contextlib.ExitStack() as bar:
        show: Show | None = None

        def progress(done: int, total: int) -> None:
            nonlocal show
            if show is None:
                show = bar.enter_context(progress_bar(label, total, quiet=quiet))
            show(done)
            if done == total:
                bar.close()

        yield progress


def read_class_names(path: Path) -> list[str]:
    """The lines of a text file; a blank one is no name and only allowed at the end.

    Raises:
        UsageError: the file is not text.
    """
    try:
        return path.read_text(encoding="utf-8").rstrip().splitlines()
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{path} is not a text file in UTF-8") from error


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
            "same token drawn",
            f"{parity.token_agreement:.2%}",
            f"{allowed.token_agreement:.0%}",
        ),
        ("decoded pixels, PSNR", exact, f"{allowed.psnr_db:.0f} dB"),
    ]
    return table(rows)
