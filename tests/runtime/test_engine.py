"""What every backend must do, the same tests for each that can run here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from aim_runtime import BackendError, Bundle, BundleError, available_backends
from aim_runtime.engine import Engine, load_engine
from aim_runtime.engines.onnxruntime_cpu import usable_cores

from .tiny_bundle import CLASSES, PATCH, SIDE, TOKENS, VOCAB, copy_bundle

# Backends may round differently; tiny scores are of order 1.
TOLERANCE = {"cpu": 1e-5}
BACKENDS = [status.name for status in available_backends() if status.available]


@pytest.fixture(scope="module", params=BACKENDS)
def engine(request: pytest.FixtureRequest, tiny: Path) -> Engine:
    return load_engine(Bundle.open(tiny), backend=request.param, threads=2)


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def play(engine: Engine, classes: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Teacher-forced scores (rows, T, V) of `tokens` (rows, T) for rows of `classes`."""
    out = []
    with engine.start(len(classes), engine.prologue(classes)) as rows:
        for step in range(tokens.shape[1]):
            token = tokens[:, step - 1] if step else np.zeros_like(classes)
            out.append(rows.step(token, np.full_like(classes, step)).copy())
    return np.stack(out, axis=1)


@pytest.fixture(scope="module")
def forced() -> np.ndarray:
    return np.random.default_rng(3).integers(0, VOCAB, (5, TOKENS))


CLASS_OF_ROW = ids(0, 1, 2, CLASSES, 0)


class TestEngineContract:
    def test_the_whole_sequence_is_what_the_onnx_reference_computes(
        self, engine: Engine, tiny: Path, forced: np.ndarray
    ) -> None:
        """State carried through all steps, in fresh arrays each time, by another evaluator."""
        graphs = {
            name: ReferenceEvaluator(onnx.load(tiny / f"{name}.onnx"))
            for name in ("prologue", "step")
        }
        manifest = engine.manifest
        feeds = dict(
            zip(
                [spec.name for spec in manifest.conditioning],
                graphs["prologue"].run(None, {"class_id": CLASS_OF_ROW}),
                strict=True,
            )
        )
        for pair in manifest.state:
            spec = manifest.graphs["step"].input(pair.input)
            feeds[pair.input] = np.full(spec.concrete_shape(5), 9, np.float32)  # must not matter
        expected = []
        names = ["logits", *(pair.output for pair in manifest.state)]
        for step in range(TOKENS):
            feeds["token"] = forced[:, step - 1] if step else ids(0, 0, 0, 0, 0)
            feeds["position"] = np.full(5, step, np.int64)
            logits, *states = graphs["step"].run(names, feeds)
            expected.append(logits)
            feeds |= {pair.input: s for pair, s in zip(manifest.state, states, strict=True)}
        np.testing.assert_allclose(
            play(engine, CLASS_OF_ROW, forced),
            np.stack(expected, axis=1),
            atol=TOLERANCE[engine.backend],
        )

    def test_scores_depend_on_class_token_and_all_that_was_before(
        self, engine: Engine, forced: np.ndarray
    ) -> None:
        base = play(engine, ids(0), forced[:1])
        other_class = play(engine, ids(1), forced[:1])
        assert not np.allclose(base[:, 0], other_class[:, 0])
        changed = forced[:1].copy()
        changed[0, 2] = (changed[0, 2] + 1) % VOCAB
        later = play(engine, ids(0), changed)
        assert np.array_equal(base[:, :3], later[:, :3])
        for step in range(3, TOKENS):
            assert not np.array_equal(base[:, step], later[:, step])

    def test_rows_do_not_see_each_other(self, engine: Engine, forced: np.ndarray) -> None:
        together = play(engine, CLASS_OF_ROW, forced)
        for row in range(5):
            alone = play(engine, CLASS_OF_ROW[row : row + 1], forced[row : row + 1])
            np.testing.assert_allclose(
                together[row : row + 1], alone, atol=TOLERANCE[engine.backend]
            )

    def test_position_0_restarts_a_row_and_leaves_the_others(
        self, engine: Engine, forced: np.ndarray
    ) -> None:
        classes = ids(0, 1)
        expected = play(engine, classes, forced[:2])
        with engine.start(2, engine.prologue(classes)) as rows:
            for step in range(4):  # row 1 plays another image's tokens first
                token = ids(forced[0, step - 1] if step else 0, forced[4, step])
                rows.step(token, ids(step, step + 3))
            found = []
            for step in range(4, TOKENS):
                other = step - 4
                token = ids(forced[0, step - 1], forced[1, other - 1] if other else 11)
                found.append(rows.step(token, ids(step, other)).copy())
        tolerance = TOLERANCE[engine.backend]
        np.testing.assert_allclose([row[0] for row in found], expected[0, 4:], atol=tolerance)
        np.testing.assert_allclose([row[1] for row in found], expected[1, :5], atol=tolerance)

    def test_requests_taking_turns_do_not_disturb_each_other(
        self, engine: Engine, forced: np.ndarray
    ) -> None:
        expected = play(engine, ids(2), forced[1:2])
        with (
            engine.start(1, engine.prologue(ids(2))) as mine,
            engine.start(3, engine.prologue(ids(0, 1, 0))) as other,
        ):
            for step in range(TOKENS):
                token = forced[1:2, step - 1] if step else ids(0)
                scores = mine.step(token, ids(step))
                other.step(forced[2:, step], np.full(3, step, np.int64))
                assert np.array_equal(scores, expected[:, step])

    def test_decode(self, engine: Engine, forced: np.ndarray) -> None:
        images = engine.decode(forced)
        assert images.dtype == np.uint8
        assert images.shape == (5, SIDE * PATCH, SIDE * PATCH, 3)
        assert np.array_equal(images[3:4], engine.decode(forced[3:4]))
        changed = forced.copy()
        changed[0, 8] = (changed[0, 8] + 1) % VOCAB
        differs = (engine.decode(changed) != images).any(axis=3)
        assert differs[0, 4:, 4:].all()
        assert differs.sum() == PATCH * PATCH

    def test_bad_arguments_are_named(self, engine: Engine, forced: np.ndarray) -> None:
        with pytest.raises(ValueError, match="class_ids has values from 0 to 4"):
            engine.prologue(ids(0, CLASSES + 1))
        with pytest.raises(ValueError, match="class_ids is float64"):
            engine.prologue(np.zeros(2))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="tokens is int64 of shape"):
            engine.decode(forced[:, :4])
        with pytest.raises(ValueError, match="tokens has values"):
            engine.decode(np.full((1, TOKENS), VOCAB))
        with engine.start(2, engine.prologue(ids(0, 1))) as rows:
            with pytest.raises(ValueError, match="token is int64 of shape"):
                rows.step(ids(0), ids(0, 0))
            with pytest.raises(ValueError, match="token has values from -1"):
                rows.step(ids(-1, 0), ids(0, 0))
            with pytest.raises(ValueError, match="position has values"):
                rows.step(ids(0, 0), ids(0, TOKENS))


def test_auto_picks_one_and_says_which(tiny: Path) -> None:
    assert load_engine(Bundle.open(tiny)).backend == BACKENDS[0]


def test_unknown_backend_and_device(tiny: Path) -> None:
    bundle = Bundle.open(tiny)
    with pytest.raises(BackendError, match="'warp'; it may be 'auto', 'cpu'"):
        load_engine(bundle, backend="warp")
    with pytest.raises(BackendError, match="device is 'cuda:0'"):
        load_engine(bundle, backend="cpu", device="cuda:0")


def test_a_backend_that_cannot_run_says_why(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "aim_runtime.engines.onnxruntime_cpu.unavailable_reason",
        lambda bundle: "it is not installed",
    )
    (status,) = available_backends()
    assert (status.name, status.available, status.reason) == ("cpu", False, "it is not installed")
    for backend in ("cpu", "auto"):
        with pytest.raises(BackendError, match="it is not installed"):
            load_engine(Bundle.open(tiny), backend=backend)


def test_usable_cores_is_a_count() -> None:
    assert usable_cores() >= 1


def test_a_model_that_was_loaded_no_longer_needs_its_files(
    tiny: Path, tmp_path: Path, forced: np.ndarray
) -> None:
    """Weights are mapped while loading; a file changed later must not change the images."""
    copy = copy_bundle(tiny, tmp_path / "bundle")
    loaded = load_engine(Bundle.open(copy))
    expected = play(loaded, CLASS_OF_ROW, forced)
    for file in copy.iterdir():
        with file.open("r+b") as target:
            target.write(bytes(file.stat().st_size))
    assert np.array_equal(play(loaded, CLASS_OF_ROW, forced), expected)
    with pytest.raises(BundleError):
        Bundle.open(copy)
