"""The VQ decoder's part of a plan: its weights, what repacks them, and its launches.

Maps are kept in half precision, sums and norm statistics in float32. The residual stream of such a
decoder has no bound that is known beforehand, so in half precision every map that a norm will read
is stored as :data:`HALF_SCALE` times its values: the norm takes any factor out again, and a power
of two rounds nothing. That leaves room up to 10^6 where half precision ends at 65504, and
steps of 10^-6 near zero; bfloat16 would have the room without the factor, but an eighth of the
resolution.

Tiles depend on the bucket: a few images need small ones for all multiprocessors to have work. A
picture does not depend on them: sums run over the inputs in one order in any tile, and statistics
are taken over parts of the map that every tile is made of.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx
import triton

from aim_export.cuda.plan import (
    Argument,
    Buffer,
    DecoderBucket,
    KernelSpec,
    Launch,
    Setup,
    Weight,
    launch,
)
from aim_export.cuda.stored import StoredTensor, stored_tensors
from aim_export.graph import HALF_SUFFIX
from aim_export.kernels import decoder as kernels
from aim_runtime import Bundle
from aim_runtime.onnx_graph import checked_graph

#: Images at once. A batch of any other size is made of these.
IMAGES = (1, 4, 16)
#: What half-precision maps are stored times.
HALF_SCALE = 1 / 16

Storage = Literal["float16", "float32"]

_GROUPS = 32
_GROUPS_A_PROGRAM = 4
_EPS = 1e-6
_PREFIX = "tokenizer."
_VECTORS = "decoder/vectors"
#: Programs that a launch should have at least, where its tiles can be cut so: nearly as many as
#: the largest GPUs have multiprocessors.
_PROGRAMS = 120
#: Pixels from which on a map of one image is enough for them in tiles of 128.
_LARGE_MAP = 128 * 128
#: Side of the blocks in which weights are repacked.
_PACK_BLOCK = 64
_BYTES: Mapping[str, int] = {"float16": 2, "float32": 4}


@dataclass(frozen=True)
class Tile:
    """How one kind of matrix product is cut up and launched."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class DecoderPart:
    """What the decoder adds to a plan.

    Attributes:
        weights: matrices in the bundle; needed by ``setup`` only.
        constants: small float32 vectors that the bundle keeps nowhere by themselves.
        setup: repacks the weights.
        buckets: the launches, ``tokens`` to ``image``.
    """

    weights: Mapping[str, Weight]
    constants: Mapping[str, np.ndarray]
    setup: Setup
    buckets: tuple[DecoderBucket, ...]


def decoder_tensors(bundle: Bundle) -> dict[str, StoredTensor]:
    """The decoder's parameters in ``bundle`` by their names in the tokenizer.

    The graph keeps the gains and offsets of its norms without names; they are found behind each
    normalisation, which come in the order in which the network has them. A small codebook lies
    there normalised already, under another name: it is what the tokens are looked up in.
    """
    stored = stored_tensors(bundle, "decoder")
    named = {
        name.removeprefix(_PREFIX): tensor
        for name, tensor in stored.items()
        if name.startswith(_PREFIX)
    }
    graph = onnx.load_from_string(checked_graph(bundle, bundle.manifest.graphs["decoder"])).graph
    if "quantize.embedding.weight" not in named:
        (lookup,) = (node for node in graph.node if "tokens" in node.input)
        named["quantize.embedding.weight"] = stored[lookup.input[0].removesuffix(HALF_SUFFIX)]
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for value in node.input:
            readers.setdefault(value, []).append(node)
    norms = (node for node in graph.node if node.op_type == "InstanceNormalization")
    for (name, channels), node in zip(_norms(named), norms, strict=True):
        value = node.output[0]
        found = {"Mul": np.ones(channels, np.float32), "Add": np.zeros(channels, np.float32)}
        while len(following := readers[value]) == 1 and following[0].op_type in ("Reshape", *found):
            (step,) = following
            for other in step.input:
                if step.op_type in found and other in stored:
                    found[step.op_type] = stored[other].values.reshape(channels)
            value = step.output[0]
        named[f"{name}.weight"] = StoredTensor(found["Mul"], None)
        named[f"{name}.bias"] = StoredTensor(found["Add"], None)
    return named


def lower_decoder(
    tensors: Mapping[str, StoredTensor],
    num_tokens: int,
    storage: Storage,
    images: Sequence[int] = IMAGES,
) -> DecoderPart:
    """The decoder of ``tensors`` (from :func:`decoder_tensors`) for square grids of codes.

    Args:
        tensors: parameters by their names in the tokenizer.
        num_tokens: T, a square number.
        storage: type of maps and weights on the device; sums are float32 either way.
        images: capacities of the buckets, ascending.
    """
    lowering = _Lowering(tensors, num_tokens, storage)
    buckets = tuple(lowering.bucket(count) for count in images)
    return DecoderPart(
        weights=lowering.weights,
        constants={_VECTORS: np.concatenate(lowering.vectors), **lowering.constants},
        setup=Setup(lowering.packed, lowering.setup),
        buckets=buckets,
    )


def _blocks(tensors: Mapping[str, StoredTensor]) -> Iterator[tuple[str, str]]:
    """The decoder's blocks between ``conv_in`` and ``norm_out``: kind and name, in order."""
    yield "residual", "decoder.mid.0"
    yield "attention", "decoder.mid.1"
    yield "residual", "decoder.mid.2"
    for level in range(_levels(tensors)):
        prefix, block = f"decoder.conv_blocks.{level}", 0
        while f"{prefix}.res.{block}.conv1.weight" in tensors:
            yield "residual", f"{prefix}.res.{block}"
            if f"{prefix}.attn.{block}.q.weight" in tensors:
                yield "attention", f"{prefix}.attn.{block}"
            block += 1
        if f"{prefix}.upsample.conv.weight" in tensors:
            yield "upsample", f"{prefix}.upsample.conv"


def _levels(tensors: Mapping[str, StoredTensor]) -> int:
    level = 0
    while f"decoder.conv_blocks.{level}.res.0.conv1.weight" in tensors:
        level += 1
    return level


def _norms(tensors: Mapping[str, StoredTensor]) -> Iterator[tuple[str, int]]:
    """The decoder's norms in order: name and channels, which the product behind each tells."""
    readers = {"residual": (("norm1", "conv1"), ("norm2", "conv2")), "attention": (("norm", "q"),)}
    for kind, name in _blocks(tensors):
        for norm, reader in readers.get(kind, ()):
            yield f"{name}.{norm}", tensors[f"{name}.{reader}.weight"].values.shape[1]
    yield "decoder.norm_out", tensors["decoder.conv_out.weight"].values.shape[1]


@dataclass(frozen=True)
class _Map:
    """A feature map in memory, of one image: where its pixels lie (see the kernels' module)."""

    buffer: str
    height: int
    width: int
    channels: int
    border: bool

    @property
    def cells(self) -> int:
        return self.height * self.width

    @property
    def pitch(self) -> int:
        return self.width + 2 * self.border

    @property
    def pixels(self) -> int:
        return (self.height + 2 * self.border) * self.pitch

    @property
    def first(self) -> int:
        return (self.pitch + 1) * self.border

    def as_constants(self, side: str, first: int | None = None) -> dict[str, int]:
        """The kernels' parameters ``X_…`` or ``Y_…``."""
        return {
            f"{side}_PIXELS": self.pixels,
            f"{side}_PITCH": self.pitch,
            f"{side}_FIRST": self.first if first is None else first,
        }


@dataclass(frozen=True)
class _Moments:
    """How the statistics of the map written last were cut up: see ``norm_factors``."""

    places: int
    part: int


def _power_of_two_in(value: int) -> int:
    """The largest power of two that divides ``value``."""
    return value & -value


def statistics_part(storage: Storage, cells: int) -> int:
    """Pixels whose mean and deviations a convolution takes together, in every bucket."""
    return 128 if storage == "float16" and cells >= _LARGE_MAP else 64


def product_tile(
    storage: Storage, images: int, cells: int, inputs: int, outputs: int, taps: int, places: int = 1
) -> Tile:
    """The tile of a convolution of ``taps`` by ``taps`` over ``cells`` pixels of ``images``.

    The larger a tile, the less is read for each product: the largest that leaves work for all
    multiprocessors. Measured on an H100 (benchmarks/RESULTS.md), as were the depths. ``places`` is
    4 after doubling.
    """
    n, k = _power_of_two_in(outputs), _power_of_two_in(inputs)
    if storage == "float32":
        return Tile(64, min(n, 64), min(k, 32), warps=4, stages=2)

    def programs(m: int, width: int) -> int:
        return images * places * -(-cells // m) * (outputs // min(n, width))

    # 256 outputs at once hold registers of one program only: they pay off in long sums.
    if n >= 256 and taps**2 * inputs >= 2048 and programs(128, 256) >= 2 * _PROGRAMS:
        return Tile(128, 256, min(k, 64), warps=8, stages=3)
    if cells >= _LARGE_MAP or programs(128, 128) >= _PROGRAMS:
        return Tile(128, min(n, 128), min(k, 64), warps=4, stages=3)
    # Beyond here the time is that of bringing the tiles' edges from the L2 cache, and of waiting
    # once for each BLOCK_K inputs.
    for width, depth in ((128, 64), (64, 128), (32, 128)):
        if programs(64, width) >= _PROGRAMS:
            return Tile(64, min(n, width), min(k, depth), warps=4, stages=4)
    return Tile(64, min(n, 16), min(k, 256), warps=4, stages=4)


def picture_tile(storage: Storage, inputs: int) -> Tile:
    """The tile of the last convolution, whose three outputs are filled up to 16."""
    k = _power_of_two_in(inputs)
    if storage == "float32":
        return Tile(64, 16, min(k, 32), warps=4, stages=2)
    return Tile(256, 16, min(k, 64), warps=8, stages=3)


@dataclass
class _Lowering:
    """Collects weights and set-up, then writes the launches of each bucket."""

    tensors: Mapping[str, StoredTensor]
    num_tokens: int
    storage: Storage
    weights: dict[str, Weight] = field(default_factory=dict)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    vectors: list[np.ndarray] = field(default_factory=list)
    packed: dict[str, Buffer] = field(default_factory=dict)
    setup: list[Launch] = field(default_factory=list)
    _vector_at: dict[str, Argument] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.side = math.isqrt(self.num_tokens)
        if self.side**2 != self.num_tokens:
            raise ValueError(f"{self.num_tokens} tokens an image fill no square")
        self.scale = HALF_SCALE if self.storage == "float16" else 1.0
        self.codes, self.code_dim = self._shape("quantize.embedding")
        outputs = self._shape("post_quant_conv")[0]
        #: Channels of the first map: filled up with zeros to what tensor cores take at once.
        self.z_channels = -(-outputs // 32) * 32
        self._pack_codes(outputs)

    def bucket(self, images: int) -> DecoderBucket:
        """The launches for up to ``images`` images."""
        return _BucketLowering(self, images).lower()

    # Weights, as the kernels read them

    def vector(self, name: str, scale: float = 1.0, length: int | None = None) -> Argument:
        """A float32 vector (a bias, a norm's parameters), times ``scale``, zeros up to ``length``.

        Several names, separated by ``+``, follow one another.
        """
        key = f"{name}*{scale}"
        if key not in self._vector_at:
            parts = [self.tensors[part].values.reshape(-1) for part in name.split("+")]
            values = np.concatenate(parts).astype(np.float32) * np.float32(scale)
            offset = sum(part.nbytes for part in self.vectors)
            # Vector loads want every start on 16 bytes; 64 keeps one to a cache line's half.
            missing = (length or values.size) - values.size
            missing += -(values.size + missing) % 16
            self.vectors.append(np.pad(values, (0, missing)))
            self._vector_at[key] = Argument(_VECTORS, offset)
        return self._vector_at[key]

    def matrix(self, name: str, inputs: int, outputs: int | None = None) -> str:
        """A convolution's weight for ``convolution``: (outputs, taps, inputs).

        Several names, separated by ``+``, follow one another along the outputs.
        """
        target = f"decoder/{name}"
        if target not in self.packed:
            parts = name.split("+")
            rows, columns, taps, _ = self._shape(parts[0])
            row_elements = taps * taps * inputs
            shape = (outputs or rows * len(parts), taps * taps, inputs)
            self.packed[target] = Buffer(self.storage, shape)
            for index, part in enumerate(parts):
                pack = KernelSpec(
                    kernels.pack_weight,
                    (self._stored_type(part), self.storage),
                    _constants(
                        OUTPUTS=rows,
                        INPUTS=columns,
                        STORED=inputs,
                        TAPS=taps,
                        BLOCK_N=_PACK_BLOCK,
                        BLOCK_K=_PACK_BLOCK,
                    ),
                )
                offset = index * rows * row_elements * _BYTES[self.storage]
                grid = (-(-rows // _PACK_BLOCK), -(-columns // _PACK_BLOCK), taps * taps)
                self.setup.append(launch(pack, grid, self._stored(part), Argument(target, offset)))
        return target

    def upsampling_matrix(self, name: str) -> str:
        """The weight of a convolution after doubling: (4, outputs, 4, inputs)."""
        target = f"decoder/{name}"
        if target not in self.packed:
            outputs, inputs, _, _ = self._shape(name)
            self.packed[target] = Buffer(self.storage, (4, outputs, 4, inputs))
            pack = KernelSpec(
                kernels.pack_upsampling_weight,
                (self._stored_type(name), self.storage),
                _constants(
                    OUTPUTS=outputs, INPUTS=inputs, BLOCK_N=_PACK_BLOCK, BLOCK_K=_PACK_BLOCK
                ),
            )
            grid = (-(-outputs // _PACK_BLOCK), -(-inputs // _PACK_BLOCK), 16)
            self.setup.append(launch(pack, grid, self._stored(name), target))
        return target

    def _pack_codes(self, outputs: int) -> None:
        block_v, block_n = 16, 32
        table = KernelSpec(
            kernels.code_table,
            (
                self._stored_type("quantize.embedding"),
                self._stored_type("post_quant_conv"),
                "float32",
                self.storage,
            ),
            _constants(
                CODES=self.codes,
                CODE_DIM=self.code_dim,
                OUTPUTS=outputs,
                STORED=self.z_channels,
                BLOCK_V=block_v,
                BLOCK_N=block_n,
            ),
        )
        self.packed["decoder/codes"] = Buffer(self.storage, (self.codes, self.z_channels))
        self.setup.append(
            launch(
                table,
                (-(-self.codes // block_v), -(-outputs // block_n)),
                self._stored("quantize.embedding"),
                self._stored("post_quant_conv"),
                self.vector("post_quant_conv.bias"),
                "decoder/codes",
            )
        )

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[f"{name}.weight"].values.shape

    def _stored_type(self, name: str) -> str:
        tensor = self.tensors[f"{name}.weight"]
        return tensor.part.dtype if tensor.part else "float32"

    def _stored(self, name: str) -> str:
        """The weight ``name`` as the bundle holds it, among the plan's weights or constants."""
        tensor = self.tensors[f"{name}.weight"]
        key = f"{_PREFIX}{name}.weight"
        if tensor.part is None:
            self.constants[key] = np.asarray(tensor.values, np.float32)
        else:
            self.weights[key] = Weight(tensor.part.dtype, tensor.values.shape, (tensor.part,))
        return key


def _constants(**values: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(values.items())


@dataclass
class _BucketLowering:
    """The launches for one number of images."""

    whole: _Lowering
    images: int
    buffers: dict[str, Buffer] = field(default_factory=dict)
    launches: list[Launch] = field(default_factory=list)
    moments: _Moments = _Moments(1, 1)

    def lower(self) -> DecoderBucket:
        whole, tensors = self.whole, self.whole.tensors
        self.buffers["tokens"] = Buffer("int64", (self.images, whole.num_tokens))
        z = self._map("z", whole.side, whole.z_channels, border=True)
        self._lookup(z)
        blocks = list(_blocks(tensors))
        widths = tensors["decoder.conv_in.weight"].values.shape[0]
        upsamples = any(kind == "upsample" for kind, _ in blocks)
        x = self._map("x", whole.side, widths, border=upsamples)
        weight = whole.matrix("decoder.conv_in", z.channels)
        bias = whole.vector("decoder.conv_in.bias", whole.scale)
        self._convolution(z, weight, bias, x, taps=3, scale=whole.scale)
        for index, (kind, name) in enumerate(blocks):
            if kind == "residual":
                x = self._residual(x, name)
            elif kind == "attention":
                self._attention(x, name)
            else:
                # Only a map that will be doubled is itself read by a 3x3 convolution.
                again = any(kind == "upsample" for kind, _ in blocks[index + 1 :])
                x = self._upsample(x, name, border=again)
        self._picture(self._normalised(x, "decoder.norm_out"))
        return DecoderBucket(self.images, self.buffers, tuple(self.launches))

    def _map(self, name: str, side: int, channels: int, *, border: bool) -> _Map:
        """A map with a buffer of its own, or that of the same name and geometry once more."""
        buffer = f"{name}/{side}/{channels}"
        found = _Map(buffer, side, side, channels, border)
        shape = (self.images, found.pixels, channels)
        self.buffers.setdefault(buffer, Buffer(self.whole.storage, shape))
        assert self.buffers[buffer].shape == shape
        return found

    def _scratch(self, side: int, channels: int) -> _Map:
        """A map without border in the one buffer that all such maps share, one after another."""
        self._reserve("hidden", self.whole.storage, self.images * side * side * channels)
        return _Map("hidden", side, side, channels, border=False)

    def _reserve(self, name: str, dtype: str, elements: int) -> str:
        """Make the shared buffer ``name`` hold at least so much."""
        held = self.buffers[name].shape[0] if name in self.buffers else 0
        self.buffers[name] = Buffer(dtype, (max(held, elements),))
        return name

    def _lookup(self, z: _Map) -> None:
        kernel = KernelSpec(
            kernels.lookup,
            ("int64", self.whole.storage, self.whole.storage),
            _constants(
                PIXELS=z.cells,
                WIDTH=z.width,
                CHANNELS=z.channels,
                **z.as_constants("Y"),
                BLOCK=triton.next_power_of_2(z.channels),
                OVERLAPS=True,
            ),
            num_warps=1,
        )
        self._launch(kernel, (z.cells, self.images), "tokens", "decoder/codes", z.buffer)

    def _residual(self, x: _Map, name: str) -> _Map:
        whole = self.whole
        outputs = whole.tensors[f"{name}.conv1.weight"].values.shape[0]
        normalised = self._normalised(x, f"{name}.norm1")
        hidden = self._scratch(x.height, outputs)
        self._scaled(normalised, f"{name}.conv1", hidden)
        normalised = self._normalised(hidden, f"{name}.norm2")
        if f"{name}.nin_shortcut.weight" in whole.tensors:
            shortcut = self._map("x", x.height, outputs, border=x.border)
            weight = whole.matrix(f"{name}.nin_shortcut", x.channels)
            bias = whole.vector(f"{name}.nin_shortcut.bias", whole.scale)
            self._convolution(x, weight, bias, shortcut, taps=1, scale=1.0, moments=False)
            x = shortcut
        self._scaled(normalised, f"{name}.conv2", x, residual=x)
        return x

    def _attention(self, x: _Map, name: str) -> None:
        whole = self.whole
        normalised = self._scratch(x.height, x.channels)
        self._normalise(x, f"{name}.norm", normalised, swish=False)
        heads = self._map("qkv", x.height, 3 * x.channels, border=False)
        parts = [f"{name}.{part}" for part in "qkv"]
        weight = whole.matrix("+".join(parts), x.channels)
        bias = whole.vector("+".join(f"{part}.bias" for part in parts))
        self._convolution(normalised, weight, bias, heads, taps=1, scale=1.0, moments=False)
        mixed = normalised
        half = whole.storage == "float16"
        power = _power_of_two_in(x.channels)
        block_m, block_n = 64, min(power, 128 if half else 64)
        kernel = KernelSpec(
            kernels.attention,
            (whole.storage, whole.storage),
            _constants(
                CELLS=x.cells,
                CHANNELS=x.channels,
                FACTOR=math.log2(math.e) / math.sqrt(x.channels),
                BLOCK_M=block_m,
                BLOCK_T=128 if half else 64,
                BLOCK_N=block_n,
                BLOCK_K=min(power, 64 if half else 32),
                OVERLAPS=True,
            ),
            num_warps=4,
            num_stages=3 if half else 2,
        )
        grid = (x.channels // block_n, -(-x.cells // block_m), self.images)
        self._launch(kernel, grid, heads.buffer, mixed.buffer)
        self._scaled(mixed, f"{name}.proj_out", x, taps=1, residual=x)

    def _upsample(self, x: _Map, name: str, *, border: bool) -> _Map:
        whole = self.whole
        outputs = whole.tensors[f"{name}.weight"].values.shape[0]
        y = self._map("x", 2 * x.height, outputs, border=border)
        weight = whole.upsampling_matrix(name)
        bias = whole.vector(f"{name}.bias", whole.scale)
        self._convolution(x, weight, bias, y, taps=2, scale=1.0, upsample=True)
        return y

    def _picture(self, x: _Map) -> None:
        whole = self.whole
        tile = picture_tile(whole.storage, x.channels)
        self.buffers["image"] = Buffer("uint8", (self.images, x.height, x.width, 3))
        kernel = KernelSpec(
            kernels.picture,
            (whole.storage, whole.storage, "float32", "uint8"),
            _constants(
                PIXELS=x.cells,
                WIDTH=x.width,
                INPUTS=x.channels,
                X_PIXELS=x.pixels,
                X_PITCH=x.pitch,
                BLOCK_M=tile.m,
                BLOCK_N=tile.n,
                BLOCK_K=tile.k,
                OVERLAPS=True,
            ),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        weight = whole.matrix("decoder.conv_out", x.channels, outputs=tile.n)
        bias = whole.vector("decoder.conv_out.bias", length=tile.n)
        grid = (-(-x.cells // tile.m), self.images)
        self._launch(kernel, grid, x.buffer, weight, bias, "image")

    def _scaled(
        self, x: _Map, name: str, y: _Map, *, taps: int = 3, residual: _Map | None = None
    ) -> None:
        """The convolution ``name`` from normalised to stored values, with statistics."""
        weight = self.whole.matrix(name, x.channels)
        bias = self.whole.vector(f"{name}.bias", self.whole.scale)
        scale = self.whole.scale
        self._convolution(x, weight, bias, y, taps=taps, scale=scale, residual=residual)

    def _convolution(
        self,
        x: _Map,
        weight: str,
        bias: Argument,
        y: _Map,
        *,
        taps: int,
        scale: float,
        residual: _Map | None = None,
        moments: bool = True,
        upsample: bool = False,
    ) -> None:
        storage = self.whole.storage
        places = 4 if upsample else 1
        tile = product_tile(storage, self.images, x.cells, x.channels, y.channels, taps, places)
        part = statistics_part(storage, x.cells)
        if moments:
            self.moments = _Moments(places, part)
        parts = -(-x.cells // part)
        self._reserve("moments", "float32", self.images * places * parts * 2 * y.channels)
        kernel = KernelSpec(
            kernels.convolution,
            (storage, storage, "float32", storage, storage, "float32"),
            _constants(
                PIXELS=x.cells,
                WIDTH=x.width,
                INPUTS=x.channels,
                OUTPUTS=y.channels,
                TAPS=taps,
                UPSAMPLE=upsample,
                RESIDUAL=residual is not None,
                MOMENTS=moments,
                SCALE=scale,
                **x.as_constants("X", first=None if taps == 1 else 0),
                **y.as_constants("Y"),
                BLOCK_M=tile.m,
                BLOCK_N=tile.n,
                BLOCK_K=tile.k,
                PART=part,
                # Large maps have the same tile in every bucket.
                PAIRS=x.cells < _LARGE_MAP,
                OVERLAPS=True,
            ),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        grid = (y.channels // tile.n * places, -(-x.cells // tile.m), self.images)
        added = (residual or y).buffer
        self._launch(kernel, grid, x.buffer, weight, bias, added, y.buffer, "moments")

    def _normalised(self, x: _Map, name: str) -> _Map:
        """What the next 3x3 convolution reads: norm and swish of ``x``, with a border."""
        y = self._map("normalised", x.height, x.channels, border=True)
        self._normalise(x, name, y, swish=True)
        return y

    def _normalise(self, x: _Map, name: str, y: _Map, *, swish: bool) -> None:
        whole, moments = self.whole, self.moments
        self._reserve("factors", "float32", self.images * 2 * x.channels)
        parts = moments.places * -(-(x.cells // moments.places) // moments.part)
        statistics = KernelSpec(
            kernels.norm_factors,
            ("float32", "float32", "float32", "float32"),
            _constants(
                PIXELS=x.cells // moments.places,
                CHANNELS=x.channels,
                GROUPS=_GROUPS,
                EPS=_EPS * whole.scale**2,
                PLACES=moments.places,
                PART=moments.part,
                BLOCK_T=min(triton.next_power_of_2(parts), 128),
                BLOCK_G=_GROUPS_A_PROGRAM,
                BLOCK_C=triton.next_power_of_2(x.channels // _GROUPS),
                OVERLAPS=True,
            ),
            num_warps=4,
        )
        self._launch(
            statistics,
            (_GROUPS // _GROUPS_A_PROGRAM, self.images),
            "moments",
            whole.vector(f"{name}.weight"),
            whole.vector(f"{name}.bias"),
            "factors",
        )
        block_c = min(_power_of_two_in(x.channels), 128)
        block_m = 4096 // block_c
        kernel = KernelSpec(
            kernels.normalise,
            (whole.storage, "float32", whole.storage),
            _constants(
                PIXELS=x.cells,
                WIDTH=x.width,
                CHANNELS=x.channels,
                SWISH=swish,
                **x.as_constants("X"),
                **y.as_constants("Y"),
                BLOCK_M=block_m,
                BLOCK_C=block_c,
                OVERLAPS=True,
            ),
            num_warps=4,
        )
        grid = (x.channels // block_c, -(-x.cells // block_m), self.images)
        self._launch(kernel, grid, x.buffer, "factors", y.buffer)

    def _launch(
        self, kernel: KernelSpec, grid: tuple[int, ...], *arguments: str | Argument
    ) -> None:
        self.launches.append(launch(kernel, grid, *arguments))
