"""The decoder's kernels in Triton's interpreter: each against PyTorch's, together against the
published decoder's golden output."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aim_export.onnx.decoder import Pictures
from aim_export.onnx.decoder import lower_decoder as lower_graph
from aim_export.onnx.graph import write_graph
from aim_runtime import Bundle, models_dir
from aim_runtime.engines.cuda.plan import DecoderBucket, Launch, flat
from aim_training.config import TokenizerConfig
from aim_training.tokenizer import Norm, VQTokenizer, tokenizer_config_from_state

from .conftest import read, weights
from .interpreter import interpret, over

pytest.importorskip("triton", reason="Triton, which the kernels are written in, is not installed")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from aim_export.cuda import decoder, decoder_tiles, decoder_weights
from aim_export.cuda.compile import compile_kernels
from aim_export.cuda.decoder import HALF_SCALE, DecoderPart, lower_decoder
from aim_export.cuda.decoder_network import PREFIX, GroupNorms, decoder_tensors, group_norms
from aim_export.cuda.decoder_tiles import Storage, Tile
from aim_export.cuda.kernels import convolution as convolutions
from aim_export.cuda.kernels import decoder as kernels
from aim_export.cuda.kernels import packing
from aim_export.cuda.launch import TRITON_TYPES, KernelSpec
from aim_export.cuda.stored import StoredTensor
from aim_export.cuda.targets import CAPABILITIES

Memory = dict[str, np.ndarray]

IMAGES, HEIGHT, WIDTH = 2, 6, 5
PIXELS = HEIGHT * WIDTH
# Tiles that fill neither the pixels nor, below, the keys of the attention.
TILE = 16
# Pixels whose statistics are taken together; they do not fill the last part.
PART = 16


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(seed))


def bordered(x: Tensor) -> np.ndarray:
    """(N, C, h, w) as a map with a border."""
    return F.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1).contiguous().numpy()


def bare(x: Tensor) -> np.ndarray:
    """(N, C, h, w) as a map without."""
    return x.permute(0, 2, 3, 1).contiguous().numpy()


def close(found: np.ndarray, wanted: np.ndarray, tolerance: float = 2e-6) -> None:
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert error <= tolerance, error


def spec(name: str, types: tuple[str, ...], **constants: object) -> KernelSpec:
    (function,) = (
        found
        for module in (kernels, convolutions, packing)
        if getattr(found := getattr(module, name, None), "__module__", "") == module.__name__
    )
    if "OVERLAPS" in function.arg_names:
        constants["OVERLAPS"] = False
    return KernelSpec(function, types, tuple(constants.items()))


def map_constants(side: str, height: int, width: int, *, border: bool, taps: int = 1) -> dict:
    pitch = width + 2 * border
    first = pitch + 1 if border and taps == 1 else 0
    pixels = (height + 2 * border) * pitch
    return {f"{side}_PIXELS": pixels, f"{side}_PITCH": pitch, f"{side}_FIRST": first}


def convolution(
    x: str, y: str, inputs: int, outputs: int, taps: int, scale: float = 1.0, **flags: object
) -> Launch[KernelSpec]:
    """One launch from map ``x`` to map ``y``; maps that 3x3 convolutions read have a border."""
    upsample = bool(flags.get("UPSAMPLE"))
    height, width = (HEIGHT * 2, WIDTH * 2) if upsample else (HEIGHT, WIDTH)
    kernel = spec(
        "convolution",
        ("float32",) * 6,
        PIXELS=PIXELS,
        WIDTH=WIDTH,
        INPUTS=inputs,
        OUTPUTS=outputs,
        TAPS=taps,
        UPSAMPLE=upsample,
        RESIDUAL=flags.get("RESIDUAL", False),
        MOMENTS=True,
        SCALE=scale,
        **map_constants("X", HEIGHT, WIDTH, border=taps > 1, taps=taps),
        **map_constants("Y", height, width, border=bool(flags.get("Y_BORDER"))),
        BLOCK_M=flags.get("BLOCK_M", TILE),
        BLOCK_N=32,
        BLOCK_K=16,
        PART=PART,
        PAIRS=flags.get("PAIRS", True),
    )
    tiles = math.ceil(PIXELS / dict(kernel.constants)["BLOCK_M"])
    grid = (outputs // 32 * (4 if upsample else 1), tiles, IMAGES)
    return over(kernel, grid, x, "packed", "bias", y, y, "moments")


def norm(
    x: str, y: str, channels: int, places: int = 1, side: int = 1, groups: int = 8
) -> list[Launch[KernelSpec]]:
    """GroupNorm and swish from map ``x`` to bordered map ``y``."""
    height, width = HEIGHT * side, WIDTH * side
    factors = spec(
        "norm_factors",
        ("float32",) * 4,
        PIXELS=PIXELS,
        CHANNELS=channels,
        GROUPS=32,
        EPS=1e-6,
        PLACES=places,
        PART=PART,
        BLOCK_T=16 // groups,
        BLOCK_G=groups,
        BLOCK_C=4,
    )
    apply = spec(
        "normalise",
        ("float32",) * 3,
        PIXELS=height * width,
        WIDTH=width,
        CHANNELS=channels,
        SWISH=True,
        **map_constants("X", height, width, border=False),
        **map_constants("Y", height, width, border=True),
        BLOCK_M=TILE,
        BLOCK_C=32,
    )
    grid = (channels // 32, math.ceil(height * width / TILE), IMAGES)
    return [
        over(factors, (32 // groups, IMAGES), "moments", "gain", "offset", "factors"),
        over(apply, grid, x, "factors", y),
    ]


def norm_memory(channels: int, places: int = 1) -> dict[str, np.ndarray]:
    return {
        "moments": np.full((IMAGES, places * 2, 2, channels), np.nan, np.float32),
        "gain": normal(11, channels).numpy(),
        "offset": normal(12, channels).numpy(),
        "factors": np.full((IMAGES, 2, channels), np.nan, np.float32),
    }


def expected_norm(x: Tensor, memory: Memory) -> np.ndarray:
    gain, offset = torch.from_numpy(memory["gain"]), torch.from_numpy(memory["offset"])
    return bordered(F.silu(F.group_norm(x.double(), 32, gain.double(), offset.double(), 1e-6)))


def pack(
    name: str, outputs: int, inputs: int, taps: int, stored: int | None = None
) -> Launch[KernelSpec]:
    sizes: dict[str, int] = {"OUTPUTS": outputs, "INPUTS": inputs}
    if name == "pack_weight":
        sizes |= {"STORED": stored or inputs, "TAPS": taps}
    kernel = spec(name, ("float32",) * 2, **sizes, BLOCK_N=64, BLOCK_K=32)
    planes = 16 if name == "pack_upsampling_weight" else taps**2
    grid = (math.ceil(outputs / 64), math.ceil(inputs / 32), planes)
    return over(kernel, grid, "weight", "packed")


@pytest.mark.parametrize(
    ("pairs", "block_m", "groups"), [(True, TILE, 8), (False, TILE, 8), (True, 64, 1)]
)
def test_convolution_norm_and_swish(pairs: bool, block_m: int, groups: int) -> None:
    inputs, outputs = 48, 96
    x, weight = normal(1, IMAGES, inputs, HEIGHT, WIDTH), normal(2, outputs, inputs, 3, 3)
    # A mean far from zero, where naive sums of squares would lose the deviation.
    bias = 300 + 10 * normal(3, outputs)
    memory = {
        "x": bordered(x),
        "weight": weight.numpy(),
        "packed": np.full((outputs, 9, inputs), np.nan, np.float32),
        "bias": bias.numpy(),
        "y": np.full((IMAGES, HEIGHT, WIDTH, outputs), np.nan, np.float32),
        "z": np.zeros((IMAGES, HEIGHT + 2, WIDTH + 2, outputs), np.float32),
        **norm_memory(outputs),
    }
    found = interpret(
        [
            pack("pack_weight", outputs, inputs, 3),
            convolution("x", "y", inputs, outputs, 3, scale=0.5, PAIRS=pairs, BLOCK_M=block_m),
            *norm("y", "z", outputs, groups=groups),
        ],
        memory,
    )
    y = 0.5 * F.conv2d(x.double(), weight.double(), padding=1) + bias[:, None, None]
    close(found["y"], bare(y))
    close(found["z"], expected_norm(y, memory), tolerance=1e-5)


def test_convolution_after_doubling() -> None:
    inputs, outputs = 32, 64
    x, weight = normal(1, IMAGES, inputs, HEIGHT, WIDTH), normal(2, outputs, inputs, 3, 3)
    memory = {
        "x": bordered(x),
        "weight": weight.numpy(),
        "packed": np.full((4, outputs, 4, inputs), np.nan, np.float32),
        "bias": normal(3, outputs).numpy(),
        "y": np.full((IMAGES, 2 * HEIGHT, 2 * WIDTH, outputs), np.nan, np.float32),
        "z": np.zeros((IMAGES, 2 * HEIGHT + 2, 2 * WIDTH + 2, outputs), np.float32),
        **norm_memory(outputs, places=4),
    }
    found = interpret(
        [
            pack("pack_upsampling_weight", outputs, inputs, 3),
            convolution("x", "y", inputs, outputs, 2, UPSAMPLE=True),
            *norm("y", "z", outputs, places=4, side=2),
        ],
        memory,
    )
    doubled = F.interpolate(x.double(), scale_factor=2.0, mode="nearest")
    bias = torch.from_numpy(memory["bias"]).double()
    y = F.conv2d(doubled, weight.double(), bias, padding=1)
    close(found["y"], bare(y))
    close(found["z"], expected_norm(y, memory), tolerance=1e-5)


def test_pointwise_convolution_adds_to_a_map_in_place_and_leaves_its_border() -> None:
    channels = 32
    x, residual = normal(1, IMAGES, channels, HEIGHT, WIDTH), normal(2, IMAGES, channels, 6, 5)
    weight = normal(3, channels, channels, 1, 1)
    memory = {
        "x": bare(x),
        "weight": weight.numpy(),
        "packed": np.full((channels, 1, channels), np.nan, np.float32),
        "bias": normal(4, channels).numpy(),
        "y": bordered(residual),
        **norm_memory(channels),
    }
    launches = [
        pack("pack_weight", channels, channels, 1),
        convolution("x", "y", channels, channels, 1, RESIDUAL=True, Y_BORDER=True),
    ]
    found = interpret(launches, memory)
    bias = torch.from_numpy(memory["bias"]).double()
    y = residual + F.conv2d(x.double(), weight.double(), bias)
    close(found["y"], bordered(y))


def test_packing_leaves_room_for_more_inputs() -> None:
    weight = normal(1, 70, 40, 3, 3)
    memory = {"weight": weight.numpy(), "packed": np.zeros((70, 9, 64), np.float32)}
    found = interpret([pack("pack_weight", 70, 40, 3, stored=64)], memory)
    wanted = F.pad(weight.flatten(2).transpose(1, 2), (0, 24))
    assert np.array_equal(found["packed"], wanted.numpy())


def test_attention() -> None:
    channels = 64
    query, key, value = (normal(seed, IMAGES, PIXELS, channels) for seed in (1, 2, 3))
    memory = {
        "qkv": torch.cat([2 * query, key, value], 2).numpy(),
        "y": np.full((IMAGES, PIXELS, channels), np.nan, np.float32),
    }
    kernel = spec(
        "attention",
        ("float32",) * 2,
        CELLS=PIXELS,
        CHANNELS=channels,
        FACTOR=math.log2(math.e) / math.sqrt(channels),
        BLOCK_M=TILE,
        BLOCK_T=TILE,
        BLOCK_N=32,
        BLOCK_K=16,
    )
    grid = (channels // 32, math.ceil(PIXELS / TILE), IMAGES)
    found = interpret([over(kernel, grid, "qkv", "y")], memory)
    double = (part.double().unsqueeze(1) for part in (2 * query, key, value))
    close(found["y"], F.scaled_dot_product_attention(*double).squeeze(1).numpy())


def test_codes_are_normalised_and_looked_up() -> None:
    codes, outputs, stored = 37, 40, 64
    embedding, weight, bias = normal(1, codes, 6), normal(2, outputs, 6), normal(3, outputs)
    tokens = torch.randint(0, codes, (IMAGES, PIXELS), generator=generator(4))
    memory = {
        "codes": embedding.numpy(),
        "weight": weight.numpy(),
        "bias": bias.numpy(),
        "table": np.zeros((codes, stored), np.float32),
        "tokens": tokens.numpy(),
        "z": np.zeros((IMAGES, HEIGHT + 2, WIDTH + 2, stored), np.float32),
    }
    table = spec(
        "code_table",
        ("float32",) * 4,
        CODES=codes,
        CODE_DIM=6,
        OUTPUTS=outputs,
        STORED=stored,
        BLOCK_V=16,
        BLOCK_N=32,
    )
    lookup = spec(
        "lookup",
        ("int64", "float32", "float32"),
        PIXELS=PIXELS,
        WIDTH=WIDTH,
        CHANNELS=stored,
        **map_constants("Y", HEIGHT, WIDTH, border=True),
        BLOCK=64,
    )
    launches = [
        over(table, (3, 2), "codes", "weight", "bias", "table"),
        over(lookup, (PIXELS, IMAGES), "tokens", "table", "z"),
    ]
    found = interpret(launches, memory)
    rows = F.linear(F.normalize(embedding.double(), dim=1), weight.double(), bias.double())
    wanted = F.pad(rows, (0, stored - outputs))[tokens].unflatten(1, (HEIGHT, WIDTH))
    close(found["z"], bordered(wanted.permute(0, 3, 1, 2)))


def test_pixels_are_rounded_to_even_and_clipped() -> None:
    # Only the middle tap of one input counts: levels at halves, at the ends and beyond them.
    levels = torch.tensor([-300.0, -0.5, 0.5, 1.5, 2.5, 127.5, 128.5, 253.5, 254.5, 255.5, 999.0])
    x = torch.zeros(IMAGES, 32, HEIGHT, WIDTH)
    x[:, 0] = levels.repeat(6)[: IMAGES * PIXELS].view(IMAGES, HEIGHT, WIDTH)
    weight = np.zeros((16, 9, 32), np.float32)
    weight[:3, 4, 0] = np.array([1, 0.5, 0.25]) / 128
    memory = {
        "x": bordered(x),
        "weight": weight,
        "bias": np.full(16, -1, np.float32),
        "image": np.full((IMAGES, HEIGHT, WIDTH, 3), 77, np.uint8),
    }
    kernel = spec(
        "picture",
        ("float32", "float32", "float32", "uint8"),
        PIXELS=PIXELS,
        WIDTH=WIDTH,
        INPUTS=32,
        X_PIXELS=(HEIGHT + 2) * (WIDTH + 2),
        X_PITCH=WIDTH + 2,
        BLOCK_M=TILE,
        BLOCK_N=16,
        BLOCK_K=32,
    )
    grid = (math.ceil(PIXELS / TILE), IMAGES)
    found = interpret([over(kernel, grid, "x", "weight", "bias", "image")], memory)
    pixels = x[:, :1].permute(0, 2, 3, 1) * torch.tensor([1, 0.5, 0.25]) / 128 - 1
    wanted = torch.clamp(torch.round((pixels + 1) * 127.5), 0, 255).to(torch.uint8)
    assert np.array_equal(found["image"], wanted.numpy())


def decode(part: DecoderPart, *batches: Tensor) -> list[np.ndarray]:
    """The pictures of each batch from the bucket of its size, the weights set up once."""
    memory = {name: np.zeros(b.shape, b.dtype) for name, b in part.setup.buffers.items()}
    memory |= part.constants
    launches = [*flat(part.setup.launches)]
    for tokens in batches:
        bucket = next(bucket for bucket in part.buckets if bucket.images == len(tokens))
        names = {name: f"{name} of {len(tokens)}" for name in bucket.buffers}
        memory |= {names[name]: np.zeros(b.shape, b.dtype) for name, b in bucket.buffers.items()}
        memory[names["tokens"]][:] = tokens.numpy()
        for item in flat(bucket.launches):
            arguments = (a._replace(name=names.get(a.name, a.name)) for a in item.arguments)
            launches.append(replace(item, arguments=tuple(arguments)))
    found = interpret(launches, memory)
    return [found[f"image of {len(tokens)}"] for tokens in batches]


@pytest.fixture
def large_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's time goes by the number of operations, hardly by their size."""
    usual = decoder.product_tile

    def product_tile(storage: Storage, *sizes: int) -> Tile:
        _, cells, inputs, outputs, *_ = sizes
        if storage == "float16":
            return usual(storage, *sizes)
        m = 64 if cells <= 64 else 256
        return Tile(m, min(outputs & -outputs, 128), min(inputs & -inputs, 128), 4, 1)

    monkeypatch.setattr(decoder, "product_tile", product_tile)
    monkeypatch.setattr(decoder_tiles, "PROGRAMS", 1)
    monkeypatch.setattr(decoder_weights, "PACK_BLOCK", 128)
    monkeypatch.setattr(decoder_tiles, "GROUPS_A_PROGRAM", 32)


def tensors_of(tokenizer: VQTokenizer) -> dict[str, StoredTensor]:
    state = tokenizer.state_dict()
    return {name: StoredTensor(value.numpy(), None) for name, value in state.items()}


def random_tokenizer(config: TokenizerConfig) -> VQTokenizer:
    torch.manual_seed(0)
    tokenizer = VQTokenizer(config).eval()
    for module in tokenizer.modules():
        if isinstance(module, Norm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.2)
    return tokenizer


@pytest.mark.usefixtures("large_blocks")
def test_golden_decoder(golden_dir: Path) -> None:
    golden, _ = read(golden_dir / "vq_f2.safetensors")
    tensors = {
        name: StoredTensor(value.float().numpy(), None)
        for name, value in weights(golden, "").items()
    }
    part = lower_decoder(tensors, 256, "float32", images=(1,))
    (found,) = decode(part, golden["indices"][:1])
    wanted = torch.clamp(torch.round((golden["decoded"][:1] + 1) * 127.5), 0, 255)
    wanted = wanted.to(torch.uint8).permute(0, 2, 3, 1)
    # A level may fall on the other side of a half.
    apart = np.abs(found.astype(int) - wanted.numpy().astype(int))
    assert apart.max() <= 1
    assert (apart > 0).mean() < 1e-3


# Widths that are no powers of two, a width that changes twice, a grid of odd side, z filled up.
ODD = TokenizerConfig(40, 6, 32, (1, 3, 2), 24, 1, 1)


@pytest.mark.parametrize(
    ("storage", "allowed"), [("float32", 1e-3), ("float16", 0.15)], ids=["float32", "float16"]
)
@pytest.mark.usefixtures("large_blocks")
def test_odd_geometry(storage: Storage, allowed: float) -> None:
    tokenizer = random_tokenizer(ODD)
    part = lower_decoder(tensors_of(tokenizer), 9, storage, images=(1, 2))
    tokens = torch.randint(0, 40, (2, 9), generator=generator(5))
    found, alone = decode(part, tokens, tokens[1:])
    with torch.inference_mode():
        wanted = Pictures(tokenizer)(tokens).numpy()
    apart = np.abs(found.astype(int) - wanted.astype(int))
    assert apart.max() <= 1
    assert (apart > 0).mean() < allowed
    # A picture does not depend on its neighbours or its bucket, bit for bit.
    assert np.array_equal(alone, found[1:])


@pytest.mark.usefixtures("large_blocks")
def test_half_precision_does_not_overflow_where_the_plain_one_would() -> None:
    tokenizer = random_tokenizer(TokenizerConfig(16, 4, 32, (1, 1), 32, 1, 1))
    with torch.no_grad():
        # The residual stream of the whole decoder grows, the norms take it out again.
        for name, parameter in tokenizer.decoder.named_parameters():
            if "conv2" in name or "conv_in" in name:
                parameter *= 4e5
    tokens = torch.randint(0, 16, (1, 4), generator=generator(6))
    largest = []
    tokenizer.decoder.mid[0].register_forward_hook(lambda *a: largest.append(a[2].abs().max()))
    with torch.inference_mode():
        wanted = Pictures(tokenizer)(tokens).numpy()
    assert 65504 < max(largest) < 65504 / HALF_SCALE
    part = lower_decoder(tensors_of(tokenizer), 4, "float16", images=(1,))
    (found,) = decode(part, tokens)
    assert np.abs(found.astype(int) - wanted.astype(int)).max() <= 2


@dataclass(frozen=True)
class DecoderOnly:
    """What of a bundle belongs to its decoder, without the time that exporting the rest takes."""

    folder: Path

    @property
    def manifest(self) -> SimpleNamespace:
        files = SimpleNamespace(file="decoder.onnx", weights="decoder.weights")
        return SimpleNamespace(graphs={"decoder": files})

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()


def forget_names(graph: onnx.GraphProto) -> None:
    """Call norms' parameters what PyTorch's exporter calls them, as older bundles do."""
    others = {}
    for index, tensor in enumerate(graph.initializer):
        if "norm" in tensor.name:
            others[tensor.name] = f"unnamed_{index}"
            tensor.name = f"unnamed_{index}"
    assert others
    for node in graph.node:
        for index, value in enumerate(node.input):
            node.input[index] = others.get(value, value)


@pytest.mark.parametrize("named", [True, False])
def test_tensors_of_a_bundle(
    named: bool, golden_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A decoder alone has no manifest that its graph could be judged by.
    for module in ("decoder_network", "stored"):
        monkeypatch.setattr(
            f"aim_export.cuda.{module}.checked_graph",
            lambda bundle, spec: bytes(bundle.read(spec.file)),
        )
    golden, _ = read(golden_dir / "vq_f2.safetensors")
    state = weights(golden, "")
    # Equal values, which the exporter keeps once, and those that change nothing.
    for name, value in (("mid.0.norm1.weight", 0.5), ("mid.0.norm1.bias", 0.5)):
        state[f"decoder.{name}"] = torch.full_like(state[f"decoder.{name}"], value)
    for name, value in (("norm_out.weight", 1.0), ("norm_out.bias", 0.0)):
        state[f"decoder.{name}"] = torch.full_like(state[f"decoder.{name}"], value)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    tokenizer = VQTokenizer(tokenizer_config_from_state(shapes)).eval()
    tokenizer.load_state_dict(state)
    graph = lower_graph(tokenizer, 4)
    wanted = {
        name: value
        for name, value in state.items()
        if not name.startswith(("encoder.", "quant_conv."))
    }
    if named:
        names = [tensor.name for tensor in graph.graph.initializer]
        assert {name for name in names if "." in name} == {f"tokenizer.{n}" for n in wanted}
        assert len(names) == len(set(names))
    else:
        forget_names(graph.graph)
    write_graph(graph, tmp_path, "decoder", "fp32")
    found = decoder_tensors(cast(Bundle, DecoderOnly(tmp_path)))
    codes = F.normalize(wanted.pop("quantize.embedding.weight").float())
    close(
        F.normalize(torch.tensor(found["quantize.embedding.weight"].values)).numpy(), codes.numpy()
    )
    for name, value in wanted.items():
        assert np.array_equal(found[name].values.reshape(value.shape), value.float().numpy()), name


def test_norms_are_what_the_graph_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert group_norms(Bundle.open(models_dir() / "emoji")) == GroupNorms(32, 1e-6)
    for module in ("decoder_network", "stored"):
        monkeypatch.setattr(
            f"aim_export.cuda.{module}.checked_graph",
            lambda bundle, spec: bytes(bundle.read(spec.file)),
        )
    tensors = {"scale": np.ones(16, np.float32), "bias": np.zeros(16, np.float32)}
    stored = [onnx.numpy_helper.from_array(values, name) for name, values in tensors.items()]
    nodes = [
        onnx.helper.make_node(
            "InstanceNormalization", [f"x{index}", *tensors], [f"x{index + 1}"], epsilon=epsilon
        )
        for index, epsilon in enumerate((1e-3, 1e-3, 1e-5))
    ]
    (tmp_path / "decoder.weights").touch()
    alone = cast(Bundle, DecoderOnly(tmp_path))
    for chosen in (nodes[:2], nodes):
        graph = onnx.helper.make_graph(chosen, "decoder", [], [], stored)
        (tmp_path / "decoder.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
        if len(chosen) == 2:
            assert group_norms(alone) == GroupNorms(16, 1e-3)
        else:
            with pytest.raises(ValueError, match="not all alike"):
                group_norms(alone)
    tokenizer = random_tokenizer(TokenizerConfig(channels=64, channel_multipliers=(1, 1)))
    part = lower_decoder(tensors_of(tokenizer), 4, "float32", GroupNorms(16, 1e-3), (1,))
    found = [dict(item.kernel.constants) for item in flat(part.buckets[0].launches)]
    assert {(sizes["GROUPS"], sizes["EPS"]) for sizes in found if "GROUPS" in sizes} == {(16, 1e-3)}


def test_bundle_in_the_box_lends_its_weights() -> None:
    bundle = Bundle.open(models_dir() / "emoji")
    tensors = decoder_tensors(bundle)
    part = lower_decoder(tensors, bundle.manifest.model.num_tokens, "float16")
    shape = (bundle.manifest.model.image_height, bundle.manifest.model.image_width, 3)
    assert {bucket.images: bucket.buffers["image"].shape for bucket in part.buckets} == {
        images: (images, *shape) for images in (1, 4, 16)
    }
    # Everything large is read from the bundle where it lies, unless it lies in fewer bits.
    packed = {PREFIX + name for name, tensor in tensors.items() if tensor.rows}
    assert packed
    lent = [values for name, values in part.constants.items() if name not in packed]
    assert sum(values.nbytes for values in lent) < 200_000
    files = {source.file for weight in part.weights.values() for source in weight.parts}
    assert files == {"decoder.weights"}
    held = {name for bucket in part.buckets for name in bucket.buffers}
    known = {*part.weights, *part.constants, *part.setup.buffers}
    used = {
        argument.name
        for program in (part.setup.launches, *(bucket.launches for bucket in part.buckets))
        for item in flat(program)
        for argument in item.arguments
    }
    assert used <= held | known
    assert not held & known


@pytest.fixture(scope="module")
def published_size() -> DecoderPart:
    """VQ-16 in half precision."""
    with torch.device("meta"):
        state = VQTokenizer(TokenizerConfig()).state_dict()
    tensors = {
        name: StoredTensor(np.broadcast_to(np.float32(0), value.shape), None)
        for name, value in state.items()
    }
    return lower_decoder(tensors, 256, "float16")


def of_every_gpu(part: DecoderPart) -> list[DecoderBucket[KernelSpec]]:
    """The buckets without kernels for some GPUs only."""
    return [
        bucket
        for bucket in part.buckets
        if not any(item.kernel.capabilities for item in flat(bucket.launches))
    ]


def test_of_each_size_the_bucket_for_some_gpus_comes_first(published_size: DecoderPart) -> None:
    """Its large maps have one cut of statistics in all buckets, and launches side by side no
    descriptors in common."""
    buckets = published_size.buckets
    assert [bucket.images for bucket in buckets] == [1, 1, 4, 4, 16, 16]
    assert list(buckets[1::2]) == of_every_gpu(published_size)
    for bucket in buckets[::2]:
        launches = list(flat(bucket.launches))
        *special, last = [item for item in launches if item.kernel.capabilities]
        assert len(special) == 20
        assert last == launches[-1]
        assert last.kernel.function.__name__ == "picture_at_once"
        names = ["x/256/128", "factors", "decoder/decoder.conv_out", "decoder/vectors", "image"]
        assert [argument.name for argument in last.arguments] == names
        # A multiprocessor has room for one program.
        assert last.grid == (256 // dict(last.kernel.constants)["LINES"], bucket.images, 1)
        assert math.prod(last.grid) == 128
        for item in special:
            sizes = dict(item.kernel.constants)
            assert item.grid == (sizes["PROGRAMS"], 1, 1)
            tiles = sizes["PIXELS"] // sizes["BLOCK_M"] * (sizes["OUTPUTS"] // sizes["BLOCK_N"])
            assert tiles * sizes["IMAGES"] * (4 if sizes["UPSAMPLE"] else 1) >= 120
            assert bucket.buffers[item.arguments[-1].name].size >= 512 * item.grid[0]
        for one, two in pairwise(launches):
            if {one, two} <= {*special}:
                assert one.arguments[-1] != two.arguments[-1]


def test_a_picture_is_summed_alike_in_every_bucket(published_size: DecoderPart) -> None:
    """Statistics are combined in one order however many images there are, and so is the last
    convolution; of this a program takes other numbers of lines (`test_picture_machine`)."""
    found = []
    for bucket in published_size.buckets:
        launches = [item.kernel for item in flat(bucket.launches)]
        norms = [dict(kernel.constants) for kernel in launches if "GROUPS" in kernel.parameters]
        for sizes in norms:
            # As many values at once: a group of large maps, with all parts of a map of 256x256.
            if "BLOCK_G" in sizes and sizes["PIXELS"] * sizes["PLACES"] >= 128 * 128:
                assert sizes["BLOCK_G"] == 1
                parts = sizes["PLACES"] * sizes["PIXELS"] // sizes["PART"]
                assert sizes["BLOCK_T"] == parts <= 512
        last = {**dict(launches[-1].constants), "LINES": None}
        found.append((norms, launches[-1].function.__name__, last))
    assert found[0] == found[2] == found[4]
    assert found[1] == found[3] == found[5]
    assert found[0][1] != found[1][1]


def test_large_maps_norms_compile_for_every_gpu_the_last_launch_for_its_own(
    published_size: DecoderPart,
) -> None:
    kernels = {
        item.kernel.id: item.kernel
        for item in flat(published_size.buckets[1].launches)
        if dict(item.kernel.constants).get("BLOCK_G") == 1
    }
    *_, last = flat(published_size.buckets[0].launches)
    found = compile_kernels([*kernels.values(), last.kernel], CAPABILITIES, workers=1)
    assert len(found) == len(kernels) * len(CAPABILITIES) + 1
    # One program a multiprocessor.
    assert 227 << 9 < found[last.kernel.id, 90].shared < 227 << 10
    assert {dict(kernel.constants)["BLOCK_T"] for kernel in kernels.values()} == {128, 256, 512}


def test_without_such_gpus_there_are_no_such_buckets() -> None:
    part = lower_decoder(
        tensors_of(random_tokenizer(TokenizerConfig(16, 4, 32, (1, 1), 32, 1, 1))),
        4,
        "float16",
        images=(1, 2),
    )
    assert [bucket.images for bucket in part.buckets] == [1, 2]


def test_tiles_fit_and_statistics_are_the_same_in_every_bucket(published_size: DecoderPart) -> None:
    parts = []
    for bucket in of_every_gpu(published_size):
        convolutions = [
            (item.grid, dict(item.kernel.constants))
            for item in flat(bucket.launches)
            if item.kernel.function.__name__ == "convolution"
        ]
        for grid, sizes in convolutions:
            for size, block in (("OUTPUTS", "N"), ("INPUTS", "K"), ("PIXELS", "M")):
                assert sizes[size] % sizes[f"BLOCK_{block}"] == 0
            assert sizes["BLOCK_M"] % sizes["PART"] == 0
            # Nearly one program for each multiprocessor of the largest GPUs, even for one image.
            assert math.prod(grid) >= 120
        parts.append([(sizes["PIXELS"], sizes["PART"]) for _, sizes in convolutions])
    assert parts[0] == parts[1] == parts[2]


def compiled_for_hopper(kernel: KernelSpec) -> CompiledKernel:
    constants = dict(kernel.constants)
    types = iter(kernel.types)
    names = kernel.parameters
    source = ASTSource(
        kernel.function,
        {n: "constexpr" if n in constants else f"*{TRITON_TYPES[next(types)]}" for n in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in constants},
    )
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def test_squares_are_rounded_apart_from_their_sums_in_every_tile(
    published_size: DecoderPart,
) -> None:
    """Else compilers fold them into sums, and how depends on the tile."""
    found = {
        (dict(item.kernel.constants)["BLOCK_N"]): item.kernel
        for bucket in of_every_gpu(published_size)
        for item in flat(bucket.launches)
        if item.kernel.function.__name__ == "convolution"
        and dict(item.kernel.constants)["PIXELS"] == 16 * 16
        and dict(item.kernel.constants)["RESIDUAL"]
        and dict(item.kernel.constants)["TAPS"] == 1
    }
    assert len(found) == 3
    for kernel in found.values():
        text = compiled_for_hopper(kernel).asm["ptx"]
        assert "wgmma.mma_async" in text
        squares = re.findall(r"fma\.rn\.f32\s+%\w+, (%\w+), \1, (\S+);", text)
        sizes = dict(kernel.constants)
        assert len(squares) == sizes["BLOCK_M"] * sizes["BLOCK_N"] // 128
        assert {summand for _, summand in squares} == {"0f00000000"}
        assert not re.search(r"mul(\.rn)?\.f32\s+%\w+, (%\w+), \2;", text)


def test_large_convolutions_copy_ahead_and_use_hopper_tensor_cores(
    published_size: DecoderPart,
) -> None:
    found = [item.kernel for item in flat(published_size.buckets[1].launches)]
    (kernel,) = {
        kernel.id: kernel
        for kernel in found
        if kernel.function.__name__ == "convolution"
        and dict(kernel.constants)["PIXELS"] == 256 * 256
        and not dict(kernel.constants)["RESIDUAL"]
    }.values()
    compiled = compiled_for_hopper(kernel)
    assert re.search(
        r"wgmma\.mma_async\.sync\.aligned\.m64n(128|256)k16\.f32\.f16\.f16", compiled.asm["ptx"]
    )
    copies = re.findall(r"cp\.async\.cg\.shared\.global \[.*\], 0x10", compiled.asm["ptx"])
    assert len(copies) > 16
    assert "griddepcontrol.wait" in compiled.asm["ptx"]
    assert ".local" not in compiled.asm["ptx"]
    assert compiled.metadata.global_scratch_size == 0
    # Two programs at once on a multiprocessor, one computing while the other starts or ends.
    assert 2 * compiled.metadata.shared < 227 << 10
