"""Ask our plugin what TensorRT would ask it, through NVIDIA's own Python layer, without TensorRT.

``python tensorrt_layer.py H P S K`` needs the package ``tensorrt_bindings`` and, where the linker
looks, libraries that have the names it links to. What judges the plugin is NVIDIA's: the checks of
``register`` and ``aot_impl`` and the class that wraps them. Stand-ins are the registry, and the
symbolic integers and shapes that TensorRT itself would hand over.

Prints what was answered as JSON, evaluated for several numbers of rows.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import tensorrt_bindings as trt

Value = Callable[[int], int]


class Plain:
    """In place of a class that only carries values to C++."""


class Dims(list):  # type: ignore[type-arg]
    def __init__(self, length: int) -> None:
        super().__init__([None] * length)


class Registry:
    def __init__(self) -> None:
        self.creators: dict[tuple[str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> None:
        self.creators[namespace, creator.name] = creator

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.creators[namespace, name]


class Expression(trt.IDimensionExpr):  # type: ignore[misc]
    """A symbolic integer: a function of the number of rows."""

    value: Value
    constant: bool

    @classmethod
    def of(cls, value: Value, constant: bool) -> Expression:
        found: Expression = cls.__new__(cls)  # it has no constructor
        found.value, found.constant = value, constant
        return found

    def is_constant(self) -> bool:
        return self.constant

    def is_size_tensor(self) -> bool:
        return False

    def get_constant_value(self) -> int:
        assert self.constant
        return self.value(0)


class Expressions:
    """TensorRT's builder of symbolic integers."""

    def constant(self, value: int) -> Expression:
        return Expression.of(lambda rows: value, True)

    def operation(self, kind: Any, left: Expression, right: Expression) -> Expression:
        compute = {
            trt.DimensionOperation.SUM: lambda a, b: a + b,
            trt.DimensionOperation.PROD: lambda a, b: a * b,
        }[kind]
        return Expression.of(
            lambda rows: compute(left.value(rows), right.value(rows)),
            left.constant and right.constant,
        )


class Setter:
    """Receives the extra integers."""

    def __init__(self) -> None:
        self.nbSymExprs = -1
        self.values: dict[int, Any] = {}

    def __setitem__(self, index: int, value: Any) -> None:
        self.values[index] = value


registry = Registry()
trt.get_plugin_registry = lambda: registry
trt.ISymExpr = Plain
trt.DimsExprs = Dims
sys.modules["tensorrt"] = trt
import tensorrt_bindings.plugin as layer  # noqa: E402

sys.modules["tensorrt.plugin"] = layer
from aim_export.onnx.state_scan import INPUTS, OUTPUTS  # noqa: E402
from aim_export.tensorrt import plugin as ours  # noqa: E402
from aim_export.tensorrt.scan import ScanSizes  # noqa: E402

TYPES = {"position": trt.int64}


def descriptor(name: str, shape: tuple[int, ...]) -> Any:
    found = trt.DynamicPluginTensorDesc()
    found.desc = trt.PluginTensorDesc()
    found.desc.dims = shape
    found.desc.type = TYPES.get(name, trt.float32)
    found.desc.format = trt.TensorFormat.LINEAR
    return found


def main(sizes: ScanSizes) -> dict[str, Any]:
    assert ours.PLUGIN_ID == "aim::StateScan"
    creator = registry.get_creator("StateScan", "1", "aim")
    plugin = creator.create_plugin(
        "StateScan",
        "aim",
        trt.PluginFieldCollection([]),
        trt.TensorRTPhase.BUILD,
        trt.QuickPluginCreationRequest.STRICT_AOT,
    )
    shapes = sizes.shapes(-1)  # -1: known when it runs
    types = [TYPES.get(name, trt.float32) for name in INPUTS]
    output_types = plugin.get_output_data_types(types, [len(shapes[name]) for name in INPUTS])
    inputs = [
        [
            Expression.of(lambda rows, size=size: rows if size < 0 else size, size >= 0)
            for size in shapes[name]
        ]
        for name in INPUTS
    ]
    output_shapes = plugin.get_output_shapes(inputs, [], Expressions())
    both = [descriptor(name, shapes[name]) for name in (*INPUTS, *OUTPUTS)]
    combination = plugin.get_supported_format_combinations(both, len(INPUTS))
    plugin.configure_plugin(both[: len(INPUTS)], both[len(INPUTS) :])
    tactics = plugin.get_valid_tactics()
    plugin.set_tactic(0)
    launch, extra = Plain(), Setter()
    plugin.get_launch_params(inputs, both, len(INPUTS), launch, extra, Expressions())
    static = [item.desc for item in both]
    name, ptx = plugin.get_kernel(static[: len(INPUTS)], static[len(INPUTS) :])

    refused = ""
    try:
        wrong = [trt.float16 if item == "ssm_state" else t for item, t in zip(INPUTS, types)]  # noqa: B905
        plugin.get_output_data_types(wrong, [len(shapes[item]) for item in INPUTS])
    except ValueError as error:
        refused = str(error)
    return {
        "version": trt.__version__,
        "aliased": [plugin.get_aliased_input(index) for index in range(len(OUTPUTS))],
        "output_types": [str(item) for item in output_types],
        "formats": [[str(item.type), str(item.format)] for item in combination],
        "tactics": tactics,
        "rows": {
            rows: {
                "shapes": [[size.value(rows) for size in shape] for shape in output_shapes],
                "launch": {key: item.expr.value(rows) for key, item in vars(launch).items()},
            }
            for rows in (1, 2, 128)
        },
        "extra": extra.nbSymExprs,
        "kernel": name,
        "ptx": ptx.decode(),
        "refused": refused,
    }


if __name__ == "__main__":
    print(json.dumps(main(ScanSizes(*map(int, sys.argv[1:])))))
