"""The decoder for ONNX Runtime's CPU provider in float32, with fewer multiplications.

Convolutions over maps that are large enough are Winograd's (`aim_export.onnx.winograd`), which is
the same arithmetic in another order. Maps of that size have their channels last and stay in strips
of lines (`aim_export.onnx.strips`) from the first to the pixels: of a norm only sums are taken of
the whole, and what it does to a value, and swish, is done to the lines that a convolution is about
to read. A convolution's bias waits for the next norm, which takes it in. All else is the plain
decoder.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from onnx import ModelProto

from aim_export.onnx.decoder_source import LAST, PREFIX, DecoderSource, Map
from aim_export.onnx.packed import as_float
from aim_export.onnx.quantised_decoder import Decoder
from aim_export.onnx.strips import (
    Prepare,
    StripedMap,
    as_half,
    group_norm,
    lines_of,
    moments_of,
)
from aim_export.onnx.winograd import WinogradConvolution, pays, strip_edges
from aim_runtime.onnx_graph.cost import MAX_TRACED

# Of a map: more of them save less memory than they cost in nodes.
_MOST_STRIPS = 11
# Of a weight as float32. Smaller ones are laid out for their kernels when the graph is loaded.
_LARGE_WEIGHT_BYTES = 4 << 20
# As float32. Of rounded weights, maps from that size on rest in half precision.
_LARGE_MAP_BYTES = 16 << 20

_Lines = Callable[[int, int, str], str]
"""Makes nodes of some lines of a map: from, to, and a value that must be there before."""


def rearrange_decoder(source: DecoderSource) -> ModelProto | None:
    """The decoder with Winograd's convolutions; None if it has none that is worth it."""
    doublings = sum(kind == "upsample" for kind, _ in source.blocks)
    if not pays(source.side << doublings):
        return None
    for most in range(_MOST_STRIPS, 1, -1):
        model = _FloatDecoder(source, {}, most_strips=most).build()
        if len(model.graph.node) <= MAX_TRACED:  # with more, its memory would not be known
            return model
    return _FloatDecoder(source, {}, most_strips=1).build()


@dataclass
class _FloatDecoder(Decoder):
    """Maps for which `pays` are striped."""

    graph_name = "aim_float_decoder"
    most_parts = 1

    most_strips: int = _MOST_STRIPS

    def __post_init__(self) -> None:
        super().__post_init__()
        blocks = list(self.source.blocks)
        # All others are in front of a norm.
        self._before_doubling = {
            name for (_, name), (kind, _) in itertools.pairwise(blocks) if kind == "upsample"
        }

    def _entered(self, x: Map) -> Map:
        return self._striped(x) if pays(x.side) else x

    # -- blocks ------------------------------------------------------------------------------------

    def _residual(self, x: Map, name: str) -> Map:
        if not isinstance(x, StripedMap):
            return super()._residual(x, name)
        read = self._swished(x, f"{name}.norm1")
        made = self._convolved_strips(x, f"{name}.conv1", x.side, read)
        kept, offset = self._kept(x, made.channels, name)
        read = self._swished(made, f"{name}.norm2")
        normed = name not in self._before_doubling
        made = self._convolved_strips(made, f"{name}.conv2", x.side, read, kept, normed=normed)
        if offset:
            made.offset = self.g.op("Add", made.offset, offset)
        return made

    def _kept(self, x: StripedMap, channels: int, name: str) -> tuple[_Lines, str]:
        """Lines of what a residual block adds to what its convolutions make, and their offset."""
        g = self.g

        if x.channels == channels:
            return (
                # Half precision waits, or ONNX Runtime would make float32 of the whole map first.
                lambda begin, end, before: lines_of(g, x, begin, end, [before], waiting=x.half),
                x.offset,
            )
        name = f"{name}.nin_shortcut"
        weight = g.op("Reshape", self._stored(f"{name}.weight"), self._sizes(channels, -1))
        offset = self._stored(f"{name}.bias")
        if x.offset:
            row = g.op("Reshape", x.offset, self._sizes(1, -1))
            row = g.op("Reshape", self._matmul(row, weight, transB=1), self._sizes(-1))
            offset = g.op("Add", offset, row)

        def projected(begin: int, end: int, before: str) -> str:
            lines = lines_of(g, x, begin, end, [before], waiting=True)
            return self._matmul(lines, weight, transB=1)

        return projected, offset

    def _attended(self, x: Map, name: str) -> Map:
        if not isinstance(x, StripedMap):
            return super()._attended(x, name)
        made = super()._attended(x, name)
        return self._striped(made, normed=name not in self._before_doubling)

    def _doubled(self, x: Map, name: str) -> Map:
        if not pays(2 * x.side):
            return super()._doubled(x, name)
        x = x if isinstance(x, StripedMap) else self._striped(x, normed=False)
        offset = x.offset

        def prepare(lines: str) -> str:
            return self.g.op("Add", lines, offset) if offset else lines

        return self._convolved_strips(x, name, 2 * x.side, prepare)

    def _finished(self, x: Map) -> None:
        assert isinstance(x, StripedMap)  # the last map is the largest
        g, prepare, before = self.g, self._swished(x, "decoder.norm_out"), x.last()
        weight, bias = (self._stored(f"{LAST}.{what}") for what in ("weight", "bias"))
        levels: list[str] = []
        for first, last in x.ranges():
            begin, end = max(first - 1, 0), min(last + 1, x.side)
            read = prepare(lines_of(g, x, begin, end, levels[-1:] or before))
            read = self._channels_first(read)
            pads = [begin - first + 1, 1, last + 1 - end, 1]
            levels.append(self._in_levels(g.op("Conv", read, weight, bias, pads=pads)))
        g.op("Concat", *levels, axis=1, result="image")

    # -- weights -----------------------------------------------------------------------------------

    def _plain_convolution(self, x: str, name: str, *, pad: int) -> str:
        weight, bias = self._behind(x, f"{name}.weight"), self._stored(f"{name}.bias")
        return self.g.op("Conv", x, weight, bias, pads=[pad] * 4)

    def _behind(self, x: str, name: str) -> str:
        """A weight (outputs, inputs, height, width) in float32, made when `x`, a map, is there.

        ONNX Runtime would make float32 of all large weights first, and have them all at once.
        """
        if PREFIX + name in self.tensors or 4 * self._value(name).size < _LARGE_WEIGHT_BYTES:
            return self._stored(name)
        return as_float(self.g, self.tensors, PREFIX + name, behind=x)

    # -- strips ------------------------------------------------------------------------------------

    def _swished(self, x: StripedMap, norm: str) -> Prepare:
        """Norm and swish."""
        normed = self._norm(x, norm)
        return lambda lines: self._swish(normed(lines))

    def _norm(self, x: StripedMap, norm: str) -> Prepare:
        gain, shift = (self._stored(f"{norm}.{what}") for what in ("weight", "bias"))
        return group_norm(self.g, x, gain, shift, self.source.groups, self.source.eps)

    def _convolved_strips(
        self,
        x: StripedMap,
        name: str,
        side: int,
        prepare: Prepare,
        kept: _Lines | None = None,
        *,
        normed: bool = True,
    ) -> StripedMap:
        """The map of `side` that the convolution `name` makes, and what is `kept` added to it.

        `normed`: a norm follows.
        """
        g = self.g
        outputs, inputs, *_ = self._value(f"{name}.weight").shape
        weight = self._stored(f"{name}.weight")
        conv = WinogradConvolution(g, weight, (outputs, inputs), side, doubled=side != x.side)
        edges = strip_edges(side, outputs, self.most_strips)
        half = self.source.rounded and 4 * outputs * side**2 >= _LARGE_MAP_BYTES
        bias = self._stored(f"{name}.bias")
        made = StripedMap([], outputs, side, edges=edges, offset=bias, half=half)
        before = x.last()  # a strip needs less than the whole of x
        for first, last in itertools.pairwise(edges):
            begin, end = conv.reads(first, last)
            lines = prepare(lines_of(g, x, begin, end, before))
            strip = conv.strip(lines, first, last)
            if kept is not None:
                strip = g.op("Add", kept(first, last, strip), strip)
            made.parts.append(as_half(g, strip) if made.half else strip)
            if normed:
                made.moments.append(moments_of(g, strip, side))
            before = made.last()
        return made

    def _striped(self, x: Map, *, normed: bool = True) -> StripedMap:
        """A whole map as one strip."""
        strip = self._channels_last(self._whole(x))
        moments = [moments_of(self.g, strip, x.side)] if normed else []
        return StripedMap([strip], x.channels, x.side, edges=[0, x.side], moments=moments)

    def _whole(self, x: Map) -> str:
        if not isinstance(x, StripedMap):
            return super()._whole(x)
        whole = lines_of(self.g, x, 0, x.side)
        if x.offset:
            whole = self.g.op("Add", whole, x.offset)
        return self._channels_first(whole)

    def _normed(self, x: Map, norm: str, reader: str) -> str:
        if not isinstance(x, StripedMap):
            return super()._normed(x, norm, reader)
        assert not reader  # behind swish are convolutions, which read strips
        return self._channels_first(self._norm(x, norm)(lines_of(self.g, x, 0, x.side)))

    def _channels_first(self, lines: str) -> str:
        return self.g.op("Transpose", lines, perm=[0, 3, 1, 2])
