"""Whether a bundle may hold a graph, decided before an engine sees a byte of it.

What is on no list is refused: operators, functions, places of weights. Of what is allowed, the
sizes of all values are bounded, with the memory and the work that one row takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from aim_runtime.bundle import Bundle
from aim_runtime.bundle.manifest import GraphSpec, Manifest, TensorSpec
from aim_runtime.errors import BundleError
from aim_runtime.onnx_graph.cost import Step, live_bytes, peak_bytes, total_bytes
from aim_runtime.onnx_graph.layout_operators import stored_value
from aim_runtime.onnx_graph.limits import GraphLimits, graph_limits
from aim_runtime.onnx_graph.model import DTYPES, Border, Function, Model, Node, read_model
from aim_runtime.onnx_graph.operator_call import Call, Work
from aim_runtime.onnx_graph.operators import OPERATORS, OPSETS
from aim_runtime.onnx_graph.protobuf import MalformedMessage, RefusedField
from aim_runtime.onnx_graph.shapes import GraphRefused, Size, Value, fixed
from aim_runtime.quoting import shortened, shown

SCAN = ("aim", "StateScan")
"""Domain and name of the one function that a graph may bring along."""

# By which TensorRT finds our kernel for it.
_SCAN_ATTRIBUTES = {"plugin_namespace", "aot"}

_IR_VERSIONS = range(8, 14)
# By these bytes ONNX Runtime takes a file for one of its own format, whatever else it is.
_ORT_FORMAT = b"ORTM"
# What is planned for values that are there at once. Engines keep parts of memory that smaller ones
# had and larger ones do not fit into, and take some besides: weights in float32, packed matrices.
# ONNX Runtime 1.32 takes 138 MiB for the published decoder's 128, and 169 for the 104 of that with
# fewer multiplications.
_ARENA = 1.5
_BUFFERS = 16 << 20
_MAX_NODES = 1 << 14
_MAX_REASON = 160


def check_graph(data: bytes, bundle: Bundle, graph: GraphSpec) -> int:
    """Check that `data` may be the file of the `graph` of `bundle`.

    Returns what is `row_bytes` of a `CheckedGraph`. Raises BundleError.
    """
    where = f"{bundle.path}: {shortened(graph.file, 40)}"
    if data[4:8] == _ORT_FORMAT:
        raise BundleError(f"{where} is a graph that no bundle may hold: it is in ORT's own format")
    try:
        model = read_model(data)
    except MalformedMessage as error:
        reason = shortened(str(error), _MAX_REASON)
        raise BundleError(f"{where} is not a graph that ONNX Runtime can run ({reason})") from None
    except RefusedField as error:
        raise BundleError(f"{where} is a graph that no bundle may hold: {error}") from None
    for side, specs, found in (
        ("input", graph.inputs, model.inputs),
        ("output", graph.outputs, model.outputs),
    ):
        _check_border(where, side, specs, found)
    try:
        return check_model(model, bundle.manifest, graph)
    except GraphRefused as error:
        reason = shortened(str(error), _MAX_REASON)
        raise BundleError(f"{where} is a graph that no bundle may hold: {reason}") from None


def check_model(model: Model, manifest: Manifest, graph: GraphSpec) -> int:
    """As `check_graph`; raise GraphRefused unless `model` may be the `graph` of `manifest`."""
    if model.ir_version not in _IR_VERSIONS:
        raise GraphRefused(f"it is of IR version {model.ir_version}")
    functions = _functions(model)
    _check_opsets(model.opsets, functions)
    _check_weights(model, graph.weights, manifest.files[graph.weights].size)
    trace = _Trace(functions)
    names = {name: trace.add(stored_value(t)) for name, t in model.initializers.items()}
    for spec in graph.inputs:
        if spec.name in names:
            raise GraphRefused(f"it gives its input {shown(spec.name)} a value")
        names[spec.name] = trace.add(_input_value(spec))
    trace.run(model.nodes, names)
    for spec in graph.outputs:
        if spec.name not in names:
            raise GraphRefused(f"nothing in it makes its output {shown(spec.name)}")
    results = frozenset(names[spec.name] for spec in graph.outputs)
    weights = sum(math.prod(tensor.shape) for tensor in model.initializers.values())
    return _check_cost(trace, results, graph_limits(manifest, graph, weights))


def _check_border(
    where: str, side: str, promised: tuple[TensorSpec, ...], found: tuple[Border, ...]
) -> None:
    """The graph's own inputs or outputs must be the manifest's: their sizes decide on buffers."""
    if len(found) != len(promised):
        raise BundleError(f"{where} has {len(found)} {side}s, the manifest says {len(promised)}")
    by_name = {border.name: border for border in found}
    for spec in promised:
        border = by_name.get(spec.name)
        # A size that the graph leaves open is checked by the engine when it runs.
        if (
            border is None
            or DTYPES[border.dtype] != spec.dtype
            or len(border.shape) != len(spec.shape)
            or any(
                isinstance(size, int) and size != wanted
                for size, wanted in zip(border.shape, spec.shape, strict=True)
            )
        ):
            has = "nothing"
            if border is not None:
                has = f"{DTYPES[border.dtype]} {shortened(str(list(border.shape)), 60)}"
            raise BundleError(
                f"{where} has {has} as {side} {shown(spec.name)}, "
                f"the manifest says {spec.dtype} {shortened(str(list(spec.shape)), 60)}"
            )


def _input_value(spec: TensorSpec) -> Value:
    dtype = {name: dtype for dtype, name in DTYPES.items()}[spec.dtype]
    sizes = (Size(1, 0) if isinstance(size, str) else fixed(size) for size in spec.shape)
    return Value(tuple(sizes), dtype)


def _functions(model: Model) -> dict[tuple[str, str], Function]:
    if any((function.domain, function.name) != SCAN for function in model.functions):
        raise GraphRefused("it brings a function along that is not aim::StateScan")
    if len(model.functions) > 1:
        raise GraphRefused("it brings aim::StateScan along twice")
    return {SCAN: model.functions[0]} if model.functions else {}


def _check_opsets(opsets: Mapping[str, int], functions: Mapping[tuple[str, str], Function]) -> None:
    own = {SCAN[0]: range(1, 2)} if functions else {}
    for domain, version in opsets.items():
        if version not in (OPSETS | own).get(domain, ()):
            raise GraphRefused(f"it asks for version {version} of operators {shown(domain)}")
    for function in functions.values():
        # One meaning of each operator in a file.
        if any(opsets.get(domain) != version for domain, version in function.opsets.items()):
            raise GraphRefused("its function asks for other versions of operators than it does")


def _check_weights(model: Model, file: str, size: int) -> None:
    """Weights outside of the graph lie in its own file, and no byte of it is two tensors'."""
    total = 0
    for name, tensor in model.initializers.items():
        if tensor.external is None:
            continue
        location, offset, length = tensor.external
        if location != file:
            raise GraphRefused(
                f"its tensor {shown(name)} is in {shown(location)}, and may be in {shown(file)}"
            )
        if length != tensor.size or offset + length > size:
            raise GraphRefused(
                f"its tensor {shown(name)} of {tensor.size} bytes is given {length} bytes "
                f"from {offset} on in a file of {size}"
            )
        total += length
    if total > size:
        raise GraphRefused(f"its tensors take {total} bytes out of a file of {size}")


def _check_cost(trace: _Trace, results: frozenset[int], limits: GraphLimits) -> int:
    a_row = total_bytes(trace.steps)
    planned = 0
    if a_row > limits.planned_row_bytes:
        a_row = peak_bytes(trace.steps, results)
        planned = _planned(a_row, live_bytes(trace.steps, results), limits)
    for what, found, most in (
        ("bytes of memory a row", a_row, limits.row_bytes),
        ("bytes of memory", trace.fixed_bytes, limits.fixed_bytes),
        ("operations a row", trace.work[0], limits.row_work),
        ("operations", trace.work[1], limits.fixed_work),
    ):
        if found > most:
            raise GraphRefused(
                f"it takes up to {found} {what}; one of the manifest's geometry needs "
                f"at most {most}"
            )
    return planned


def _planned(in_any_order: int, in_this_order: int, limits: GraphLimits) -> int:
    """What is `row_bytes` of a `CheckedGraph`, by the bytes of values that are there at once.

    Less than the geometry's plan is at least half of what the nodes take in any order.
    """
    if in_any_order > limits.planned_row_bytes:
        return in_any_order
    planned = max(in_any_order // 2, int(_ARENA * in_this_order) + _BUFFERS)
    return planned if 2 * planned < limits.planned_row_bytes else 0


# -- following the nodes --------------------------------------------------------------------------


@dataclass
class _Trace:
    """The values of a graph, by number, and what making them takes."""

    functions: Mapping[tuple[str, str], Function]
    values: list[Value] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    fixed_bytes: int = 0
    work: Work = (0, 0)
    _calls: dict[tuple[Value, ...], tuple[list[Value], int, int, Work]] = field(
        default_factory=dict
    )

    def add(self, value: Value) -> int:
        self.values.append(value)
        return len(self.values) - 1

    def run(self, nodes: tuple[Node, ...], names: dict[str, int]) -> None:
        """Bound the outputs of `nodes` and add their numbers to `names`."""
        if len(nodes) > _MAX_NODES:
            raise GraphRefused(f"it has {len(nodes)} nodes; no model has {_MAX_NODES}")
        for node in nodes:
            self._node(node, names)

    def _node(self, node: Node, names: dict[str, int]) -> None:
        for name in node.inputs:
            if name and name not in names:
                raise GraphRefused(
                    f"its {shown(node.op_type)} takes {shown(name)}, which nothing before it makes"
                )
        numbers = [names[name] if name else -1 for name in node.inputs]
        inputs = [self.values[number] if number >= 0 else None for number in numbers]
        try:
            values, extra, work = self._call(node, inputs)
            taken = [value.bytes for value in values]
        except GraphRefused as error:
            raise GraphRefused(f"{error} (in a node {shown(node.op_type)})") from None
        if len(values) < len(node.outputs):
            raise GraphRefused(f"its {shown(node.op_type)} has more outputs than there are")
        outputs = []
        for name, value in zip(node.outputs, values, strict=False):
            if name in names:
                raise GraphRefused(f"it makes {shown(name)} twice")
            outputs.append(self.add(value))
            if name:
                names[name] = outputs[-1]
        made = tuple(rows for rows, _ in taken[: len(outputs)])
        read = tuple(number for number in numbers if number >= 0)
        self.steps.append(Step(read, tuple(outputs), made, extra[0]))
        self.fixed_bytes += extra[1] + sum(rest for _, rest in taken)
        self.work = (self.work[0] + work[0], self.work[1] + work[1])

    def _call(self, node: Node, inputs: list[Value | None]) -> tuple[list[Value], Work, Work]:
        """Bounds of a node's outputs, the bytes it takes beside them, and its work."""
        function = self.functions.get((node.domain, node.op_type))
        if function is not None:
            return self._inside(node, function, inputs)
        rule = OPERATORS.get(node.domain, {}).get(node.op_type)
        if rule is None:
            name = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
            raise GraphRefused(f"the operator {shown(name)} is not on the list")
        call = Call(node.op_type, inputs, node.attributes, len(node.outputs))
        values = rule(call)
        rows, rest = call.operations
        for value in values:
            made = value.bytes
            rows, rest = rows + made[0], rest + made[1]
        return values, call.extra, (rows, rest)

    def _inside(
        self, node: Node, function: Function, inputs: list[Value | None]
    ) -> tuple[list[Value], Work, Work]:
        """As `_call`, of a call of a function. Layers are alike, so most calls were seen before."""
        if not node.attributes.keys() <= _SCAN_ATTRIBUTES:
            raise GraphRefused("it calls aim::StateScan with other attributes than it has")
        if len(inputs) != len(function.inputs) or None in inputs:
            raise GraphRefused("it calls aim::StateScan with other inputs than it has")
        # Without numbers, of which each layer has its own.
        values = [Value(value.shape, value.dtype) for value in inputs if value is not None]
        key = tuple(values)
        if key not in self._calls:
            trace = _Trace({})
            names = {
                name: trace.add(value) for name, value in zip(function.inputs, values, strict=True)
            }
            if len(names) != len(inputs):
                raise GraphRefused("its function has two inputs of one name")
            trace.run(function.nodes, names)
            if any(name not in names for name in function.outputs):
                raise GraphRefused("nothing in its function makes one of its outputs")
            values = [trace.values[names[name]] for name in function.outputs]
            inside = total_bytes(trace.steps) - sum(value.bytes[0] for value in values)
            self._calls[key] = values, max(inside, 0), trace.fixed_bytes, trace.work
        values, extra, rest, work = self._calls[key]
        return values, (extra, rest), work
