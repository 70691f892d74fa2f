"""Whole pictures by the browser's engine, in Node: tokens are those that Python draws."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aim_runtime import Bundle, Generator, Result
from aim_runtime.result import UNDECIDED_GRAY

from ..runtime.tiny_bundle import PATCH, SIDE, TOKENS, write_tiny_bundle
from . import engine_parts
from .engine_parts import Site, in_node, installed, needs_node, served

pytestmark = needs_node


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, npm: Path) -> Iterator[Site]:
    with served({"npm": installed(tmp_path_factory.mktemp("engine"), npm)}) as site:
        yield site


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "tiny")


def runtime_of(site: Site) -> dict[str, str]:
    runtime = site.runtime()
    for kind in ("module", "loader"):  # Node imports no modules over HTTP
        runtime[kind] = runtime[kind].replace(f"{site.url}/npm", str(site.folders["npm"]))
    return runtime


def drawn(site: Site, bundle: Path, *orders: dict[str, Any], without: Sequence[str] = ()) -> Any:
    files = {name: url for name, url in site.bundle(bundle).items() if name not in without}
    return in_node("draw", files=files, runtime=runtime_of(site), orders=orders)


def tokens_of(drawing: Any) -> np.ndarray:
    return np.array([picture["tokens"] for picture in drawing["pictures"]])


def pixels_of(picture: Any, height: int, width: int) -> np.ndarray:
    rgba = np.array(picture["pixels"], np.uint8).reshape(height, width, 4)
    assert (rgba[..., 3] == 255).all()
    return rgba[..., :3]


def by_python(bundle: Path, order: dict[str, Any]) -> Result:
    """The same by the backend `cpu`; the order's seeds follow one another."""
    names = {"guidance": "cfg_scale"}
    options = {
        names.get(name, name): value
        for name, value in order.items()
        if name not in ("classes", "seeds", "every")
    }
    with Generator.load(bundle, backend="cpu", threads=1) as gen:
        return gen.generate(order["classes"], seed=int(order["seeds"][0]), **options)


ORDERS: list[dict[str, Any]] = [
    {"classes": [i % 3 for i in range(16)], "seeds": list(range(16))},
    {"classes": [i % 3 for i in range(16)], "seeds": list(range(100, 116)), "guidance": 1.0},
    {
        "classes": [2] * 16,
        "seeds": [str(2**64 - 16 + i) for i in range(16)],
        "guidance": 5.5,
        "temperature": 0.7,
        "top_k": 5,
    },
    {
        "classes": [i % 3 for i in range(16)],
        "seeds": list(range(2**40, 2**40 + 16)),
        "guidance": 0,
        "temperature": 1.4,
        "top_p": 0.8,
    },
]


def test_64_pictures_have_the_tokens_that_python_draws(site: Site, tiny: Path) -> None:
    found = drawn(site, tiny, *ORDERS)
    assert found["sha256"] == Bundle.open(tiny).manifest_sha256
    for order, drawing in zip(ORDERS, found["drawn"], strict=True):
        expected = by_python(tiny, order)
        np.testing.assert_array_equal(tokens_of(drawing), expected.tokens)
        for picture, image in zip(drawing["pictures"], expected.array, strict=True):
            np.testing.assert_array_equal(pixels_of(picture, *image.shape[:2]), image)
        assert drawing["steps"] == [[0, 16, step] for step in range(1, TOKENS + 1)]
    # Nothing goes through JavaScript but the conditioning of each order and the pictures.
    assert found["copied"] == len(ORDERS) + 64


def test_a_picture_is_the_same_alone(site: Site, tiny: Path) -> None:
    order = ORDERS[0]
    alone = [
        order | {"classes": [order["classes"][i]], "seeds": [order["seeds"][i]]} for i in (0, 7, 15)
    ]
    together, *found = drawn(site, tiny, order, *alone)["drawn"]
    for index, one in zip((0, 7, 15), found, strict=True):
        assert one["pictures"] == [together["pictures"][index]]


def test_a_host_that_calls_webassembly_something_else(
    site: Site, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then it cannot be compiled while it comes, but afterwards."""
    order = {"classes": [1], "seeds": [3]}
    expected = drawn(site, tiny, order)
    monkeypatch.setitem(engine_parts.TYPES, ".wasm", "application/octet-stream")
    assert drawn(site, tiny, order) == expected


def test_previews_are_gray_where_nothing_is_drawn(site: Site, tiny: Path) -> None:
    (found,) = drawn(site, tiny, {"classes": [1, 2], "seeds": [3, 4], "every": 1})["drawn"]
    assert found["previews"]
    for preview in found["previews"]:
        step, side = preview["step"], SIDE * PATCH
        shows = pixels_of(preview, side, side)
        done = pixels_of(found["pictures"][preview["index"]], side, side)
        decided = np.kron(
            np.arange(TOKENS).reshape(SIDE, SIDE) < step, np.ones((PATCH, PATCH), bool)
        )
        np.testing.assert_array_equal(shows[decided], done[decided])
        assert (shows[~decided] == UNDECIDED_GRAY).all()


def test_a_bundle_of_few_bits(site: Site, tiny: Path, tmp_path: Path) -> None:
    """Over its own graphs, and, where the page has those files not, over the plain ones."""
    folder = _few_bits().write_int8_bundle(tiny, tmp_path / "tiny-int8")
    order = ORDERS[0]
    found = drawn(site, folder, order)
    assert found["graphs"] == ["step-cpu.onnx", "decoder.onnx"]
    expected = by_python(folder, order)
    np.testing.assert_array_equal(tokens_of(found["drawn"][0]), expected.tokens)
    plain = drawn(site, folder, order, without=["step-cpu.json", "step-cpu.onnx"])
    assert plain["graphs"] == ["step.onnx", "decoder.onnx"]
    assert tokens_of(plain["drawn"][0]).shape == expected.tokens.shape


def test_weights_of_4_bits(site: Site, tiny: Path, tmp_path: Path) -> None:
    """They become float32, or 8 bits, when the step is loaded: the tokens are Python's."""
    folder = _few_bits().write_4_bits_bundle(tiny, tmp_path / "tiny-4-bits")
    order = ORDERS[0]
    (drawing,) = drawn(site, folder, order)["drawn"]
    np.testing.assert_array_equal(tokens_of(drawing), by_python(folder, order).tokens)


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 2e-5), ("int8", 5e-3)])
def test_scores_are_near_those_of_python(
    site: Site, tiny: Path, tmp_path: Path, precision: str, bound: float
) -> None:
    """With 8 bits only near: a value at the border of two steps may be rounded to either."""
    folder = tiny
    if precision == "int8":
        folder = _few_bits().write_int8_bundle(tiny, tmp_path / "tiny-int8")
    classes = [0, 1, 2, 1]
    tokens = np.random.default_rng(5).integers(0, 9, (len(classes), TOKENS))
    found = in_node(
        "scores",
        files=site.bundle(folder),
        runtime=runtime_of(site),
        classes=classes,
        tokens=tokens.tolist(),
    )
    with Generator.load(folder, backend="cpu", threads=1) as gen:
        expected = gen.logits(tokens, classes, cfg_scale=1.0)
    scores = np.array(found).reshape(TOKENS, *expected.shape[::2]).swapaxes(0, 1)
    assert np.abs(scores - expected).max() <= bound * expected.std()


def _few_bits() -> Any:
    pytest.importorskip("torch")  # what writes such bundles comes with the export's packages
    from ..runtime import few_bits_bundle

    return few_bits_bundle


def test_a_step_that_does_not_run_here_leaves_the_plain_one(
    site: Site, tiny: Path, tmp_path: Path
) -> None:
    few_bits = _few_bits()
    folder = few_bits.write_int8_bundle(tiny, tmp_path / "tiny-int8")
    onnx = pytest.importorskip("onnx")
    model = onnx.load(folder / "step-cpu.onnx", load_external_data=False)
    next(node for node in model.graph.node if node.domain).op_type = "NoSuchOperator"
    (folder / "step-cpu.onnx").write_bytes(model.SerializeToString())
    few_bits.rehash(folder)
    found = drawn(site, folder, ORDERS[0])
    assert found["graphs"] == ["step.onnx", "decoder.onnx"]


def test_the_model_in_the_box(site: Site, tmp_path: Path) -> None:
    """Four pictures, by the graphs for a CPU."""
    folder = tmp_path / "emoji"
    shutil.copytree(Bundle.open().path, folder)
    order = {"classes": [12, 5, 44, 97], "seeds": [41, 42, 43, 44], "top_k": 1000}
    found = drawn(site, folder, order)
    assert found["graphs"] == ["step-cpu.onnx", "decoder-cpu.onnx"]
    expected = by_python(folder, order)
    np.testing.assert_array_equal(tokens_of(found["drawn"][0]), expected.tokens)
    for picture, image in zip(found["drawn"][0]["pictures"], expected.array, strict=True):
        off = pixels_of(picture, *image.shape[:2]).astype(int) - image
        assert abs(off).max() <= 1  # rounding at the end
