"""The decoder of 8-bit convolutions: how near it is, what it may add up, and when it stays away."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from aim_export import ExportError, decoder, export_bundle
from aim_export.decoder import add_decoder_graph, psnr_db, with_decoder_graph
from aim_export.onnx import quantised_decoder
from aim_export.onnx.decoder_ranges import Range, Seen, convolution_ranges
from aim_export.onnx.integer_convolution import MIDDLE, integer_convolution, weight_steps
from aim_runtime import Bundle
from aim_runtime.engines.base import Engine
from aim_runtime.engines.onnxruntime.cpu import OnnxRuntimeCpu, load
from aim_runtime.engines.onnxruntime.decoder_graph import (
    DECODER_FILE,
    DECODER_GRAPH_FILE,
    chosen_decoder,
)
from aim_training.checkpoint import save_checkpoint
from aim_training.config import ModelConfig, TokenizerConfig
from aim_training.model import AiM
from aim_training.tokenizer import VQTokenizer

from ..runtime.tiny_bundle import copy_bundle, write_tiny_bundle, zip_bundle


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose decoder has every kind of block."""
    folder = tmp_path_factory.mktemp("decoder")
    config = ModelConfig(
        vocab_size=64, num_classes=3, num_tokens=16, d_model=64, num_layers=1, d_state=16
    )
    tokenizer = TokenizerConfig(
        codebook_size=64,
        channels=32,
        channel_multipliers=(1, 2),
        z_channels=32,
        encoder_blocks=1,
        decoder_blocks=1,
    )
    torch.manual_seed(0)
    names = {"class_names": ["cat", "dog", "red panda"]}
    model = AiM(config).initialise()
    path = save_checkpoint(folder / "m.safetensors", model, VQTokenizer(tokenizer), names)
    export_bundle(path, folder / "plain", precision="fp16")
    return folder / "plain"


@pytest.fixture(scope="module")
def quantised(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, list[str]]:
    """It with all its convolutions in 8 bits, and what was said.

    Random weights, which no training has made smooth, lose more by it than a tokenizer's do.
    """
    folder = copy_bundle(plain, tmp_path_factory.mktemp("quantised") / "bundle")
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        anything(patch)
        return add_decoder_graph(folder, lines.append), lines


def anything(patch: pytest.MonkeyPatch) -> None:
    """Let decoders count however far they are from the plain one."""
    patch.setattr(decoder, "LEAST_PSNR_DB", 0.0)
    patch.setattr(decoder, "_WANTED_PSNR_DB", 0.0)


def engine_of(bundle: Bundle, threads: int = 1) -> Engine:
    return load(bundle, threads=threads)


CODES = np.random.default_rng(3).integers(0, 64, (5, 16))


def test_pictures_are_near_and_the_report_says_how_near(
    plain: Path, quantised: tuple[Bundle, list[str]]
) -> None:
    bundle, lines = quantised
    found = psnr_db(engine_of(bundle).decode(CODES), engine_of(Bundle.open(plain)).decode(CODES))
    described = chosen_decoder(bundle).decoder
    assert described is not None
    assert 28 <= described.psnr_db < 50  # it is near, and not the plain one
    assert abs(found - described.psnr_db) < 2  # on other codes than those that it was held to
    said = re.search(r"([\d.]+) dB PSNR from the plain decoder", lines[-1])
    assert said is not None
    assert float(said[1]) == pytest.approx(described.psnr_db, abs=0.06)  # both are rounded
    bundle.verify()


def test_its_sums_are_of_whole_numbers(quantised: tuple[Bundle, list[str]]) -> None:
    graph = onnx.load(quantised[0].path / DECODER_GRAPH_FILE, load_external_data=False).graph
    kinds = [node.op_type for node in graph.node]
    # Two in each of three blocks (the middle has two), four for the doubled map, the shortcut, the
    # last one.
    assert kinds.count("QLinearConv") == 2 * 4 + 4 + 1 + 1
    products = [node for node in graph.node if node.op_type == "Conv"]
    weights = {tensor.name: tensor.dims for tensor in graph.initializer}
    threes = [n for n in products if list(weights.get(f"{n.input[1]}/half", ()))[2:] == [3, 3]]
    assert len(threes) == 1  # the first one


def test_weights_are_stored_once(plain: Path, quantised: tuple[Bundle, list[str]]) -> None:
    folder = quantised[0].path
    own, others = (
        onnx.load(folder / name, load_external_data=False).graph.initializer
        for name in (DECODER_GRAPH_FILE, "decoder.onnx")
    )
    stored = {tensor.name: tensor for tensor in others}
    outside = [tensor for tensor in own if tensor.external_data]
    assert outside
    assert all(tensor == stored[tensor.name] for tensor in outside)
    added = {path.name for path in folder.iterdir()} - {path.name for path in plain.iterdir()}
    assert added == {DECODER_FILE, DECODER_GRAPH_FILE}


def test_a_picture_depends_on_nothing_beside_it(quantised: tuple[Bundle, list[str]]) -> None:
    bundle, _ = quantised
    together = engine_of(bundle).decode(CODES)
    for threads in (1, 2):
        engine = engine_of(bundle, threads)
        for code, picture in zip(CODES, together, strict=True):
            np.testing.assert_array_equal(engine.decode(code[None])[0], picture)
        np.testing.assert_array_equal(engine.decode(CODES[::-1].copy())[::-1], together)


def test_asked_for_float32_the_plain_one_decodes(
    plain: Path, quantised: tuple[Bundle, list[str]]
) -> None:
    exact = load(quantised[0], threads=1, precision="fp32").decode(CODES)
    np.testing.assert_array_equal(exact, engine_of(Bundle.open(plain)).decode(CODES))


def test_made_twice_it_is_the_same(
    quantised: tuple[Bundle, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = quantised[0].path
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    anything(monkeypatch)
    add_decoder_graph(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_maps_in_parts_give_the_same_pictures(
    plain: Path, quantised: tuple[Bundle, list[str]], tmp_path: Path, monkeypatch: Any
) -> None:
    anything(monkeypatch)
    monkeypatch.setattr(quantised_decoder, "_PART_BYTES", 2048)
    bundle = add_decoder_graph(copy_bundle(plain, tmp_path / "parts"))
    graph = onnx.load(bundle.path / DECODER_GRAPH_FILE, load_external_data=False).graph
    assert "Split" in {node.op_type for node in graph.node}
    np.testing.assert_array_equal(
        engine_of(bundle).decode(CODES), engine_of(quantised[0]).decode(CODES)
    )


def test_too_far_from_the_plain_one_it_is_left_out(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "LEAST_PSNR_DB", 200.0)
    monkeypatch.setattr(decoder, "_WANTED_PSNR_DB", 200.0)
    folder = copy_bundle(plain, tmp_path / "bundle")
    lines: list[str] = []
    bundle = add_decoder_graph(folder, lines.append)
    assert DECODER_FILE not in bundle.manifest.files
    assert {p.name for p in folder.iterdir()} == {p.name for p in plain.iterdir()}
    assert "8-bit convolutions" in lines[-1]
    assert "are left out" in lines[-1]
    assert "at least 200 are needed" in lines[-1]


def test_levels_stay_in_float32_as_far_as_pictures_ask(
    plain: Path, quantised: tuple[Bundle, list[str]], tmp_path: Path, monkeypatch: Any
) -> None:
    described = chosen_decoder(quantised[0]).decoder
    assert described is not None
    anything(monkeypatch)
    monkeypatch.setattr(decoder, "_WANTED_PSNR_DB", described.psnr_db + 0.5)
    monkeypatch.setattr(decoder, "_MOST_IN_FLOAT", 1.0)
    lines: list[str] = []
    bundle = add_decoder_graph(copy_bundle(plain, tmp_path / "bundle"), lines.append)
    kept = chosen_decoder(bundle).decoder
    assert kept is not None
    assert kept.psnr_db > described.psnr_db
    assert "with mid" in lines[-1]
    assert "in float32" in lines[-1]


def test_no_more_stays_in_float32_than_leaves_it_the_faster_one(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the levels here "mid" is the first to go back."""
    monkeypatch.setattr(decoder, "_WANTED_PSNR_DB", 200.0)
    monkeypatch.setattr(decoder, "LEAST_PSNR_DB", 200.0)
    for share, said in ((0.0, "8-bit convolutions are left out"), (0.9, ", with mid")):
        monkeypatch.setattr(decoder, "_MOST_IN_FLOAT", share)
        lines: list[str] = []
        add_decoder_graph(copy_bundle(plain, tmp_path / f"{share}"), lines.append)
        assert said in lines[-1]


def test_multiplications_of_levels(plain: Path) -> None:
    """Of maps of 4 x 4 and, once doubled, 8 x 8 with 32 or 64 channels, as PyTorch runs them."""
    source = decoder.decoder_source(Bundle.open(plain))
    names = [
        name.removesuffix(".weight")
        for name, value in source.values.items()
        if value.ndim == 4 and value.shape[-1] == 3
    ]
    sides = {name: 8 if name.startswith("decoder.conv_blocks.1") else 4 for name in names}
    sides |= dict.fromkeys([n for n in names if n.endswith(("upsample.conv", "conv_out"))], 8)
    counted = {name: source.values[f"{name}.weight"].size * sides[name] ** 2 for name in names}
    assert decoder.products_of_levels(source, ["decoder.conv_out"]) == {
        "conv_out": counted["decoder.conv_out"]
    }
    found = decoder.products_of_levels(source, names)
    assert sum(found.values()) == sum(counted.values())
    assert found["mid"] == sum(counted[name] for name in names if name.startswith("decoder.mid."))


def test_it_goes_with_weights_of_few_bits(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    anything(monkeypatch)
    for precision, there in (("fp16", False), ("int8", True), ("int4", True)):
        scratch = tmp_path / precision
        scratch.mkdir()
        bundle = Bundle.open(copy_bundle(plain, scratch / "bundle"))
        bundle = with_decoder_graph(bundle, precision, scratch, lambda line: None)
        assert (DECODER_FILE in bundle.manifest.files) == there


def test_a_bundle_of_another_make_is_refused(tmp_path: Path, plain: Path) -> None:
    stranger = write_tiny_bundle(tmp_path / "tiny")
    before = {path.name: path.read_bytes() for path in stranger.iterdir()}
    with pytest.raises(ExportError, match="decoder"):
        add_decoder_graph(stranger)
    assert {path.name: path.read_bytes() for path in stranger.iterdir()} == before
    packed = zip_bundle(plain, tmp_path / "packed.zip")
    with pytest.raises(ExportError, match="unpack it first"):
        add_decoder_graph(packed)


# -- the arithmetic -------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [8, 7])
def test_no_pair_of_products_leaves_16_bits(inputs: int) -> None:
    rng = np.random.default_rng(inputs)
    weight = rng.standard_normal((6, inputs, 3, 3)).astype(np.float32)
    weight[0] = 1  # every pair as large as it gets
    weight[1, 0::2] = 0
    weight[2] = 0
    steps = weight_steps(weight)
    levels = np.round(weight / steps[:, None, None, None]).astype(np.int64)
    assert np.abs(levels).max() <= 127
    rows = np.moveaxis(levels, 1, -1).reshape(6, 9, inputs)
    rows = np.pad(rows, ((0, 0), (0, 0), (0, inputs % 2))).reshape(6, -1, 2)
    for sign in (1, -1):
        assert 255 * np.maximum(sign * rows, 0).sum(-1).max() <= 32767


def test_onnxruntime_adds_up_the_largest_products_exactly() -> None:
    rng = np.random.default_rng(0)
    weight = np.abs(rng.standard_normal((32, 64, 3, 3))).astype(np.float32)
    steps = weight_steps(weight)
    levels = np.round(weight / steps[:, None, None, None]).astype(np.int8)
    pixels = np.full((1, 6, 6, 64), 255, np.uint8)
    sums = 255 * levels.astype(np.int64).sum(axis=(1, 2, 3))
    scale = np.float32(200 / sums.max())
    node = helper.make_node(
        "QLinearConv",
        ["x", "one", "zero", "w", "scales", "none", "one", "zero"],
        ["y"],
        domain="com.microsoft",
        channels_last=1,
    )
    constants = {
        "one": np.float32(1),
        "zero": np.uint8(0),
        "w": levels,
        "scales": np.full(32, scale),
        "none": np.zeros(32, np.int8),
    }
    graph = helper.make_graph(
        [node],
        "sums",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [1, 6, 6, 64])],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, [1, 4, 4, 32])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (made,) = session.run(None, {"x": pixels})
    expected = np.round(sums.astype(np.float32) * scale)
    np.testing.assert_array_equal(made[0, 1, 1], expected.astype(np.uint8))


@pytest.mark.parametrize("by_channel", [False, True])
def test_a_rounded_convolution_is_the_convolution(by_channel: bool) -> None:
    """By its definition: levels in, sums of whole numbers, levels out."""
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((4, 6, 1, 1)).astype(np.float32)
    bias = rng.standard_normal(4).astype(np.float32)
    values = rng.uniform(-0.5, 2.5, (6, 500)).astype(np.float32)
    steps = np.full(6, 0.03, np.float32) * (rng.uniform(0.8, 1.2, 6) if by_channel else 1)
    zeros = np.arange(100, 106) if by_channel else 100
    inputs = Range(
        np.asarray(steps if by_channel else steps[0], np.float32), np.asarray(zeros, np.uint8)
    )
    made = weight[:, :, 0, 0] @ values + bias[:, None]
    seen = Seen(made.min(1), made.max(1), made.mean(1))
    read = Seen(values.min(1), values.max(1), values.mean(1))
    outputs = convolution_ranges(read, seen, activated=False).outputs
    scaled = weight * steps[:, None, None] if by_channel else weight
    whole = integer_convolution(scaled, bias, inputs, outputs, read.mean)
    levels = np.clip(np.round(values / inputs.step.reshape(-1, 1)) + zeros_of(inputs), 0, 255)
    kept = np.round(scaled[:, :, 0, 0] / whole.steps[:, None])
    sums = kept @ (levels - int(whole.input_zero)) + whole.bias[:, None]
    out = np.clip(np.round(sums * whole.input_step * whole.factors[:, None]) + MIDDLE, 0, 255)
    # Levels are counted from the middle; the bias has moved them to the outputs' own zero.
    back = (out - outputs.zero[:, None]) * outputs.step[:, None]
    assert np.abs(back - made).max() <= 3 * outputs.step.max() + 0.1
    assert abs((back - made).mean()) < 0.02


def zeros_of(how: Range) -> np.ndarray:
    return how.zero.reshape(-1, 1).astype(np.float32)


def test_the_cpu_engine_takes_it(quantised: tuple[Bundle, list[str]]) -> None:
    engine = engine_of(quantised[0])
    assert isinstance(engine, OnnxRuntimeCpu)
    assert engine.manifest.graphs["decoder"].file == DECODER_GRAPH_FILE
    assert engine.manifest.graphs["step"].file == "step-cpu.onnx"
