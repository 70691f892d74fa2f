"""The decoder for ONNX Runtime's CPU provider in float32, with fewer multiplications.

Convolutions over maps that are large enough are Winograd's (`aim_export.onnx.winograd`), which is
the same arithmetic in another order. Maps of that size have their lines in fours throughout; norms,
swish, sums and products of channels do not see it. Swish and a norm's gain and shift are computed
strip by strip, in front of the convolution that reads them. All else is the plain decoder.
"""

from __future__ import annotations

from onnx import ModelProto

from aim_export.onnx.decoder_source import LAST, DecoderSource, Map
from aim_export.onnx.quantised_decoder import Decoder
from aim_export.onnx.winograd import Prepare, WinogradConvolution, in_fours, in_order, pays


def rearrange_decoder(source: DecoderSource) -> ModelProto | None:
    """The decoder with Winograd's convolutions; None if it has none that is worth it."""
    doublings = sum(kind == "upsample" for kind, _ in source.blocks)
    return _FloatDecoder(source, {}).build() if pays(source.side << doublings) else None


class _FloatDecoder(Decoder):
    """Maps for which `pays` are in fours."""

    graph_name = "aim_float_decoder"
    most_parts = 1

    def _entered(self, x: Map) -> Map:
        if not pays(x.side):
            return x
        return self._split(in_fours(self.g, self._whole(x), x.channels, x.side), x.channels, x.side)

    def _residual(self, x: Map, name: str) -> Map:
        if not pays(x.side):
            return super()._residual(x, name)
        channels = self._value(f"{name}.conv1.weight").shape[0]
        kept = self._shortcut(x, channels, name)
        made = x
        for number in (1, 2):
            normed, prepare = self._normed_later(made, f"{name}.norm{number}")
            conv = self._winograd(f"{name}.conv{number}", x.side)
            made = self._split(conv.of(normed, prepare, behind=kept.parts[0]), channels, x.side)
        return self._added(kept, made)

    def _doubled(self, x: Map, name: str) -> Map:
        if not pays(2 * x.side):
            return super()._doubled(x, name)
        whole = self._whole(x)
        if pays(x.side):
            whole = in_order(self.g, whole, x.channels, x.side)
        made = self._winograd(name, x.side, doubled=True).of(whole)
        return self._split(made, self._value(f"{name}.weight").shape[0], 2 * x.side)

    def _normed(self, x: Map, norm: str, reader: str) -> str:
        made = super()._normed(x, norm, reader)
        if reader == LAST and pays(x.side):
            made = in_order(self.g, made, x.channels, x.side)
        return made

    def _normed_later(self, x: Map, norm: str) -> tuple[str, Prepare]:
        """What is left of a norm and swish once it is normalised, and what makes it of that."""
        g = self.g
        gain, shift = (
            g.op("Reshape", self._stored(f"{norm}.{name}"), self._sizes(-1, 1, 1))
            for name in ("weight", "bias")
        )

        def prepare(value: str) -> str:
            return self._swish(g.op("Add", g.op("Mul", value, gain), shift))

        (part,) = x.parts
        normalised = self._normalised(part, self.source.groups)
        return g.op("Reshape", normalised, self._sizes(0, x.channels, x.side, x.side)), prepare

    def _winograd(self, name: str, side: int, *, doubled: bool = False) -> WinogradConvolution:
        weight, bias = f"{name}.weight", f"{name}.bias"
        outputs, inputs, *_ = self._value(weight).shape
        return WinogradConvolution(
            self.g,
            self._stored(weight),
            self._stored(bias),
            (outputs, inputs),
            side,
            doubled=doubled,
        )
