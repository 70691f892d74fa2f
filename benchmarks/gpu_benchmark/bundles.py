"""The bundles that are measured: of random weights, and the one in the box, with kernels."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from aim_cli import human
from gpu_benchmark.agreement import CPU_TOKENS, cpu_tokens
from gpu_benchmark.sections import Keep

if TYPE_CHECKING:
    from aim_training.model import AiM

# Numbers drawn for all weights; odd, so that rows of a matrix start at different places.
RANDOM_BLOCK = (1 << 22) - 1


def prepare_all(
    size: str, cache: Path, engines: Path, precisions: tuple[str, ...], images: int
) -> None:
    """Make the bundles of `size` and of the model in the box, and compile both's kernels."""
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
    """Write the files of `engines/cuda` for compute capability 9.0 to `out`."""
    from aim_export.cuda.bundle import compile_engines

    out.mkdir(parents=True, exist_ok=True)
    compile_engines(bundle, out, precisions=precisions, capabilities=(90,))


def make_bundle(keep: Keep, size: str, cache: Path, engines: Path, separate: bool) -> None:
    """The random bundle of `size` with its kernels, as far as there are any.

    With `separate` every layer has launches of its own (`separate_launches`).
    """
    started = time.perf_counter()
    path, outline = cache / f"random-{size.lower()}-fp16", engines / f"outline-{size}"
    if outline.is_dir() and not path.exists():
        fill_outline(outline, path)
    random_bundle(size, cache)
    keep(path=str(path), seconds=time.perf_counter() - started)
    install_kernels(path, engines, size, separate)
    warm_disk(path)


def make_box(keep: Keep, cache: Path, engines: Path) -> None:
    """A copy of the model in the box with its kernels, as far as there are any."""
    from aim_runtime import Bundle, write_bundle

    source = Bundle.open(None)
    path = cache / "box"
    write_bundle(source.manifest, source.path, path, overwrite=True)
    keep(path=str(path))
    install_kernels(path, engines, "box")


def install_kernels(path: Path, engines: Path, name: str, separate: bool = False) -> None:
    """Put ENGINES/name into a bundle, or ENGINES itself if it holds the kernels."""
    from aim_runtime.bundle import add_engine

    folder = engines / name
    if not folder.is_dir() and list(engines.glob("plan-*.json")):
        folder = engines
    if not folder.is_dir():
        click.echo(f"there are no compiled kernels in {folder}", err=True)
        return
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(shutil.copytree(folder, Path(scratch) / "cuda"))
        for file in copy.glob("plan-*.json") if separate else ():
            file.write_text(json.dumps(separate_launches(json.loads(file.read_text()))))
        add_engine(path, "cuda", copy)


def separate_launches(plan: dict[str, Any]) -> dict[str, Any]:
    """A plan without the buckets whose programs wait for each other.

    It is what a GPU takes of the plan that cannot hold all of those at a time.
    """
    resident = {name for name, kernel in plan["kernels"].items() if kernel.get("resident")}

    def waits(bucket: dict[str, Any]) -> bool:
        launches = [
            launch
            for item in bucket["begin"] + bucket["step"]
            for launch in item.get("body", [item])
        ]
        return any(launch["kernel"] in resident for launch in launches)

    return plan | {"buckets": [bucket for bucket in plan["buckets"] if not waits(bucket)]}


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
    """Write the small files of a random bundle to `out`, and what its large tensors are like."""
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
    """Make the bundle of an outline at `path`: its tensors from one block of random numbers."""
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
