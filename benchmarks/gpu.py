"""Measure the product on an NVIDIA GPU, with rivals beside it in the same run.

    python benchmarks/gpu.py --size L --engines compiled --json gpu-L.json

Networks of the published sizes with **random weights**, for speed; the model in the box, for how
far other number formats are from float32. Every section is a process of its own, so that a fault in
one costs no other; rows are printed as they come and the JSON file is written after each section.

Bundles are made once and kept in the cache. ``--prepare``, on a machine with more time, compiles
kernels into ENGINES/SIZE and, for the model in the box, into ENGINES/box; leaves in
ENGINES/outline-SIZE what makes a bundle of the same layout out of random numbers in seconds; and
draws the pictures of the CPU that the GPU's are compared with (ENGINES/cpu-tokens.npy).

Seconds are of whole requests, `Generator.generate` with guidance (two rows an image), top-k 600 and
top-p 0.98, decoding included.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import UTC, datetime
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click
import numpy as np
from numpy.typing import NDArray

from aim_cli import human
from aim_cli.commands.bench import machine
from aim_cli.dataclass_options import CommaSeparated
from aim_runtime.engines.cuda.plan import DTYPE_BYTES

if TYPE_CHECKING:
    from aim_runtime.engines.base import Engine
    from aim_training.model import AiM

SETTINGS = {"cfg_scale": 4.0, "temperature": 1.0, "top_k": 600, "top_p": 0.98}
SECTIONS = ("copy", "speed", "agreement", "torch", "published")
COPY_BYTES = 1 << 30
COPIES = 20
#: Further repeats of a request are left out once they have taken so long.
PATIENCE_S = 20.0
SECTION_LIMIT_S = 420
CPU_TOKENS = "cpu-tokens.npy"
#: Numbers drawn for all weights; odd, so that rows of a matrix start at different places.
RANDOM_BLOCK = (1 << 22) - 1
COMPARED_AT_ONCE = 8
#: Seconds of the published code in bf16 on an H100 80GB: sampling with its CUDA graph kept between
#: calls, its `generate` as shipped, decoding. Printed only where it cannot run, and marked so.
RECORDED = {
    ("B", 1): (0.390, 0.752, 0.012),
    ("B", 16): (0.505, 0.955, 0.048),
    ("B", 64): (0.885, 1.386, 0.174),
    ("L", 1): (0.678, 1.219, 0.014),
    ("L", 16): (0.912, 1.412, 0.048),
    ("L", 64): (1.677, 2.315, 0.174),
    ("XL", 1): (0.749, 1.213, 0.011),
    ("XL", 16): (1.160, 1.699, 0.049),
}

Keep = Callable[..., None]
"""Stores named results of a section, so that what is measured survives what follows."""


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
    repeats: int,
    compared: int,
    published: Path | None,
    mamba: Path | None,
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
    engines = engines or cache / "engines"
    runs = [("cuda", precision) for precision in precisions if "cuda" in backends]
    runs += [(backend, "auto") for backend in backends if backend != "cuda"]

    if "copy" in sections:
        report.add("copy", in_process(measure_copy))
    if "speed" in sections:
        path = bundle
        if path is None:
            made = in_process(make_bundle, size, cache, engines)
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
    report.finish()


# -- what is printed and kept ---------------------------------------------------------------------


class Report:
    """Prints each section as it comes and keeps all of it in a file."""

    def __init__(self, target: Path | None, model: str, repeats: int) -> None:
        self.target, self.model = target, model
        self.found: dict[str, Any] = machine() | {
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": model,
            "repeats": repeats,
            "settings": SETTINGS,
            "sections": {},
        }

    def add(self, name: str, found: dict[str, Any]) -> None:
        """Print and keep what a section found, its error included."""
        self.found["sections"][name] = found
        for line in self._lines(name, found):
            click.echo(line)
        if error := found.get("error"):
            click.echo(f"{name}: {'failed: ' if len(found) > 1 else ''}{error}")
        sys.stdout.flush()
        self._write()

    def finish(self) -> None:
        """Print the tables, and the JSON where no file takes it."""
        click.echo()
        click.echo("\n".join(self._tables()))
        if self.target is None:
            click.echo()
            click.echo(json.dumps(self.found))

    def _write(self) -> None:
        if self.target is not None:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self.target.write_text(json.dumps(self.found, indent=1), encoding="utf-8")

    def _lines(self, name: str, found: dict[str, Any]) -> Iterator[str]:
        if name == "copy" and "bytes_per_second" in found:
            yield f"{found['gpu']}: copies {found['bytes_per_second'] / 1e12:.2f} TB/s, both ways"
        for row in found.get("rows", []):
            words = [f"{name}: {human.count(row['images'], 'image')}"]
            for key, unit in (
                ("seconds", "s"),
                ("as_shipped_seconds", "s as shipped"),
                ("step_ms", "ms a step"),
                ("decode_ms_per_image", "ms decoding an image"),
            ):
                if key in row:
                    words.append(f"{row[key]:.3f} {unit}")
            yield ", ".join(words)
        if "first_image_seconds" in found:
            yield (
                f"{name}: load {found['load_seconds']:.2f} s, first image "
                f"{found['first_image_seconds']:.2f} s after the call of load, "
                f"{found['process_seconds']:.2f} s after the start of the process"
            )
        if "compared" in found:
            yield f"{name}: {describe_agreement(found)}"

    def _tables(self) -> Iterator[str]:
        sections = self.found["sections"]
        copy = sections.get("copy", {})
        bandwidth = copy.get("bytes_per_second")
        yield f"**AiM-{self.model}**, guidance on, {copy.get('gpu', 'no GPU measured')}"
        yield ""
        yield (
            "| what | images | s | images/s | ms a step | GB a step | of copy bandwidth "
            "| ms decoding an image | load s | first image s | GPU memory |"
        )
        yield "|---" * 11 + "|"
        for name, found in sections.items():
            for index, row in enumerate(found.get("rows", [])):
                once = found if index == 0 else {}
                yield table_row(name, row, once, bandwidth)
        if "rows" not in sections.get("published", {"rows": 0}):
            for (size, images), (kept, shipped, decode) in RECORDED.items():
                if size == self.model:
                    yield (
                        f"| published, recorded earlier, NOT measured in this run | {images} "
                        f"| {kept + decode:.3f} (as shipped {shipped + decode:.3f}) "
                        f"| {images / (kept + decode):.1f} | | | | {decode / images * 1e3:.1f} "
                        "| | | |"
                    )
        yield ""
        yield "The model in the box:"
        for name, found in sections.items():
            if "compared" in found:
                yield f"- {name.removeprefix('agreement ')}: {describe_agreement(found)}"


def table_row(name: str, row: dict[str, Any], once: dict[str, Any], copy: float | None) -> str:
    """One line of the table; ``once`` has what is measured once a process, in its first line."""

    def number(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    step_ms, traffic = row.get("step_ms"), row.get("step_bytes")
    share = ""
    if step_ms and traffic and copy:
        share = f"{sum(traffic.values()) / (step_ms / 1e3) / copy:.0%}"
    peak = row.get("peak_gpu_bytes")
    seconds = number(row["seconds"], 3)
    if "as_shipped_seconds" in row:
        seconds += f" (as shipped {row['as_shipped_seconds']:.3f})"
    cells = (
        name.removeprefix("speed "),
        str(row["images"]),
        seconds,
        number(row["images"] / row["seconds"], 1),
        number(step_ms, 3),
        number(sum(traffic.values()) / 1e9 if traffic else None, 3),
        share,
        number(row.get("decode_ms_per_image"), 2),
        number(once.get("load_seconds"), 2),
        number(once.get("first_image_seconds"), 2),
        "" if peak is None else human.size(peak),
    )
    return f"| {' | '.join(cells)} |"


def describe_agreement(found: dict[str, Any]) -> str:
    """Sentences from what `compare_formats` found."""
    text = (
        f"{found['differing_tokens']} of {found['tokens']} tokens, in {found['differing_images']} "
        f"of {found['compared']} images, are not those that the CPU draws"
    )
    if "reference" not in found:
        return text
    return (
        f"{text}; given the same tokens, against {found['reference']}: "
        f"KL {found['kl_guided']:.2e} nats with guidance, {found['kl_plain']:.2e} without, "
        f"equal best token {found['argmax_guided']:.3%}, equal draw {found['draw_guided']:.3%}"
    )


# -- sections in processes of their own -----------------------------------------------------------


def in_process(
    function: Callable[..., None], *args: Any, limit_s: float = SECTION_LIMIT_S, **extra: Any
) -> dict[str, Any]:
    """Call ``function(keep, *args, **extra)`` in a new process; returns what it kept.

    What it raised, or how else it ended early, is under "error"; never raises itself.
    """
    name = function.__name__
    click.echo(f"-- {name} {' '.join(str(arg) for arg in args)}", err=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        process = get_context("spawn").Process(target=_work, args=(function, path, args, extra))
        process.start()
        process.join(limit_s)
        late = process.is_alive()
        if late:
            process.kill()
            process.join()
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if late:
        found["error"] = f"stopped after {limit_s:.0f} s"
    elif process.exitcode and "error" not in found:
        found["error"] = f"the process ended with code {process.exitcode}"
    return found


def _work(function: Callable[..., None], path: Path, args: Any, extra: Any) -> None:
    found: dict[str, Any] = {}

    def keep(**values: Any) -> None:
        found.update(values)
        new = path.with_suffix(".new")
        new.write_text(json.dumps(found))
        new.replace(path)

    try:
        function(keep, *args, **extra)
    except BaseException as error:
        traceback.print_exc()
        text = str(error).strip().splitlines()
        keep(error=f"{type(error).__name__}: {text[0] if text else 'no message'}")
        sys.exit(1)


# -- bundles --------------------------------------------------------------------------------------


def prepare_all(
    size: str, cache: Path, engines: Path, precisions: tuple[str, ...], images: int
) -> None:
    """Make the bundles of ``size`` and of the model in the box, and compile both's kernels."""
    from aim_runtime import Bundle

    random = random_bundle(size, cache)
    write_outline(random, engines / f"outline-{size}")
    np.save(engines / CPU_TOKENS, cpu_tokens(None, images))
    for name, bundle in ((size, Bundle.open(random)), ("box", Bundle.open(None))):
        out = engines / name
        shutil.rmtree(out, ignore_errors=True)
        compile_kernels(bundle, out, precisions)
        total = sum(file.stat().st_size for file in out.iterdir())
        click.echo(f"{out}: {human.size(total)}")


def compile_kernels(bundle: Any, out: Path, precisions: tuple[str, ...]) -> None:
    """Write the files of ``engines/cuda`` for compute capability 9.0 to ``out``."""
    from aim_export.cuda.bundle import compile_engines

    out.mkdir(parents=True, exist_ok=True)
    compile_engines(bundle, out, precisions=precisions, capabilities=(90,))


def make_bundle(keep: Keep, size: str, cache: Path, engines: Path) -> None:
    """The random bundle of ``size`` with its kernels, as far as there are any."""
    started = time.perf_counter()
    path, outline = cache / f"random-{size.lower()}-fp16", engines / f"outline-{size}"
    if outline.is_dir() and not path.exists():
        fill_outline(outline, path)
    random_bundle(size, cache)
    keep(path=str(path), seconds=time.perf_counter() - started)
    install_kernels(path, engines, size)
    warm_disk(path)


def make_box(keep: Keep, cache: Path, engines: Path) -> None:
    """A copy of the model in the box with its kernels, as far as there are any."""
    from aim_runtime import Bundle, write_bundle

    source = Bundle.open(None)
    path = cache / "box"
    write_bundle(source.manifest, source.path, path, overwrite=True)
    keep(path=str(path))
    install_kernels(path, engines, "box")


def install_kernels(path: Path, engines: Path, name: str) -> None:
    """Put ENGINES/name into a bundle, or ENGINES itself if it holds the kernels."""
    from aim_runtime.bundle import add_engine

    folder = engines / name
    if not folder.is_dir() and list(engines.glob("plan-*.json")):
        folder = engines
    if folder.is_dir():
        add_engine(path, "cuda", folder)
    else:
        click.echo(f"there are no compiled kernels in {folder}", err=True)


def warm_disk(path: Path) -> None:
    """Read every file once: a load is measured without the disk."""
    for file in path.rglob("*"):
        if file.is_file():
            file.read_bytes()


def random_bundle(size: str, cache: Path) -> Path:
    """A bundle of a published size, float16 files, made once with PyTorch.

    Its graphs are those that `aim export` writes; the comparison with PyTorch, which takes minutes,
    is left out.
    """
    path = cache / f"random-{size.lower()}-fp16"
    if path.exists():
        return path
    import torch

    from aim_export.bundle import PUBLISHED_SAMPLING, model_card, state_pairs, write_graphs
    from aim_runtime import Manifest, write_bundle
    from aim_training.config import PRESETS, TokenizerConfig
    from aim_training.tokenizer import VQTokenizer

    torch.manual_seed(0)
    config, tokenizer = PRESETS[size], VQTokenizer(TokenizerConfig()).eval()
    network = random_network(size, "cpu")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        specs = write_graphs(network, tokenizer, 1, "fp16", Path(folder))
        manifest = Manifest(
            name=f"AiM-{size}, random weights",
            description="Draws noise. For measurements of speed.",
            license="MIT",
            model=model_card(network, tokenizer, 1),
            graphs=specs,
            state=state_pairs(config),
            sampling=PUBLISHED_SAMPLING,
            class_names=tuple(f"class-{index}" for index in range(config.num_classes)),
            precision="fp16",
            provenance={},
        )
        write_bundle(manifest, folder, path)
    return path


def write_outline(path: Path, out: Path) -> None:
    """Write the small files of a random bundle to ``out``, and what its large tensors are like."""
    from aim_export.cuda.stored import stored_tensors
    from aim_runtime import Bundle

    bundle = Bundle.open(path)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    shutil.copy(path / "manifest.json", out)
    tensors = []
    for name, graph in bundle.manifest.graphs.items():
        shutil.copy(path / graph.file, out)
        for tensor in stored_tensors(bundle, name).values():
            if tensor.part is not None:
                part, values = tensor.part, tensor.values.astype(np.float32)
                moments = [values.mean(), values.std(), values.min(), values.max()]
                place = [part.file, part.offset, tensor.dtype, values.size]
                tensors.append([*place, *map(float, moments)])
    (out / "tensors.json").write_text(json.dumps(tensors))


def fill_outline(outline: Path, path: Path) -> None:
    """Make the bundle of an outline at ``path``: its tensors from one block of random numbers."""
    from aim_runtime import Manifest, write_bundle

    manifest = Manifest.from_json((outline / "manifest.json").read_text(encoding="utf-8"))
    tensors = json.loads((outline / "tensors.json").read_text())
    block = np.random.default_rng(0).standard_normal(RANDOM_BLOCK, np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        for graph in manifest.graphs.values():
            shutil.copy(outline / graph.file, folder)
            size = manifest.files[graph.weights].size
            file = np.memmap(Path(folder) / graph.weights, np.uint8, "w+", shape=(size,))
            for name, offset, dtype, count, mean, std, low, high in tensors:
                if name == graph.weights:
                    end = offset + count * np.dtype(dtype).itemsize
                    target = file[offset:end].view(dtype)
                    for start in range(0, count, RANDOM_BLOCK):
                        part = block[: min(RANDOM_BLOCK, count - start)] * np.float32(std) + mean
                        target[start : start + len(part)] = part.clip(low, high)
            file.flush()
        write_bundle(manifest, folder, path)


def random_network(size: str, device: str) -> AiM:
    """A network of a published size whose layers all take part.

    Filled once: the constructors of PyTorch's layers would fill it before, with other numbers. The
    published initialisation closes the gates of AiM-B, so that its layers would not reach the
    scores.
    """
    import torch

    from aim_training.config import PRESETS
    from aim_training.model import AiM

    with torch.device("meta"):
        network = AiM(PRESETS[size])
    network = network.to_empty(device=device).initialise().eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "adaLN" in name:
                parameter.normal_(0.0, 0.02)
    return network


# -- the speed of ours ----------------------------------------------------------------------------


def measure_copy(keep: Keep) -> None:
    """Bytes read and written a second when one buffer of the GPU is copied to another."""
    from cuda.bindings import driver

    from aim_runtime.engines.gpu import libcuda
    from aim_runtime.engines.gpu.driver import CudaDevice

    device = CudaDevice(0)
    keep(gpu=libcuda.gpu_name(0), cuda_driver=libcuda.cuda_version())
    with device.current():
        stream = device.stream()
        memory = device.allocate([COPY_BYTES, COPY_BYTES])
        source, target = memory.addresses
        stream.clear(source, COPY_BYTES)
        stream.clear(target, COPY_BYTES)
        times = []
        for _ in range(4):  # the first warms up
            stream.synchronize()
            started = time.perf_counter()
            for _ in range(COPIES):
                (code,) = driver.cuMemcpyDtoDAsync(target, source, COPY_BYTES, stream.handle)
                if code != driver.CUresult.CUDA_SUCCESS:
                    raise RuntimeError(f"copying failed: {code.name}")
            stream.synchronize()
            times.append(time.perf_counter() - started)
    keep(bytes_per_second=2 * COPY_BYTES * COPIES / min(times[1:]))


def measure_speed(
    keep: Keep,
    path: str,
    backend: str,
    precision: str,
    batches: tuple[int, ...],
    repeats: int,
    started: float,
) -> None:
    """Load, first image, then requests of each size, and their parts.

    ``started`` is the time at which the process was asked for.
    """
    called = time.perf_counter()
    from aim_runtime import Bundle, Generator
    from aim_runtime.engines.backends import load_engine

    imported = time.perf_counter()
    memory = GpuMemory(backend != "cpu")  # CUDA's context is made here: part of the load
    bundle = Bundle.open(path)
    engine = load_engine(bundle, backend=backend, precision=precision)
    generator = Generator(bundle, engine)
    loaded = time.perf_counter()
    classes = len(generator.class_names)
    settings: dict[str, Any] = SETTINGS
    generator.generate([0], **settings)
    drawn = time.perf_counter()
    keep(
        backend=engine.backend,
        device=engine.device,
        precision=engine.precision,
        import_seconds=imported - called,
        load_seconds=loaded - imported,
        first_image_seconds=drawn - imported,
        process_seconds=time.time() - started,
        loaded_gpu_bytes=memory.taken(),
    )
    if engine.backend == "cuda":
        from aim_runtime.engines.cuda.plan import Plan

        keep(compiler=Plan.read(bundle, engine.precision).compiler)
    rows: list[dict[str, Any]] = []
    for images in batches:
        wanted = [index % classes for index in range(images)]
        request = partial(generator.generate, wanted, **settings)
        with memory.watch():  # this one warms up
            tokens = request().tokens
        times = repeated(request, repeats)
        at_once = generator.plan(images, SETTINGS["cfg_scale"]).batch_size
        row: dict[str, Any] = {
            "images": images,
            "at_once": at_once,
            "seconds": statistics.median(times),
            "all_seconds": times,
            "peak_gpu_bytes": memory.peak,
        }
        rows.append(row)
        keep(rows=rows)
        row["decode_ms_per_image"] = decode_seconds(engine, tokens, repeats) / images * 1e3
        keep(rows=rows)
        if engine.backend == "cuda":
            row |= cuda_step(engine, at_once)
            keep(rows=rows)


def repeated(work: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each of ``repeats`` calls, or of fewer where they take very long."""
    times: list[float] = []
    while len(times) < repeats and sum(times) < PATIENCE_S:
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return times


def decode_seconds(engine: Engine, tokens: NDArray[np.int64], repeats: int) -> float:
    """Median seconds of decoding ``tokens`` (N, T), as many at a time as the engine asks for."""

    def decode() -> None:
        for start in range(0, len(tokens), engine.decode_batch):
            engine.decode(tokens[start : start + engine.decode_batch])

    decode()
    return statistics.median(repeated(decode, repeats))


def cuda_step(engine: Any, images: int) -> dict[str, Any]:
    """Milliseconds of a step, head and sampler included, without the host: T replays in a row.

    The workspace is the one that the last request used, so its settings and noise are still there.
    """
    steps = engine.manifest.model.num_tokens
    bucket = engine._bucket(images, 2)
    times = []
    with engine._step_lease(bucket, 2) as workspace, engine._device.current():
        for _ in range(4):  # the first warms up
            workspace.run("begin")
            workspace.stream.synchronize()
            started = time.perf_counter()
            for _ in range(steps):
                workspace.run("step")
            workspace.stream.synchronize()
            times.append(time.perf_counter() - started)
    weights = {name: weight.tensor for name, weight in engine._launch_plan.weights.items()}
    named = {name for launch in bucket.step for name, _ in launch.arguments}
    return {
        "rows": bucket.rows,
        "step_ms": statistics.median(times[1:]) / steps * 1e3,
        "step_bytes": step_bytes(weights, bucket.buffers, named, steps),
        "launches": len(bucket.step),
    }


class TensorLike(Protocol):
    """What `step_bytes` needs to know of a weight or buffer."""

    @property
    def dtype(self) -> str:
        """The plan's name of the element type."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes."""


def step_bytes(
    weights: Mapping[str, TensorLike],
    buffers: Mapping[str, TensorLike],
    named: Collection[str],
    steps: int,
) -> dict[str, float]:
    """Bytes of GPU memory that one step must read and write, by term, on average over an image.

    Weights once, whatever the number of rows; of every row, its state. What launches hand to each
    other (at most a few MB) is taken to stay in the L2 cache, as are repeated reads of one buffer
    by several programs. ``named`` are the names that the step's launches use.

    A chunked state (there is ``past_x``) is read at every position of the second chunk and later,
    and written at the end of each chunk of C tokens: (T - C) / T + 1 / C of its size a step. The
    tokens since the chunk began are read by their number, C / 2 - 1 / 2 on average, and one is
    written. Otherwise the state is read, except at position 0, and written at every step.
    """

    def size(tensors: Mapping[str, TensorLike], *names: str) -> float:
        found = [tensors[name] for name in names if name in tensors and name in named]
        return float(sum(math.prod(t.shape) * DTYPE_BYTES[t.dtype] for t in found))

    projections = ("in_proj", "in_proj_scales", "out_proj", "out_proj_scales")
    large = (*projections, "word_table", "position_table")
    terms = {
        "projections": size(weights, *projections),
        "head": size(weights, "word_table"),
        "small weights": size(weights, *(name for name in weights if name not in large)),
        "conditioning": size(buffers, "shifted", "scale", "gate", "final_modulation"),
        "convolution": size(buffers, "ring"),
    }
    state = size(buffers, "state", "state_scale")
    if "past_x" in buffers:
        chunk = buffers["past_x"].shape[2]
        terms["state, read"] = state * (steps - chunk) / steps
        terms["state, written"] = state / chunk
        history = size(buffers, "past_x", "past_b", "past_decay") / chunk  # of one token
        terms["tokens since, read"] = history * (chunk - 1) / 2
        terms["tokens since, written"] = history
    else:
        terms["state, read"] = state * (steps - 1) / steps
        terms["state, written"] = state
    return terms


class GpuMemory:
    """Memory of GPU 0 that this process takes, CUDA's own context apart."""

    def __init__(self, present: bool) -> None:
        self.peak: int | None = None
        self._present = present
        if present:
            from aim_runtime.engines.gpu import libcuda

            # Held until the process ends: a context made and dropped at each look would be slow.
            self._context = libcuda.current(0)
            self._context.__enter__()
            self._before = self._free()

    def taken(self) -> int | None:
        """Bytes taken now."""
        return self._before - self._free() if self._present else None

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Keep `peak`, the most that was taken meanwhile, looked at every 5 ms."""
        if not self._present:
            yield
            return
        ended = threading.Event()
        least = self._free()

        def look() -> None:
            nonlocal least
            while not ended.wait(0.005):
                least = min(least, self._free())

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self.peak = self._before - min(least, self._free())

    def _free(self) -> int:
        from aim_runtime.engines.gpu import libcuda

        return libcuda.free_bytes(0)


# -- number formats against float32 ---------------------------------------------------------------


def cpu_tokens(path: str | None, images: int) -> NDArray[np.int64]:
    """The tokens (N, T) that the CPU draws of the first classes of a bundle."""
    from aim_runtime import Generator

    with Generator.load(path, backend="cpu") as generator:
        classes = [index % len(generator.class_names) for index in range(images)]
        settings: dict[str, Any] = SETTINGS
        return generator.generate(classes, **settings).tokens


def draw_on_cpu(keep: Keep, path: str, images: int, engines: Path, folder: str) -> None:
    """Put the CPU's tokens into ``folder``: those that `prepare_all` drew, or new ones."""
    ready = engines / CPU_TOKENS
    tokens = np.load(ready)[:images] if ready.exists() else np.empty((0, 0))
    keep(on_this_machine=len(tokens) < images)
    if len(tokens) < images:
        tokens = cpu_tokens(path, images)
    np.save(Path(folder) / CPU_TOKENS, tokens)


def compare_formats(
    keep: Keep, path: str, backend: str, precision: str, images: int, folder: str
) -> None:
    """How near to the CPU and to float32 an engine is, over ``images`` of the bundle at ``path``.

    Its tokens, drawn freely, are compared with the CPU's. Its scores, given the CPU's tokens, are
    compared with those of the first engine that came here, which left them in ``folder``; with
    guidance and without.
    """
    from aim_runtime import Bundle, Generator
    from aim_runtime.engines.backends import load_engine

    engine = load_engine(Bundle.open(path), backend=backend, precision=precision)
    generator = Generator(Bundle.open(path), engine)
    classes = [index % len(generator.class_names) for index in range(images)]
    tokens = np.load(Path(folder) / CPU_TOKENS)  # (N, T)
    settings: dict[str, Any] = SETTINGS
    differs = generator.generate(classes, **settings).tokens != tokens
    label = f"{engine.backend} {engine.precision}"
    keep(
        label=label,
        compared=images,
        tokens=int(tokens.size),
        differing_tokens=int(differs.sum()),
        differing_images=int(differs.any(axis=1).sum()),
    )
    reference = Path(folder) / "reference"
    first = not reference.exists()
    reference.mkdir(exist_ok=True)
    sums: dict[str, float] = {}
    for start in range(0, images, COMPARED_AT_ONCE):
        part = slice(start, min(start + COMPARED_AT_ONCE, images))
        for kind, scale in (("plain", 1.0), ("guided", SETTINGS["cfg_scale"])):
            scores = generator.logits(tokens[part], classes[part], cfg_scale=scale)  # (n, T, V)
            file = reference / f"{kind}-{start}.npy"
            if first:
                np.save(file, scores)
                continue
            for name, value in differences(np.load(file), scores, part).items():
                sums[f"{name}_{kind}"] = sums.get(f"{name}_{kind}", 0.0) + value
    if first:
        (reference / "label").write_text(label)
    else:
        means = {name: value / tokens.size for name, value in sums.items()}
        keep(reference=(reference / "label").read_text(), **means)


def differences(
    true: NDArray[np.float32], other: NDArray[np.float32], seeds: slice
) -> dict[str, float]:
    """Sums over all places of what differs between scores (n, T, V) of the images of ``seeds``.

    "kl" in nats at temperature 1; "argmax" and "draw" count the places where the best token and
    the token drawn with the same noise are the same.
    """
    from aim_runtime.noise import uniforms
    from aim_runtime.sampling import SamplingOptions, sample

    options = SamplingOptions(**SETTINGS)  # type: ignore[arg-type]
    noise = uniforms(range(seeds.start, seeds.stop), true.shape[1]).reshape(-1)
    one, two = (scores.reshape(-1, scores.shape[-1]) for scores in (true, other))
    return {
        "kl": float(divergence(one, two).sum()),
        "argmax": float((one.argmax(-1) == two.argmax(-1)).sum()),
        "draw": float((sample(one, noise, options) == sample(two, noise, options)).sum()),
    }


def divergence(true: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float64]:
    """Kullback-Leibler divergence in nats, of the softmaxes of scores (..., V): (...)."""

    def log_softmax(scores: NDArray[np.float32]) -> NDArray[np.float64]:
        shifted = scores.astype(np.float64) - scores.max(axis=-1, keepdims=True)
        normalised: NDArray[np.float64] = shifted - np.log(
            np.exp(shifted).sum(axis=-1, keepdims=True)
        )
        return normalised

    p, q = log_softmax(true), log_softmax(other)
    found: NDArray[np.float64] = (np.exp(p) * (p - q)).sum(axis=-1)
    return found


# -- rivals ---------------------------------------------------------------------------------------


def measure_torch(keep: Keep, size: str, batches: tuple[int, ...], repeats: int) -> None:
    """The same network in plain PyTorch, bf16: `AiM.step` and a sampler, each one CUDA graph."""
    import torch

    from aim_training.config import TokenizerConfig
    from aim_training.tokenizer import VQTokenizer

    torch.manual_seed(0)
    network = random_network(size, "cuda").to(torch.bfloat16)
    tokenizer = VQTokenizer(TokenizerConfig()).eval().to("cuda", torch.bfloat16)
    keep(torch=torch.__version__, what="AiM.step and a sampler in CUDA graphs, bf16, state too")
    rows: list[dict[str, Any]] = []
    for images in batches:
        with torch.inference_mode():
            rows.append(torch_row(network, tokenizer, images, repeats))
        keep(rows=rows)
        torch.cuda.empty_cache()


def torch_row(network: AiM, tokenizer: Any, images: int, repeats: int) -> dict[str, Any]:
    """Its figures for one number of images."""
    import torch

    torch.cuda.reset_peak_memory_stats()
    request = TorchRequest(network, images)
    step, draw = captured(request.step), captured(request.draw)
    steps = network.config.num_tokens

    def sampling() -> None:
        request.position.zero_()
        for _ in range(steps):
            step.replay()
            draw.replay()
        torch.cuda.synchronize()

    def stepping() -> None:
        for _ in range(steps):
            step.replay()
        torch.cuda.synchronize()

    def decoding() -> None:
        for chunk in request.tokens.split(16):
            to_host(tokenizer.decode(chunk))

    sampling()
    decoding()
    drawing = statistics.median(repeated(sampling, repeats))
    decode = statistics.median(repeated(decoding, repeats))
    return {
        "images": images,
        "seconds": drawing + decode,
        "step_ms": repeated(stepping, 1)[0] / steps * 1e3,
        "decode_ms_per_image": decode / images * 1e3,
        "peak_gpu_bytes": torch.cuda.max_memory_reserved(),
    }


class TorchRequest:
    """Guided images in the making, in tensors that keep their place, as a CUDA graph needs them.

    The step returns new states, which are copied over the old ones.
    """

    def __init__(self, network: AiM, images: int) -> None:
        import torch

        config, like = network.config, network.backbone.norm_f.weight
        classes = torch.arange(images, device=like.device) % config.num_classes
        classes = torch.cat([classes, torch.full_like(classes, config.num_classes)])  # (R,)
        self.network = network
        self.conditioning = network.prologue(classes)
        self.state = network.init_state(2 * images)
        self.token, self.position = torch.zeros_like(classes), torch.zeros_like(classes)
        self.logits = torch.zeros(2 * images, config.vocab_size, device=like.device)
        self.tokens = classes.new_zeros(images, config.num_tokens)
        self.noise = torch.rand(images, config.num_tokens, device=like.device)

    def step(self) -> None:
        """Scores of the token at `position`."""
        logits, state = self.network.step(
            self.token, self.position, self.conditioning, self.state, 1
        )
        self.logits.copy_(logits)
        for old, new in zip(self.state, state, strict=True):
            old.conv.copy_(new.conv)
            old.ssm.copy_(new.ssm)

    def draw(self) -> None:
        """Guidance, top-k, top-p and a draw; on to the next position."""
        guided, without = self.logits.chunk(2)
        guided = without + SETTINGS["cfg_scale"] * (guided - without)
        best, order = guided.topk(int(SETTINGS["top_k"]))  # (N, k), falling
        chance = best.softmax(-1)
        before = chance.cumsum(-1) - chance
        reached = chance.where(before < SETTINGS["top_p"], 0.0).cumsum(-1)
        at = self.position[: len(self.tokens), None]  # (N, 1)
        goal = self.noise.gather(1, at) * reached[:, -1:]
        place = (reached <= goal).sum(-1, keepdim=True).clamp(max=best.shape[1] - 1)
        drawn = order.gather(1, place)
        self.tokens.scatter_(1, at, drawn)
        self.token.copy_(drawn[:, 0].repeat(2))
        self.position.add_(1).remainder_(self.tokens.shape[1])


def to_host(decoded: Any) -> None:
    """Bring images in [-1, 1] to the host as bytes, as an application would."""
    import torch

    (decoded.float() * 127.5 + 127.5).clamp(0, 255).to(torch.uint8).cpu()


def captured(work: Callable[[], None]) -> Any:
    """``work`` as a CUDA graph, after two runs of it."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def measure_published(
    keep: Keep, checkout: str, mamba: str, size: str, batches: tuple[int, ...], repeats: int
) -> None:
    """The published code with random weights in bf16: its graph kept between calls, and as shipped.

    As shipped, `AiM.generate` drops the captured graph after every call.
    """
    import importlib.util

    import torch

    model = published_model(checkout, mamba, size)
    conv = importlib.util.find_spec("causal_conv1d") is not None
    keep(torch=torch.__version__, causal_conv1d=conv)
    rows: list[dict[str, Any]] = []
    for images in batches:
        with torch.inference_mode():
            row: dict[str, Any] = {"images": images}
            published_row(row, model, repeats)
        rows.append(row)
        keep(rows=rows)
        torch.cuda.empty_cache()


def published_row(row: dict[str, Any], model: Any, repeats: int) -> None:
    """Its figures for ``row["images"]`` images."""
    import torch

    images, T, C = row["images"], model.num_tokens, model.num_classes
    classes = (torch.arange(images, device="cuda") % C)[:, None]
    both = torch.cat([classes, torch.full_like(classes, C)])
    side = math.isqrt(T)
    drawn = both

    def shipped() -> None:
        to_host(model.generate(c=classes, **SETTINGS))

    def decode() -> None:
        to_host(model.decode_to_img(drawn, (images, model.num_embed_dim, side, side)))

    def kept() -> None:
        nonlocal drawn
        model.mamba.cfg_scale = SETTINGS["cfg_scale"]
        rest = {name: SETTINGS[name] for name in ("temperature", "top_k", "top_p")}
        rest |= {"max_length": T + 1, "cg": True}
        drawn = model.mamba.generate(input_ids=both, cond=both, **rest)[:images, 1:]
        decode()

    def steps() -> None:
        for at in range(1, T + 1):
            cache.run(both, torch.full_like(both, at), at, cond=both)
        torch.cuda.synchronize()

    torch.cuda.reset_peak_memory_stats()
    shipped()
    row["as_shipped_seconds"] = statistics.median(repeated(shipped, repeats))
    kept()
    row["seconds"] = statistics.median(repeated(kept, repeats))
    row["decode_ms_per_image"] = statistics.median(repeated(decode, repeats)) / images * 1e3
    row["peak_gpu_bytes"] = torch.cuda.max_memory_reserved()
    cache = model.mamba._decoding_cache
    row["step_ms"] = statistics.median(repeated(steps, repeats)) / T * 1e3
    model.mamba._decoding_cache = None


def published_model(checkout: str, mamba: str, size: str, device: str = "cuda") -> Any:
    """The model class of the published checkout, random weights."""
    import torch

    models = published_code(checkout, mamba)
    torch.manual_seed(0)
    with torch.device(device):
        model = models.AiM_models[f"AiM-{size}"]()
    model.eval()
    return model.to(device, torch.bfloat16)


def published_code(checkout: str, mamba: str) -> Any:
    """The module `models.aim` of the published checkout.

    What its imports want but neither sampling nor a training step calls is stood in for where it is
    missing: names that newer versions of `transformers` dropped, and the parts of mamba_ssm for
    other models.
    """
    import importlib
    import types

    sys.path.insert(0, checkout)
    if mamba:
        # Its own __init__ imports every model that it has, with all that those need.
        package = types.ModuleType("mamba_ssm")
        package.__path__ = [str(Path(mamba) / "mamba_ssm")]
        sys.modules["mamba_ssm"] = package
    for name, attributes in {
        "transformers.generation": (
            "GreedySearchDecoderOnlyOutput",
            "SampleDecoderOnlyOutput",
            "TextStreamer",
        ),
        "transformers.utils": ("WEIGHTS_NAME", "CONFIG_NAME"),
        "transformers.utils.hub": ("cached_file",),
    }.items():
        try:
            module = importlib.import_module(name)
        except ImportError:
            module = types.ModuleType(name)
            sys.modules[name] = module
            sys.modules.setdefault("transformers", types.ModuleType("transformers"))
        for attribute in attributes:
            if not hasattr(module, attribute):
                setattr(module, attribute, types.SimpleNamespace)
    return importlib.import_module("models.aim")


if __name__ == "__main__":
    main()
