"""One call of an operator, as the rules see it: its inputs and attributes, and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from aim_runtime.onnx_graph.shapes import GraphRefused, Value, axis_of

Work = tuple[int, int]
"""An amount: so much a row, and so much whatever the rows."""


class Call:
    """A node with bounds of its inputs.

    Attributes:
        op_type: The operator.
        inputs: None where one is left out.
        attributes: By name.
        outputs: How many there are.
        operations: Multiply-adds and the like, as far as rules have told.
        extra: Bytes that it takes besides its outputs while it runs.
    """

    def __init__(
        self,
        op_type: str,
        inputs: Sequence[Value | None],
        attributes: dict[str, Any],
        outputs: int,
    ) -> None:
        self.op_type = op_type
        self.inputs = inputs
        self.attributes = attributes
        self.outputs = outputs
        self.operations: Work = (0, 0)
        self.extra: Work = (0, 0)

    def input(self, index: int) -> Value:
        """An input that must be there."""
        value = self.inputs[index] if index < len(self.inputs) else None
        if value is None:
            raise GraphRefused("it lacks an input")
        return value

    def given(self, index: int) -> Value | None:
        """An input that may be left out."""
        return self.inputs[index] if index < len(self.inputs) else None

    def integer(self, name: str, default: int) -> int:
        """A whole number among the attributes."""
        value = self.attributes.get(name, default)
        if not isinstance(value, int):
            raise GraphRefused(f"its attribute {name} is no whole number")
        return value

    def integers(self, name: str) -> list[int]:
        """Whole numbers among the attributes; none where there is no such attribute."""
        values = self.attributes.get(name, [])
        if not isinstance(values, list) or not all(isinstance(v, int) for v in values):
            raise GraphRefused(f"its attribute {name} is no list of whole numbers")
        return values

    def axes(self, rank: int) -> list[int] | None:
        """The axes it works on, out of an attribute or of its second input; None for no word."""
        given = self.given(1)
        axes = self.integers("axes") if given is None else given.constants()
        if given is not None and "axes" in self.attributes:
            raise GraphRefused("it gives its axes twice")
        if given is None and "axes" not in self.attributes:
            return None
        found = [axis_of(axis, rank) for axis in axes]
        if len(set(found)) != len(found):
            raise GraphRefused("it names an axis twice")
        return found or None

    def work(self, amount: Work) -> None:
        """Note operations beyond one for each element of the outputs."""
        self.operations = (self.operations[0] + amount[0], self.operations[1] + amount[1])

    def scratch(self, amount: Work) -> None:
        """Note bytes that are taken while it runs."""
        self.extra = (self.extra[0] + amount[0], self.extra[1] + amount[1])


Rule = Callable[[Call], list[Value]]
"""Bounds of a call's outputs. Raises GraphRefused."""
