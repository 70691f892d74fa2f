"""The decoder graph that a bundle brings for the `cpu` backend: who takes it, what it may be."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from aim_runtime import Bundle, BundleError
from aim_runtime.bundle import add_files
from aim_runtime.engines.backends import load_engine
from aim_runtime.engines.onnxruntime import description
from aim_runtime.engines.onnxruntime.decoder_graph import (
    DECODER_FILE,
    DECODER_GRAPH_FILE,
    DecoderGraph,
    chosen_decoder,
)
from aim_runtime.onnx_graph.check import _Trace
from aim_runtime.onnx_graph.cost import peak_bytes
from aim_runtime.onnx_graph.limits import graph_limits
from aim_runtime.onnx_graph.model import FLOAT, INT32, UINT8, Node
from aim_runtime.onnx_graph.operator_call import Call
from aim_runtime.onnx_graph.operators import MICROSOFT, OPERATORS
from aim_runtime.onnx_graph.shapes import GraphRefused, Size, Value, fixed

from .playing import onnxruntime_cuda_on_the_host
from .tiny_bundle import TOKENS, VOCAB, copy_bundle, rehash

CODES = np.random.default_rng(1).integers(0, VOCAB, (3, TOKENS))


@pytest.fixture
def with_decoder(tiny: Path, tmp_path: Path) -> Callable[..., Path]:
    """The tiny bundle with a decoder graph of its own, whose pictures are negatives."""

    def make(
        document: Callable[[dict[str, Any]], object] = lambda document: None,
        operator: str = "",
    ) -> Path:
        folder = copy_bundle(tiny, tmp_path / "bundle")
        made = tmp_path / "made"
        made.mkdir()
        spec = replace(Bundle.open(folder).manifest.graphs["decoder"], file=DECODER_GRAPH_FILE)
        value = json.loads(DecoderGraph(spec, "int8", 45.5, "1.24").to_json())
        document(value)
        (made / DECODER_FILE).write_text(json.dumps(value), encoding="utf-8")
        model = onnx.load(folder / "decoder.onnx", load_external_data=False)
        model.graph.node[-1].output[0] = "positive"
        model.graph.initializer.append(
            onnx.numpy_helper.from_array(np.array(255, np.uint8), "white")
        )
        inputs = ["positive"] if operator else ["white", "positive"]
        model.graph.node.append(onnx.helper.make_node(operator or "Sub", inputs, ["image"]))
        (made / DECODER_GRAPH_FILE).write_bytes(model.SerializeToString())
        add_files(folder, made)
        return folder

    return make


def test_the_cpu_takes_it_and_others_do_not(with_decoder: Callable[..., Path], tiny: Path) -> None:
    bundle = Bundle.open(with_decoder())
    plain = load_engine(Bundle.open(tiny), backend="cpu").decode(CODES)
    np.testing.assert_array_equal(load_engine(bundle, backend="cpu").decode(CODES), 255 - plain)
    with onnxruntime_cuda_on_the_host(bundle) as engine:
        np.testing.assert_array_equal(engine.decode(CODES), plain)
    # To runtimes that know nothing of it the two files are a licence or the like.
    assert json.loads((bundle.path / "manifest.json").read_text())["format_version"] == 1


def test_who_asks_for_float32_gets_the_plain_one(
    with_decoder: Callable[..., Path], tiny: Path
) -> None:
    bundle = Bundle.open(with_decoder())
    plain = load_engine(Bundle.open(tiny), backend="cpu").decode(CODES)
    exact = load_engine(bundle, backend="cpu", precision="fp32")
    np.testing.assert_array_equal(exact.decode(CODES), plain)
    assert "computes in int8" in chosen_decoder(bundle, "fp32").reason


def test_one_in_float32_is_for_both(with_decoder: Callable[..., Path]) -> None:
    bundle = Bundle.open(with_decoder(lambda document: document.update(precision="fp32")))
    assert chosen_decoder(bundle).decoder == chosen_decoder(bundle, "fp32").decoder
    assert chosen_decoder(bundle).decoder is not None


def test_an_older_onnxruntime_takes_the_plain_one(
    with_decoder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(with_decoder(lambda document: document.update(onnxruntime="1.30")))
    monkeypatch.setattr(description, "installed_version", lambda: "1.29.1")
    choice = chosen_decoder(bundle)
    assert choice.decoder is None
    assert "onnxruntime 1.29.1 lacks operators of the faster one, 1.30" in choice.reason
    assert load_engine(bundle, backend="cpu").manifest.graphs["decoder"].file == "decoder.onnx"


def test_an_onnxruntime_built_without_an_operator_takes_the_plain_one(
    with_decoder: Callable[..., Path], tiny: Path
) -> None:
    # It is of opset 24; the graph asks for an older one.
    engine = load_engine(Bundle.open(with_decoder(operator="Swish")), backend="cpu")
    plain = load_engine(Bundle.open(tiny), backend="cpu")
    np.testing.assert_array_equal(engine.decode(CODES), plain.decode(CODES))


def test_a_newer_description_is_left_alone(with_decoder: Callable[..., Path]) -> None:
    bundle = Bundle.open(with_decoder(lambda d: d.update(format_version=2, news={})))
    choice = chosen_decoder(bundle)
    assert choice.decoder is None
    assert "newer aim-runtime" in choice.reason


def test_a_bundle_without_one_says_how_to_add_it(tiny: Path) -> None:
    choice = chosen_decoder(Bundle.open(tiny))
    assert choice.decoder is None
    assert f"'aim export --bundle {tiny} --cpu' adds one where that gains" in choice.reason


BAD: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no format": (lambda d: d.pop("format"), "is no decoder graph"),
    "version": (lambda d: d.update(format_version="x"), "format_version is 'x'"),
    "unknown key": (lambda d: d.update(more=1), "has the unknown key 'more'"),
    "onnxruntime": (lambda d: d.update(onnxruntime="new"), "onnxruntime is 'new'"),
    "precision": (lambda d: d.update(precision="int2"), "precision is 'int2'"),
    "distance": (lambda d: d.update(psnr_db="far"), "psnr_db is 'far'"),
    "impossible distance": (lambda d: d.update(psnr_db=-1), "psnr_db is -1"),
    "file": (
        lambda d: d["graphs"]["decoder"].update(file="../decoder.onnx"),
        r"graphs.decoder.file is '../decoder.onnx'",
    ),
    "no such file": (
        lambda d: d["graphs"]["decoder"].update(file="other.onnx"),
        "graphs.decoder.file is 'other.onnx', which the manifest's files does not list",
    ),
    "another picture": (
        lambda d: d["graphs"]["decoder"]["outputs"][0].update(shape=["rows", 4096, 4096, 3]),
        "'image'",
    ),
    "other inputs": (
        lambda d: d["graphs"]["decoder"]["inputs"][0].update(name="codes"),
        "'tokens'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_a_stranger_may_not_say(with_decoder: Callable[..., Path], name: str) -> None:
    edit, words = BAD[name]
    bundle = Bundle.open(with_decoder(edit))
    for refuses in (lambda: chosen_decoder(bundle), lambda: load_engine(bundle, backend="cpu")):
        with pytest.raises(BundleError, match=words) as caught:
            refuses()
        message = str(caught.value).removeprefix(str(bundle.path))
        assert len(message) <= 300
        assert message.isprintable()


def test_text_that_is_no_description(with_decoder: Callable[..., Path]) -> None:
    folder = with_decoder()
    for data, words in ((b"\xff", "not UTF-8 text"), (b"[]", "no decoder graph"), (b"{", "JSON")):
        (folder / DECODER_FILE).write_bytes(data)
        rehash(folder)
        with pytest.raises(BundleError, match=words):
            chosen_decoder(Bundle.open(folder))


def test_its_graph_is_checked_like_any_other(with_decoder: Callable[..., Path]) -> None:
    bundle = Bundle.open(with_decoder(operator="Unique"))
    with pytest.raises(BundleError, match=r"decoder-cpu\.onnx .*'Unique' is not on the"):
        load_engine(bundle, backend="cpu")


# -- what its convolutions take -------------------------------------------------------------------


def convolved(
    domain: str, pixels: tuple[int, ...], sizes: Mapping[int, int] = {}, **attributes: Any
) -> tuple[Call, list[str]]:
    """A call of a convolution in 8 bits, 3×3 from 8 to 16 channels, and what it makes."""

    def of(shape: tuple[int, ...], dtype: int = UINT8) -> Value:
        return Value(tuple(map(fixed, shape)), dtype)

    image = Value((Size(1, 0), *map(fixed, pixels)), UINT8)
    kernels = of((16, 8, 3, 3))
    inputs = [image, of((), FLOAT), of(()), kernels, of((16,), FLOAT), of((16,))]
    inputs += [of((), FLOAT), of(()), of((16,), INT32)]
    for index, size in sizes.items():
        inputs[index] = of((size,), inputs[index].dtype)
    call = Call("QLinearConv", inputs, {"pads": [1, 1, 1, 1], **attributes}, 1)
    (made,) = OPERATORS[domain]["QLinearConv"](call)
    return call, [str(size) for size in made.shape]


def test_channels_may_be_first_or_last() -> None:
    first, made_first = convolved("", (8, 5, 6))
    last, made_last = convolved(MICROSOFT, (5, 6, 8), channels_last=1)
    assert made_first == ["1 rows + 0", "16", "5", "6"]
    assert made_last == ["1 rows + 0", "5", "6", "16"]
    # The same work and the same windows copied out.
    assert first.operations == last.operations == (16 * 5 * 6 * 8 * 9, 0)
    assert first.extra == last.extra == (8 * 9 * 5 * 6, 0)


@pytest.mark.parametrize(
    ("domain", "pixels", "words"),
    [
        ("", (5, 6, 8), "channels last"),  # ONNX's own knows no such thing
        (MICROSOFT, (8, 5, 6), "other channels"),
    ],
)
def test_channels_elsewhere_are_refused(domain: str, pixels: tuple[int, ...], words: str) -> None:
    with pytest.raises(GraphRefused, match=words):
        convolved(domain, pixels, channels_last=1)


@pytest.mark.parametrize("domain", ["", MICROSOFT])
def test_windows_copied_out_are_memory_of_a_row(domain: str) -> None:
    """So the plan of a request counts them, and none is there beside another's."""
    found = []
    for count in (1, 2):
        trace = _Trace({})
        names = {
            "x": trace.add(Value((Size(1, 0), *map(fixed, (8, 5, 6))), UINT8)),
            "w": trace.add(Value(tuple(map(fixed, (8, 8, 3, 3))), UINT8)),
            "s": trace.add(Value((), FLOAT)),
        }
        nodes = [
            Node(
                domain,
                "QLinearConv",
                ("x" if not index else f"y{index - 1}", *"sswssss"),
                (f"y{index}",),
                {"pads": [1] * 4},
            )
            for index in range(count)
        ]
        trace.run(tuple(nodes), names)
        assert trace.fixed_bytes == 0
        found.append(peak_bytes(trace.steps, frozenset({count + 2})))
    made, windows = 8 * 5 * 6, 9 * 8 * 5 * 6
    assert found == [windows + made, windows + 2 * made]


def test_memory_beside_the_rows_follows_from_stored_weights(tiny: Path) -> None:
    """What a manifest only says of its decoder lets a graph take none that no plan counts."""
    manifest = Bundle.open(tiny).manifest
    claims = replace(manifest, model=replace(manifest.model, decoder_parameters=1 << 44))
    graph = manifest.graphs["decoder"]
    found = [graph_limits(one, graph, weights=9).fixed_bytes for one in (claims, manifest)]
    assert found[0] == found[1]


@pytest.mark.parametrize(("domain", "name"), [("", "Conv"), (MICROSOFT, "FusedConv")])
def test_a_convolution_has_a_bias_for_each_channel(domain: str, name: str) -> None:
    """Its kernel takes that on trust, and would read beyond the end."""
    image = Value((Size(1, 0), *map(fixed, (8, 5, 6))), FLOAT)
    kernels = Value(tuple(map(fixed, (16, 8, 3, 3))), FLOAT)
    for size in (1, 15, 17):
        bias = Value((fixed(size),), FLOAT)
        with pytest.raises(GraphRefused, match="other sizes"):
            OPERATORS[domain][name](Call(name, [image, kernels, bias], {}, 1))


@pytest.mark.parametrize("domain", ["", MICROSOFT])
@pytest.mark.parametrize(("index", "size"), [(4, 2), (5, 15), (8, 1), (8, 15)])
def test_what_belongs_to_kernels_of_8_bits_has_their_sizes(
    domain: str, index: int, size: int
) -> None:
    with pytest.raises(GraphRefused, match="other sizes"):
        convolved(domain, (8, 5, 6), sizes={index: size})


# -- convolutions over three dimensions -----------------------------------------------------------


def over(
    name: str, domain: str, sizes: tuple[int, ...], taps: tuple[int, ...], **attributes: Any
) -> tuple[Call, list[str]]:
    """A call of a convolution of one channel to 6, and what it makes."""
    image = Value((Size(1, 0), *map(fixed, (1, *sizes))), FLOAT)
    kernels = Value(tuple(map(fixed, (6, 1, *taps))), FLOAT)
    call = Call(name, [image, kernels], attributes, 1)
    (made,) = OPERATORS[domain][name](call)
    return call, [str(size) for size in made.shape]


def test_a_convolution_in_float32_may_be_over_three_dimensions() -> None:
    call, made = over(
        "Conv", "", (8, 16, 10), (1, 6, 1), strides=[1, 4, 1], pads=[0, 1, 0, 0, 1, 0]
    )
    assert made == ["1 rows + 0", "6", "8", "4", "10"]
    assert call.operations == (6 * 8 * 4 * 10 * 6, 0)


@pytest.mark.parametrize(
    ("name", "domain", "sizes", "taps", "attributes", "words"),
    [
        ("Conv", "", (8, 8, 8, 8), (1, 1, 1, 1), {}, "more than 3 dimensions"),
        ("FusedConv", MICROSOFT, (8, 8, 8), (1, 1, 1), {}, "more than 2 dimensions"),
        ("Conv", "", (8, 8, 8), (1, 1), {}, "more than 3 dimensions"),
        ("Conv", "", (8, 8, 8), (1, 9, 1), {}, "larger than what it moves over"),
        ("Conv", "", (8, 8, 8), (1, 3, 1), {"pads": [0, 1 << 21, 0] * 2}, "larger than"),
        ("Conv", "", (8, 8, 8), (1, 3, 1), {"strides": [1, 4]}, "another number of dimensions"),
        ("Conv", "", (8, 8, 8), (1, 3, 1), {"group": 2}, "other channels"),
        ("Conv", "", (8, 8, 8), (1, 3, 1), {"channels_last": 1}, "channels last"),
    ],
)
def test_such_a_convolution_is_held_to_what_others_are(
    name: str,
    domain: str,
    sizes: tuple[int, ...],
    taps: tuple[int, ...],
    attributes: dict[str, Any],
    words: str,
) -> None:
    with pytest.raises(GraphRefused, match=words):
        over(name, domain, sizes, taps, **attributes)
