"""The decoder that the `cpu` backend takes instead of the plain one, made and held against it.

As with the step, everything follows from the bundle. In float32 it is the same arithmetic in
another order, and pictures of any codes show that. What 8 bits must hold is seen on pictures of the
model's own codes; what they lose is measured on others.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from numpy.typing import NDArray

from aim_export.cuda.decoder_network import blocks, decoder_tensors, group_norms
from aim_export.errors import ExportError
from aim_export.onnx.decoder_ranges import ConvolutionRanges, Seen, convolution_ranges
from aim_export.onnx.decoder_source import (
    LAST,
    PREFIX,
    DecoderSource,
    follows_swish,
    level_of,
)
from aim_export.onnx.float_decoder import rearrange_decoder
from aim_export.onnx.graph import HALF_SUFFIX
from aim_export.onnx.packed import lying_in_rows
from aim_export.onnx.quantised_decoder import observed_decoder, quantise_decoder
from aim_runtime import Bundle
from aim_runtime.bundle import add_files
from aim_runtime.cores import usable_cores
from aim_runtime.engines.onnxruntime.cpu import OnnxRuntimeCpu
from aim_runtime.engines.onnxruntime.decoder_graph import (
    DECODER_FILE,
    DECODER_GRAPH_FILE,
    DecoderGraph,
    chosen_decoder,
)
from aim_runtime.engines.onnxruntime.engine import make_session
from aim_runtime.engines.onnxruntime.interruptible import Stopping
from aim_runtime.engines.onnxruntime.library import installed_version, is_older
from aim_runtime.engines.onnxruntime.step_graph import chosen_step
from aim_runtime.errors import BundleError
from aim_runtime.noise import uniforms
from aim_runtime.onnx_graph import checked_graph
from aim_runtime.onnx_graph.check import check_graph

if TYPE_CHECKING:
    import onnxruntime

Report = Callable[[str], None]

FIRST_ONNXRUNTIME = "1.24"
"""The first ONNX Runtime that these graphs were tried on."""
LEAST_PSNR_DB = 40.0
"""What pictures of a decoder in 8 bits must have, on average, against the plain one's."""
LEAST_FLOAT_PSNR_DB = 60.0
"""And those of one in float32."""

EIGHT_BITS = ("int8", "int4")
"""Precisions of a bundle whose decoder sums products of 8 bits on a CPU."""

# The pictures that ranges are seen on, and those that it is compared on.
_SEEN, _COMPARED = 8, 6
# In float32, where every picture is as near as the other.
_COMPARED_IN_FLOAT = 3
# The share of multiplications that 8 bits may leave to float32: with more of them, a decoder in
# float32 with fewer is faster (benchmarks/RESULTS.md).
_MOST_IN_FLOAT = 0.25
# What is aimed at: other pictures may come out a little worse than those compared.
_WANTED_PSNR_DB = LEAST_PSNR_DB + 1


@dataclass(frozen=True)
class _Tried:
    """A decoder graph, what of it is in float32, and its PSNR against the plain one."""

    model: onnx.ModelProto
    kept: tuple[str, ...]
    psnr_db: float


def add_decoder_graph(
    bundle_dir: Path, report: Report | None = None, *, in_8_bits: bool = True
) -> Bundle:
    """Put a faster decoder into a bundle's folder; one that was there is replaced.

    Args:
        bundle_dir: the folder of a bundle.
        report: told, line by line, what is being done and was measured.
        in_8_bits: with convolutions of 8 bits if the pictures bear it. Without, one of these that
            is there stays.

    Returns:
        The bundle; as it was, if no other decoder is both faster and near enough to the plain one.

    Raises:
        ExportError: the bundle is no folder, or its decoder is not one that `aim export` wrote; the
            bundle is as it was.
        aim_runtime.BundleError: there is no bundle folder, or it is damaged or cannot be written.
    """
    bundle = Bundle.open(bundle_dir)
    if not bundle.path.is_dir():
        raise ExportError(f"{bundle.path}: graphs are added to a bundle folder; unpack it first")
    there = chosen_decoder(bundle).decoder
    if not in_8_bits and there is not None and there.precision == "int8":
        return bundle
    with tempfile.TemporaryDirectory(dir=bundle.path.parent, prefix=".aim-cpu.") as folder:
        say = report or (lambda line: None)
        return _added(bundle, Path(folder), say, in_8_bits=in_8_bits)


def with_decoder_graph(bundle: Bundle, precision: str, scratch: Path, report: Report) -> Bundle:
    """`bundle`, in a folder, with a faster decoder where there is one: see `add_decoder_graph`.

    It may be of 8 bits if `precision` is one of `EIGHT_BITS`. `scratch` is a folder beside the
    bundle's.
    """
    made = scratch / "decoder"
    made.mkdir()
    return _added(bundle, made, report, in_8_bits=precision in EIGHT_BITS)


def _added(bundle: Bundle, folder: Path, say: Report, *, in_8_bits: bool) -> Bundle:
    """`bundle` with what fits into `folder` first."""
    if is_older(installed_version(), FIRST_ONNXRUNTIME):
        say(f"the decoder stays the plain one: another takes onnxruntime {FIRST_ONNXRUNTIME}")
        return bundle
    source = decoder_source(bundle)
    written = in_8_bits and write_quantised_decoder(bundle, source, folder, say)
    if written or write_float_decoder(bundle, source, folder, say):
        return add_files(bundle.path, folder)
    return bundle


def write_float_decoder(bundle: Bundle, source: DecoderSource, folder: Path, say: Report) -> bool:
    """Write a decoder of fewer multiplications over the weights of `bundle`, and its description.

    Args:
        bundle: an open one.
        source: what its decoder is made of.
        folder: an existing one, for the two files.
        say: told, line by line, what is being done and was measured.

    Returns:
        Whether there is one: maps may be too small for it to be faster.

    Raises:
        aim_runtime.BundleError: the bundle is damaged.
    """
    model = rearrange_decoder(source)
    if model is None:
        return False
    say("comparing the decoder of fewer multiplications with the plain one")
    manifest = bundle.manifest.model
    sizes = (_COMPARED_IN_FLOAT, manifest.num_tokens)
    tokens = np.random.default_rng(0).integers(0, manifest.vocab_size, sizes)
    found = psnr_db(*(_pictures(bundle, graph, tokens) for graph in (model, source.plain)))
    if found < LEAST_FLOAT_PSNR_DB:
        say(
            f"the decoder stays the plain one: one of fewer multiplications reaches {found:.1f} dB "
            f"PSNR from its pictures, at least {LEAST_FLOAT_PSNR_DB:g} are needed"
        )
        return False
    if not _written(bundle, folder, say, model, ("fp32", found)):
        return False
    say(f"a decoder of fewer multiplications is {found:.1f} dB PSNR from the plain one")
    return True


def write_quantised_decoder(
    bundle: Bundle, source: DecoderSource, folder: Path, say: Report
) -> bool:
    """Write a decoder of 8-bit convolutions over the weights of `bundle`, and what describes it.

    The levels of lowest resolution, which cost least, stay in float32 as far as the pictures ask
    for it.

    Args:
        bundle: an open one.
        source: what its decoder is made of.
        folder: an existing one, for the two files.
        say: told, line by line, what is being done and was measured.

    Returns:
        Whether there is one: pictures of less than `LEAST_PSNR_DB` are not worth their speed.

    Raises:
        aim_runtime.BundleError: the bundle is damaged.
    """
    say(f"drawing {_SEEN + _COMPARED} images to fit the decoder's 8-bit convolutions to")
    tokens = _codes(bundle, _SEEN + _COMPARED)
    ranges = seen_ranges(bundle, source, tokens[:_SEEN])
    say("comparing the decoder of 8-bit convolutions with the plain one")
    best = _best(bundle, source, ranges, tokens[_SEEN:])
    kept = f", with {', '.join(best.kept)} in float32," if best.kept else ""
    if best.psnr_db < LEAST_PSNR_DB:
        say(
            f"8-bit convolutions{kept} are left out: they reach {best.psnr_db:.1f} dB PSNR from "
            f"the plain decoder's pictures, at least {LEAST_PSNR_DB:g} are needed"
        )
        return False
    if not _written(bundle, folder, say, best.model, ("int8", best.psnr_db)):
        return False
    say(f"8-bit convolutions{kept} decode at {best.psnr_db:.1f} dB PSNR from the plain decoder")
    return True


def _written(
    bundle: Bundle, folder: Path, say: Report, model: onnx.ModelProto, what: tuple[str, float]
) -> bool:
    """Whether the graph is one that a bundle may hold; then it and its description are written.

    `what` is what most of its sums are of, and the PSNR of its pictures.
    """
    graph = replace(bundle.manifest.graphs["decoder"], file=DECODER_GRAPH_FILE)
    precision, found = what
    described = DecoderGraph(graph, precision, round(found, 2), FIRST_ONNXRUNTIME)
    data = model.SerializeToString()
    try:
        check_graph(data, bundle, graph)
    except BundleError as error:  # it takes more than a bundle of this geometry may
        say(f"the decoder stays the plain one: {error}")
        return False
    (folder / DECODER_GRAPH_FILE).write_bytes(data)
    (folder / DECODER_FILE).write_text(described.to_json(), encoding="utf-8")
    return True


def decoder_source(bundle: Bundle) -> DecoderSource:
    """What the decoder of `bundle` is made of. Raises ExportError for one of another make."""
    plain = onnx.load_from_string(checked_graph(bundle, bundle.manifest.graphs["decoder"]))
    names = {tensor.name.removesuffix(HALF_SUFFIX) for tensor in plain.graph.initializer}
    names |= lying_in_rows(plain.graph)
    try:
        tensors, norms = decoder_tensors(bundle), group_norms(bundle)
        order = list(blocks(tensors))
        missing = {PREFIX + name for name in tensors} - names
    except (ValueError, KeyError, IndexError) as error:
        raise ExportError(f"the bundle's decoder is no known export: {error}") from None
    if missing:
        raise ExportError(f"the bundle's decoder has no weight called {min(missing)}")
    return DecoderSource(
        plain,
        {name: tensor.values for name, tensor in tensors.items()},
        order,
        norms.groups,
        norms.eps,
        bundle.manifest.model.grid[0],
        rounded=bundle.manifest.precision in EIGHT_BITS,
    )


def psnr_db(pictures: NDArray[np.uint8], others: NDArray[np.uint8]) -> float:
    """Of 8-bit pictures (N, height, width, 3), the mean over them.

    An equal one counts as one in which one value is a level off, so that the mean means something.
    """
    squares = np.square(pictures.astype(np.float64) - others).sum(axis=(1, 2, 3))
    values = pictures[0].size
    return float(np.mean(10 * np.log10(255**2 * values / np.maximum(squares, 1))))


def _codes(bundle: Bundle, images: int) -> NDArray[np.int64]:
    """Codes (images, T) that the model draws, of classes spread over all of them."""
    engine = OnnxRuntimeCpu(bundle, usable_cores(), chosen_step(bundle).step)
    model, options = bundle.manifest.model, bundle.manifest.sampling
    classes = np.linspace(0, model.num_classes - 1, images).astype(np.int64)
    noise = uniforms(range(images), model.num_tokens)
    at_once = engine.plan(images, options.rows_per_image).batch_size
    drawn = []
    for first in range(0, images, at_once):
        some = slice(first, first + at_once)
        blocks_of_codes = list(engine.draw(classes[some], noise[some], options))
        drawn.append(np.concatenate(blocks_of_codes, axis=1))
    return np.concatenate(drawn)


def seen_ranges(
    bundle: Bundle, source: DecoderSource, tokens: NDArray[np.int64]
) -> dict[str, ConvolutionRanges]:
    """Ranges for every convolution that can be in 8 bits, by pictures of `tokens` (N, T)."""
    model, outputs = observed_decoder(source)
    names = [name for found in outputs.values() for name in found]
    session = _session(bundle, model)
    runs = [session.run(names, {"tokens": row[None]}) for row in tokens]
    seen: dict[str, NDArray[np.float32]] = {}
    for index, name in enumerate(names):
        combine = (np.min, np.max, np.mean)[index % 3]
        seen[name] = combine(np.stack([run[index] for run in runs]), axis=0)
    ranges = {}
    for conv, found in outputs.items():
        read, made = (Seen(*(seen[name] for name in found[at : at + 3])) for at in (0, 3))
        ranges[conv] = convolution_ranges(read, made, activated=follows_swish(conv))
    return ranges


def _best(
    bundle: Bundle,
    source: DecoderSource,
    ranges: Mapping[str, ConvolutionRanges],
    tokens: NDArray[np.int64],
) -> _Tried:
    """The decoder with most in 8 bits whose pictures of `tokens` are near enough, or the nearest.

    One level after the other goes back to float32, that of lowest resolution, the cheapest, first,
    as long as what is left is faster than a decoder in float32 of fewer multiplications.
    """
    plain = _pictures(bundle, source.plain, tokens)
    products = products_of_levels(source, ranges)
    levels = list(products)
    tried: list[_Tried] = []
    for count in range(len(levels)):
        kept = tuple(levels[:count])
        if sum(products[level] for level in kept) > _MOST_IN_FLOAT * sum(products.values()):
            break
        chosen = {name: found for name, found in ranges.items() if level_of(name) not in kept}
        model = quantise_decoder(source, chosen)
        tried.append(_Tried(model, kept, psnr_db(_pictures(bundle, model, tokens), plain)))
        if tried[-1].psnr_db >= _WANTED_PSNR_DB:
            break
    return max(tried, key=lambda one: one.psnr_db)


def products_of_levels(source: DecoderSource, convolutions: Iterable[str]) -> dict[str, int]:
    """How many multiplications `convolutions` take for a picture, by level, in their order."""
    sides, side = {"decoder.conv_in": source.side}, source.side
    for kind, name in source.blocks:
        side *= 2 if kind == "upsample" else 1
        sides[name] = side
    sides[LAST] = side
    found: dict[str, int] = {}
    for conv in convolutions:
        block = conv if conv in sides else conv.rpartition(".")[0]
        weight = source.values[f"{conv}.weight"]
        level = level_of(conv)
        found[level] = found.get(level, 0) + weight.size * sides[block] ** 2
    return found


def _pictures(
    bundle: Bundle, model: onnx.ModelProto, tokens: NDArray[np.int64]
) -> NDArray[np.uint8]:
    """Pictures of `tokens` (N, T), decoded one by one."""
    session = _session(bundle, model)
    return np.concatenate([session.run(["image"], {"tokens": row[None]})[0] for row in tokens])


def _session(bundle: Bundle, model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    return make_session(
        bundle,
        bundle.manifest.graphs["decoder"],
        model.SerializeToString(),
        threads=usable_cores(),
        providers=[("CPUExecutionProvider", {})],
        stopping=Stopping(),
        arena=True,
    )
