"""Graphs that nobody meant: an honest one with bytes, numbers, operators or nodes changed."""

from __future__ import annotations

import functools
import random
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

from aim_runtime.onnx_graph.operators import OPERATORS

_OPSET = 20
_NUMBERS = (0, 1, -1, 2, 3, 7, 16, -2, 63, 64, 255, 2**31 - 1, -(2**31), 2**31, 2**62, -(2**63))
_SIZES = {  # inputs that are small integers
    *("axes", "shape", "indices", "starts", "ends", "steps", "repeats", "pads", "split", "sizes"),
    *("start", "limit", "delta"),
}
_TEXTS = (
    *("linear", "nearest", "cubic", "constant", "reflect", "edge", "wrap", "SAME_UPPER", "VALID"),
    *("tanh", "none", "silu", "gated", "delta", "gated_delta", "asymmetric", "half_pixel", "CRD"),
    *("tf_crop_and_resize", "floor", "not_larger", "", "x" * 1000, "\0"),
)


def mutated(data: bytes, seed: int) -> bytes:
    """One of the many neighbours of the graph `data`: the same for the same seed."""
    rng = random.Random(seed)
    if rng.random() < 0.3:
        return _bytes(data, rng)
    model = onnx.ModelProto.FromString(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        rng.choice((_add_node, _add_node, _add_node, _change_node, _change_tensor, _wire))(
            model, rng
        )
    try:
        return bytes(model.SerializeToString())
    except ValueError:  # a text that is none
        return data


def _bytes(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(out))
        match rng.randrange(5):
            case 0:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
            case 2:
                del out[at : at + rng.randrange(1, 40)]
            case 3:
                out[at:at] = rng.randbytes(rng.randrange(1, 12))
            case _:
                other = rng.randrange(len(out))
                out[at:at] = out[other : other + rng.randrange(1, 200)]
        if not out:
            break
    return bytes(out)


def _number(rng: random.Random) -> int:
    return rng.choice(_NUMBERS) if rng.random() < 0.5 else rng.randrange(-4, 20)


def _attribute(kind: str, rng: random.Random) -> Any:
    match kind:
        case "INT":
            return _number(rng)
        case "INTS":
            return [_number(rng) for _ in range(rng.randrange(1, 6))]
        case "FLOAT":
            return rng.choice((0.0, -1.0, 1e-30, 3e38, float("nan"), float("inf"), 0.5))
        case "FLOATS":
            return [rng.choice((0.0, -1.0, 1e30, float("nan"))) for _ in range(rng.randrange(1, 4))]
        case "STRING":
            return rng.choice(_TEXTS)
        case "TENSOR":
            return _tensor("t", rng)
        case _:
            return None


@functools.cache
def _schemas() -> dict[tuple[str, str], Any]:
    """What ONNX Runtime knows of each operator on the list."""
    found: dict[tuple[str, str], Any] = {}
    for schema in get_all_operator_schema():
        key = schema.domain, schema.name
        listed = schema.name in OPERATORS.get(schema.domain, ())
        since = found[key].since_version if key in found else 0
        if listed and since < schema.since_version <= _OPSET:
            found[key] = schema
    return dict(sorted(found.items()))


def _values(model: onnx.ModelProto) -> list[str]:
    graph = model.graph
    names = [value.name for value in (*graph.input, *graph.initializer)]
    return names + [name for node in graph.node for name in node.output if name]


def _tensor(name: str, rng: random.Random, dtype: Any = None) -> TensorProto:
    dtype = dtype or rng.choice((np.int64, np.float32, np.float32, np.uint8, np.int8, np.bool_))
    shape = [rng.choice((1, 1, 2, 3, 4, 8, 16, 0)) for _ in range(rng.randrange(0, 4))]
    count = int(np.prod(shape))
    if np.issubdtype(dtype, np.floating):
        choices = (0.0, 1.0, -1.0, 2.0, 0.5, 1e30, float("nan"))
        values = [rng.choice(choices) for _ in range(count)]
    elif dtype is np.bool_:
        values = [rng.random() < 0.5 for _ in range(count)]
    else:
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        values = [min(max(_number(rng), low), high) for _ in range(count)]
    return numpy_helper.from_array(np.array(values, dtype).reshape(shape), name)


def _add_node(model: onnx.ModelProto, rng: random.Random) -> None:
    """Another operator in front of an output, on values and constants that happen to be there."""
    graph = model.graph
    (domain, op_type), schema = rng.choice(list(_schemas().items()))
    if domain and not any(opset.domain == domain for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid(domain, 1))
    values = _values(model)
    inputs = []
    for index, expected in enumerate(schema.inputs):
        optional = str(expected.option).endswith("Optional")
        if optional and rng.random() < 0.4:
            inputs.append("")
        elif expected.name in _SIZES or rng.random() < 0.35:
            dtype = np.int64 if expected.name in _SIZES and rng.random() < 0.95 else None
            if dtype is None and rng.random() < 0.7:
                dtype = np.float32
            name = f"c{rng.getrandbits(40)}"
            graph.initializer.append(_tensor(name, rng, dtype))
            inputs.append(name)
        else:
            inputs.append(rng.choice(values))
        if str(expected.option).endswith("Variadic"):
            inputs += [rng.choice((inputs[index], *values)) for _ in range(rng.randrange(3))]
    while inputs and not inputs[-1]:
        inputs.pop()
    attributes = {}
    for name, attribute in schema.attributes.items():
        value = _attribute(str(attribute.type).rpartition(".")[2], rng)
        if value is not None and (attribute.required or rng.random() < 0.4):
            attributes[name] = value
    most = rng.choice((1, 1, len(schema.outputs)))
    outputs = [f"n{rng.getrandbits(40)}" for _ in range(most)]
    made = helper.make_node(op_type, inputs, outputs, domain=domain, **attributes)
    if rng.random() < 0.5:
        graph.node.append(made)
        return
    # Its result, or the sum of its result and what was there, is an output.
    target = rng.choice(graph.output).name
    for node in graph.node:
        for index, name in enumerate(node.output):
            if name == target:
                node.output[index] = f"{target}/old"
        for index, name in enumerate(node.input):
            if name == target:
                node.input[index] = f"{target}/old"
    made.input[:] = [f"{target}/old" if name == target else name for name in made.input]
    graph.node.append(made)
    graph.node.append(helper.make_node("Add", [f"{target}/old", outputs[0]], [target]))


def _change_node(model: onnx.ModelProto, rng: random.Random) -> None:
    node = rng.choice(model.graph.node)
    if node.attribute and rng.random() < 0.6:
        attribute = rng.choice(node.attribute)
        if attribute.type == onnx.AttributeProto.INT:
            attribute.i = _number(rng)
        elif attribute.type == onnx.AttributeProto.INTS and attribute.ints:
            attribute.ints[rng.randrange(len(attribute.ints))] = _number(rng)
        elif attribute.type == onnx.AttributeProto.STRING:
            attribute.s = rng.choice(_TEXTS).encode()
        elif attribute.type == onnx.AttributeProto.FLOAT:
            attribute.f = rng.choice((0.0, -1.0, float("nan"), 3e38))
    elif rng.random() < 0.5:
        node.op_type = rng.choice(sorted(OPERATORS[""]))
    else:
        names = ("axis", "axes", "perm", "keepdims", "to", "group", "pads", "value_ints")
        node.attribute.append(helper.make_attribute(rng.choice(names), _attribute("INT", rng)))


def _change_tensor(model: onnx.ModelProto, rng: random.Random) -> None:
    tensor = rng.choice(model.graph.initializer)
    if not tensor.external_data:
        tensor.CopyFrom(_tensor(tensor.name, rng))
    elif rng.random() < 0.5 and tensor.dims:
        tensor.dims[rng.randrange(len(tensor.dims))] = _number(rng)
    else:
        rng.choice(tensor.external_data).value = str(_number(rng))


def _wire(model: onnx.ModelProto, rng: random.Random) -> None:
    node = rng.choice([node for node in model.graph.node if node.input])
    node.input[rng.randrange(len(node.input))] = rng.choice(_values(model))
