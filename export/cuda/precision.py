"""The number formats that a plan is made for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """Element types by role, in the plan's names.

    Attributes:
        matrix: the two projections of every layer, and the word table, which is the head too.
        table: the table of classes and the conditioning's matrices, which are read once an image:
            int8 there would save no time.
        activation: what enters a product.
        state: the recurrent state; float16 with a factor for each channel of a head, int8 with one
            for each channel and one for each column (`aim_export.cuda.kernels.short_states`).
        history: the tokens since the state was last rewritten.
        ring: the last inputs of the convolution.
    """

    matrix: str
    table: str
    activation: str
    state: str
    history: str
    ring: str

    @property
    def quantised(self) -> bool:
        """Whether `matrix` is int8 with a factor for each output."""
        return self.matrix == "int8"


# Sums, norms, the residual and the scan's arithmetic are float32 in all of them.
FORMATS: Mapping[str, Format] = {
    "fp32": Format(
        matrix="float32",
        table="float32",
        activation="float32",
        state="float32",
        history="float32",
        ring="float32",
    ),
    "fp16": Format(
        matrix="float16",
        table="float16",
        activation="float16",
        state="float32",
        history="float32",
        ring="float32",
    ),
    "fp16-state16": Format(
        matrix="float16",
        table="float16",
        activation="float16",
        state="float16",
        history="float16",
        ring="float32",
    ),
    "fp16-state8": Format(
        matrix="float16",
        table="float16",
        activation="float16",
        state="int8",
        history="float16",
        ring="float16",
    ),
    "int8": Format(
        matrix="int8",
        table="float16",
        activation="float16",
        state="float32",
        history="float32",
        ring="float32",
    ),
    "int8-state16": Format(
        matrix="int8",
        table="float16",
        activation="float16",
        state="float16",
        history="float16",
        ring="float32",
    ),
    "int8-state8": Format(
        matrix="int8",
        table="float16",
        activation="float16",
        state="int8",
        history="float16",
        ring="float16",
    ),
}
