"""The decoder for ONNX Runtime's CPU provider: convolutions in 8 bits over the plain weights.

It is made from the plain graph, whose weights have names, and stores none of its own: they are
rounded to 8 bits by nodes without inputs, which ONNX Runtime computes once, when it loads the
graph. What differs from the plain decoder:

- Convolutions of 3×3 sum products of 8 bits. Their inputs are rounded behind swish; their outputs
  have a step and a zero for each channel, which costs nothing, since weights and biases take them
  in. Sums are of whole numbers, so they are the same on every machine.
- A map is doubled by the convolution behind it: four convolutions of 2×2, whose weights are sums of
  the 3×3, make one quarter of the pixels each, with 16 products in the place of 36.
- Large maps are in parts, some groups of channels each, so that what is done to single values
  between two convolutions stays in a core's cache.

Products of neighbours, attention and the first convolutions stay in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from aim_export.onnx.decoder_ranges import ConvolutionRanges, Range
from aim_export.onnx.decoder_source import LAST, PREFIX, DecoderSource, Map
from aim_export.onnx.graph import HALF_SUFFIX, ROWS, GraphBuilder
from aim_export.onnx.integer_convolution import MIDDLE, integer_convolution
from aim_export.onnx.packed import as_float

_MICROSOFT = "com.microsoft"
_CODEBOOK = "quantize.embedding.weight"
# Values of a part: as much as two cores' caches hold.
_PART_BYTES = 4 << 20
_MOST_PARTS = 16
# Rows and columns of the 3×3 kernel that fall on the two inputs of an even and of an odd output.
_FOLDS = (np.array([[1, 0, 0], [0, 1, 1]]), np.array([[1, 1, 0], [0, 0, 1]]))
# The pixels' levels, round((x + 1) · 127.5), as a range whose zero is a whole number and the half
# beside it.
_PIXELS = Range(np.full(3, 1 / 127.5, np.float32), np.full(3, 127, np.uint8))
_PIXELS_REST = 0.5
_NEAREST = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
# What is measured of maps, in the order of the fields of `Seen`.
_MEASURES = ("ReduceMin", "ReduceMax", "ReduceMean")
_WHAT_OF = ("read", "made")


def quantise_decoder(source: DecoderSource, ranges: Mapping[str, ConvolutionRanges]) -> ModelProto:
    """The decoder with the convolutions named in `ranges` in 8 bits; the others in float32."""
    return Decoder(source, ranges).build()


def observed_decoder(source: DecoderSource) -> tuple[ModelProto, dict[str, list[str]]]:
    """The decoder in float32 with more outputs: what convolutions read and make.

    Returns the model, and the names of those outputs by convolution, (C,) each: the least, the
    largest and the mean of each channel of what it reads, then of what it makes.
    """
    decoder = Decoder(source, {}, observe=True)
    model = decoder.build()
    return model, decoder.observed


@dataclass
class Decoder:
    """The decoder, part by part; without `ranges` in float32."""

    graph_name: ClassVar[str] = "aim_quantised_decoder"
    most_parts: ClassVar[int] = _MOST_PARTS

    source: DecoderSource
    ranges: Mapping[str, ConvolutionRanges]
    observe: bool = False
    observed: dict[str, list[str]] = field(default_factory=dict)
    constants: int = 0

    def __post_init__(self) -> None:
        self.g = GraphBuilder(self.graph_name)
        self.g.domain(_MICROSOFT, 1)
        self.tensors = {tensor.name: tensor for tensor in self.source.plain.graph.initializer}
        self.cast: set[str] = set()
        self.taps: dict[str, str] = {}

    def build(self) -> ModelProto:
        """The whole graph, its large weights outside as those of the plain one."""
        g, side = self.g, self.source.side
        g.input("tokens", np.int64, [ROWS, side * side])
        size = self._value(_CODEBOOK).shape[1]
        vectors = g.op("Gather", self._codebook(), "tokens", axis=0)
        grid = g.op("Reshape", vectors, self._sizes(0, side, side, size))
        grid = g.op("Transpose", grid, perm=[0, 3, 1, 2])
        grid = self._plain_convolution(grid, "post_quant_conv", pad=0)
        grid = self._plain_convolution(grid, "decoder.conv_in", pad=1)
        channels = self._value("decoder.conv_in.weight").shape[0]
        x = self._entered(self._split(grid, channels, side))
        steps = {
            "residual": self._residual,
            "attention": self._attended,
            "upsample": self._doubled,
        }
        for kind, name in self.source.blocks:
            g.scope(name)
            x = steps[kind](x, name)
        g.scope("out")
        self._finished(x)
        g.output("image", np.uint8, [ROWS, x.side, x.side, 3])
        model = g.build()
        for name in (name for pair in self.observed.values() for name in pair):
            model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
        return model

    def _entered(self, x: Map) -> Map:
        """The map in front of the first block."""
        return x

    def _finished(self, x: Map) -> None:
        """`image`, of what the last block made."""
        self._pictures(self._normed(x, "decoder.norm_out", LAST), x.side)

    # -- blocks ------------------------------------------------------------------------------------

    def _residual(self, x: Map, name: str) -> Map:
        """norm, swish, convolution, twice, around a shortcut."""
        made = x
        for number in (1, 2):
            conv = f"{name}.conv{number}"
            read = self._normed(made, f"{name}.norm{number}", conv)
            made = self._convolved(read, conv, x.side)
        same = x.channels == made.channels
        kept = x if same else self._projected(x, f"{name}.nin_shortcut")
        parts = [self.g.op("Add", a, b) for a, b in zip(kept.parts, made.parts, strict=True)]
        return Map(parts, made.channels, x.side)

    def _projected(self, x: Map, name: str) -> Map:
        """A product for each pixel, where a block has another number of channels behind it."""
        if name in self.ranges and x.levels is not None:
            levels, inputs = x.levels
            return self._from_levels(
                self._product(levels, name, inputs, pads=[0] * 4), name, x.side
            )
        whole = self._whole(x)
        made = self._plain_convolution(whole, name, pad=0)
        self._look(name, whole, made)
        return self._split(made, self._value(f"{name}.weight").shape[0], x.side)

    def _attended(self, x: Map, name: str) -> Map:
        """Attention of all pixels to all."""
        g, hidden = self.g, self._normed(x, f"{name}.norm", "")
        query, key, value = (
            g.op(
                "Reshape",
                self._plain_convolution(hidden, f"{name}.{part}", pad=0),
                self._sizes(0, x.channels, -1),
            )
            for part in ("q", "k", "v")
        )  # (rows, C, pixels)
        scores = self._matmul(query, key, transA=1, alpha=float(x.channels**-0.5))
        mixed = self._matmul(value, g.op("Softmax", scores, axis=-1), transB=1)
        mixed = g.op("Reshape", mixed, self._sizes(0, x.channels, x.side, x.side))
        mixed = self._plain_convolution(mixed, f"{name}.proj_out", pad=0)
        return self._split(g.op("Add", self._whole(x), mixed), x.channels, x.side)

    def _doubled(self, x: Map, name: str) -> Map:
        """Every pixel four times, then a convolution; of 2×2 for each of the four if in 8 bits."""
        g, side = self.g, x.side
        if name not in self.ranges:
            whole = self._whole(x)
            scales = g.constant([1, 1, 2, 2])
            large = g.op("Resize", whole, "", scales, mode="nearest", **_NEAREST)
            made = self._plain_convolution(large, name, pad=1)
            self._look(name, whole, made)
            return self._split(made, x.channels, 2 * side)
        found = self.ranges[name]
        parts = self._rounded_parts(x.parts, found.inputs)
        read = self._channels_last(self._joined(parts, x.channels, side))
        lines = []
        for row in range(2):
            quarters = [
                self._product(
                    read,
                    name,
                    found.inputs,
                    pads=[1 - row, 1 - column, row, column],
                    fold=(row, column),
                )
                for column in range(2)
            ]
            pairs = g.op("Concat", *quarters, axis=3)
            lines.append(g.op("Reshape", pairs, self._sizes(0, side, 1, -1)))
        made = g.op("Concat", *lines, axis=2)
        made = g.op("Reshape", made, self._sizes(0, 2 * side, 2 * side, -1))
        return self._from_levels(made, name, 2 * side)

    def _pictures(self, read: str, side: int) -> None:
        """`image`, of what comes out of the last swish."""
        if LAST in self.ranges:
            read = self._channels_last(read)
            self._product(
                read,
                LAST,
                self.ranges[LAST].inputs,
                pads=[1] * 4,
                rest=_PIXELS_REST,
                result="image",
            )
            return
        made = self._plain_convolution(read, LAST, pad=1)
        self._look(LAST, read, made)
        self._in_levels(made, result="image")

    def _in_levels(self, made: str, *, result: str = "") -> str:
        """What the last convolution made, (rows, 3, lines, side), as pixels with channels last."""
        g = self.g
        levels = g.op("Mul", g.op("Add", made, g.constant(1)), g.constant(127.5))
        levels = g.op("Clip", g.op("Round", levels), g.constant(0), g.constant(255))
        levels = g.op("Cast", levels, to=TensorProto.UINT8)
        return g.op("Transpose", levels, perm=[0, 2, 3, 1], result=result)

    # -- between convolutions ----------------------------------------------------------------------

    def _normed(self, x: Map, norm: str, reader: str) -> str:
        """The norm of `x`, for the convolution `reader` behind swish, or "" without swish.

        (rows, C, side, side): float32, or levels where `reader` is in 8 bits.
        """
        g, count = self.g, len(x.parts)
        gains = self._vector(f"{norm}.weight", count)
        shifts = self._vector(f"{norm}.bias", count)
        groups, channels = self.source.groups // count, self._sizes(0, x.channels // count, -1)
        made = []
        for part, gain, shift in zip(x.parts, gains, shifts, strict=True):
            value = g.op("Reshape", self._normalised(part, groups), channels)
            value = g.op("Add", g.op("Mul", value, gain), shift)
            made.append(self._swish(value) if reader else value)
        if reader in self.ranges:
            made = self._rounded_parts(made, self.ranges[reader].inputs)
        return self._joined(made, x.channels, x.side)

    def _normalised(self, part: str, groups: int) -> str:
        """Groups of channels with mean 0 and variance 1, (rows, groups, ..)."""
        g = self.g
        ones, zeros = (g.constant([value] * groups) for value in (1, 0))
        value = g.op("Reshape", part, self._sizes(0, groups, -1))
        return g.op("InstanceNormalization", value, ones, zeros, epsilon=self.source.eps)

    def _swish(self, value: str) -> str:
        return self._microsoft("QuickGelu", value, alpha=1.0)

    def _convolved(self, read: str, name: str, side: int) -> Map:
        """The convolution `name` of what `_normed` made for it."""
        if name in self.ranges:
            read = self._channels_last(read)
            levels = self._product(read, name, self.ranges[name].inputs, pads=[1] * 4)
            return self._from_levels(levels, name, side)
        made = self._plain_convolution(read, name, pad=1)
        self._look(name, read, made)
        return self._split(made, self._value(f"{name}.weight").shape[0], side)

    def _rounded_parts(self, parts: Sequence[str], how: Range) -> list[str]:
        """Parts in 8 bits."""
        g = self.g
        if not how.step.ndim:
            step, zero = g.constant(how.step), g.constant(how.zero, np.uint8)
            return [g.op("QuantizeLinear", part, step, zero) for part in parts]
        return [
            g.op("QuantizeLinear", part, step, zero, axis=1)
            for part, (step, zero) in zip(parts, self._pieces(how, len(parts)), strict=True)
        ]

    def _from_levels(self, levels: str, name: str, side: int) -> Map:
        """A map of the levels (rows, side, side, C) that the convolution `name` made."""
        g, how = self.g, self.ranges[name].outputs
        channels = len(how.step)
        count = self._parts(channels, side)
        # The transpose in front of a reshape, which keeps ONNX Runtime from moving it further.
        value = g.op("Transpose", levels, perm=[0, 3, 1, 2])
        value = g.op("Reshape", value, self._sizes(0, channels, -1))
        parts = [
            g.op("DequantizeLinear", part, step, zero, axis=1)
            for part, (step, zero) in zip(
                self._divided(value, count), self._pieces(how, count), strict=True
            )
        ]
        return Map(parts, channels, side, (levels, how))

    def _pieces(self, how: Range, count: int) -> Iterator[tuple[str, str]]:
        """Steps and zeros of each of `count` parts."""
        pairs = zip(np.split(how.step, count), np.split(how.zero, count), strict=True)
        for step, zero in pairs:
            yield self._own(step), self._own(zero)

    # -- convolutions ------------------------------------------------------------------------------

    def _product(
        self,
        levels: str,
        name: str,
        inputs: Range,
        *,
        pads: Sequence[int],
        fold: tuple[int, int] | None = None,
        rest: float = 0.0,
        result: str = "",
    ) -> str:
        """The convolution `name` in 8 bits of `levels` (rows, h, w, C), which `inputs` explains.

        `fold` picks a quarter of the pixels of the doubled map, by row and column; `rest` is added
        to the levels made.
        """
        g, found = self.g, self.ranges[name]
        outputs = _PIXELS if name == LAST else found.outputs
        weight, stored = self._weight(name, fold)  # float32, and the value that has it
        if inputs.step.ndim:  # a step for each channel goes into the weights
            weight = weight * inputs.step[:, None, None]
            stored = g.op("Mul", stored, self._own(inputs.step.reshape(-1, 1, 1)))
        bias = self._value(f"{name}.bias")
        whole = integer_convolution(weight, bias, inputs, outputs, found.mean, rest)
        zeros = g.constant([0] * len(weight), np.int8)
        return g.ops(
            "QLinearConv",
            levels,
            g.constant(whole.input_step),
            g.constant(whole.input_zero, np.uint8),
            g.op("QuantizeLinear", stored, self._own(whole.steps), zeros, axis=0),
            self._own(whole.factors),
            zeros,
            g.constant(1),
            g.constant(MIDDLE, np.uint8),
            self._own(whole.bias),
            results=[result],
            domain=_MICROSOFT,
            channels_last=1,
            kernel_shape=list(weight.shape[2:]),
            pads=list(pads),
        )[0]

    def _weight(self, name: str, fold: tuple[int, int] | None) -> tuple[NDArray[np.float32], str]:
        """A convolution's weight, and the value that has it in the graph."""
        g, weight = self.g, self._value(f"{name}.weight").astype(np.float32)
        node = self._stored(f"{name}.weight")
        if fold is None:
            return weight, node
        outputs, inputs, *_ = weight.shape
        row, column = (_FOLDS[side] for side in fold)
        folding = np.einsum("ui,vj->ijuv", row, column).reshape(9, 4).astype(np.float32)
        if name not in self.taps:
            self.taps[name] = g.op("Reshape", node, self._sizes(-1, 9))
        node = g.op("MatMul", self.taps[name], g.constant(folding))
        node = g.op("Reshape", node, self._sizes(outputs, inputs, 2, 2))
        return (weight.reshape(-1, 9) @ folding).reshape(outputs, inputs, 2, 2), node

    def _plain_convolution(self, x: str, name: str, *, pad: int) -> str:
        """A convolution in float32."""
        weight, bias = self._stored(f"{name}.weight"), self._stored(f"{name}.bias")
        return self.g.op("Conv", x, weight, bias, pads=[pad] * 4)

    # -- maps and parts ----------------------------------------------------------------------------

    def _parts(self, channels: int, side: int) -> int:
        """How many parts such a map is in: each of whole groups."""
        count, groups = 1, self.source.groups
        large = channels * side * side * 4
        while large > count * _PART_BYTES and count < self.most_parts and not groups % (2 * count):
            count *= 2
        return count

    def _split(self, whole: str, channels: int, side: int) -> Map:
        """A map of one value (rows, C, side, side)."""
        value = self.g.op("Reshape", whole, self._sizes(0, channels, -1))
        return Map(self._divided(value, self._parts(channels, side)), channels, side)

    def _divided(self, value: str, count: int) -> list[str]:
        """Parts of the channels of (rows, C, pixels)."""
        if count == 1:
            return [value]
        return self.g.ops("Split", value, results=[""] * count, axis=1, num_outputs=count)

    def _whole(self, x: Map) -> str:
        return self._joined(x.parts, x.channels, x.side)

    def _joined(self, parts: Sequence[str], channels: int, side: int) -> str:
        """One value (rows, C, side, side) of parts."""
        value = parts[0] if len(parts) == 1 else self.g.op("Concat", *parts, axis=1)
        return self.g.op("Reshape", value, self._sizes(0, channels, side, side))

    def _channels_last(self, x: str) -> str:
        return self.g.op("Transpose", x, perm=[0, 2, 3, 1])

    def _look(self, name: str, *maps: str) -> None:
        """Let the graph say what is like what the convolution `name` reads, and what it makes."""
        if not self.observe:
            return
        g, names = self.g, []
        for what, value in zip(_WHAT_OF, maps, strict=True):
            for measure in _MEASURES:
                result = f"observed/{what}/{measure}/{name}"
                axes = self._sizes(0, 2, 3)
                names.append(g.op(measure, value, axes, keepdims=0, result=result))
        self.observed[name] = names

    # -- values ------------------------------------------------------------------------------------

    def _codebook(self) -> str:
        """Vectors of length 1; a small codebook is stored so."""
        g, table = self.g, self._stored(_CODEBOOK)
        (lookup,) = (node for node in self.source.plain.graph.node if "tokens" in node.input)
        if lookup.input[0] in (PREFIX + _CODEBOOK, PREFIX + _CODEBOOK + HALF_SUFFIX):
            return table
        length = g.op("ReduceL2", table, self._sizes(1), keepdims=1)
        return g.op("Div", table, g.op("Max", length, g.constant(1e-12)))

    def _vector(self, name: str, count: int) -> list[str]:
        """Parts of a norm's parameters, (C / count, 1)."""
        value = self.g.op("Reshape", self._stored(name), self._sizes(-1, 1))
        if count == 1:
            return [value]
        return self.g.ops("Split", value, results=[""] * count, axis=0, num_outputs=count)

    def _value(self, name: str) -> NDArray[np.floating]:
        return self.source.values[name]

    def _stored(self, name: str) -> str:
        """A parameter of the plain graph, in float32."""
        g, name = self.g, PREFIX + name
        if name in self.tensors:
            return g.stored(self.tensors[name])
        if name not in self.cast:
            self.cast.add(name)
            as_float(g, self.tensors, name, result=name)
        return name

    def _own(self, array: NDArray[np.generic]) -> str:
        """A constant of this graph's own."""
        self.constants += 1
        return self.g.weight(f"own/{self.constants}", array)

    def _sizes(self, *numbers: int) -> str:
        return self.g.constant(numbers, np.int64)

    def _matmul(self, a: str, b: str, **attributes: float) -> str:
        return self._microsoft("FusedMatMul", a, b, **attributes)

    def _microsoft(self, op_type: str, *inputs: str, **attributes: float) -> str:
        return self.g.ops(op_type, *inputs, results=[""], domain=_MICROSOFT, **attributes)[0]
