"""Engines put into a bundle: what can be built here, the building, and how to do the rest later."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import click

from aim_cli.errors import Interrupted, MissingExtra, requires
from aim_cli.terminal import Show, progress_bar

Report = Callable[[str], None]
"""Told, line by line, what is being done."""


@dataclass(frozen=True)
class Engines:
    """What to put into a bundle beside its graphs; checked, so that it only has to be done.

    Attributes:
        trt: TensorRT's engines.
        cpu: the fused step graph of the backend `cpu`, which a new bundle has already.
        precisions: number formats to compile CUDA kernels for; none where none are wanted.
        capabilities: compute capabilities to compile them for, 90 stands for 9.0.
        cuda_options: the options that asked for the kernels, as they were typed.
        cpu_decoder: with `cpu`, a decoder of 8-bit convolutions too, even where the bundle's
            precision does not ask for it.
    """

    trt: bool = False
    cpu: bool = False
    precisions: tuple[str, ...] = ()
    capabilities: tuple[int, ...] = ()
    cuda_options: tuple[str, ...] = ()
    cpu_decoder: bool = False


def chosen_engines(
    cuda: bool, precisions: tuple[str, ...], archs: tuple[str, ...], *, trt: bool, cpu: bool
) -> Engines:
    """What the options ask for, whether it can be built here or not.

    Raises:
        UsageError: there are no kernels for a format or compute capability.
    """
    if not cuda:
        if precisions or archs:
            given = "--cuda-precision" if precisions else "--cuda-arch"
            raise click.UsageError(f"{given} says what --cuda compiles for; give --cuda too")
        return Engines(trt, cpu)
    from aim_export.cuda.precision import FORMATS
    from aim_export.cuda.targets import CAPABILITIES, PRECISIONS

    known = {f"{capability / 10}": capability for capability in CAPABILITIES}
    chosen = _chosen("--cuda-arch", archs, known)
    formats = _chosen("--cuda-precision", precisions, FORMATS)
    options = ["--cuda"]
    for option, names in (("--cuda-precision", formats), ("--cuda-arch", chosen)):
        options += [option, ",".join(names)] if names else []
    return Engines(
        trt,
        cpu,
        formats or PRECISIONS,
        tuple(known[arch] for arch in chosen) or CAPABILITIES,
        tuple(options),
    )


def add_engines(
    bundle_dir: Path, engines: Engines, *, useful: bool, report: Report | None, quiet: bool
) -> None:
    """Add the engines asked for to a bundle that is complete without them.

    What cannot be built on this machine is left out, with a sentence on stderr that says why and
    which command adds it later.

    Args:
        bundle_dir: the bundle.
        engines: what to add.
        useful: something was done already. Else, if nothing can be built, that is the error.
        report: told what is being done.
        quiet: show no progress.

    Raises:
        MissingExtra, ExportError: nothing could be done at all, or an engine cannot be built.
    """
    left_out: list[tuple[MissingExtra, tuple[str, ...]]] = []
    steps: list[tuple[tuple[str, ...], Callable[[], None]]] = []
    if engines.cpu:
        in_8_bits = engines.cpu_decoder
        steps.append((("--cpu",), lambda: _add_cpu_graphs(bundle_dir, report, in_8_bits=in_8_bits)))
    if engines.precisions:
        steps.append(
            (engines.cuda_options, lambda: _add_kernels(bundle_dir, engines, report, quiet=quiet))
        )
    if engines.trt:
        steps.append((("--trt",), lambda: _add_tensorrt(bundle_dir, report)))
    for options, step in steps:
        try:
            step()
            useful = True
        except MissingExtra as error:
            left_out.append((error, options))
    if left_out and not useful:
        raise left_out[0][0]
    for missing, options in left_out:
        later = shlex.join(["aim", "export", "--bundle", str(bundle_dir), *options])
        click.echo(f"Warning: {missing.format_message()}; then add them with: {later}", err=True)


class Unavailable(MissingExtra):
    """What builds some engines is not on this machine; the message says how to get it."""

    def __init__(self, message: str) -> None:
        click.ClickException.__init__(self, message)


def _add_kernels(bundle_dir: Path, engines: Engines, report: Report | None, *, quiet: bool) -> None:
    if sys.platform != "linux":
        raise Unavailable("no kernels can be compiled: Triton, which does it, is for Linux only")
    if not _installed("triton"):
        raise Unavailable(
            "no kernels can be compiled: Triton is not installed; pip install "
            "'aim-runtime[kernels]'"
        )
    with requires("kernels", "aim export --cuda"):
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


def _add_cpu_graphs(bundle_dir: Path, report: Report | None, *, in_8_bits: bool) -> None:
    with requires("export", "aim export --cpu"):
        from aim_export.cpu import add_step_graph
        from aim_export.decoder import EIGHT_BITS, add_decoder_graph
    with _whole_if_interrupted(bundle_dir, "graphs for CPUs"):
        bundle = add_step_graph(bundle_dir, report)
        in_8_bits = in_8_bits or bundle.manifest.precision in EIGHT_BITS
        add_decoder_graph(bundle_dir, report, in_8_bits=in_8_bits)


def _add_tensorrt(bundle_dir: Path, report: Report | None) -> None:
    with requires("export", "aim export --trt"):
        from aim_export.errors import EnginesUnavailable
        from aim_export.tensorrt import add_engines as add_tensorrt
    # TensorRT takes our kernel, which Triton compiles; TensorRT for RTX does without.
    with _whole_if_interrupted(bundle_dir, "TensorRT engines"), requires("kernels", "--trt"):
        try:
            add_tensorrt(bundle_dir, report)
        except EnginesUnavailable as error:
            raise Unavailable(str(error)) from error


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ValueError:  # a module without a spec, or barred from being imported
        return False


def _chosen(option: str, given: Iterable[str], known: Iterable[str]) -> tuple[str, ...]:
    """The names in the values of an option, which may hold several with commas, each once.

    Raises UsageError for one that is not among `known`.
    """
    names = dict.fromkeys(name.strip() for value in given for name in value.split(","))
    known = tuple(known)
    for name in names:
        if name not in known:
            raise click.UsageError(f"{option} is {name!r}; kernels can be for {', '.join(known)}")
    return tuple(names)


@contextlib.contextmanager
def _whole_if_interrupted(bundle_dir: Path, without: str) -> Iterator[None]:
    """Say, after Ctrl-C, that the bundle is as it was."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {bundle_dir} is whole, without new {without}") from None


@contextlib.contextmanager
def late_bar(label: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar that appears with the first (done, in all) and goes once all is done.

    Then another may begin.
    """
    with contextlib.ExitStack() as bar:
        show: Show | None = None

        def progress(done: int, total: int) -> None:
            nonlocal show
            if show is None:
                show = bar.enter_context(progress_bar(label, total, quiet=quiet))
            show(done)
            if done == total:
                bar.close()
                show = None  # what comes next has a bar of its own

        yield progress
