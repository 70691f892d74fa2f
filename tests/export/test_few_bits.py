"""Weights of 8 and 4 bits: what is stored, what each backend makes of it, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from aim_export import ExportError, ParityReport, agreement, export_bundle, quantization
from aim_export.cpu import add_step_graph
from aim_export.cuda.bundle import compile_engines
from aim_export.onnx.graph import Precision
from aim_export.onnx.packed import held_in_4_bits, int8_matrix
from aim_export.wide import check_wide
from aim_runtime import BackendError, Bundle, SamplingOptions
from aim_runtime.engines.backends import load_engine
from aim_runtime.engines.onnxruntime import description
from aim_runtime.engines.onnxruntime.cpu import OnnxRuntimeCpu
from aim_runtime.engines.onnxruntime.slots import OnnxRuntimeSlots
from aim_runtime.engines.onnxruntime.step_graph import GRAPH_FILE, chosen_step
from aim_runtime.noise import uniforms
from aim_training.config import ModelConfig

from ..runtime.playing import play
from .small_checkpoint import save_small

# Widths in which such blocks fit; of 256 they are three, and two zero points are a byte.
WIDTHS = {128: 256, 256: 768}


SOURCES = ["int8", "int8 in blocks of 128", "int4", "int4 in blocks of 256"]


@pytest.fixture(scope="module", params=SOURCES)
def source(
    request: pytest.FixtureRequest, small: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Precision, int]:
    """A checkpoint, the precision to store it in, and the blocks of `MatMulNBits`; 0: none."""
    precision, _, block = request.param.partition(" in blocks of ")
    if not block:
        return small, precision, 64 if precision == "int4" else 0
    path = tmp_path_factory.mktemp("wide") / "wide.safetensors"
    config = ModelConfig(
        vocab_size=32,
        num_classes=3,
        num_tokens=9,
        d_model=WIDTHS[int(block)],
        num_layers=2,
        d_state=16,
    )
    return save_small(path, config, ["cat", "dog", "red panda"]), precision, int(block)


@pytest.fixture(scope="module")
def few_bits(
    source: tuple[Path, Precision, int], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Bundle, ParityReport]:
    checkpoint, precision, block = source
    with pytest.MonkeyPatch.context() as patch:
        if not block:
            patch.setattr(quantization, "_SHARE", 0.0)
        out = tmp_path_factory.mktemp("few") / "out"
        return export_bundle(checkpoint, out, precision=precision)


def test_blocks_are_as_large_as_fit(
    source: tuple[Path, Precision, int], few_bits: tuple[Bundle, ParityReport]
) -> None:
    bundle, _ = few_bits
    graph = onnx.load(bundle.path / GRAPH_FILE, load_external_data=False).graph
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    blocks = [a.i for node in products for a in node.attribute if a.name == "block_size"]
    heads = {256: 128}  # 4 bits are too few for the head of the widest, so what it multiplies has 8
    assert blocks == ([*[source[2]] * 4, heads.get(source[2], source[2])] if source[2] else [])


def test_a_matrix_of_8_bits_is_the_nearest_there_is() -> None:
    weight = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    weight[3] = 0
    found = int8_matrix(weight)
    assert (found.values.shape, found.scale.shape) == ((64, 5), (5,))
    assert np.abs(found.values).max() == 127
    assert (np.abs(found.matrix() - weight) <= found.scale[:, None] / 2 * 1.0001).all()
    assert not found.matrix()[3].any()


@pytest.mark.parametrize("most", [1, 3, 7, 15, 63])
def test_rows_of_few_steps_are_held_as_they_are(most: int) -> None:
    """As `--weight-bits` leaves them; some rows need not reach the largest number."""
    generator = np.random.default_rng(most)
    whole = generator.integers(-most, most + 1, (6, 64))
    whole[5] = 0
    step = np.float32(2.0) ** -9 * generator.integers(1 << 4, 1 << 5, 6).astype(np.float32)
    weight = (whole * step[:, None]).astype(np.float32)
    found = int8_matrix(weight)
    assert np.array_equal(found.matrix(), weight)
    assert np.abs(found.values).max() <= most
    narrow = held_in_4_bits(weight, 32)
    if most > 7:
        assert narrow is None
    else:
        assert narrow is not None
        assert np.array_equal(narrow.matrix(), weight)


def test_a_row_that_few_steps_do_not_hold_takes_all() -> None:
    weight = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    assert held_in_4_bits(weight, 32) is None
    weight[2] = np.rint(weight[2] * 3) / 4
    assert (np.abs(int8_matrix(weight).values).max(axis=0) == 127).tolist() == [
        row != 2 for row in range(5)
    ]


def test_it_is_near_enough_and_says_how_near(few_bits: tuple[Bundle, ParityReport]) -> None:
    bundle, parity = few_bits
    assert parity.precision == bundle.manifest.precision
    assert parity.step_graphs == ("plain", "cpu")
    assert 0 < parity.divergence <= agreement.TOLERANCES[parity.precision].divergence
    recorded = bundle.manifest.provenance["parity"]
    assert recorded["divergence"] == parity.divergence
    assert recorded["best_token_agreement"] == parity.best_token_agreement


def test_no_matrix_of_the_step_is_stored_twice(
    few_bits: tuple[Bundle, ParityReport], source: tuple[Path, Precision, int], tmp_path: Path
) -> None:
    bundle, _ = few_bits
    plain, own = (
        onnx.load(bundle.path / name, load_external_data=False)
        for name in ("step.onnx", GRAPH_FILE)
    )
    places = [
        {tuple((e.key, e.value) for e in t.external_data) for t in m.graph.initializer} - {()}
        for m in (plain, own)
    ]
    assert places[1] <= places[0]
    half, _ = export_bundle(source[0], tmp_path / "half", precision="fp16")
    sizes = [b.manifest.files["step.weights"].size for b in (half, bundle)]
    assert sizes[1] < 0.62 * sizes[0]


def test_kernels_of_the_decoder_have_8_bits(few_bits: tuple[Bundle, ParityReport]) -> None:
    bundle, parity = few_bits
    graph = onnx.load(bundle.path / "decoder.onnx", load_external_data=False).graph
    large = {t.name: t.data_type for t in graph.initializer if np.prod(t.dims) >= 4096}
    kernels = {name: kind for name, kind in large.items() if ".conv" in name}
    assert kernels
    assert set(kernels.values()) == {onnx.TensorProto.INT8}
    assert parity.psnr_db >= 40


def test_the_manifest_says_so_in_a_format_that_older_runtimes_refuse(
    few_bits: tuple[Bundle, ParityReport],
) -> None:
    bundle, _ = few_bits
    text = (bundle.path / "manifest.json").read_text(encoding="utf-8")
    assert '"format_version": 3' in text
    assert Bundle.open(bundle.path).manifest == bundle.manifest


def test_the_cpu_computes_in_it_and_nothing_else(few_bits: tuple[Bundle, ParityReport]) -> None:
    bundle, _ = few_bits
    precision = bundle.manifest.precision
    for asked in ("auto", precision):
        assert load_engine(bundle, backend="cpu", precision=asked).precision == precision
    with pytest.raises(BackendError, match=f"computes this bundle in '{precision}' only"):
        load_engine(bundle, backend="cpu", precision="fp32")


def test_an_older_onnxruntime_takes_the_plain_graph(
    few_bits: tuple[Bundle, ParityReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, _ = few_bits
    monkeypatch.setattr(description, "installed_version", lambda: "1.24.1")
    choice = chosen_step(bundle)
    assert choice.step is None
    assert "onnxruntime 1.24.1 lacks operators" in choice.reason
    engine = load_engine(bundle, backend="cpu")
    names = [spec.name for spec in engine.manifest.graphs["step"].inputs]
    assert engine.manifest.graphs["step"].file == "step.onnx"
    assert "ssm_state_0" in names
    assert engine.precision == bundle.manifest.precision


def test_rows_do_not_depend_on_neighbours_or_threads(
    source: tuple[Path, Precision, int], few_bits: tuple[Bundle, ParityReport]
) -> None:
    """To the last bit; `MatMulNBits` has another kernel for a last row by itself."""
    bundle, _ = few_bits
    odd = () if source[2] else (1, 3, 33)
    model = bundle.manifest.model
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, model.vocab_size, (64, 4))
    classes = rng.integers(0, model.num_classes + 1, 64)
    step = chosen_step(bundle).step
    assert step is not None
    expected = play(OnnxRuntimeCpu(bundle, 1, step), classes, tokens)
    for threads in (1, 2):
        engine = OnnxRuntimeCpu(bundle, threads, step)
        for rows in (*odd, 2, 10, 64):
            found = play(engine, classes[:rows], tokens[:rows])
            np.testing.assert_array_equal(found, expected[:rows])


def test_an_image_s_scores_do_not_depend_on_how_many_there_are(
    few_bits: tuple[Bundle, ParityReport],
) -> None:
    """To the last bit, from a single row on, and wherever among the others it is."""
    bundle, _ = few_bits
    engine = OnnxRuntimeCpu(bundle, 2, chosen_step(bundle).step)
    noise = uniforms(range(3), bundle.manifest.model.num_tokens)
    unguided, guided = SamplingOptions(cfg_scale=1.0), SamplingOptions(cfg_scale=2.0)

    def scores(before: int, behind: int) -> list[bytes]:
        with engine.slots(1 + 2 * (before + behind)) as slots:
            assert isinstance(slots, OnnxRuntimeSlots)
            for index in range(before):
                slots.begin(index, noise[1 + index], guided)
            slots.begin(0, noise[0], unguided)
            for index in range(behind):
                slots.begin(index, noise[1 + index], guided)
            seen = []
            while slots.step():
                seen.append(slots._logits[2 * before].tobytes())
        return seen

    alone = scores(0, 0)
    assert len(alone) == len(noise[0])
    assert alone == scores(1, 0) == scores(0, 1) == scores(2, 0) == scores(1, 1)


def test_the_graph_for_the_cpu_can_be_made_again(
    few_bits: tuple[Bundle, ParityReport], tmp_path: Path
) -> None:
    import shutil

    bundle, _ = few_bits
    copy = tmp_path / "copy"
    shutil.copytree(bundle.path, copy)
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    add_step_graph(copy)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


def test_nothing_for_gpus_is_made_of_it(
    few_bits: tuple[Bundle, ParityReport], tmp_path: Path
) -> None:
    bundle, _ = few_bits
    with pytest.raises(ExportError, match="for CPUs; CUDA kernels are made of a bundle"):
        compile_engines(bundle, tmp_path)
    with pytest.raises(ExportError, match="--precision fp32 or fp16"):
        check_wide(bundle, "TensorRT engines")


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_what_differs_too_much_is_not_written(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    from dataclasses import replace

    limit = replace(agreement.TOLERANCES[precision], divergence=1e-12)
    monkeypatch.setitem(agreement.TOLERANCES, precision, limit)
    with pytest.raises(ExportError, match=r"nothing was written: divergence is .*, at most 1e-12"):
        export_bundle(small, tmp_path / "out", precision=precision)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
