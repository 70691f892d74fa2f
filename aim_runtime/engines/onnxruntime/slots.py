"""Slots on ONNX Runtime's CPU provider: arrays for all rows, bound as far as they are in use.

A row's scores are the same to the last bit whatever the number of rows, so that a step may compute
just those that are in use: the first r rows of each array, through bindings made when that many are
there for the first time, and kept. Weights of few bits are the exception: products of most take two
rows at a time, and a last one by itself by another kernel. It gets a second, which nobody reads.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aim_runtime.bundle.manifest import FEW_BITS, TensorSpec
from aim_runtime.engines.onnxruntime.engine import Binding, OnnxRuntimeEngine, failed
from aim_runtime.engines.slots import HostSlots
from aim_runtime.memory import give_back

if TYPE_CHECKING:
    import onnxruntime

# Of a state, in bytes: a line of the caches.
_ALIGNMENT = 64

_Arrays = Mapping[str, NDArray[Any]]


class OnnxRuntimeSlots(HostSlots):
    """Slots of an engine whose memory is the host's."""

    def __init__(
        self, engine: OnnxRuntimeEngine, session: onnxruntime.InferenceSession, rows: int
    ) -> None:
        super().__init__(engine.manifest, rows)
        self._together = 2 if engine.precision in FEW_BITS else 1
        rows = self._computed(rows)
        self._token, self._position = (np.zeros(rows, np.int64) for _ in range(2))
        manifest, step = engine.manifest, engine.manifest.graphs["step"]
        self._engine = engine
        self._session = session
        self._no_class: _Arrays | None = None  # its conditioning, once it is known
        try:
            self._conditioning: _Arrays = {
                spec.name: _zeros(spec, rows) for spec in manifest.conditioning
            }
            # Each step reads one set and writes the other; some arrays are in both.
            names = [pair.input for pair in manifest.state]
            apart = [name for name in names if name not in engine.in_place]
            arrays = _in_one_block([step.input(name) for name in (*names, *apart)], rows)
            one, written = arrays[: len(names)], dict(zip(apart, arrays[len(names) :], strict=True))
            other = [written.get(name, array) for name, array in zip(names, one, strict=True)]
            self._states: list[list[NDArray[Any]]] = [one, other]
            self._logits: NDArray[np.float32] = _zeros(step.output("logits"), rows)  # (R, V)
        except (MemoryError, ValueError) as error:  # ValueError: more than an address can tell
            raise failed(error) from error
        self._turn = 0
        self._bindings: dict[tuple[int, int], Binding] = {}  # by number of rows and turn

    def close(self) -> None:
        """Give the memory back; the object is useless afterwards."""
        self._bindings.clear()
        self._states, self._conditioning = [], {}
        give_back()  # decoding needs other memory

    def _join(self, rows: Sequence[int], class_ids: Sequence[int]) -> None:
        known = {} if self._no_class is None else {self._model.num_classes: self._no_class}
        asked = sorted(set(class_ids) - set(known))
        if asked:
            found = self._engine.prologue(np.array(asked, np.int64))
            values = {name: value.numpy() for name, value in found.items()}
            for index, class_id in enumerate(asked):
                known[class_id] = {name: value[index] for name, value in values.items()}
        if self._model.num_classes in asked:
            self._no_class = {n: v.copy() for n, v in known[self._model.num_classes].items()}
        for row, class_id in zip(rows, class_ids, strict=True):
            for name, array in self._conditioning.items():
                array[row] = known[class_id][name]
            # A graph may let the old state count as zero by multiplying with 0, which leaves a NaN
            # what it is: an image that failed would make those fail that come after it.
            for array in self._states[self._turn]:
                array[row] = 0

    def _move(self, source: int, target: int) -> None:
        for array in (*self._states[self._turn], *self._conditioning.values()):
            array[target] = array[source]

    def _advance(self, rows: int) -> NDArray[np.float32]:
        computed = self._computed(rows)
        try:
            binding = self._bindings.get((computed, self._turn))
            if binding is None:
                binding = self._bindings[computed, self._turn] = self._bind(computed, self._turn)
            binding.run()
        except Exception as error:
            raise failed(error) from error
        self._turn = 1 - self._turn
        return self._logits[:rows]

    def _computed(self, rows: int) -> int:
        """How many rows a step computes so that the first `rows` have the bits they always have."""
        return -(-rows // self._together) * self._together

    def _bind(self, rows: int, turn: int) -> Binding:
        import onnxruntime

        def first(array: NDArray[Any]) -> onnxruntime.OrtValue:
            return onnxruntime.OrtValue.ortvalue_from_numpy(array[:rows])  # the same memory

        inputs = {"token": self._token, "position": self._position, **self._conditioning}
        return Binding(
            self._engine,
            self._session,
            {name: first(array) for name, array in inputs.items()},
            [first(array) for array in self._states[turn]],
            [first(array) for array in self._states[1 - turn]],
            self._logits[:rows],
        )


def _in_one_block(specs: Sequence[TensorSpec], rows: int) -> list[NDArray[Any]]:
    """Tensors of zeros that lie one behind the other.

    NumPy asks the system for large pages where it takes 4 MiB and more, which most states of their
    own do not have; reading and writing every state in every step is a tenth faster in them.
    """
    shapes = [spec.concrete_shape(rows) for spec in specs]
    sizes = [
        math.prod(s) * np.dtype(spec.dtype).itemsize for s, spec in zip(shapes, specs, strict=True)
    ]
    starts = [0, *itertools.accumulate(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)]
    block = np.zeros(starts[-1] + _ALIGNMENT, np.uint8)
    first = -block.ctypes.data % _ALIGNMENT
    return [
        block[first + start :][:size].view(spec.dtype).reshape(shape)
        for spec, shape, size, start in zip(specs, shapes, sizes, starts[:-1], strict=True)
    ]


def _zeros(spec: TensorSpec, rows: int) -> NDArray[Any]:
    return np.zeros(spec.concrete_shape(rows), spec.dtype)
