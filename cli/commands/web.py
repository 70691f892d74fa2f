"""`aim web`: a bundle as a static site that draws in its visitors' browsers."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click
from click.core import ParameterSource

from aim_cli import human
from aim_cli.errors import Interrupted, requires
from aim_cli.export_engines import late_bar
from aim_cli.options import bundle_option
from aim_cli.terminal import fields, finish
from aim_cli.torch_threads import limit_torch_threads

if TYPE_CHECKING:
    from aim_export.onnx.graph import Precision
    from aim_runtime import Bundle
    from aim_web import Package, Site


@dataclass(frozen=True)
class Sources:
    """Where the parts of a site come from; None where nothing was said."""

    bundle: Path | None
    ckpt: Path | None
    tokenizer: Path | None
    precision: str | None
    onnxruntime_web: Path | None
    registry: str | None


_BUILDING = (*(field.name for field in dataclasses.fields(Sources)), "webgpu")


@click.command("web")
@click.argument("out", required=False, type=click.Path(path_type=Path), metavar="[OUT]")
@bundle_option
@click.option(
    "--ckpt",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Instead of --bundle: a checkpoint, exported as 'aim export' does.",
)
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="VQ tokenizer of --ckpt. [default: the one inside the checkpoint]",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "int8", "int4"]),
    help="How weights are stored: int8 is half to download (unless they were trained to have 4 "
    "bits, as the model in the box was); int4, which takes --ckpt, a little less. Needs "
    "aim-runtime[export]. [default: as the bundle has them, or fp16 of --ckpt]",
)
@click.option(
    "--onnxruntime-web",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="npm's package onnxruntime-web: unpacked, or the file of 'npm pack'. Nothing is "
    "downloaded then. [default: the user's cache, or else the registry]",
)
@click.option(
    "--registry",
    metavar="URL",
    help="Where the package comes from. [default: what npm_config_registry says, or npm's own]",
)
@click.option(
    "--webgpu/--no-webgpu",
    default=True,
    help="Whether browsers that have WebGPU may use it, for which 27 MB more lie on the host. "
    "[default: --webgpu]",
)
@click.option("--serve", is_flag=True, help="Show the site to browsers of this machine.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8001,
    show_default=True,
    metavar="N",
    help="With --serve: where to listen; 0 takes a port that is free.",
)
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors and --serve's URL.")
@click.pass_context
def command(
    context: click.Context,
    out: Path | None,
    bundle: Path | None,
    ckpt: Path | None,
    tokenizer: Path | None,
    precision: str | None,
    onnxruntime_web: Path | None,
    registry: str | None,
    webgpu: bool,
    serve: bool,
    port: int,
    quiet: bool,
) -> None:
    """Make a static web site that draws with a bundle in the visitor's browser.

    \b
    aim web site                              the model in the box, as files in the folder site
    aim web site --bundle aim-b               another bundle
    aim web site --bundle aim-b --precision int8      half to download
    aim web site --ckpt aim_b.pt --precision int8
    aim web --serve                           try it here: open http://127.0.0.1:8001
    aim web --serve site                      look at a site that was made

    The folder can be put on any host of static files; no server draws, and nothing that a visitor
    asks for leaves their machine. After the first visit it works without a network. docs/browser.md
    says which headers make it draw with several threads.

    Browsers run ONNX Runtime's WebAssembly, from npm's package onnxruntime-web. It is downloaded
    once (33 MB), compared with the checksum that this release of aim knows, and kept in the user's
    cache. A site that 'aim web' wrote is replaced as a whole, anything else that is in OUT is not.
    """
    if out is None and not serve:
        raise click.UsageError("OUT is missing, the folder to write; or --serve to try it here")
    if not serve and context.get_parameter_source("port") is not ParameterSource.DEFAULT:
        raise click.UsageError("--port is where --serve listens; give --serve too")
    _check_sources(bundle, ckpt, tokenizer)
    given = [name for name in _BUILDING if _was_given(context, name)]
    with contextlib.ExitStack() as stack:
        site = _existing(out, given) if serve and out is not None else None
        if site is None:
            place = out or stack.enter_context(_temporary()) / "site"
            sources = Sources(bundle, ckpt, tokenizer, precision, onnxruntime_web, registry)
            site = _made(place, sources, webgpu=webgpu, quiet=quiet)
            if out is not None and not quiet:
                finish(_summary(site), f"the site is {out}")
        if serve:
            _show(site, port)


def _was_given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is not ParameterSource.DEFAULT


def _check_sources(bundle: Path | None, ckpt: Path | None, tokenizer: Path | None) -> None:
    if bundle is not None and ckpt is not None:
        raise click.UsageError("--bundle and --ckpt exclude each other: the site has one model")
    if tokenizer is not None and ckpt is None:
        raise click.UsageError("--tokenizer belongs to --ckpt; a bundle has its decoder")


def _existing(out: Path, given: list[str]) -> Site | None:
    """The site that is in `out`, to be shown as it is; None where one is to be made first."""
    from aim_web import Site
    from aim_web.site import LIST

    if not (out / LIST).is_file():
        return None
    if given:
        option = f"--{given[0].replace('_', '-')}"
        raise click.UsageError(
            f"{out} holds a site, which --serve shows as it is; leave out {option}, or make the "
            "site anew without --serve first"
        )
    return Site.open(out)


@contextlib.contextmanager
def _temporary() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="aim-web.") as folder:
        yield Path(folder)


def _made(out: Path, sources: Sources, *, webgpu: bool, quiet: bool) -> Site:
    """Make the site, or say that nothing was written."""
    from aim_web import write_site
    from aim_web.site import check_target

    try:
        check_target(out)
        opened = None if sources.ckpt else _opened(sources.bundle, sources.precision)
        package = _package(sources.onnxruntime_web, sources.registry, quiet=quiet)
        with _model(sources, opened, quiet) as bundle:
            return write_site(bundle, package, out, webgpu=webgpu)
    except KeyboardInterrupt:
        raise Interrupted("interrupted; nothing was written") from None


def _opened(path: Path | None, precision: str | None) -> Bundle:
    """The bundle at `path`, if what is stored in `precision` can be made of it."""
    from aim_runtime import Bundle
    from aim_runtime.bundle.manifest import FEW_BITS

    bundle = Bundle.open(path)
    found = bundle.manifest.precision
    if precision not in (None, found) and (precision != "int8" or found in FEW_BITS):
        raise click.UsageError(
            f"the bundle is stored in {found}; {precision} is made of its checkpoint: 'aim export "
            f"--ckpt CKPT --precision {precision} --out DIR', then --bundle DIR; or --ckpt here"
        )
    return bundle


@contextlib.contextmanager
def _model(sources: Sources, opened: Bundle | None, quiet: bool) -> Iterator[Bundle]:
    """What goes into the site: a bundle as it is, or one that is made for the time being."""
    report = None if quiet else lambda line: click.echo(line, err=True)
    if opened is None:
        with _exported(sources, report) as bundle:
            yield bundle
    elif sources.precision in (None, opened.manifest.precision):
        yield opened
    else:
        with requires("export", f"aim web --precision {sources.precision}"):
            from aim_export.eight_bits import in_8_bits
        with _temporary() as folder:
            yield in_8_bits(opened, folder / "bundle", report)[0]


@contextlib.contextmanager
def _exported(sources: Sources, report: Callable[[str], None] | None) -> Iterator[Bundle]:
    """A bundle made of the checkpoint, for the time being."""
    with requires("export", "aim web --ckpt"):
        from aim_export import export_bundle

        limit_torch_threads()
    assert sources.ckpt is not None
    with _temporary() as folder:
        yield export_bundle(
            sources.ckpt,
            folder / "bundle",
            tokenizer=sources.tokenizer,
            precision=cast("Precision", sources.precision or "fp16"),
            report=report,
        )[0]


def _package(path: Path | None, registry: str | None, *, quiet: bool) -> Package:
    """ONNX Runtime for browsers: from `path`, or the cache, or a registry."""
    from aim_web import Package
    from aim_web.onnxruntime_web import default_registry

    if path is not None:
        return Package.at(path)
    with late_bar("fetching onnxruntime-web", quiet=quiet) as progress:
        return Package.fetched(registry or default_registry(), progress)


def _summary(site: Site) -> str:
    """What there is now, and what to do with it."""
    place = shlex.quote(str(site.folder))
    files = human.count(len(site.files), "file")
    return fields(
        [
            ("site", f"{site.folder} ({files}, {_megabytes(site.size)})"),
            ("to load", f"about {_megabytes(site.bytes_to_load)} before the first picture, once"),
            ("next", f"'aim web --serve {place}' shows it here; any host of static files will do"),
        ]
    )


def _megabytes(count: int) -> str:
    """Bytes as browsers and hosts count them."""
    return f"{count / 1e6:.1f} MB"


def _show(site: Site, port: int) -> None:
    """Answer browsers until Ctrl-C."""
    from aim_web import listening
    from aim_web.local_server import url

    with listening(site, port) as server:
        click.echo(f"Showing {site.name} at {url(server)} (Ctrl-C ends it)", err=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
