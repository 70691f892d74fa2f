"""From a bundle's ONNX graphs to engines beside them.

With TensorRT installed: engines for the GPU of this machine, the scan as our kernel
(`aim_export.tensorrt.plugin`). With TensorRT for RTX instead: engines for any GPU that it
supports, made without one; it knows no plugins and takes the scan's body of standard operators.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

from onnx import ModelProto

from aim_export.errors import EnginesUnavailable, ExportError
from aim_export.onnx.graph import Stored, write_graph
from aim_export.onnx.in_floats import in_floats
from aim_export.onnx.packed import lying_in_rows
from aim_export.onnx.state_scan import NAME
from aim_export.tensorrt.graphs import cast_pixels_last, multiply_in_half, read_graph
from aim_export.wide import check_wide
from aim_runtime import BackendError, Bundle, BundleError
from aim_runtime.bundle import add_engine
from aim_runtime.bundle.manifest import ENGINES_FOLDER, GRAPHS, GraphSpec
from aim_runtime.engines.gpu import libcuda
from aim_runtime.engines.tensorrt.library import (
    Library,
    collecting_logger,
    engine_file,
    engine_folder,
    find_library,
)
from aim_runtime.onnx_graph import checked_graph

# Numbers of rows (of images for the decoder) from, tuned for, and to, for each kind of batch. One
# image under guidance is two rows.
PROFILES = {
    "prologue": ((1, 2, 128),),
    "step": ((1, 2, 2), (3, 8, 8), (9, 32, 32), (33, 128, 128)),
    "decoder": ((1, 1, 1), (2, 8, 8)),
}
# What TensorRT measured; makes the next build for the same GPU and version faster.
_TIMING_CACHE = "timing.cache"

Report = Callable[[str], None]


def check_library() -> Library:
    """The TensorRT that is installed; asked before an export spends minutes on something else.

    Raises:
        EnginesUnavailable: none can be used.
    """
    try:
        return find_library()
    except BackendError as error:
        raise EnginesUnavailable(f"no engines can be built: {error}") from error


def add_engines(bundle_dir: Path, report: Report | None = None) -> Bundle:
    """Build the three engines of a bundle folder and put them into it.

    Engines of the same TensorRT and GPU that are there already are replaced, other ones stay.

    Args:
        bundle_dir: the folder of a bundle.
        report: told, line by line, what is being done.

    Returns:
        The bundle with its engines.

    Raises:
        EnginesUnavailable: there is no TensorRT here, or no GPU to build for.
        ExportError: TensorRT cannot build an engine; the bundle is as it was.
        aim_runtime.BundleError: there is no bundle folder, or it is damaged or cannot be written.
    """
    library = check_library()
    bundle = Bundle.open(bundle_dir)
    if not bundle.path.is_dir():
        raise BundleError(f"{bundle.path}: engines are added to a bundle folder; unpack it first")
    try:
        name = engine_folder(library, (0, 0) if library.portable else libcuda.capability(0))
    except BackendError as error:
        raise EnginesUnavailable(f"no engines can be built: {error}") from error
    with tempfile.TemporaryDirectory(prefix="aim-engines-") as folder:
        build_engines(library, bundle, name, Path(folder), report or (lambda line: None))
        return add_engine(bundle_dir, name, folder)


def build_engines(
    library: Library, bundle: Bundle, name: str, folder: Path, report: Report
) -> None:
    """Write the engines of all three graphs, and what helps building them again, to `folder`.

    Raises:
        ExportError: TensorRT cannot build one of them.
        aim_runtime.BundleError: the bundle is damaged.
    """
    check_wide(bundle, "TensorRT engines")
    cache_name = f"{ENGINES_FOLDER}/{name}/{_TIMING_CACHE}"
    cache = bytes(bundle.read(cache_name)) if cache_name in bundle.manifest.files else b""
    for graph in GRAPHS:
        started = perf_counter()
        with tempfile.TemporaryDirectory(prefix="aim-graph-") as place:
            path = _write_graph(bundle, graph, Path(place))
            spec = bundle.manifest.graphs[graph]
            engine, cache = _build(library, path, spec, graph, bundle.manifest.precision, cache)
        (folder / engine_file(graph)).write_bytes(engine)
        report(
            f"built the {graph}'s engine with {library} "
            f"({len(engine) / 1e6:.1f} MB, {perf_counter() - started:.0f} s)"
        )
    if cache:
        (folder / _TIMING_CACHE).write_bytes(cache)


def _write_graph(bundle: Bundle, graph: str, folder: Path) -> Path:
    """A copy of a graph, in the form that TensorRT takes, beside its weights.

    Its bytes are those whose checksums the manifest gives; TensorRT reads weights by path only.
    Weights that lie in fewer bits than they are read in are written as they are read.
    """
    spec = bundle.manifest.graphs[graph]
    path, where = folder / spec.file, f"{bundle.path}: {spec.file}"
    model = read_graph(checked_graph(bundle, spec), spec.weights, where)
    if lying_in_rows(model.graph):
        stored: Stored = "fp32" if bundle.manifest.precision == "fp32" else "fp16"
        written = write_graph(in_floats(bundle, graph), folder, Path(spec.weights).stem, stored)
        model = read_graph(written.read_bytes(), spec.weights, where)
    else:
        (folder / spec.weights).write_bytes(bundle.read(spec.weights))
    prepare(model)
    path.write_bytes(model.SerializeToString())
    return path


def prepare(model: ModelProto) -> None:
    """Put a graph into the form that engines are built from."""
    cast_pixels_last(model)
    multiply_in_half(model)


def _build(
    library: Library, path: Path, spec: GraphSpec, graph: str, precision: str, cache: bytes
) -> tuple[bytes, bytes]:
    """The engine of the graph at `path`, and the timing cache with what was measured for it."""
    trt = library.module
    if not library.portable:
        # Importing it registers the kernel; this comes first because it may lack Triton.
        import aim_export.tensorrt.plugin  # noqa: F401
    messages: list[str] = []
    try:
        logger = collecting_logger(library, messages.append)
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse_from_file(str(path)):
            reasons = [parser.get_error(index).desc() for index in range(parser.num_errors)]
            raise _failed(library, spec, reasons or messages)
        _check_network(library, network, path, spec)
        config = builder.create_builder_config()
        if precision == "fp32":
            # By default matrix products of float32 keep 10 bits of each factor.
            config.clear_flag(trt.BuilderFlag.TF32)
        for rows in profiles(graph, portable=library.portable):
            profile = builder.create_optimization_profile()
            for tensor in spec.inputs:
                profile.set_shape(tensor.name, *map(tensor.concrete_shape, rows))
            config.add_optimization_profile(profile)
        if not library.portable:
            config.set_timing_cache(config.create_timing_cache(cache), False)
        engine = builder.build_serialized_network(network, config)
        if engine is None:
            raise _failed(library, spec, messages)
        if not library.portable:
            cache = bytes(config.get_timing_cache().serialize())
        return bytes(engine), cache
    except (ExportError, BundleError):
        raise
    except Exception as error:  # its bindings raise many types, for a missing GPU among others
        raise _failed(library, spec, [*messages, str(error)]) from error


def profiles(graph: str, *, portable: bool) -> tuple[tuple[int, int, int], ...]:
    """The numbers of rows an engine is made for: ranges from, tuned for, to.

    TensorRT for RTX compiles on the user's machine for the sizes it meets there, so one range does.
    """
    ranges = PROFILES[graph]
    return ((*ranges[0][:2], ranges[-1][2]),) if portable else ranges


def _check_network(library: Library, network: Any, path: Path, spec: GraphSpec) -> None:
    """The parsed network must have the manifest's inputs and outputs, and our kernel for scans."""
    trt = library.module
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    for side, promised, found in (
        ("input", spec.inputs, inputs),
        ("output", spec.outputs, outputs),
    ):
        expected = {t.name: (t.dtype, (-1, *t.concrete_shape(1)[1:])) for t in promised}
        actual = {t.name: (library.dtype_name(t.dtype), tuple(t.shape)) for t in found}
        if actual != expected:
            name = next(n for n in expected | actual if expected.get(n) != actual.get(n))
            raise BundleError(
                f"{spec.file} has {actual.get(name)} as {side} {name!r}, the manifest says "
                f"{expected.get(name)}"
            )
    if library.portable:
        return
    graph = read_graph(path.read_bytes(), spec.weights, spec.file).graph
    scans = sum(node.op_type == NAME for node in graph.node)
    layers = [network.get_layer(index).type for index in range(network.num_layers)]
    if layers.count(trt.LayerType.PLUGIN_V3) != scans:
        raise ExportError(f"{library} did not take the kernel for the {NAME} nodes of {spec.file}")


def _failed(library: Library, spec: GraphSpec, reasons: list[str]) -> ExportError:
    lines = [line.strip() for reason in reasons for line in reason.splitlines() if line.strip()]
    reason = lines[0] if lines else "it does not say why"
    return ExportError(f"{library} cannot build an engine of {spec.file} ({reason[:300]})")
