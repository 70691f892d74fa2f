"""The CUDA engine on a simulated GPU that interprets the real kernels, against the CPU engine."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aim_export import ExportError, export_bundle
from aim_runtime import Bundle, Generator, SamplingOptions
from aim_runtime.engines.backends import load_engine
from aim_runtime.engines.base import Engine
from aim_runtime.engines.cuda.plan import DecoderBucket, Setup, Tensor
from aim_runtime.noise import uniforms
from tests.runtime.playing import play

from .conftest import ADALN, GROUP, Exported
from .interpreter import Interpreter, binaries, interpreter_process

pytest.importorskip("triton", reason="Triton, which the kernels are written in, is not installed")

from aim_export.cuda import bundle as engines
from aim_export.cuda.decoder import DecoderPart, lower_decoder
from aim_export.cuda.tuning import ScanCut, Tile, Tuning

# The largest error of a row's scores at a step, relative to their norm. Each is a few times what
# the format costs these models: 5e-7, 7e-4 in half precision, 5e-3 with bytes.
TOLERANCE = {"fp32": 2e-6, "fp16": 3e-3, "fp16-state16": 5e-3, "fp16-state8": 5e-3, "int8": 1e-2}
CHUNK, STEPS = 4, 7


def coarse(rows: int) -> Tuning:
    """Few programs, each of which costs the interpreter ten milliseconds.

    Most cost those of 16 rows, which are the tensor cores': they get shorter chunks.
    """
    narrow, wide = Tile(rows=rows, outputs=128), Tile(rows=rows, outputs=256)
    scan = dict.fromkeys(("float32", "float16", "int8"), ScanCut(heads=4))
    return Tuning(wide, narrow, wide, CHUNK if rows < 16 else CHUNK // 2, scan)


@dataclass(frozen=True)
class Reference:
    """A golden bundle, and what the CPU engine makes of it."""

    bundle: Bundle
    cpu: Engine
    classes: np.ndarray
    tokens: np.ndarray
    scores: np.ndarray

    def with_kernels(
        self,
        folder: Path,
        precision: str,
        rows: int,
        *,
        decoder: bool = False,
        tuning: Tuning | None = None,
    ) -> Path:
        """A copy of the bundle with kernels for the interpreter, for batches of ``rows`` rows.

        Without ``decoder`` its pictures are empty: what a decoder needs takes long to prepare.
        """
        out, model = folder / "bundle", self.bundle.manifest.model
        shutil.copytree(self.bundle.path, out)

        def lower(*arguments: Any, **_capabilities: Any) -> DecoderPart:
            if decoder:  # what every GPU runs: the interpreter has no copy engine
                return lower_decoder(*arguments, images=(1,), capabilities=())
            buffers = {
                "tokens": Tensor("int64", (1, model.num_tokens)),
                "image": Tensor("uint8", (1, model.image_height, model.image_width, 3)),
            }
            return DecoderPart({}, {}, Setup(), (DecoderBucket(1, buffers, ()),))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engines, "TUNING", {rows: tuning or coarse(rows)})
            patch.setattr(engines, "lower_decoder", lower)
            patch.setattr(engines, "compile_kernels", binaries)
            engines.add_engines(out, precisions=[precision], capabilities=[90])
        return out


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with interpreter_process() as process:
        yield process


@pytest.fixture(scope="module")
def references(exports: Callable[[str], Exported]) -> Callable[[str], Reference]:
    """The reference of a golden model's name."""

    return cache(lambda name: reference(exports(name).bundle))


def reference(bundle: Bundle) -> Reference:
    cpu, model = load_engine(bundle, backend="cpu", threads=2), bundle.manifest.model
    rng = np.random.default_rng(4)
    classes = rng.integers(0, model.num_classes + 1, 16)
    tokens = rng.integers(0, model.vocab_size, (16, STEPS))
    return Reference(bundle, cpu, classes, tokens, play(cpu, classes, tokens))


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest error of a row at a step."""
    assert found.shape == wanted.shape
    apart = np.linalg.norm(found - wanted, axis=-1)
    return float((apart / np.linalg.norm(wanted, axis=-1)).max())


# -- scores ---------------------------------------------------------------------------------------

# Every form of every product, and both models in full precision; each costs seconds.
CASES = [
    (ADALN, "fp32", 2),
    (ADALN, "fp32", 16),
    (ADALN, "fp16-state16", 16),
    (ADALN, "fp16-state8", 2),
    (ADALN, "int8", 2),
    (GROUP, "fp32", 2),
    (GROUP, "fp16", 1),
]


@pytest.mark.parametrize(("name", "precision", "rows"), CASES)
def test_scores(
    interpreter: Interpreter,
    references: Callable[[str], Reference],
    name: str,
    precision: str,
    rows: int,
    tmp_path: Path,
) -> None:
    """Past the end of a chunk, and for few rows more than once around the convolution's ring."""
    golden = references(name)
    bundle = golden.with_kernels(tmp_path, precision, rows)
    steps = STEPS if rows < 16 else CHUNK
    classes, tokens = golden.classes[:rows], golden.tokens[:rows, :steps]
    found = interpreter.play(bundle, precision, classes, tokens)
    assert error(found, golden.scores[:rows, :steps]) <= TOLERANCE[precision]


def test_layers_of_two_heads(interpreter: Interpreter, small: Path, tmp_path: Path) -> None:
    """The second layer's numbers of each head begin where a pointer may, past the first's two."""
    made, _ = export_bundle(small, tmp_path / "small")
    found = reference(made)
    tile = Tile(rows=2, outputs=32)
    tuning = dataclasses.replace(coarse(2), in_proj=tile, out_proj=tile)
    bundle = found.with_kernels(tmp_path, "fp32", 2, tuning=tuning)
    scores = interpreter.play(bundle, "fp32", found.classes[:2], found.tokens[:2])
    assert error(scores, found.scores[:2]) <= TOLERANCE["fp32"]


def test_states_of_bytes_want_columns_for_a_product(small: Path, tmp_path: Path) -> None:
    made, _ = export_bundle(small, tmp_path / "small")
    model = dataclasses.replace(made.manifest.model, d_state=16)
    engines._check_sizes(model, "fp16-state16")
    with pytest.raises(ExportError, match=r"fp16-state8 want a power of two from 32 for d_state"):
        engines._check_sizes(model, "fp16-state8")


def test_int8_wants_four_heads(small: Path, tmp_path: Path) -> None:
    made, _ = export_bundle(small, tmp_path / "small")
    with pytest.raises(ExportError, match=r"int8 want a multiple of 4 heads .*, not 2"):
        engines.add_engines(made.path, precisions=["int8"], capabilities=[90])
    assert made.path.joinpath("manifest.json").exists()
    assert not made.path.joinpath("engines").exists()


def test_rows_at_different_positions(
    interpreter: Interpreter, references: Callable[[str], Reference], tmp_path: Path
) -> None:
    """One row plays something else first, and begins anew while the other is in its chunk."""
    golden = references(ADALN)
    bundle = golden.with_kernels(tmp_path, "fp32", 2)
    classes, tokens, late = golden.classes[:2], golden.tokens[:2], 2
    feeds = []
    for step in range(STEPS):
        other = step - late if step >= late else step
        previous = tokens[1, other - 1] if step >= late else 11
        feeds.append((np.array([tokens[0, step - 1], previous]), np.array([step, other])))
    found = interpreter.take_turns(bundle, "fp32", classes, feeds)
    wanted = golden.scores
    assert error(found[:, 0], wanted[0]) <= TOLERANCE["fp32"]
    assert error(found[late:, 1], wanted[1, : STEPS - late]) <= TOLERANCE["fp32"]


# -- tokens and pictures --------------------------------------------------------------------------


def test_draws(
    interpreter: Interpreter, references: Callable[[str], Reference], tmp_path: Path
) -> None:
    """The first tokens of two images without guidance."""
    golden = references(ADALN)
    bundle = golden.with_kernels(tmp_path, "fp32", 2)
    options = SamplingOptions(temperature=0.9, top_p=0.95)
    classes = np.array([3, 1])
    noise = uniforms(range(2), golden.bundle.manifest.model.num_tokens)
    found = interpreter.draw(bundle, "fp32", classes, noise, options)
    wanted = np.concatenate(list(golden.cpu.draw(classes, noise, options)), axis=1)
    assert found.shape[1] > CHUNK
    assert np.array_equal(found, wanted[:, : found.shape[1]])


def test_images_that_join(
    interpreter: Interpreter, references: Callable[[str], Reference], tmp_path: Path
) -> None:
    """One row beside two, and one image in the middle of a chunk when others begin theirs."""
    golden = references(ADALN)
    bundle = golden.with_kernels(tmp_path, "fp32", 4)
    noise = uniforms(range(3), golden.bundle.manifest.model.num_tokens)
    guided = SamplingOptions(cfg_scale=2.5, top_k=60)
    alone = SamplingOptions(temperature=0.9, top_p=0.95)
    images = [(3, noise[0], guided), (1, noise[1], alone), (0, noise[2], SamplingOptions())]
    calls = [[images[0]], images[1:], [], []]
    found = interpreter.visit(bundle, "fp32", 4, 1, calls)
    assert [len(tokens) for tokens in found] == [4, 2, 2]
    for tokens, (class_id, row, options) in zip(found, images, strict=True):
        wanted = golden.cpu.draw(np.array([class_id]), row[None], options)
        assert tokens == np.concatenate(list(wanted), axis=1)[0, : len(tokens)].tolist()


@pytest.mark.slow
def test_generate(
    interpreter: Interpreter, references: Callable[[str], Reference], tmp_path: Path
) -> None:
    """All of it: weights loaded, a graph captured, every token drawn, the picture decoded."""
    golden = references(ADALN)
    bundle = golden.with_kernels(tmp_path, "fp32", 2, decoder=True)
    options = {"classes": [2], "seed": 8, "cfg_scale": 2.5, "top_k": 60}
    tokens, pixels = interpreter.generate(bundle, "fp32", **options)
    with Generator.load(golden.bundle.path, backend="cpu") as generator:
        wanted = generator.generate(**options)  # type: ignore[arg-type]
    assert np.array_equal(tokens, wanted.tokens)
    assert np.abs(pixels.astype(int) - wanted.array).max() <= 1
