"""The step graph that the `cpu` backend takes instead of the plain one, made and held against it.

Everything follows from the bundle: it takes neither the checkpoint nor PyTorch.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx

from aim_export.agreement import TOLERANCES, relative_error, token_agreement
from aim_export.errors import ExportError
from aim_export.onnx.fused_step import FIRST_ONNXRUNTIME, describe, fuse_step
from aim_runtime import Bundle
from aim_runtime.bundle import add_files
from aim_runtime.bundle.files import MANIFEST_NAME
from aim_runtime.bundle.manifest import FEW_BITS, GraphSpec, ModelCard
from aim_runtime.cores import usable_cores
from aim_runtime.engines.base import Engine
from aim_runtime.engines.onnxruntime.cpu import OnnxRuntimeCpu
from aim_runtime.engines.onnxruntime.library import installed_version, is_older
from aim_runtime.engines.onnxruntime.step_graph import STEP_FILE, chosen_step
from aim_runtime.noise import uniforms
from aim_runtime.onnx_graph import checked_graph
from aim_runtime.quoting import shortened

Report = Callable[[str], None]

WANTED = f"onnxruntime {FIRST_ONNXRUNTIME} or later"
"""What the fused step runs on."""


def add_step_graph(bundle_dir: Path, report: Report | None = None) -> Bundle:
    """Put the fused step graph into a bundle's folder; one that was there is replaced.

    It counts only if it agrees with the plain graph over every step of two images.

    Args:
        bundle_dir: the folder of a bundle.
        report: told, line by line, what is being done and was measured.

    Returns:
        The bundle with its step graph.

    Raises:
        ExportError: the bundle is no folder, the plain graph is not one that `aim export` wrote, or
            the two disagree; the bundle is as it was.
        aim_runtime.BundleError: there is no bundle folder, or it is damaged or cannot be written.
    """
    say = report or (lambda line: None)
    bundle = Bundle.open(bundle_dir)
    if not bundle.path.is_dir():
        raise ExportError(f"{bundle.path}: graphs are added to a bundle folder; unpack it first")
    if not step_graph_can_be_tried():
        raise ExportError(
            f"the fused step cannot be tried on onnxruntime {installed_version()}, it takes "
            f"{FIRST_ONNXRUNTIME} or later; pip install --upgrade onnxruntime"
        )
    graph, model = bundle.manifest.graphs["step"], bundle.manifest.model
    with tempfile.TemporaryDirectory(dir=bundle.path.parent, prefix=".aim-cpu.") as folder:
        made, tried = Path(folder) / "made", Path(folder) / "tried"
        made.mkdir()
        say("fusing the step")
        write_step_graph(checked_graph(bundle, graph), graph, model, made)
        _mirror(bundle, tried)
        say(_compared(add_files(tried, made)))
        return add_files(bundle_dir, made)


def write_step_graph(plain: bytes, graph: GraphSpec, model: ModelCard, folder: Path) -> None:
    """Write the fused graph of a `plain` one and what describes it into `folder`.

    Args:
        plain: the file of the plain graph.
        graph: what the manifest says of it.
        model: the manifest's geometry.
        folder: an existing one.

    Raises:
        ExportError: the plain graph is not one that `aim export` wrote.
    """
    step = describe(graph, model)
    fused = fuse_step(onnx.load_from_string(plain), model)
    (folder / step.graph.file).write_bytes(fused.SerializeToString())
    (folder / STEP_FILE).write_text(step.to_json(), encoding="utf-8")


def step_graph_can_be_tried() -> bool:
    """Whether the ONNX Runtime of this machine runs the fused step."""
    return not is_older(installed_version(), FIRST_ONNXRUNTIME)


def step_engines(bundle: Bundle) -> dict[str, Engine]:
    """The `cpu` engine with each step graph of `bundle` that runs here, by what they are called."""
    engines: dict[str, Engine] = {"plain": OnnxRuntimeCpu(bundle, usable_cores())}
    fused = chosen_step(bundle).step
    if fused is not None:
        engines["cpu"] = OnnxRuntimeCpu(bundle, usable_cores(), fused)
    return engines


def _mirror(bundle: Bundle, folder: Path) -> None:
    """A folder with the files of `bundle`: the same ones where the file system can, else copies."""
    for name in bundle.manifest.files:
        source, target = bundle.path / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source.resolve(), target)
        except OSError:
            shutil.copyfile(source, target)
    shutil.copyfile(bundle.path / MANIFEST_NAME, folder / MANIFEST_NAME)


def _compared(bundle: Bundle) -> str:
    """What the fused graph of `bundle` differs from the plain one by; ExportError for too much."""
    engines = step_engines(bundle)
    model, options = bundle.manifest.model, bundle.manifest.sampling
    if options.rows_per_image == 1:
        options = options.replace(cfg_scale=2.0)
    classes = np.unique([0, model.num_classes - 1]).astype(np.int64)
    noise = uniforms(range(len(classes)), model.num_tokens)
    tokens = np.concatenate(list(engines["plain"].draw(classes, noise, options)), axis=1)
    logits = {}
    for name, engine in engines.items():
        with contextlib.closing(engine.scores(classes, tokens, options.cfg_scale)) as steps:
            logits[name] = np.stack([scores.copy() for scores in steps], axis=1)  # (n, T, V)
    error = relative_error(logits["cpu"], logits["plain"])
    agreement = token_agreement(logits["cpu"], noise, options, tokens)
    # Weights of few bits are the same ones in both, but only one rounds what it multiplies.
    few_bits = bundle.manifest.precision in FEW_BITS
    allowed = TOLERANCES[bundle.manifest.precision if few_bits else "fp32"]
    found = (
        f"the fused step's scores differ by {error:.1e} from the plain one's over "
        f"{model.num_tokens} steps, and draw {agreement:.2%} of the same tokens"
    )
    if not (error <= allowed.logits_error and agreement >= allowed.token_agreement):
        raise ExportError(
            f"{found}; at most {allowed.logits_error:.0e} and at least "
            f"{allowed.token_agreement:.0%} are allowed: {shortened(str(bundle.path.name), 40)} "
            "stays as it was"
        )
    return found
