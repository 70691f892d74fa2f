"""The VQ tokenizer: images to a grid of codes and back (LlamaGen's VQGAN, arXiv 2406.06525).

A convolutional encoder shrinks the image, each cell of the result is replaced by the nearest of
V learned codes, and a mirrored decoder draws the image again. Codes and cells are compared after
L2 normalisation, so "nearest" means the largest cosine. Parameter names are those of the
published files.

Letters as in `aim_training.config`; here also E = `codebook_dim`, (h, w) = the code grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aim_training.config import TokenizerConfig

Network = TypeVar("Network", bound=nn.Module)

# Rows of the code search done at once: bounds its (rows, V) table of similarities.
_SEARCH_ROWS = 16384
# More than any tokenizer has: a file that names more is none.
_MOST_LEVELS, _MOST_BLOCKS, _MOST_CHANNELS = 12, 64, 1 << 16


class Norm(nn.GroupNorm):
    """GroupNorm(32) in the dtype of its input.

    Autocast would widen it, and the swish after it, to float32; at full resolution these passes
    over memory are most of a training step. Statistics are summed in float32 either way.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(32, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) to the same shape and dtype."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


def _conv3(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class ResidualBlock(nn.Module):
    """norm, swish, conv, twice, around a shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = Norm(inputs)
        self.conv1 = _conv3(inputs, outputs)
        self.norm2 = Norm(outputs)
        self.conv2 = _conv3(outputs, outputs)
        self.nin_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) to (B, outputs, h, w)."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        shortcut = x if self.nin_shortcut is None else self.nin_shortcut(x)
        return shortcut + hidden


class AttentionBlock(nn.Module):
    """Single-head self-attention over the cells of a feature map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = Norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to the same shape."""
        hidden = self.norm(x)
        query, key, value = (
            part(hidden).flatten(2).transpose(1, 2).unsqueeze(1)  # (B, 1, h·w, C)
            for part in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)  # (B, 1, h·w, C)
        mixed = mixed.squeeze(1).transpose(1, 2).reshape(x.shape)  # (B, C, h, w)
        return x + self.proj_out(mixed)


class Downsample(nn.Module):
    """Halves the map by a strided conv, padded on the right and below only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C, h/2, w/2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the map by repeating cells, then a conv."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C, 2h, 2w)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks at one resolution, then the change to the next one, if any."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        blocks: int,
        *,
        attention: bool,
        downsample: bool = False,
        upsample: bool = False,
    ) -> None:
        super().__init__()
        self.res = nn.ModuleList(
            ResidualBlock(inputs if block == 0 else outputs, outputs) for block in range(blocks)
        )
        self.attn = nn.ModuleList(AttentionBlock(outputs) for _ in range(blocks * attention))
        self.downsample = Downsample(outputs) if downsample else None
        self.upsample = Upsample(outputs) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) to (B, outputs, h', w')."""
        for block, residual in enumerate(self.res):
            x = residual(x)
            if len(self.attn):
                x = self.attn[block](x)
        if self.downsample is not None:
            x = self.downsample(x)
        if self.upsample is not None:
            x = self.upsample(x)
        return x


def _middle(channels: int) -> nn.ModuleList:
    return nn.ModuleList(
        (
            ResidualBlock(channels, channels),
            AttentionBlock(channels),
            ResidualBlock(channels, channels),
        )
    )


class Encoder(nn.Module):
    """Image to features: levels from the highest resolution to the lowest."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.channel_multipliers]
        last = len(widths) - 1
        self.conv_in = _conv3(3, config.channels)
        self.conv_blocks = nn.ModuleList(
            Level(
                widths[level - 1] if level else config.channels,
                widths[level],
                config.encoder_blocks,
                attention=level == last,
                downsample=level != last,
            )
            for level in range(len(widths))
        )
        self.mid = _middle(widths[-1])
        self.norm_out = Norm(widths[-1])
        self.conv_out = _conv3(widths[-1], config.z_channels)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, height, width) to (B, z_channels, h, w)."""
        x = self.conv_in(images)
        for level in self.conv_blocks:
            x = level(x)
        for block in self.mid:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Features to image: `conv_blocks.0` is the lowest resolution."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in reversed(config.channel_multipliers)]
        last = len(widths) - 1
        self.conv_in = _conv3(config.z_channels, widths[0])
        self.mid = _middle(widths[0])
        self.conv_blocks = nn.ModuleList(
            Level(
                widths[level - 1] if level else widths[0],
                widths[level],
                config.decoder_blocks,
                attention=level == 0,
                upsample=level != last,
            )
            for level in range(len(widths))
        )
        self.norm_out = Norm(widths[-1])
        self.conv_out = _conv3(widths[-1], 3)

    def features(self, z: Tensor) -> Tensor:
        """(B, z_channels, h, w) to what the last conv reads, (B, C, height, width)."""
        x = self.conv_in(z)
        for block in self.mid:
            x = block(x)
        for level in self.conv_blocks:
            x = level(x)
        return F.silu(self.norm_out(x))

    def forward(self, z: Tensor) -> Tensor:
        """(B, z_channels, h, w) to (B, 3, height, width)."""
        return self.conv_out(self.features(z))


class Quantizer(nn.Module):
    """The codebook. Initialised uniform, then L2-normalised, so that no code starts far away."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, dim)
        with torch.no_grad():
            self.embedding.weight.uniform_(-1.0, 1.0)
            self.embedding.weight.copy_(F.normalize(self.embedding.weight, dim=-1))

    def codes(self) -> Tensor:
        """The codebook as it is compared and looked up: (V, E), rows of length 1."""
        return F.normalize(self.embedding.weight, dim=-1)

    def nearest(self, z: Tensor) -> Tensor:
        """Indices (rows,) int64 of the codes nearest to the unit vectors z (rows, E)."""
        codes = self.codes().t()  # (E, V)
        # Among unit vectors the smallest distance is the largest dot product. It stays out of
        # autocast: half precision would confuse close codes.
        with torch.autocast(z.device.type, enabled=False):
            return torch.cat([(part @ codes).argmax(-1) for part in z.split(_SEARCH_ROWS)])

    def lookup(self, indices: Tensor) -> Tensor:
        """Code vectors (..., E) of indices (...)."""
        return F.embedding(indices, self.codes())


class TokenizerOutput(NamedTuple):
    """What training needs from one pass.

    Attributes:
        image: reconstruction, (B, 3, height, width), about [-1, 1].
        features: input of the decoder's last conv, (B, C, height, width), without gradient.
        indices: codes in raster order, (B, T) int64.
        codebook_loss: scalar, pulls codes towards the encoder's vectors.
        commitment_loss: scalar, not weighted, pulls the encoder's vectors towards their codes.
    """

    image: Tensor
    features: Tensor
    indices: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor


class VQTokenizer(nn.Module):
    """Encoder, codebook and decoder; pixels in [-1, 1], channels first."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Quantizer(config.codebook_size, config.codebook_dim)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.z_channels, 1)

    def encode_vectors(self, images: Tensor) -> Tensor:
        """Images (B, 3, height, width) to unit vectors (B, h, w, E) float32, before the codebook.

        Raises:
            ValueError: the image sides are not multiples of the downsampling.
        """
        factor = self.config.downsampling
        if images.shape[-1] % factor or images.shape[-2] % factor:
            raise ValueError(
                f"images are {images.shape[-2]}x{images.shape[-1]} pixels; "
                f"this tokenizer needs sides that are multiples of {factor}"
            )
        z = self.quant_conv(self.encoder(images))  # (B, E, h, w)
        return F.normalize(z.permute(0, 2, 3, 1).float(), dim=-1)  # (B, h, w, E)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, height, width) to codes (B, T) int64 in raster order."""
        z = self.encode_vectors(images)  # (B, h, w, E)
        return self.quantize.nearest(z.flatten(0, 2)).view(z.shape[0], -1)  # (B, T)

    def decode(self, indices: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Codes (B, T) to images (B, 3, height, width).

        Args:
            indices: int64 in [0, V).
            grid: (h, w) with h·w = T; a square when left out.

        Raises:
            ValueError: T fits no such grid.
        """
        tokens = indices.shape[1]
        height, width = grid or (round(tokens**0.5),) * 2
        if height * width != tokens:
            raise ValueError(f"{tokens} tokens an image do not fill a grid of {height}x{width}")
        quantized = self.quantize.lookup(indices)  # (B, T, E)
        quantized = quantized.unflatten(1, (height, width))  # (B, h, w, E)
        return self.decoder(self.post_quant_conv(quantized.permute(0, 3, 1, 2)))

    def forward(self, images: Tensor) -> TokenizerOutput:
        """One training pass: gradients reach the encoder straight through the codebook."""
        z = self.encode_vectors(images)  # (B, h, w, E)
        with torch.no_grad():
            indices = self.quantize.nearest(z.flatten(0, 2)).view(z.shape[:-1])  # (B, h, w)
        quantized = self.quantize.lookup(indices)  # (B, h, w, E)
        codebook_loss = F.mse_loss(quantized, z.detach())
        commitment_loss = F.mse_loss(z, quantized.detach())
        straight = z + (quantized - z).detach()
        features = self.decoder.features(self.post_quant_conv(straight.permute(0, 3, 1, 2)))
        return TokenizerOutput(
            image=self.decoder.conv_out(features),
            features=features.detach(),
            indices=indices.flatten(1),  # (B, T)
            codebook_loss=codebook_loss,
            commitment_loss=commitment_loss,
        )


def channels_last(network: Network) -> Network:
    """Lay the convs' weights out channels last, which GPUs want; return the network."""
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs
    return network


def tokenizer_config_from_state(shapes: Mapping[str, tuple[int, ...]]) -> TokenizerConfig:
    """Read the geometry off the shapes of a tokenizer's tensors.

    Args:
        shapes: shape of each tensor by its name, without any `vqvae.` prefix.

    Raises:
        ValueError: a tensor that tells the geometry is missing, or the shapes contradict it.
    """

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in shapes:
            raise ValueError(f"the tokenizer has no tensor {name!r}, which tells its geometry")
        if len(shapes[name]) != rank:
            raise ValueError(
                f"tensor {name!r} has shape {tuple(shapes[name])}; expected {rank} dimensions"
            )
        return tuple(shapes[name])

    def count(prefix: str, most: int) -> int:
        found = {name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)}
        if len(found) > most or found != {str(index) for index in range(len(found))}:
            raise ValueError(
                f"{prefix}* must be numbered from 0 without a gap, up to {most - 1} at most"
            )
        return len(found)

    channels = shape("encoder.conv_in.weight", 4)[0]
    widths = [
        shape(f"encoder.conv_blocks.{level}.res.0.conv1.weight", 4)[0]
        for level in range(count("encoder.conv_blocks.", _MOST_LEVELS))
    ]
    if channels < 1 or not widths or any(width < 1 or width % channels for width in widths):
        raise ValueError(
            f"the encoder's levels are {widths} channels wide; expected multiples of its first "
            f"width {channels}"
        )
    codebook_size, codebook_dim = shape("quantize.embedding.weight", 2)
    z_channels = shape("encoder.conv_out.weight", 4)[0]
    if max(*widths, z_channels, codebook_dim) > _MOST_CHANNELS:
        raise ValueError(f"the tokenizer has more than {_MOST_CHANNELS} channels")
    return TokenizerConfig(
        codebook_size=codebook_size,
        codebook_dim=codebook_dim,
        channels=channels,
        channel_multipliers=tuple(width // channels for width in widths),
        z_channels=z_channels,
        encoder_blocks=count("encoder.conv_blocks.0.res.", _MOST_BLOCKS),
        decoder_blocks=count("decoder.conv_blocks.0.res.", _MOST_BLOCKS),
    )
