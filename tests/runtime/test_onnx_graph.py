"""What a bundle's graph may hold: a catalogue of graphs that no engine must ever see.

Each is the tiny bundle's with one thing changed, under honest checksums.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from aim_runtime import Bundle, BundleError, Generator, plan_batches
from aim_runtime.bundle import models_dir
from aim_runtime.engines.onnxruntime.step_graph import chosen_step
from aim_runtime.onnx_graph import KNOWN_MANIFESTS, check, checked_graph, limits
from aim_runtime.onnx_graph.limits import GraphLimits
from aim_runtime.onnx_graph.operator_call import Call
from aim_runtime.onnx_graph.operators import OPERATORS
from aim_runtime.onnx_graph.shapes import GraphRefused, Size, Value

from .tiny_bundle import copy_bundle, rehash

Edit = Callable[[onnx.ModelProto], object]


@pytest.fixture
def edited(tiny: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes a bundle whose graph is changed by an edit of its message or of its bytes."""

    def make(edit: Edit, file: str = "step", raw: bytes | None = None) -> Path:
        bundle = copy_bundle(tiny, tmp_path / "bundle")
        path = bundle / f"{file}.onnx"
        model = onnx.load(path, load_external_data=False)
        edit(model)
        path.write_bytes(model.SerializeToString() if raw is None else raw)
        rehash(bundle)
        return bundle

    return make


def refused(bundle: Path, file: str = "step") -> str:
    with pytest.raises(BundleError) as caught:
        Generator.load(bundle, backend="cpu", threads=1)
    message = str(caught.value)
    assert message.startswith(f"{bundle}: {file}.onnx")
    assert message.isprintable()
    assert len(message) - len(str(bundle)) <= 250
    return message


# -- ways to change a graph -----------------------------------------------------------------------


def replace(model: onnx.ModelProto, output: str, *nodes: onnx.NodeProto) -> None:
    """Compute `output` by `nodes`, out of what was computed before as "old"."""
    for node in model.graph.node:
        for index, name in enumerate(node.output):
            if name == output:
                node.output[index] = "old"
    model.graph.node.extend(nodes)


def node(op_type: str, inputs: str, outputs: str, domain: str = "", **attributes: Any) -> Any:
    return helper.make_node(op_type, inputs.split(), outputs.split(), domain=domain, **attributes)


def constant(model: onnx.ModelProto, name: str, value: object, dtype: Any = np.int64) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array(value, dtype), name))


def initializer(model: onnx.ModelProto, name: str) -> TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def external(tensor: TensorProto, **entries: object) -> TensorProto:
    tensor.data_location = TensorProto.EXTERNAL
    tensor.ClearField("raw_data")
    del tensor.external_data[:]
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def logits_by(*nodes: Any, **constants: object) -> Edit:
    """The logits are computed by `nodes` out of "old", the honest ones."""

    def edit(model: onnx.ModelProto) -> None:
        for name, value in constants.items():
            constant(model, name, value)
        replace(model, "logits", *nodes)

    return edit


def words(**entries: object) -> Edit:
    """The table of words lies elsewhere."""

    def edit(model: onnx.ModelProto) -> None:
        found = {entry.key: entry.value for entry in initializer(model, "words").external_data}
        external(initializer(model, "words"), **(found | entries))

    return edit


def body(*nodes: Any) -> onnx.GraphProto:
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 16])
    return helper.make_graph(list(nodes), "body", [], [value])


def with_function(domain: str, name: str, *nodes: Any, calls: int = 1) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid(domain, 1)]
        function = helper.make_function(domain, name, ["x"], ["y"], list(nodes), opsets)
        model.functions.append(function)
        model.opset_import.append(helper.make_opsetid(domain, 1))
        calls_made = [node(name, "old", "v0", domain)]
        calls_made += [node(name, f"v{i}", f"v{i + 1}", domain) for i in range(calls - 1)]
        replace(model, "logits", *calls_made, node("Identity", f"v{calls - 1}", "logits"))

    return edit


def doubled(times: int, op: str = "Concat", **attributes: Any) -> Edit:
    nodes = [node(op, f"v{i} v{i}", f"v{i + 1}", **attributes) for i in range(times)]
    last = node("Gather", f"v{times} first", "logits", axis=1)
    return logits_by(node("Identity", "old", "v0"), *nodes, last, first=np.arange(16))


def bad_external_constant(model: onnx.ModelProto) -> None:
    tensor = TensorProto(name="v", data_type=TensorProto.FLOAT, dims=[1, 16])
    external(tensor, location="step.weights", offset=0, length=64)
    replace(
        model, "logits", node("Constant", "", "c", value=tensor), node("Add", "old c", "logits")
    )


def recursive(model: onnx.ModelProto) -> None:
    with_function("aim", "StateScan", node("StateScan", "x", "y", "aim"))(model)


def many(model: onnx.ModelProto) -> None:
    nodes = [node("Neg", f"v{i}", f"v{i + 1}") for i in range(20_000)]
    replace(
        model,
        "logits",
        node("Identity", "old", "v0"),
        *nodes,
        node("Neg", "v20000", "logits"),
    )


def grown(model: onnx.ModelProto) -> None:
    """Something as large as the square of the rows."""
    constant(model, "last", [-1])
    constant(model, "flat", [1, -1])
    replace(
        model,
        "logits",
        node("Reshape", "old flat", "row"),
        node("Transpose", "row", "column"),
        node("MatMul", "column row", "square"),
        node("ReduceSum", "square", "total", keepdims=1),
        node("Add", "old total", "logits"),
    )


def many_at_once(model: onnx.ModelProto) -> None:
    """Each is small; in an unlucky order all are there at the same time."""
    constant(model, "times", [1, 64])
    count = 200
    nodes = [node("Tile", "old times", "wide")]
    for i in range(count):
        nodes += [
            node("Exp", "wide" if not i else f"a{i - 1}", f"a{i}"),
            node("ReduceSum", f"a{i} one_axis", f"f{i}", keepdims=1),
        ]
    constant(model, "one_axis", [1])
    total = [node("Sum", " ".join(f"f{i}" for i in range(count)), "total")]
    again = [node("ReduceMax", f"a{i} one_axis", f"g{i}", keepdims=1) for i in range(count)]
    end = [node("Sum", " ".join(f"g{i}" for i in range(count)) + " total", "more")]
    replace(model, "logits", *nodes, *total, *again, *end, node("Add", "old more", "logits"))


def shares(model: onnx.ModelProto) -> None:
    """Many tensors over the same bytes would each be copied."""
    table = initializer(model, "words")
    for i in range(50):
        copy = model.graph.initializer.add()
        copy.CopyFrom(table)
        copy.name = f"copy{i}"


CATALOGUE: dict[str, tuple[Edit, str]] = {
    # other graphs inside
    "if": (
        logits_by(
            node("If", "yes", "y", then_branch=body(), else_branch=body()),
            node("Identity", "y", "logits"),
            yes=True,
        ),
        "it has a graph inside of a node",
    ),
    "loop": (
        logits_by(node("Loop", "n yes old", "logits", body=body()), n=2**62, yes=True),
        "it has a graph inside of a node",
    ),
    "scan": (
        logits_by(node("Scan", "old", "logits", body=body(), num_scan_inputs=1)),
        "it has a graph inside of a node",
    ),
    "list of graphs": (
        logits_by(node("Neg", "old", "logits", extra=[body()])),
        "it has graphs inside of a node",
    ),
    # functions
    "function": (with_function("evil", "F", node("Neg", "x", "y")), "brings a function along"),
    "other function of ours": (
        with_function("aim", "Other", node("Neg", "x", "y")),
        "brings a function along",
    ),
    "function in place of an operator": (
        with_function("com.microsoft", "Gelu", node("Abs", "x", "y")),
        "brings a function along",
    ),
    "function that calls itself": (recursive, "'aim::StateScan' is not on the list"),
    "function with a strange operator": (
        with_function("aim", "StateScan", node("RandomNormalLike", "x", "y")),
        "'RandomNormalLike' is not on the list",
    ),
    "function that grows what it gets": (
        with_function("aim", "StateScan", node("Concat", "x x", "y", axis=1), calls=30),
        "it takes up to",
    ),
    # operators
    "random": (
        logits_by(node("RandomNormalLike", "old", "r", scale=-1.0), node("Add", "old r", "logits")),
        "'RandomNormalLike' is not on the list",
    ),
    "another domain": (
        logits_by(node("Neg", "old", "logits", "ai.onnx.ml")),
        "'ai.onnx.ml::Neg' is not on the list",
    ),
    "microsoft's other operators": (
        logits_by(node("Tokenizer", "old", "logits", "com.microsoft")),
        "'com.microsoft::Tokenizer' is not on the list",
    ),
    "engine context": (
        logits_by(node("EPContext", "old", "logits", "com.microsoft", ep_cache_context="/etc")),
        "is not on the list",
    ),
    "python": (logits_by(node("PyOp", "old", "logits", "ai.onnx.contrib")), "is not on the list"),
    "optional": (logits_by(node("Optional", "old", "logits")), "is not on the list"),
    "sequence": (logits_by(node("SequenceConstruct", "old", "logits")), "is not on the list"),
    "data decides the size": (logits_by(node("NonZero", "old", "logits")), "is not on the list"),
    "einsum": (
        logits_by(node("Einsum", "old", "logits", equation="i,j->ij")),
        "is not on the list",
    ),
    "name with line breaks": (
        logits_by(node("x\n\x1b[31m" + "y" * 5000, "old", "logits")),
        "is not on the list",
    ),
    # weights elsewhere
    **{
        f"weights in {location!r}": (words(location=location), "is in")
        for location in (
            "/etc/passwd",
            "../outside",
            "./step.weights",
            "STEP.weights",
            "",
            "decoder.weights",
            "step.weights\0",
            "*/_ORT_MEM_ADDR_/*",
        )
    },
    **{
        f"weights from {offset}": (words(offset=offset), "'words'")
        for offset in (1 << 40, 2**63, "-1", " 64", "+64", "0x40", "064", "1e3", "")
    },
    "too few weights": (words(length=508), "is given 508 bytes"),
    "too many weights": (words(length=516), "is given 516 bytes"),
    "weights twice": (shares, "out of a file of"),
    "a constant's weights in a file": (bad_external_constant, "'value' that lies in a file"),
    "raw memory": (words(location="*/_ORT_MEM_ADDR_/*", offset=4096), "is in"),
    "key twice": (
        lambda m: initializer(m, "words").external_data.add(key="location", value="x"),
        "'location' twice",
    ),
    "unknown key": (
        lambda m: initializer(m, "words").external_data.add(key="checksum", value="x"),
        "location, offset and length",
    ),
    "both places": (
        lambda m: setattr(initializer(m, "words"), "raw_data", bytes(512)),
        "lies in two places",
    ),
    # tensors
    "strings": (
        lambda m: m.graph.initializer.append(
            TensorProto(name="s", data_type=TensorProto.STRING, dims=[1], string_data=[b"x"])
        ),
        "it has a tensor of strings",
    ),
    "float64": (
        lambda m: constant(m, "d", [1.0], np.float64),
        "is of type 11",
    ),
    "shape without bytes": (
        lambda m: m.graph.initializer.append(
            TensorProto(name="z", data_type=TensorProto.FLOAT, dims=[1 << 30, 1 << 30])
        ),
        "has 0 bytes instead of",
    ),
    "negative size": (
        lambda m: m.graph.initializer.append(
            TensorProto(name="z", data_type=TensorProto.FLOAT, dims=[-1, -4], raw_data=bytes(16))
        ),
        "impossible shape",
    ),
    "one name twice": (lambda m: constant(m, "zero", 1), "the initializer 'zero' twice"),
    "an input with a value": (lambda m: constant(m, "token", [1]), "gives its input 'token' a val"),
    "sparse": (lambda m: m.graph.sparse_initializer.add(), "it has a sparse tensor"),
    # growth
    "concat doubles": (doubled(20, axis=1), "it takes up to"),
    "concat doubles for ever": (doubled(2000, axis=1), "more elements than any model's"),
    "expand": (
        logits_by(
            node("Expand", "zero_f huge", "e"),
            node("ReduceMax", "e", "m", keepdims=0),
            node("Add", "old m", "logits"),
            huge=[1600, 1000, 1000],
        ),
        "it takes up to",
    ),
    "fill": (
        logits_by(
            node("ConstantOfShape", "huge", "e"),
            node("ReduceMax", "e", "m", keepdims=0),
            node("Add", "old m", "logits"),
            huge=[1 << 33],
        ),
        "it takes up to",
    ),
    "tile": (
        logits_by(
            node("Tile", "old huge", "e"),
            node("ReduceMax", "e last", "m", keepdims=1),
            node("Add", "old m", "logits"),
            huge=[1, 1 << 24],
            last=[1],
        ),
        "it takes up to",
    ),
    "range": (
        logits_by(
            node("Range", "zero end step", "r"),
            node("ReduceMax", "r", "m", keepdims=0),
            node("Cast", "m", "f", to=1),
            node("Add", "old f", "logits"),
            end=1 << 32,
            step=1,
        ),
        "it takes up to",
    ),
    "range the other way round": (
        logits_by(node("Range", "zero end zero", "r"), node("Add", "old r", "logits"), end=5),
        "not of whole numbers",
    ),
    "pad": (
        logits_by(
            node("Pad", "old by", "p"),
            node("ReduceMax", "p last", "m", keepdims=1),
            node("Add", "old m", "logits"),
            by=[0, 0, 0, 1 << 30],
            last=[1],
        ),
        "it takes up to",
    ),
    "negative pad": (
        logits_by(node("Pad", "old by", "logits"), by=[0, -1, 0, 1]),
        "by less than nothing",
    ),
    "outer product": (grown, "square of the rows"),
    "a shape out of data": (
        logits_by(
            node("ConstantOfShape", "token", "e"),
            node("ReduceMax", "e", "m", keepdims=0),
            node("Add", "old m", "logits"),
        ),
        "a shape in it is not a constant",
    ),
    "an unlucky order": (many_at_once, "it takes up to"),
    "many nodes": (many, "no model has"),
    # what ends the process, or may
    "the least number over -1": (
        logits_by(
            node("Div", "token minus", "d"),
            node("Cast", "d", "f", to=1),
            node("ReduceMax", "f", "m", keepdims=0),
            node("Add", "old m", "logits"),
            minus=-1,
        ),
        "divided by what is no positive constant",
    ),
    "divided by data": (
        logits_by(node("Div", "token position", "d"), node("Identity", "old", "logits")),
        "a shape in it is not a constant",
    ),
    "divided as int32": (
        logits_by(
            node("Cast", "token", "t", to=TensorProto.INT32),
            node("Div", "t t", "d"),
            node("Identity", "old", "logits"),
        ),
        "divided by what is no positive constant",
    ),
    "a mean of whole numbers": (
        logits_by(node("ReduceMean", "token", "d"), node("Identity", "old", "logits")),
        "a mean in it is not of float32",
    ),
    "no groups": (
        logits_by(node("GroupNormalization", "old old old", "logits", num_groups=0)),
        "impossible number of groups",
    ),
    "a part of a picture": (
        logits_by(
            node(
                *("Resize", "old old scales", "logits"),
                coordinate_transformation_mode="tf_crop_and_resize",
            ),
            scales=[1, 1],
        ),
        "it resizes a part of a tensor",
    ),
    "another plugin": (
        lambda m: (
            with_function("aim", "StateScan", node("Neg", "x", "y"))(m),
            m.graph.node[-2].attribute.append(helper.make_attribute("plugin_version", "1")),
        ),
        "with other attributes than it has",
    ),
    # structure
    "out of nothing": (logits_by(node("Neg", "ghost", "logits")), "which nothing before it makes"),
    "in a circle": (
        logits_by(node("Add", "old b", "a"), node("Neg", "a", "b"), node("Neg", "b", "logits")),
        "which nothing before it makes",
    ),
    "made twice": (
        logits_by(node("Neg", "old", "logits"), node("Neg", "old", "logits")),
        "makes 'logits' twice",
    ),
    "output that nothing makes": (
        lambda m: replace(m, "logits", node("Neg", "old", "other")),
        "nothing in it makes its output 'logits'",
    ),
    "attribute twice": (
        lambda m: m.graph.node[0].attribute.extend(
            [helper.make_attribute("a", 1), helper.make_attribute("a", 2)]
        ),
        "the attribute 'a' twice",
    ),
    "attribute of two types": (
        lambda m: m.graph.node[0].attribute.add(name="a", type=2, i=1, f=1.0),
        "not of the type it says",
    ),
    "attribute that refers to another": (
        lambda m: m.graph.node[0].attribute.add(name="a", type=2, ref_attr_name="b"),
        "refers to another",
    ),
    "old operators": (
        lambda m: setattr(m.opset_import[0], "version", 11),
        "version 11 of operators",
    ),
    "operators to come": (
        lambda m: setattr(m.opset_import[0], "version", 99),
        "version 99 of operators",
    ),
    "unknown operators": (
        lambda m: m.opset_import.append(helper.make_opsetid("evil", 1)),
        "of operators 'evil'",
    ),
    "old IR": (lambda m: setattr(m, "ir_version", 3), "IR version 3"),
    "training": (lambda m: m.training_info.add(), "it has training information"),
    "quantisation": (
        lambda m: m.graph.quantization_annotation.add(tensor_name="x"),
        "it has a quantisation's annotations",
    ),
}


@pytest.mark.parametrize("name", CATALOGUE)
def test_what_no_graph_may_hold(edited: Callable[..., Path], name: str) -> None:
    edit, says = CATALOGUE[name]
    assert says in refused(edited(edit))


def test_an_engine_never_sees_what_is_refused(
    edited: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = edited(CATALOGUE["if"][0])
    seen, real = [], onnxruntime.InferenceSession

    def watched(model: bytes, *args: Any, **kwargs: Any) -> Any:
        seen.append(model)
        return real(model, *args, **kwargs)

    monkeypatch.setattr(onnxruntime, "InferenceSession", watched)
    with pytest.raises(BundleError):
        Generator.load(bundle, backend="cpu", threads=1)
    assert seen == []  # not the other graphs either


@pytest.mark.parametrize("times", [1, 4])
def test_weights_of_4_bits_may_become_float32(
    edited: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """That is eight times their bytes, and ten with whole numbers on the way; not four times so."""
    monkeypatch.setattr(limits, "_FREE_FIXED_BYTES", 0)
    count = 1 << 10

    def edit(model: onnx.ModelProto) -> None:
        raw = bytes(count // 2)
        packed = helper.make_tensor("packed", TensorProto.INT4, [4, count // 4], raw, raw=True)
        steps = numpy_helper.from_array(np.ones(4, np.float32), "steps")
        model.graph.initializer.extend([packed, steps])
        model.graph.node.append(node("Cast", "packed", "whole", to=TensorProto.INT8))
        for index in range(times):
            made = node("DequantizeLinear", "whole steps", f"made_{index}", axis=0)
            model.graph.node.append(made)
        model.opset_import[0].version = 21

    bundle = edited(edit)
    if times == 1:
        Generator.load(bundle, backend="cpu", threads=1)
    else:
        assert f"takes up to {17 * count} bytes of memory;" in refused(bundle)


def test_work_is_bounded_besides_memory(
    edited: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(edited(lambda model: None))
    step = bundle.manifest.graphs["step"]
    for row, fixed, says in ((100, 10**9, "operations a row"), (10**9, -1, "0 operations")):
        allowed = GraphLimits(10**9, 10**9, 10**9, row, fixed)
        monkeypatch.setattr(check, "graph_limits", lambda *of, allowed=allowed: allowed)
        with pytest.raises(BundleError, match=says):
            checked_graph(bundle, step)


# -- bytes that protocol buffers read in more than one way ----------------------------------------


def field(number: int, value: bytes | int) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def test_these_helpers_write_protocol_buffers() -> None:
    model = onnx.ModelProto.FromString(field(1, 300) + field(2, b"me"))
    assert (model.ir_version, model.producer_name) == (300, "me")


GRAPH, FUNCTIONS = 7, 25
SPELLINGS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a second graph that is merged": (lambda b: b + field(GRAPH, b""), "its field graph twice"),
    "a second version": (lambda b: b + field(1, 9), "its field ir_version twice"),
    "an unknown field": (lambda b: b + field(1000, b"x"), "unknown field, number 1000"),
    "a field of another type": (lambda b: b + field(GRAPH, 1), "field graph is of another type"),
    "a group": (lambda b: b + varint(GRAPH << 3 | 3), "field graph is of another type"),
    "a reserved type": (lambda b: b + varint(GRAPH << 3 | 7), "field graph is of another type"),
    "field number 0": (lambda b: b + b"\0\0", "unknown field, number 0"),
    "a padded number": (lambda b: b + b"\x28\x81\0", "not in its shortest form"),
    "a padded tag": (lambda b: b + b"\xa8\0\1", "not in its shortest form"),
    "a number beyond 64 bits": (
        lambda b: b + b"\x28" + b"\xff" * 9 + b"\x02",
        "not in its shortest form",
    ),
    "a number without end": (lambda b: b + b"\x28" + b"\xff" * 20, "does not end"),
    "cut in a number": (lambda b: b + b"\x28\x80", "does not end"),
    "cut in a tag": (lambda b: b + b"\x80", "does not end"),
    "longer than the file": (lambda b: b + varint(GRAPH << 3 | 2) + varint(1 << 40), "cut short"),
    "empty": (lambda b: b"", "it holds no graph"),
    "no ONNX": (lambda b: b"hello", "is not a graph that ONNX Runtime can run"),
    "ONNX Runtime's own format": (
        lambda b: b"\x08\x0a\x12\x04ORTM" + b.removeprefix(b"\x08\x09"),
        "it is in ORT's own format",
    ),
    "not text": (
        lambda b: b + field(8, field(1, b"\xff\xfe")),
        "field domain is not text",
    ),
    "very deep": (lambda b: nested(b, 100_000), "is not a graph"),
    "very many fields": (lambda b: b + field(2, b"") * (1 << 20), "more fields than any"),
}


def nested(data: bytes, depth: int) -> bytes:
    for _ in range(depth):
        data = field(GRAPH, data[-200:])
    return data


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_file_has_one_reading(edited: Callable[..., Path], tiny: Path, name: str) -> None:
    change, says = SPELLINGS[name]
    raw = change((tiny / "step.onnx").read_bytes())
    assert says in refused(edited(lambda model: None, raw=raw))


def test_a_file_that_is_larger_than_any_graph(edited: Callable[..., Path]) -> None:
    with pytest.raises(BundleError, match=r"files\['step\.onnx'\]\.size is 9000000"):
        Generator.load(edited(lambda model: None, raw=bytes(9_000_000)))


# -- what graphs may hold -------------------------------------------------------------------------

ALLOWED: dict[str, Edit] = {
    "notes": lambda m: (
        setattr(m, "doc_string", "notes"),
        m.metadata_props.add(key="a", value="b"),
        m.graph.node[0].metadata_props.add(key="a", value="b"),
        setattr(m.graph.node[0], "doc_string", "notes"),
    ),
    "types of values between": lambda m: m.graph.value_info.append(
        helper.make_tensor_value_info("word", TensorProto.FLOAT, ["rows", 8])
    ),
    "numbers one by one": lambda m: (
        initializer(m, "from_0").ClearField("raw_data"),
        initializer(m, "from_0").int64_data.append(0),
    ),
    "constants as nodes": logits_by(
        node("Constant", "", "c", value_float=1.0), node("Mul", "old c", "logits")
    ),
    "a function of ours": with_function("aim", "StateScan", node("Identity", "x", "y"), calls=5),
    "shapes out of shapes": logits_by(
        node("Shape", "old", "shape"),
        node("Slice", "shape zero_1 one_1", "rows"),
        node("Concat", "rows wide", "target", axis=0),
        node("Expand", "zero_f target", "zeros"),
        node("Reshape", "zeros shape", "again"),
        node("Add", "old again", "logits"),
        zero_1=[0],
        one_1=[1],
        wide=[16],
    ),
    "both halves": logits_by(
        node("Split", "old", "a b", axis=1, num_outputs=2),
        node("Concat", "a b", "logits", axis=1),
    ),
    "padding and cutting": logits_by(
        node("Pad", "old by", "p"),
        node("Slice", "p from to axis", "logits"),
        by=[0, 2, 0, 1],
        **{"from": [2], "to": [-1], "axis": [1]},
    ),
    "blocks": logits_by(
        node("Reshape", "old square", "s"),
        node("DepthToSpace", "s", "d", blocksize=2),
        node("SpaceToDepth", "d", "e", blocksize=2),
        node("Reshape", "e flat", "logits"),
        square=[-1, 4, 2, 2],
        flat=[0, 16],
    ),
    "half precision": logits_by(
        node("Cast", "old", "h", to=TensorProto.FLOAT16),
        node("Cast", "h", "logits", to=TensorProto.FLOAT),
    ),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_what_graphs_may_hold(edited: Callable[..., Path], name: str) -> None:
    with Generator.load(edited(ALLOWED[name]), backend="cpu", threads=1) as generator:
        assert generator.generate([0, 1]).array.shape == (2, 6, 6, 3)


def quantised(model: onnx.ModelProto, *nodes: Any) -> None:
    constant(model, "w8", np.arange(256).reshape(16, 16) % 7, np.uint8)
    constant(model, "scale", 0.1, np.float32)
    constant(model, "point", 3, np.uint8)
    replace(model, "logits", *nodes)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


FUSED: dict[str, list[Any]] = {
    "integer products": [
        node("DynamicQuantizeLinear", "old", "q s z"),
        node("MatMulInteger", "q w8 z point", "i"),
        node("Cast", "i", "f", to=TensorProto.FLOAT),
        node("Mul", "f s", "logits"),
    ],
    "quantised both ways": [
        node("QuantizeLinear", "old scale point", "q"),
        node("QLinearMatMul", "q scale point w8 scale point scale point", "p"),
        node("DequantizeLinear", "p scale point", "logits"),
    ],
    "dynamic": [node("DynamicQuantizeMatMul", "old w8 scale point", "logits", "com.microsoft")],
    "norm": [node("SimplifiedLayerNormalization", "old gain", "logits", axis=-1, epsilon=1e-5)],
    "norm and sum": [
        node("SkipSimplifiedLayerNormalization", "old old gain", "logits", "com.microsoft"),
    ],
    "gated norm": [node("GatedRMSNorm", "old gain old", "logits", "com.microsoft")],
    "few bits": [
        node(
            *("MatMulNBits", "old packed scales", "logits", "com.microsoft"),
            N=16,
            K=16,
            bits=4,
            block_size=16,
        )
    ],
    "few bits, 8 of each": [
        node(
            *("MatMulNBits", "old wide_packed scales points", "logits", "com.microsoft"),
            N=16,
            K=16,
            bits=8,
            block_size=16,
            accuracy_level=4,
        )
    ],
    "two digits": [
        node("QuantizeLinear", "old scale point", "q"),
        node(
            *("MatMulIntegerToFloat", "q w8 scale column_scales point point column_bias", "logits"),
            "com.microsoft",
        ),
    ],
    "dequantised by columns": [
        node("DequantizeLinear", "w8 column_scales", "wide", axis=1),
        node("MatMul", "old wide", "logits"),
    ],
    "dequantised by blocks of 4 bits": [
        node("DequantizeLinear", "halves scales middles", "wide", axis=1, block_size=16),
        node("Gemm", "old wide", "logits", transB=1),
    ],
    "activation": [node("QuickGelu", "old", "logits", "com.microsoft", alpha=1.7)],
    "fused product": [node("FusedMatMul", "old square", "logits", "com.microsoft", alpha=0.5)],
    "recurrence": [
        node("Slice", "old zero_1 four_1 last", "quarter"),
        node("Reshape", "quarter packed_shape", "q"),
        node("Reshape", "old state_shape", "state"),
        node("ReduceMean", "old last", "mean", keepdims=1),
        node("Reshape", "mean decay_shape", "slower"),
        node(
            *("LinearAttention", "q q q state slower", "attended after", "com.microsoft"),
            q_num_heads=1,
            kv_num_heads=1,
            update_rule="gated",
        ),
        node("Tile", "attended four", "wide"),
        node("Reshape", "wide flat", "logits"),
    ],
    "recurrence with one key for all heads": [
        node("Slice", "old zero_1 four_1 last", "quarter"),
        node("Reshape", "quarter packed_shape", "q"),
        node("Reshape", "old all_heads", "values"),
        node("Tile", "old four_2", "four_states"),
        node("Reshape", "four_states states_shape", "states"),
        node("Reshape", "quarter packed_shape", "slower"),
        node(
            *("LinearAttention", "q q values states slower", "attended after", "com.microsoft"),
            q_num_heads=1,
            kv_num_heads=4,
            update_rule="gated",
        ),
        node("Reshape", "attended flat", "logits"),
    ],
    "causal convolution": [
        node("Reshape", "old channels", "by_channel"),
        node("Slice", "by_channel zero_1 three last2", "past"),
        node("CausalConvWithState", "by_channel kernels bias past", "z after", "com.microsoft"),
        node("Reshape", "z flat", "logits"),
    ],
}


@pytest.mark.parametrize("name", FUSED)
def test_fused_and_quantised_operators(edited: Callable[..., Path], name: str) -> None:
    """Those that step graphs to come are made of, as ONNX Runtime takes them."""

    def edit(model: onnx.ModelProto) -> None:
        quantised(model, *FUSED[name])
        constant(model, "gain", np.ones(16), np.float32)
        constant(model, "packed", np.full((16, 1, 8), 0x79), np.uint8)
        constant(model, "scales", np.full((16, 1), 0.1), np.float32)
        constant(model, "wide_packed", np.full((16, 1, 16), 0x79), np.uint8)
        constant(model, "points", np.full((16, 1), 0x80), np.uint8)
        constant(model, "column_scales", np.full(16, 0.1), np.float32)
        constant(model, "column_bias", np.full(16, 0.1), np.float32)
        for tensor_name, shape in (("halves", (16, 16)), ("middles", (16, 1))):
            raw = bytes([0x87]) * (math.prod(shape) // 2)
            tensor = helper.make_tensor(tensor_name, TensorProto.UINT4, shape, raw, raw=True)
            model.graph.initializer.append(tensor)
        if "by blocks" in name:
            (own,) = (opset for opset in model.opset_import if not opset.domain)
            own.version = 21
        constant(model, "square", np.eye(16), np.float32)
        constant(model, "kernels", np.ones((4, 1, 4)), np.float32)
        constant(model, "bias", np.zeros(4), np.float32)
        for key, value in {
            "packed_shape": [-1, 1, 4],
            "state_shape": [-1, 1, 4, 4],
            "decay_shape": [-1, 1, 1],
            "all_heads": [-1, 1, 16],
            "four_2": [1, 4],
            "states_shape": [-1, 4, 4, 4],
            "last": [1],
            "four": [1, 1, 4],
            "flat": [-1, 16],
            "channels": [-1, 4, 4],
            "zero_1": [0],
            "four_1": [4],
            "three": [3],
            "last2": [2],
        }.items():
            constant(model, key, value)

    bundle = edited(edit)
    try:
        generator = Generator.load(bundle, backend="cpu", threads=1)
    except BundleError as error:
        # Past the check, for only then it gets there: this ONNX Runtime is older than the operator.
        if "is not a registered function/op" not in str(error):
            raise
        pytest.skip("this ONNX Runtime lacks the operator")
    with generator:
        assert generator.generate([0, 1]).array.shape == (2, 6, 6, 3)


ROWS = Size(1, 0)


def of(*sizes: int, dtype: int = TensorProto.FLOAT) -> Value:
    return Value(tuple(Size(0, size) for size in sizes), dtype)


X = Value((ROWS, Size(0, 64)), TensorProto.FLOAT)
SKIPPED = "SkipSimplifiedLayerNormalization"
BITS = {"N": 8, "K": 64, "bits": 4, "block_size": 32, "accuracy_level": 4}
PACKED, SCALES = of(8, 2, 16, dtype=TensorProto.UINT8), of(8, 2)
POINTS = of(8, 1, dtype=TensorProto.UINT8)


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("MatMulNBits", [X, of(8, 2, 8, dtype=TensorProto.UINT8), SCALES]),
        ("MatMulNBits", [X, PACKED, of(8, 1)]),
        ("MatMulNBits", [X, PACKED, SCALES, of(4, dtype=TensorProto.UINT8)]),
        ("MatMulNBits", [X, PACKED, SCALES, of(8, 1)]),
        ("MatMulNBits", [X, PACKED, SCALES, POINTS, None, of(7)]),
        ("MatMulNBits", [X, PACKED, None]),
        ("MatMulIntegerToFloat", [X, of(64, 8), of(), of(7)]),
        ("MatMulIntegerToFloat", [X, of(64, 8), of(), of(8), of(), of(2)]),
        ("MatMulIntegerToFloat", [X, of(64, 8), of(), of(8), of(), None, of(1)]),
        ("MatMulIntegerToFloat", [of(64), of(64), of(), of()]),
        ("DynamicQuantizeMatMul", [X, of(64, 8), of(9)]),
        ("DynamicQuantizeMatMul", [X, of(64, 8), of(8), None, of(7)]),
    ],
)
def test_what_belongs_to_weights_of_few_bits_has_their_sizes(
    name: str, inputs: list[Value | None]
) -> None:
    """Kernels take some of these on trust, and would read beyond their end."""
    call = Call(name, inputs, BITS if name == "MatMulNBits" else {}, 1)
    with pytest.raises(GraphRefused, match=r"of other sizes than it says|lacks an input"):
        OPERATORS["com.microsoft"][name](call)


def test_what_products_of_few_bits_cost() -> None:
    rule = OPERATORS["com.microsoft"]["MatMulNBits"]
    cost = []
    for level in (4, 1):
        call = Call(
            "MatMulNBits", [X, PACKED, SCALES, POINTS], {**BITS, "accuracy_level": level}, 1
        )
        assert rule(call) == [Value((ROWS, Size(0, 8)), TensorProto.FLOAT)]
        assert call.operations == (8 * 64, 0)
        cost.append(call.extra)
    assert cost == [(64 * 8, 0), (64 * 8, 64 * 8 * 4)]  # as float32 beside them


@pytest.mark.parametrize(
    ("keys", "fit"), [(4, True), (8, True), (16, True), (12, False), (32, False)]
)
def test_keys_of_a_recurrence_have_as_many_heads_as_divide_the_others(keys: int, fit: bool) -> None:
    """Four heads of size 4: the kernel would look for more keys than there are."""

    def tensor(*sizes: int) -> Value:
        return Value((Size(1, 0), *(Size(0, size) for size in sizes)), TensorProto.FLOAT)

    inputs = [tensor(1, 4), tensor(1, keys), tensor(1, 16), tensor(4, 4, 4), tensor(1, 4)]
    call = Call("LinearAttention", inputs, {"q_num_heads": 1, "kv_num_heads": 4}, 2)
    rule = OPERATORS["com.microsoft"]["LinearAttention"]
    if fit:
        assert [value.shape for value in rule(call)] == [inputs[2].shape, inputs[3].shape]
    else:
        with pytest.raises(GraphRefused, match="keys for another number of heads"):
            rule(call)


@pytest.mark.parametrize("shape", [of(0), Value((ROWS, Size(0, 0)), TensorProto.FLOAT)])
def test_a_reduction_of_no_numbers_is_refused(shape: Value) -> None:
    """ONNX Runtime 1.24 ends the process."""
    with pytest.raises(GraphRefused, match="a reduction in it is of no numbers"):
        OPERATORS[""]["ReduceMax"](Call("ReduceMax", [shape], {}, 1))


@pytest.mark.parametrize(
    ("domain", "name", "inputs", "says"),
    [
        ("", "LpNormalization", [of(0, 1, 3)], "a norm in it is of no numbers"),
        ("", "Mod", [of(3, dtype=TensorProto.INT8)] * 2, "a remainder in it is not of float32"),
        ("com.microsoft", SKIPPED, [of(), of(), of()], "weights of other sizes"),
        ("com.microsoft", SKIPPED, [X, of(64), of(64)], "weights of other sizes"),
        ("com.microsoft", SKIPPED, [X, X, of()], "weights of other sizes"),
        ("com.microsoft", SKIPPED, [X, X, of(64), of(63)], "weights of other sizes"),
    ],
)
def test_what_ends_the_process_of_older_runtimes_is_refused(
    domain: str, name: str, inputs: list[Value | None], says: str
) -> None:
    with pytest.raises(GraphRefused, match=says):
        OPERATORS[domain][name](Call(name, inputs, {}, 1))


def test_a_norm_of_a_sum_is_as_large_as_its_parts() -> None:
    (made,) = OPERATORS["com.microsoft"][SKIPPED](Call(SKIPPED, [X, X, of(64)], {}, 1))
    assert made == X


def test_a_recurrence_of_one_number_as_keys_is_refused() -> None:
    inputs = [of(1, 1, 4), of(), of(1, 1, 16), of(1, 4, 4, 4), of(1, 1, 4)]
    call = Call("LinearAttention", inputs, {"q_num_heads": 1, "kv_num_heads": 4}, 2)
    with pytest.raises(GraphRefused, match="a state of another shape"):
        OPERATORS["com.microsoft"]["LinearAttention"](call)


def test_the_model_in_the_box_holds_what_it_may() -> None:
    bundle = Bundle.open(models_dir() / "emoji")
    step = chosen_step(bundle).step
    made_for_the_cpu = [] if step is None else [step.graph]
    for graph in (*bundle.manifest.graphs.values(), *made_for_the_cpu):
        check.check_graph(bytes(bundle.read(graph.file)), bundle, graph)
    # A model that is exported anew has another manifest: name it there.
    assert bundle.manifest_sha256 in KNOWN_MANIFESTS


def test_a_known_manifest_vouches_for_its_own_graphs_only(tmp_path: Path) -> None:
    """Whatever is changed in a copy of the model in the box, it is read anew or refused."""
    bundle = copy_bundle(models_dir() / "emoji", tmp_path / "bundle")
    model = onnx.load(bundle / "prologue.onnx", load_external_data=False)
    replace(model, "final_modulation", node("RandomNormalLike", "old", "final_modulation"))
    (bundle / "prologue.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match=r"prologue\.onnx is altered"):
        Generator.load(bundle, backend="cpu", threads=1)
    rehash(bundle)
    assert "'RandomNormalLike' is not on the list" in refused(bundle, "prologue")


def test_a_wide_decoder_is_planned_with_what_it_takes(
    edited: Callable[..., Path], tiny: Path
) -> None:
    """Beyond twice the usual plan, the memory of a request follows from the decoder's graph."""
    copies = 2000  # of the image's 6 x 6 x 3 values

    def widen(model: onnx.ModelProto) -> None:
        constant(model, "last", [4])
        constant(model, "wide", [1, 1, 1, 1, copies])
        cast = next(item for item in model.graph.node if item.op_type == "Cast")
        model.graph.node.remove(cast)
        model.graph.node.extend(
            [
                node("Unsqueeze", "image_float last", "thin"),
                node("Expand", "thin wide", "thick"),
                node("ReduceMax", "thick last", "same", keepdims=0),
                node("Cast", "same", "image", to=TensorProto.UINT8),
            ]
        )

    bundle = edited(widen, file="decoder")
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["model"]["decoder_parameters"] = 10**8  # or it would be refused
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with Generator.load(tiny, backend="cpu", threads=1) as generator:
        image = generator.generate([1]).array
    with Generator.load(bundle, backend="cpu", threads=1) as generator:
        estimate, planned = plan_batches(generator.manifest, 1).total, generator.plan(1).total
        assert planned > 4 * 6 * 6 * 3 * copies > 2 * estimate
        assert (generator.generate([1]).array == image).all()
    little = planned / 2**20 * 0.99
    with (
        Generator.load(bundle, backend="cpu", threads=1, memory_limit_mb=little) as generator,
        pytest.raises(ValueError, match=r"one image of this model needs \d+: give memory_lim"),
    ):
        generator.generate([1])
