"""The decoder of fewer multiplications: the same numbers, whatever is beside them, one strip at a
time; and when there is none."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F

from aim_export import decoder, export_bundle
from aim_export.decoder import add_decoder_graph, psnr_db
from aim_export.onnx import float_decoder, winograd
from aim_export.onnx.graph import MICROSOFT, GraphBuilder
from aim_export.onnx.strips import StripedMap, as_half, group_norm, lines_of, moments_of
from aim_export.onnx.winograd import WinogradConvolution, best_tile, pays, strip_edges
from aim_runtime import Bundle
from aim_runtime.bundle.manifest import FEW_BITS
from aim_runtime.engines.base import Engine
from aim_runtime.engines.onnxruntime.cpu import load
from aim_runtime.engines.onnxruntime.decoder_graph import (
    DECODER_FILE,
    DECODER_GRAPH_FILE,
    chosen_decoder,
)
from aim_runtime.onnx_graph.check import _Trace
from aim_runtime.onnx_graph.cost import live_bytes, peak_bytes
from aim_runtime.onnx_graph.layout_operators import stored_value
from aim_runtime.onnx_graph.model import FLOAT, INT64, read_model
from aim_runtime.onnx_graph.shapes import Size, Value, fixed
from aim_training.checkpoint import save_checkpoint
from aim_training.config import ModelConfig, TokenizerConfig
from aim_training.model import AiM
from aim_training.tokenizer import VQTokenizer

from ..runtime.tiny_bundle import copy_bundle


def run(g: GraphBuilder, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        g.build().SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {"x": x})
    return np.asarray(found)


def convolution(
    side: int, shape: tuple[int, int], doubled: bool, strips: int = 8
) -> tuple[GraphBuilder, Any, list[str]]:
    """A graph of one convolution of `x`, strip by strip, its weight, and the strips it makes."""
    outputs, inputs = shape
    weight = np.random.default_rng(side).standard_normal((outputs, inputs, 3, 3)) / 3
    weight = weight.astype(np.float32)
    g = GraphBuilder("one")
    g.domain(MICROSOFT, 1)
    read = side // 2 if doubled else side
    g.input("x", np.float32, ["rows", read, read, inputs])
    x = StripedMap(["x"], inputs, read, edges=[0, read])
    conv = WinogradConvolution(g, g.weight("weight", weight), shape, side, doubled=doubled)
    made: list[str] = []
    for first, last in itertools.pairwise(strip_edges(side, max(shape), strips)):
        lines = lines_of(g, x, *conv.reads(first, last), made[-1:])
        made.append(conv.strip(lines, first, last))
    g.op("Concat", *made, axis=1, result="y")
    g.output("y", np.float32, ["rows", side, side, outputs])
    return g, weight, made


def channels_first(x: np.ndarray[Any, Any]) -> torch.Tensor:
    return torch.from_numpy(x).double().permute(0, 3, 1, 2)


@pytest.mark.parametrize("strip_bytes", [1 << 30, 20_000, 1])
@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize("tile", [4, 6])
@pytest.mark.parametrize(("side", "shape"), [(4, (3, 2)), (12, (5, 3)), (26, (4, 7)), (28, (4, 7))])
def test_it_is_the_plain_convolution(
    side: int, shape: tuple[int, int], tile: int, doubled: bool, strip_bytes: int, monkeypatch: Any
) -> None:
    """Whether or not tiles fill the map, and strips hold as many lines as each other."""
    monkeypatch.setattr(winograd, "_STRIP_BYTES", strip_bytes)
    monkeypatch.setattr(winograd, "best_tile", lambda _: tile)
    g, weight, made = convolution(side, shape, doubled)
    assert len(made) == {1 << 30: 1, 1: min(8, -(-side // tile))}.get(strip_bytes, len(made))
    pixels = side // 2 if doubled else side
    read = np.random.default_rng(1).standard_normal((3, pixels, pixels, shape[1]))
    read = read.astype(np.float32)
    plain = channels_first(read)
    if doubled:
        plain = F.interpolate(plain, scale_factor=2.0, mode="nearest")
    wanted = F.conv2d(plain, torch.from_numpy(weight).double(), padding=1)
    np.testing.assert_allclose(run(g, read), wanted.permute(0, 2, 3, 1).numpy(), atol=2e-4)


def test_sides_that_tiles_do_not_fill_take_few_more_products() -> None:
    assert {side: best_tile(side) for side in (32, 64, 66, 128, 256)} == {
        32: 4,
        64: 6,
        66: 6,
        128: 6,
        256: 6,
    }


def test_strips_are_alike_but_for_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "_STRIP_BYTES", 1)
    assert strip_edges(64, 8, 4) == [0, 18, 36, 54, 64]
    assert strip_edges(32, 8, 100) == list(range(0, 33, 4))
    assert strip_edges(64, 8, 1) == [0, 64]
    monkeypatch.setattr(winograd, "_STRIP_BYTES", 1 << 30)
    assert strip_edges(64, 8, 4) == [0, 64]


def test_lines_come_from_all_strips_that_have_some() -> None:
    g = GraphBuilder("lines")
    g.input("x", np.float32, ["rows", 9, 2, 3])
    parts = g.ops("Split", "x", results=[""] * 3, axis=1, num_outputs=3)
    lines = lines_of(g, StripedMap(parts, 3, 2, edges=[0, 3, 6, 9]), 2, 8, ["x"])
    g.op("Identity", lines, result="y")
    g.output("y", np.float32, ["rows", 6, 2, 3])
    x = np.random.default_rng(0).standard_normal((2, 9, 2, 3)).astype(np.float32)
    np.testing.assert_array_equal(run(g, x), x[:, 2:8])


def test_strips_of_half_precision_are_read_as_float32() -> None:
    g = GraphBuilder("half")
    g.input("x", np.float32, ["rows", 4, 2, 3])
    parts = [
        as_half(g, part) for part in g.ops("Split", "x", results=[""] * 2, axis=1, num_outputs=2)
    ]
    half = StripedMap(parts, 3, 2, edges=[0, 2, 4], half=True)
    g.op("Identity", lines_of(g, half, 1, 4, ["x", parts[1]]), result="y")
    g.output("y", np.float32, ["rows", 3, 2, 3])
    x = np.random.default_rng(0).standard_normal((2, 4, 2, 3)).astype(np.float32)
    x[0, 1, 0, :2] = 1e6, -1e30  # beyond half precision
    largest = float(np.finfo(np.float16).max)
    wanted = x[:, 1:].clip(-largest, largest).astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(run(g, x), wanted)


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("mean", [0, 30])
def test_a_norm_of_strips_is_the_norm_of_the_whole(mean: int, offset: bool) -> None:
    """Sums and squares are enough, however far values are from 0."""
    rng = np.random.default_rng(0)
    side, channels, groups, eps = 32, 8, 4, 1e-6
    gain, shift, more = rng.standard_normal((3, channels)).astype(np.float32)
    g = GraphBuilder("norm")
    g.input("x", np.float32, ["rows", side, side, channels])
    whole = StripedMap(["x"], channels, side, edges=[0, side])
    edges = [0, 12, 24, 32]
    parts = [lines_of(g, whole, *some) for some in itertools.pairwise(edges)]
    moments = [moments_of(g, part, side) for part in parts]
    striped = StripedMap(parts, channels, side, edges=edges, moments=moments)
    if offset:
        striped.offset = g.weight("more", more)
    names = g.weight("gain", gain), g.weight("shift", shift)
    prepare = group_norm(g, striped, *names, groups, eps)
    g.op("Identity", prepare(lines_of(g, striped, 0, side)), result="y")
    g.output("y", np.float32, ["rows", side, side, channels])
    x = (mean + rng.standard_normal((2, side, side, channels))).astype(np.float32)
    plain = channels_first(x + more if offset else x)
    weights = (torch.from_numpy(value).double() for value in (gain, shift))
    wanted = F.group_norm(plain, groups, *weights, eps)
    found = run(g, x)
    np.testing.assert_allclose(found, wanted.permute(0, 2, 3, 1).numpy(), atol=2e-3)


def test_where_it_pays() -> None:
    assert [side for side in (16, 28, 31, 32, 33, 34, 64, 256) if pays(side)] == [
        32,
        33,
        34,
        64,
        256,
    ]


def test_one_strip_is_there_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """In whatever order nodes run: each strip depends on the one before it."""
    peaks = []
    for strip_bytes in (1 << 30, 1 << 17):
        monkeypatch.setattr(winograd, "_STRIP_BYTES", strip_bytes)
        g, _, made = convolution(64, (16, 16), False, strips=11)
        model = read_model(g.build().SerializeToString())
        trace = _Trace({})
        values = {name: trace.add(stored_value(t)) for name, t in model.initializers.items()}
        values["x"] = trace.add(Value((Size(1, 0), fixed(64), fixed(64), fixed(16)), FLOAT))
        trace.run(model.nodes, values)
        # Without the last step, which puts strips together for this test.
        peaks.append(peak_bytes(trace.steps[:-1], frozenset(values[strip] for strip in made)))
    assert peaks[1] < peaks[0] / 2


# -- whole decoders -------------------------------------------------------------------------------

GRID = 8
CODES = np.random.default_rng(3).integers(0, 64, (3, GRID * GRID))


@pytest.fixture(scope="module", params=["fp16", "fp32", "int8"])
def plain(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A bundle whose decoder has every kind of block, and maps of 8, 16 and 32 pixels."""
    folder = tmp_path_factory.mktemp("decoder")
    config = ModelConfig(
        vocab_size=64, num_classes=3, num_tokens=GRID**2, d_model=64, num_layers=1, d_state=16
    )
    tokenizer = TokenizerConfig(
        codebook_size=64,
        channels=32,
        channel_multipliers=(1, 2, 2),
        z_channels=32,
        encoder_blocks=1,
        decoder_blocks=1,
    )
    torch.manual_seed(0)
    names = {"class_names": ["cat", "dog", "red panda"]}
    model = AiM(config).initialise()
    path = save_checkpoint(folder / "m.safetensors", model, VQTokenizer(tokenizer), names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "_LEAST_TILES", 1 << 20)
        patch.setattr(decoder, "write_quantised_decoder", lambda *_: False)
        export_bundle(path, folder / "plain", precision=request.param)
    return folder / "plain"


def engine_of(bundle: Bundle, threads: int = 1) -> Engine:
    return load(bundle, threads=threads)


def added(plain: Path, folder: Path, least: int = 64) -> tuple[Bundle, list[str]]:
    """`plain` with such a decoder, and what was said."""
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "_LEAST_TILES", least)
        patch.setattr(winograd, "_STRIP_BYTES", 1 << 18)
        return add_decoder_graph(copy_bundle(plain, folder), lines.append, in_8_bits=False), lines


def test_an_equal_picture_counts_as_one_with_one_value_a_level_off() -> None:
    pictures = np.full((2, 4, 4, 3), 100, np.uint8)
    others = pictures.copy()
    best = 10 * np.log10(255**2 * 48)
    assert psnr_db(pictures, others) == pytest.approx(best)
    others[0, 0, 0, 0] += 1
    assert psnr_db(pictures, others) == pytest.approx(best)
    others[1] += 5
    assert psnr_db(pictures, others) == pytest.approx((best + 10 * np.log10(255**2 / 25)) / 2)


@pytest.mark.parametrize("least", [1, 16, 64])
def test_pictures_are_the_plain_ones(plain: Path, tmp_path: Path, least: int) -> None:
    """From which map on lines are in fours makes no difference."""
    bundle, lines = added(plain, tmp_path / "bundle", least)
    described = chosen_decoder(bundle).decoder
    assert described is not None
    assert described.precision == "fp32"
    assert described.psnr_db >= 60
    assert f"{described.psnr_db:.1f} dB PSNR from the plain one" in lines[-1]
    wanted = engine_of(Bundle.open(plain)).decode(CODES)
    found = engine_of(bundle).decode(CODES)
    assert np.abs(found.astype(int) - wanted).max() <= 1
    assert psnr_db(found, wanted) >= 60
    if bundle.manifest.precision not in FEW_BITS:  # it is for who asks for float32 too
        exact = load(bundle, threads=1, precision="fp32").decode(CODES)
        np.testing.assert_array_equal(exact, found)


@pytest.mark.parametrize("large", [False, True])
def test_a_picture_depends_on_nothing_beside_it(
    plain: Path, tmp_path: Path, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(float_decoder, "_LARGE_MAP_BYTES", 0)
    bundle, lines = added(plain, tmp_path / "bundle", 1)
    assert "dB PSNR from the plain one" in lines[-1]  # which it says of none below 60
    together = engine_of(bundle).decode(CODES)
    for threads in (1, 2, 3):
        engine = engine_of(bundle, threads)
        for code, picture in zip(CODES, together, strict=True):
            np.testing.assert_array_equal(engine.decode(code[None])[0], picture)
        np.testing.assert_array_equal(engine.decode(CODES[::-1].copy())[::-1], together)


def test_weights_that_wait_for_their_maps_are_the_same(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(float_decoder, "_LARGE_WEIGHT_BYTES", 0)
    found = engine_of(added(plain, tmp_path / "bundle", 1)[0]).decode(CODES)
    wanted = engine_of(Bundle.open(plain)).decode(CODES)
    assert np.abs(found.astype(int) - wanted).max() <= 1


def test_of_a_map_in_half_precision_one_strip_is_float32(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whatever order nodes run, at hardly more memory than in the order that they are in."""
    monkeypatch.setattr(float_decoder, "_LARGE_MAP_BYTES", 0)
    monkeypatch.setattr(winograd, "_LEAST_TILES", 1)
    monkeypatch.setattr(winograd, "_STRIP_BYTES", 1 << 15)
    found = float_decoder.rearrange_decoder(decoder.decoder_source(Bundle.open(plain)))
    assert found is not None
    model = read_model(found.SerializeToString())
    trace = _Trace({})
    values = {name: trace.add(stored_value(t)) for name, t in model.initializers.items()}
    values["tokens"] = trace.add(Value((Size(1, 0), fixed(GRID**2)), INT64))
    trace.run(model.nodes, values)
    image = frozenset([values["image"]])
    assert peak_bytes(trace.steps, image) < 1.5 * live_bytes(trace.steps, image)


def test_weights_are_stored_once(plain: Path, tmp_path: Path) -> None:
    bundle, _ = added(plain, tmp_path / "bundle", 1)
    own, others = (
        onnx.load(bundle.path / name, load_external_data=False).graph.initializer
        for name in (DECODER_GRAPH_FILE, "decoder.onnx")
    )
    stored = {tensor.name: tensor for tensor in others}
    outside = [tensor for tensor in own if tensor.external_data]
    assert outside
    assert all(tensor == stored[tensor.name] for tensor in outside)
    assert sum(len(tensor.raw_data) for tensor in own if not tensor.external_data) < 1 << 16


def test_made_twice_it_is_the_same(plain: Path, tmp_path: Path) -> None:
    one, other = (added(plain, tmp_path / name)[0].path for name in ("one", "other"))
    for name in (DECODER_FILE, DECODER_GRAPH_FILE):
        assert (one / name).read_bytes() == (other / name).read_bytes()


def test_small_maps_have_none(plain: Path, tmp_path: Path) -> None:
    bundle, lines = added(plain, tmp_path / "bundle", 65)
    assert DECODER_FILE not in bundle.manifest.files
    assert not lines


def test_too_far_from_the_plain_one_it_is_left_out(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "LEAST_FLOAT_PSNR_DB", 1000.0)
    bundle, lines = added(plain, tmp_path / "bundle")
    assert DECODER_FILE not in bundle.manifest.files
    assert {p.name for p in bundle.path.iterdir()} == {p.name for p in plain.iterdir()}
    assert "the decoder stays the plain one" in lines[-1]
    assert "at least 1000 are needed" in lines[-1]


def test_it_takes_the_place_of_8_bits_that_are_too_far(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "LEAST_PSNR_DB", 200.0)
    monkeypatch.setattr(decoder, "_WANTED_PSNR_DB", 0.0)
    monkeypatch.setattr(winograd, "_STRIP_BYTES", 1 << 18)
    bundle = add_decoder_graph(copy_bundle(plain, tmp_path / "bundle"))
    described = chosen_decoder(bundle).decoder
    assert described is not None
    assert described.precision == "fp32"


def test_8_bits_that_are_there_stay(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "LEAST_PSNR_DB", 0.0)
    monkeypatch.setattr(decoder, "_WANTED_PSNR_DB", 0.0)
    bundle = add_decoder_graph(copy_bundle(plain, tmp_path / "bundle"))
    before = (bundle.path / DECODER_GRAPH_FILE).read_bytes()
    bundle = add_decoder_graph(bundle.path, in_8_bits=False)
    assert (bundle.path / DECODER_GRAPH_FILE).read_bytes() == before
    chosen = chosen_decoder(bundle).decoder
    assert chosen is not None
    assert chosen.precision == "int8"
