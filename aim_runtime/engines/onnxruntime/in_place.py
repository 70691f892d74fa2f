"""Whether ONNX Runtime may write new states where it reads the old ones.

That saves a pass over the state, which decides the speed of many rows: LinearAttention copies the
old state before it works on the copy, and a copy onto itself costs nothing. It is not what ONNX
promises, and other graphs then compute wrong results in silence. So a bundle says for which states
it may be tried, and a step of this graph with this ONNX Runtime says whether it works.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aim_runtime.engines.base import Conditioning
from aim_runtime.engines.onnxruntime.engine import Binding, OnnxRuntimeEngine

if TYPE_CHECKING:
    import onnxruntime


def works_in_place(
    engine: OnnxRuntimeEngine,
    session: onnxruntime.InferenceSession,
    names: Collection[str],
) -> bool:
    """Whether a step gives the same, to the last bit, with the states `names` written in place.

    One row takes a step from a random state, both ways.
    """
    rng = np.random.default_rng(0)
    step = engine.manifest.graphs["step"]
    conditioning = engine.prologue(np.zeros(1, np.int64))
    state = []
    for pair in engine.manifest.state:
        spec = step.input(pair.input)
        random = rng.standard_normal(spec.concrete_shape(1), np.float32)
        state.append(random.astype(spec.dtype, copy=False))
    apart = _stepped(engine, session, conditioning, state, ())
    together = _stepped(engine, session, conditioning, state, names)
    return all(one.tobytes() == two.tobytes() for one, two in zip(apart, together, strict=True))


def _stepped(
    engine: OnnxRuntimeEngine,
    session: onnxruntime.InferenceSession,
    conditioning: Conditioning,
    state: Sequence[NDArray[Any]],
    names: Collection[str],
) -> list[NDArray[Any]]:
    """The scores and new states of one row's step from `state`, those of `names` in place."""
    import onnxruntime

    value = onnxruntime.OrtValue.ortvalue_from_numpy  # over the same memory
    old = [array.copy() for array in state]
    new = [
        array if pair.input in names else np.zeros_like(array)
        for pair, array in zip(engine.manifest.state, old, strict=True)
    ]
    logits = np.zeros((1, engine.manifest.model.vocab_size), np.float32)
    first = {"token": value(np.zeros(1, np.int64)), "position": value(np.ones(1, np.int64))}
    inputs = {**first, **conditioning}
    Binding(engine, session, inputs, list(map(value, old)), list(map(value, new)), logits).run()
    return [logits, *new]
