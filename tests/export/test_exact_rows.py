"""Weights of few bits in bundles of wide precisions: fewer bytes, and nothing else differs."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from aim_export import bundle as export
from aim_export import export_bundle
from aim_export.cpu import add_step_graph
from aim_export.cuda.bundle import draft_plan
from aim_export.cuda.geometry import Geometry
from aim_export.cuda.precision import FORMATS
from aim_export.cuda.stored import StoredTensor, stored_tensors
from aim_export.cuda.weights import CONSTANTS_FILE, Constants, step_weights
from aim_export.decoder import add_decoder_graph
from aim_export.eight_bits import in_8_bits
from aim_export.onnx.graph import Precision
from aim_export.onnx.in_floats import in_floats
from aim_export.onnx.packed import exact_rows, nearest_rows
from aim_export.tensorrt import build
from aim_runtime import Bundle
from aim_runtime.bundle.manifest import GRAPHS
from aim_runtime.engines.cuda.plan import Weight
from aim_runtime.engines.onnxruntime.cpu import OnnxRuntimeCpu
from aim_runtime.engines.onnxruntime.decoder_graph import chosen_decoder
from aim_runtime.engines.onnxruntime.step_graph import chosen_step
from aim_training.checkpoint import save_checkpoint
from aim_training.config import ModelConfig, TokenizerConfig
from aim_training.fake_quantization import plain_model, plain_state, round_decoder, round_model
from aim_training.model import AiM
from aim_training.tokenizer import VQTokenizer

from ..runtime.playing import play

CONFIG = ModelConfig(
    vocab_size=64, num_classes=3, num_tokens=9, d_model=64, num_layers=2, d_state=16
)
TOKENIZER = TokenizerConfig(
    codebook_size=64,
    channels=32,
    channel_multipliers=(1, 1),
    z_channels=32,
    encoder_blocks=1,
    decoder_blocks=1,
)


def checkpoint(folder: Path, bits: int | None) -> Path:
    """Random weights; of so many bits, where that is given."""
    torch.manual_seed(0)
    model, tokenizer = AiM(CONFIG).initialise(), VQTokenizer(TOKENIZER)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adaLN" in name:  # it starts with every gate closed
                parameter.normal_(0.0, 0.5)
    if bits is not None:
        round_model(model, bits)
        round_decoder(tokenizer, bits)
    plain = VQTokenizer(TOKENIZER)
    plain.load_state_dict(plain_state(tokenizer))
    return save_checkpoint(folder / "model.safetensors", plain_model(model), plain)


@pytest.fixture(scope="module", params=["fp16", "fp32"])
def precision(request: pytest.FixtureRequest) -> Precision:
    found: Precision = request.param
    return found


@pytest.fixture(scope="module")
def on_grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("grid"), 4)


@pytest.fixture(scope="module")
def narrow(on_grid: Path, precision: Precision, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_bundle(on_grid, tmp_path_factory.mktemp("narrow") / "b", precision=precision)[0]


@pytest.fixture(scope="module")
def wide(on_grid: Path, precision: Precision, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same weights as other bundles hold theirs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "rows_as_they_are", lambda weights: {})
        return export_bundle(on_grid, tmp_path_factory.mktemp("wide") / "b", precision=precision)[0]


def tensors(bundle: Bundle, name: str) -> dict[str, TensorProto]:
    graph = onnx.load(bundle.path / f"{name}.onnx", load_external_data=False).graph
    return {tensor.name: tensor for tensor in graph.initializer}


def scores(bundle: Bundle, *, plain: bool, rows: int = 6) -> np.ndarray:
    engine = OnnxRuntimeCpu(bundle, 1, None if plain else chosen_step(bundle).step)
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, CONFIG.vocab_size, (6, CONFIG.num_tokens))
    return play(engine, np.array([0, 1, 2, 3, 3, 0])[:rows], tokens[:rows])


def pictures(bundle: Bundle, *, plain: bool) -> np.ndarray:
    engine = OnnxRuntimeCpu(bundle, 1, None, None if plain else chosen_decoder(bundle).decoder)
    return engine.decode(np.arange(2 * CONFIG.num_tokens).reshape(2, -1) % CONFIG.vocab_size)


# -- what is stored -------------------------------------------------------------------------------


def test_what_4_bits_hold_lies_in_4_bits(narrow: Bundle, wide: Bundle) -> None:
    step = tensors(narrow, "step")
    large = {n: t.data_type for n, t in step.items() if np.prod(t.dims) >= 4096}
    assert large.keys() == {
        "word_table/nibbles",
        *(f"layer_{i}.{part}_proj/nibbles" for i in range(2) for part in ("in", "out")),
    }
    assert set(large.values()) == {TensorProto.INT4}
    ours, theirs = (
        sum(bundle.manifest.files[f"{name}.weights"].size for name in GRAPHS)
        for bundle in (narrow, wide)
    )
    assert ours < {"fp32": 0.22, "fp16": 0.42}[narrow.manifest.precision] * theirs
    assert narrow.manifest.precision == wide.manifest.precision


def test_the_graphs_for_a_cpu_are_over_the_same_bytes(narrow: Bundle) -> None:
    for name in ("step", "decoder"):
        if f"{name}-cpu.onnx" not in narrow.manifest.files:
            continue
        plain, own = tensors(narrow, name), tensors(narrow, f"{name}-cpu")
        packed = [key for key in own if key.endswith("/nibbles")]
        assert packed
        assert all(own[key] == plain[key] for key in packed)


@pytest.mark.parametrize("bits", [5, 8])
def test_what_8_bits_hold_lies_in_8_bits(bits: int, tmp_path: Path) -> None:
    bundle, _ = export_bundle(checkpoint(tmp_path, bits), tmp_path / "b", precision="fp16")
    found = tensors(bundle, "step")
    assert found["layer_0.in_proj/int8"].data_type == TensorProto.INT8
    assert found["layer_0.in_proj/scale"].data_type == TensorProto.FLOAT


def test_other_weights_lie_as_they_did(tmp_path: Path) -> None:
    bundle, _ = export_bundle(checkpoint(tmp_path, None), tmp_path / "b", precision="fp16")
    found = tensors(bundle, "step")
    assert found["layer_0.in_proj/half"].data_type == TensorProto.FLOAT16
    assert not [name for name in found if name.endswith(("/int8", "/nibbles", "/scale"))]


def test_a_row_that_is_not_whole_keeps_the_matrix_as_it_is() -> None:
    whole = np.random.default_rng(0).integers(-7, 8, (5, 64)).astype(np.float32)
    found = exact_rows(whole * np.float32(0.25))
    assert found is not None
    assert np.array_equal(found.weight(), whole * np.float32(0.25))
    whole[3, 7] += np.float32(1e-5)  # so near that the nearest whole numbers would do
    assert np.abs(nearest_rows(whole).values).max() <= 7
    assert exact_rows(whole) is None


# -- what is computed -----------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("plain", [True, False])
def test_scores_are_the_same_to_the_last_bit(
    narrow: Bundle, wide: Bundle, plain: bool, rows: int
) -> None:
    found, wanted = (scores(bundle, plain=plain, rows=rows) for bundle in (narrow, wide))
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("plain", [True, False])
def test_pictures_are_the_same_to_the_last_bit(narrow: Bundle, wide: Bundle, plain: bool) -> None:
    np.testing.assert_array_equal(pictures(narrow, plain=plain), pictures(wide, plain=plain))


# -- what is made of it ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRAPHS)
def test_its_graphs_can_be_had_as_they_were_lowered(
    narrow: Bundle, wide: Bundle, name: str
) -> None:
    ours, theirs = in_floats(narrow, name).graph, in_floats(wide, name).graph
    assert [node.name for node in ours.node] == [node.name for node in theirs.node]
    values = [
        {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        for graph in (ours, theirs)
    ]
    assert values[0].keys() == values[1].keys()
    for key, value in values[0].items():
        assert value.dtype == values[1][key].dtype
        np.testing.assert_array_equal(value, values[1][key])


def test_8_bits_are_made_of_it_as_of_the_wide_one(
    narrow: Bundle, wide: Bundle, tmp_path: Path
) -> None:
    ours, theirs = (in_8_bits(b, tmp_path / str(i))[0] for i, b in enumerate((narrow, wide)))
    assert tensors(ours, "step")["layer_0.in_proj/nibbles"].data_type == TensorProto.INT4
    for name in ("step.weights", "decoder.weights", "prologue.weights"):
        sizes = [bundle.manifest.files[name].size for bundle in (ours, theirs, narrow)]
        assert sizes[0] == sizes[1] <= 1.01 * sizes[2]
    np.testing.assert_array_equal(scores(ours, plain=False), scores(theirs, plain=False))


def test_the_graphs_for_a_cpu_can_be_made_again(narrow: Bundle, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(narrow.path, copy)
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    add_step_graph(copy)
    add_decoder_graph(copy, in_8_bits=False)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


def numbers(bundle: Bundle, weight: Weight, constants: bytes) -> np.ndarray:
    """What a plan's weight is loaded from, flat."""
    rows = []
    width = int(np.prod(weight.tensor.shape)) // sum(part.rows for part in weight.parts)
    for part in weight.parts:
        data = constants if part.file == CONSTANTS_FILE else bundle.read(part.file)
        rows.append(np.frombuffer(data, weight.stored, part.rows * width, part.offset))
    return np.concatenate(rows)


def test_kernels_for_cuda_read_the_same_numbers(narrow: Bundle, wide: Bundle) -> None:
    """What lies in 4 bits is among the plan's constants, in half precision."""
    found = []
    for bundle in (narrow, wide):
        constants = Constants()
        plan = draft_plan(bundle, "fp16", constants, capabilities=[90])
        found.append((bundle, plan.weights, constants.to_bytes()))
    (ours, our_weights, our_constants), (theirs, their_weights, their_constants) = found
    assert our_weights.keys() == their_weights.keys()
    for name, weight in our_weights.items():
        if weight.parts:
            np.testing.assert_array_equal(
                numbers(ours, weight, our_constants),
                numbers(theirs, their_weights[name], their_constants),
            )
    assert our_weights["in_proj"].stored == "float16"
    assert [part.file for part in our_weights["in_proj"].parts] == [CONSTANTS_FILE]


@pytest.mark.parametrize("all_layers", [True, False])
def test_8_bits_on_a_gpu_are_what_4_bits_are(narrow: Bundle, all_layers: bool) -> None:
    """To the last bit; a layer that does not lie in few bits does not lose the others' theirs."""
    stored = {graph: dict(stored_tensors(narrow, graph)) for graph in ("prologue", "step")}
    if not all_layers:
        part = stored["step"]["layer_0.in_proj"]
        stored["step"]["layer_0.in_proj"] = StoredTensor(part.values, None)
    geometry = Geometry.of(narrow.manifest.model, stored)
    constants = Constants()
    found = step_weights(geometry, stored, FORMATS["int8"], constants)
    layers = range(CONFIG.num_layers)
    parts = {name: [f"layer_{i}.{name}" for i in layers] for name in ("in_proj", "out_proj")}
    for name, names in (parts | {"word_table": ["word_table"]}).items():
        weight, scales = found[name], found[f"{name}_scales"]
        assert weight.stored == weight.tensor.dtype == "int8"
        assert weight.scales is None
        values = numbers(narrow, weight, constants.to_bytes()).reshape(weight.tensor.shape)
        factors = numbers(narrow, scales, constants.to_bytes())
        wanted = [stored["step"][part].values for part in names]
        np.testing.assert_array_equal(values * factors[:, None], np.concatenate(wanted))


@pytest.mark.parametrize("name", GRAPHS)
def test_tensorrt_gets_the_same_numbers(
    narrow: Bundle, wide: Bundle, name: str, tmp_path: Path
) -> None:
    """TensorRT takes 4 bits in blocks only, and makes float16 of no scales of rows."""
    written = []
    for index, bundle in enumerate((narrow, wide)):
        folder = tmp_path / str(index)
        folder.mkdir()
        model = onnx.load(build._write_graph(bundle, name, folder))
        assert {o.version for o in model.opset_import if not o.domain} == {20}
        written.append({t.name: numpy_helper.to_array(t) for t in model.graph.initializer})
    assert written[0].keys() == written[1].keys()
    for key, value in written[0].items():
        np.testing.assert_array_equal(value, written[1][key])


def test_values_come_as_they_were(narrow: Bundle, wide: Bundle) -> None:
    for name in GRAPHS:
        ours, theirs = stored_tensors(narrow, name), stored_tensors(wide, name)
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            np.testing.assert_array_equal(tensor.values, theirs[key].values)
            assert tensor.rows is None or tensor.dtype == "float16"
