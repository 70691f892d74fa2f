"""The VQ decoder's part of a plan: its weights, what repacks them, and its launches.

Maps are kept in half precision, sums and norm statistics in float32. The residual stream of such a
decoder has no bound that is known beforehand, so in half precision every map that a norm will read
is stored as `HALF_SCALE` times its values: the norm takes any factor out again, and a power
of two rounds nothing. That leaves room up to 10^6 where half precision ends at 65504, and
steps of 10^-6 near zero; bfloat16 would have the room without the factor, but an eighth of the
resolution.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import triton
from triton.runtime.jit import JITFunction

from aim_export.cuda.decoder_maps import Map, Moments
from aim_export.cuda.decoder_network import USUAL_NORMS, GroupNorms, blocks
from aim_export.cuda.decoder_tiles import (
    LARGE_MAP,
    WARPGROUP_PART,
    Storage,
    WarpgroupTile,
    norm_cut,
    picture_lines,
    picture_tile,
    power_of_two_in,
    product_tile,
    statistics_part,
    warpgroup_tile,
)
from aim_export.cuda.decoder_weights import DecoderWeights
from aim_export.cuda.kernels import convolution
from aim_export.cuda.kernels import decoder as kernels
from aim_export.cuda.kernels.convolution_warpgroup import convolution_warpgroup
from aim_export.cuda.kernels.picture_at_once import picture_at_once
from aim_export.cuda.launch import ABSENT, ABSENT_BUFFER, KernelSpec, Launcher, with_scratch
from aim_export.cuda.stored import StoredTensor
from aim_export.cuda.targets import CAPABILITIES, WARPGROUP
from aim_runtime.engines.cuda.plan import (
    Argument,
    DecoderBucket,
    Launch,
    Setup,
    Tensor,
    Weight,
    decoder_interface,
    flat,
)

# Images at once. A batch of any other size is made of these.
IMAGES = (1, 4, 16)
# What half-precision maps are stored times.
HALF_SCALE = 1 / 16
# Pixels up to which a norm is one launch: larger maps have so many statistics that reading them in
# every program takes more than a launch.
SMALL_NORM = 16 * 16
# Of `convolution_warpgroup` bytes of the copy engine's four descriptors of a program, and warps
# besides the first four: as many multiply, four finish, and with the one that fetches come three
# that do nothing.
_DESCRIPTORS, _WORKERS = 512, 12


@dataclass(frozen=True)
class DecoderPart:
    """What the decoder adds to a plan.

    Attributes:
        weights: matrices in the bundle; needed by `setup` only.
        constants: tensors that the bundle keeps nowhere by themselves, or in fewer bits.
        setup: repacks the weights.
        buckets: the launches, `tokens` to `image`.
    """

    weights: Mapping[str, Weight]
    constants: Mapping[str, np.ndarray]
    setup: Setup[KernelSpec]
    buckets: tuple[DecoderBucket[KernelSpec], ...]


def lower_decoder(
    tensors: Mapping[str, StoredTensor],
    num_tokens: int,
    storage: Storage,
    norms: GroupNorms = USUAL_NORMS,
    images: Sequence[int] = IMAGES,
    capabilities: Sequence[int] = CAPABILITIES,
) -> DecoderPart:
    """The decoder of `tensors` (from `decoder_tensors`) for square grids of codes.

    Args:
        tensors: parameters by their names in the tokenizer.
        num_tokens: T, a square number.
        storage: type of maps and weights on the device; sums are float32 either way.
        norms: what all of its norms have in common.
        images: capacities of the buckets, ascending.
        capabilities: compute capabilities to compile for. Where some have `convolution_warpgroup`,
            there is a bucket with it ahead of each that every GPU can run.

    Raises:
        ValueError: the tokens of an image fill no square.
    """
    side = math.isqrt(num_tokens)
    if side**2 != num_tokens:
        raise ValueError(f"{num_tokens} tokens an image fill no square")
    weights = DecoderWeights(tensors, storage)
    buckets = []
    for count in images:
        lowering = _BucketLowering(weights, side, count, norms)
        if set(WARPGROUP) & set(capabilities):
            special = _BucketLowering(weights, side, count, norms, warpgroups=True).bucket()
            if any(launch.kernel.capabilities for launch in flat(special.launches)):
                buckets.append(special)
        buckets.append(lowering.bucket())
    return DecoderPart(weights.weights, weights.constants(), weights.setup(), tuple(buckets))


class _BucketLowering:
    """The launches for one number of images."""

    def __init__(
        self,
        weights: DecoderWeights,
        side: int,
        images: int,
        norms: GroupNorms,
        *,
        warpgroups: bool = False,
    ) -> None:
        self.weights, self.side, self.images, self.norms = weights, side, images, norms
        self.warpgroups = warpgroups
        self.storage = weights.storage
        self.scale = HALF_SCALE if self.storage == "float16" else 1.0
        self.blocks = list(blocks(weights.tensors))
        self.buffers: dict[str, Tensor] = {}
        self.launches: list[Launch[KernelSpec]] = []
        self.moments = Moments(1, 1)
        self.launcher = Launcher(ChainMap(self.buffers, weights.known), num_stages=3)

    def bucket(self) -> DecoderBucket[KernelSpec]:
        tensors, upsamples = self.weights.tensors, self._upsamples(self.blocks)
        pixels = self.side << upsamples
        interface = decoder_interface(self.images, self.side**2, pixels, pixels)
        self.buffers.update({**interface, **ABSENT_BUFFER})
        z = self._lookup()
        channels = tensors["decoder.conv_in.weight"].values.shape[0]
        x = self._map("x", self.side, channels, border=upsamples > 0)
        self._scaled(z, "decoder.conv_in", x)
        for index, (kind, name) in enumerate(self.blocks):
            if kind == "residual":
                x = self._residual(x, name)
            elif kind == "attention":
                self._attention(x, name)
            else:
                # Only a map that will be doubled is itself read by a 3x3 convolution.
                again = self._upsamples(self.blocks[index + 1 :]) > 0
                x = self._upsample(x, name, border=again)
        self._picture(x)
        return DecoderBucket(self.images, self.buffers, tuple(self.launches))

    @staticmethod
    def _upsamples(some: Sequence[tuple[str, str]]) -> int:
        return sum(kind == "upsample" for kind, _ in some)

    # Maps

    def _map(self, name: str, side: int, channels: int, *, border: bool) -> Map:
        """A map with a buffer of its own, or that of the same name and geometry once more."""
        buffer = f"{name}/{side}/{channels}"
        found = Map(buffer, side, side, channels, border)
        shape = (self.images, found.pixels, channels)
        self.buffers.setdefault(buffer, Tensor(self.storage, shape))
        assert self.buffers[buffer].shape == shape
        return found

    def _scratch(self, side: int, channels: int) -> Map:
        """A map without border in the one buffer that all such maps share, one after another."""
        self._reserve("hidden", self.storage, self.images * side * side * channels)
        return Map("hidden", side, side, channels, border=False)

    def _reserve(self, name: str, dtype: str, elements: int) -> str:
        """Make the shared buffer `name` hold at least so much."""
        held = self.buffers[name].count if name in self.buffers else 0
        self.buffers[name] = Tensor(dtype, (max(held, elements),))
        return name

    # Blocks

    def _lookup(self) -> Map:
        # Filled up with zeros to what tensor cores take at once.
        channels = -(-self.weights.shape("post_quant_conv")[0] // 32) * 32
        z = self._map("z", self.side, channels, border=True)
        self._launch(
            kernels.lookup,
            (z.cells, self.images),
            tokens="tokens",
            table=self.weights.codes(channels),
            y=z.buffer,
            num_warps=1,
            PIXELS=z.cells,
            WIDTH=z.width,
            CHANNELS=z.channels,
            **z.as_constants("Y"),
            BLOCK=triton.next_power_of_2(z.channels),
            OVERLAPS=True,
        )
        return z

    def _residual(self, x: Map, name: str) -> Map:
        tensors = self.weights.tensors
        outputs = tensors[f"{name}.conv1.weight"].values.shape[0]
        normalised = self._normalised(x, f"{name}.norm1")
        hidden = self._scratch(x.height, outputs)
        self._scaled(normalised, f"{name}.conv1", hidden)
        normalised = self._normalised(hidden, f"{name}.norm2")
        if f"{name}.nin_shortcut.weight" in tensors:
            shortcut = self._map("x", x.height, outputs, border=x.border)
            weight = self.weights.matrix(f"{name}.nin_shortcut", x.channels)
            bias = self.weights.vector(f"{name}.nin_shortcut.bias", self.scale)
            self._convolution(x, weight, bias, shortcut, taps=1, moments=False)
            x = shortcut
        self._scaled(normalised, f"{name}.conv2", x, residual=x)
        return x

    def _attention(self, x: Map, name: str) -> None:
        normalised = self._scratch(x.height, x.channels)
        self._normalise(x, f"{name}.norm", normalised, swish=False)
        qkv = self._map("qkv", x.height, 3 * x.channels, border=False)
        parts = [f"{name}.{part}" for part in "qkv"]
        weight = self.weights.matrix("+".join(parts), x.channels)
        bias = self.weights.vector("+".join(f"{part}.bias" for part in parts))
        self._convolution(normalised, weight, bias, qkv, taps=1, moments=False)
        mixed = normalised
        half = self.storage == "float16"
        power = power_of_two_in(x.channels)
        block_m, block_n = 64, min(power, 128 if half else 64)
        self._launch(
            kernels.attention,
            (x.channels // block_n, -(-x.cells // block_m), self.images),
            qkv=qkv.buffer,
            y=mixed.buffer,
            num_stages=3 if half else 2,
            CELLS=x.cells,
            CHANNELS=x.channels,
            FACTOR=math.log2(math.e) / math.sqrt(x.channels),
            BLOCK_M=block_m,
            BLOCK_T=128 if half else 64,
            BLOCK_N=block_n,
            BLOCK_K=min(power, 64 if half else 32),
            OVERLAPS=True,
        )
        self._scaled(mixed, f"{name}.proj_out", x, taps=1, residual=x)

    def _upsample(self, x: Map, name: str, *, border: bool) -> Map:
        y = self._map("x", 2 * x.height, self.weights.shape(name)[0], border=border)
        weight = self.weights.upsampling_matrix(name)
        bias = self.weights.vector(f"{name}.bias", self.scale)
        self._convolution(x, weight, bias, y, taps=2, upsample=True)
        return y

    def _picture(self, x: Map) -> None:
        tile = picture_tile(self.storage, x.channels)
        lines = None
        if self.warpgroups:
            lines = picture_lines(self.storage, self.images, (x.height, x.width), x.channels)
        given: dict[str, Any] = {
            "weight": self.weights.matrix("decoder.conv_out", x.channels, outputs=tile.n),
            "bias": self.weights.vector("decoder.conv_out.bias", length=tile.n),
            **{"image_bytes": "image", "PIXELS": x.cells, "WIDTH": x.width, "INPUTS": x.channels},
            "OVERLAPS": True,
        }
        if lines:
            self._norm_factors(x, "decoder.norm_out")
            grid = x.height // lines, self.images
            given |= {"x": x.buffer, "factors": "factors", "LINES": lines, **x.as_constants("X")}
            given |= {"num_warps": max(4, x.width // 32), "num_stages": 1}
            self._launch(picture_at_once, grid, **given, capabilities=WARPGROUP)
            return
        x = self._normalised(x, "decoder.norm_out")
        given |= {"x": x.buffer, "X_PIXELS": x.pixels, "X_PITCH": x.pitch}
        given |= {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k}
        given |= {"num_warps": tile.warps, "num_stages": tile.stages}
        self._launch(kernels.picture, (-(-x.cells // tile.m), self.images), **given)

    # Convolutions and norms

    def _scaled(
        self, x: Map, name: str, y: Map, *, taps: int = 3, residual: Map | None = None
    ) -> None:
        """The convolution `name` from values as they are to stored ones, with statistics."""
        weight = self.weights.matrix(name, x.channels)
        bias = self.weights.vector(f"{name}.bias", self.scale)
        self._convolution(x, weight, bias, y, taps=taps, scale=self.scale, residual=residual)

    def _convolution(
        self,
        x: Map,
        weight: str,
        bias: Argument,
        y: Map,
        *,
        taps: int,
        scale: float = 1.0,
        residual: Map | None = None,
        moments: bool = True,
        upsample: bool = False,
    ) -> None:
        places = 4 if upsample else 1
        sizes = x.channels, y.channels, taps, places
        special = None
        if self.warpgroups:
            special = warpgroup_tile(self.storage, self.images, (x.height, x.width), *sizes)
        part = WARPGROUP_PART if special else statistics_part(self.storage, x.cells)
        if moments:
            self.moments = Moments(places, part)
            parts = places * -(-x.cells // part)
            self._reserve("moments", "float32", self.images * parts * 2 * y.channels)
        given: dict[str, Any] = {
            **{"x": x.buffer, "weight": weight, "bias": bias, "y": y.buffer},
            **{"moments": "moments" if moments else ABSENT},
            **{"PIXELS": x.cells, "WIDTH": x.width, "INPUTS": x.channels, "OUTPUTS": y.channels},
            **{"TAPS": taps, "UPSAMPLE": upsample, "RESIDUAL": residual is not None},
            **{"SCALE": scale, "OVERLAPS": True},
            **x.as_constants("X", first=None if taps == 1 else 0),
            **y.as_constants("Y"),
        }
        if special:
            assert residual in (None, y)
            assert moments
            self._by_warpgroups(special, given)
            return
        tile = product_tile(
            self.storage, self.images, x.cells, x.channels, y.channels, taps, places
        )
        self._launch(
            convolution.convolution,
            (y.channels // tile.n * places, -(-x.cells // tile.m), self.images),
            residual=residual.buffer if residual else ABSENT,
            MOMENTS=moments,
            **given,
            num_warps=tile.warps,
            num_stages=tile.stages,
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            BLOCK_K=tile.k,
            PART=part,
            # Large maps have the same tile in every bucket.
            PAIRS=x.cells < LARGE_MAP,
        )

    def _by_warpgroups(self, tile: WarpgroupTile, given: dict[str, Any]) -> None:
        """A convolution by `convolution_warpgroup`, with memory for the copy engine's descriptors.

        A launch starts when the last but one has ended, so two take turns with it.
        """
        self._launch(
            convolution_warpgroup,
            (tile.programs,),
            **given,
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            IMAGES=self.images,
            PROGRAMS=tile.programs,
            STAGES=tile.stages,
            WEIGHT_STAGES=tile.weight_stages,
        )
        launch = self.launches.pop()
        name = f"descriptors/{len(self.launches) % 2}"
        self._reserve(name, "uint8", _DESCRIPTORS * tile.programs)
        own = {"workers": _WORKERS, "scratch": _DESCRIPTORS, "capabilities": WARPGROUP}
        self.launches.append(with_scratch(launch, name, **own))

    def _normalised(self, x: Map, name: str) -> Map:
        """What the next 3x3 convolution reads: norm and swish of `x`, with a border."""
        y = self._map("normalised", x.height, x.channels, border=True)
        self._normalise(x, name, y, swish=True)
        return y

    def _norm_of(self, x: Map, name: str) -> dict[str, Any]:
        """What kernels want for the factors of the norm `name` from the moments of `x`."""
        places, part = self.moments.places, self.moments.part
        parts = places * -(-(x.cells // places) // part)
        return {
            **{"moments": "moments", "CHANNELS": x.channels, "GROUPS": self.norms.groups},
            "gain": self.weights.vector(f"{name}.weight"),
            "offset": self.weights.vector(f"{name}.bias"),
            "EPS": self.norms.eps * self.scale**2,
            **{"PLACES": places, "PART": part, "OVERLAPS": True},
            "BLOCK_T": min(triton.next_power_of_2(parts), norm_cut(x.cells)[1]),
        }

    def _norm_factors(self, x: Map, name: str) -> None:
        groups, together = self.norms.groups, norm_cut(x.cells)[0]
        self._launch(
            kernels.norm_factors,
            (groups // together, self.images),
            **self._norm_of(x, name),
            factors=self._reserve("factors", "float32", self.images * 2 * x.channels),
            PIXELS=x.cells // self.moments.places,
            BLOCK_G=together,
            BLOCK_C=triton.next_power_of_2(x.channels // groups),
        )

    def _normalise(self, x: Map, name: str, y: Map, *, swish: bool) -> None:
        block_c = min(power_of_two_in(x.channels), 128)
        block_m = 4096 // block_c
        members = x.channels // self.norms.groups
        grid = x.channels // block_c, -(-x.cells // block_m), self.images
        given: dict[str, Any] = {
            **{"x": x.buffer, "y": y.buffer, "PIXELS": x.cells, "WIDTH": x.width},
            **{"SWISH": swish, "BLOCK_M": block_m, "BLOCK_C": block_c},
            **x.as_constants("X"),
            **y.as_constants("Y"),
        }
        if x.cells <= SMALL_NORM and block_c % members == 0 and x.cells % block_m == 0:
            norm = self._norm_of(x, name)
            self._launch(kernels.normalise_at_once, grid, **given, **norm)
            return
        self._norm_factors(x, name)
        given |= {"factors": "factors", "CHANNELS": x.channels, "OVERLAPS": True}
        self._launch(kernels.normalise, grid, **given)

    def _launch(self, function: JITFunction, grid: tuple[int, ...], **given: Any) -> None:
        self.launches.append(self.launcher(function, grid, **given))
