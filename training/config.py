"""The sizes of the two networks, as frozen dataclasses, and the published presets.

Glossary used throughout the project:

=====  ===========================================================
N      images in a request
R      rows in flight: two an image under guidance, else one
B      images in a training batch
T      tokens an image
V      codebook size (the vocabulary)
C      classes; class C itself is the "no class" row
D      `d_model`
L      layers
I      `d_inner` = 2 D
P      head dimension
H      heads = I / P
S      `d_state`, the state size per channel
K      width of the causal convolution
X      channels of that convolution = I + 2 S
=====  ===========================================================
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

# What every RMSNorm adds to the mean square before its root.
EPS = 1e-5


@dataclass(frozen=True)
class ModelConfig:
    """Geometry of an AiM network (arXiv 2408.12245, section 3).

    Attributes:
        vocab_size: V, entries of the tokenizer's codebook.
        num_classes: C, classes without the "no class" row.
        num_tokens: T, tokens an image.
        d_model: D, width of the residual stream.
        num_layers: L.
        d_state: S, state size per channel.
        head_dim: P, channels a head.
        conv_width: K, inputs that the causal convolution sees.
        adaln_groups: 0 gives every layer a linear adaLN of its own; g > 0 shares g of them
            (adaLN-group), layer l using group `l mod g` plus a learned table.
        position_offset: which position embedding the sampler adds to token s - 1: row
            `s - 1 + position_offset`. 0 is what training uses, 1 is what the published sampler
            does; None means the checkpoint does not say.
    """

    vocab_size: int
    num_classes: int
    num_tokens: int
    d_model: int
    num_layers: int
    d_state: int = 128
    head_dim: int = 64
    conv_width: int = 4
    adaln_groups: int = 0
    position_offset: int | None = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "position_offset":
                if value not in (None, 0, 1):
                    raise ValueError(f"position_offset is {value!r}; it may be 0, 1 or None")
            elif field.name == "adaln_groups":
                if value < 0:
                    raise ValueError(f"adaln_groups is {value}; it may be 0 or more")
            elif value < 1:
                raise ValueError(f"{field.name} is {value}; it must be 1 or more")
        if self.d_inner % self.head_dim:
            raise ValueError(
                f"head_dim {self.head_dim} does not divide the inner width 2·d_model = "
                f"{self.d_inner}"
            )

    @property
    def d_inner(self) -> int:
        """I, twice the model width."""
        return 2 * self.d_model

    @property
    def num_heads(self) -> int:
        """H, heads of the state space."""
        return self.d_inner // self.head_dim

    @property
    def conv_channels(self) -> int:
        """X, channels of the causal convolution: x, B and C side by side."""
        return self.d_inner + 2 * self.d_state

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)


_IMAGENET = {"vocab_size": 16384, "num_classes": 1000, "num_tokens": 256}

# The published sizes (arXiv 2408.12245, table 1); 1B was described but never released.
PRESETS: dict[str, ModelConfig] = {
    "B": ModelConfig(**_IMAGENET, d_model=768, num_layers=24),
    "L": ModelConfig(**_IMAGENET, d_model=1024, num_layers=48, adaln_groups=4),
    "XL": ModelConfig(**_IMAGENET, d_model=1536, num_layers=48, adaln_groups=4),
    "1B": ModelConfig(**_IMAGENET, d_model=2048, num_layers=48, adaln_groups=4),
}


@dataclass(frozen=True)
class TokenizerConfig:
    """Geometry of the VQ tokenizer; the defaults are LlamaGen's VQ-16 (arXiv 2406.06525).

    Attributes:
        codebook_size: V, number of codes.
        codebook_dim: length of a code vector; codes are compared after L2 normalisation.
        channels: width of the first level.
        channel_multipliers: width of each level over `channels`; every level but the last
            halves the image, so pixels a token = 2 ** (levels - 1) in each direction.
        z_channels: width between encoder and codebook.
        encoder_blocks: residual blocks a level in the encoder.
        decoder_blocks: residual blocks a level in the decoder.
    """

    codebook_size: int = 16384
    codebook_dim: int = 8
    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    z_channels: int = 256
    encoder_blocks: int = 2
    decoder_blocks: int = 3

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_multipliers", tuple(self.channel_multipliers))
        for field in fields(self):
            value = getattr(self, field.name)
            sizes = value if isinstance(value, tuple) else (value,)
            if not sizes or any(size < 1 for size in sizes):
                raise ValueError(f"{field.name} is {value}; it must be 1 or more")
        if self.channels % 32:
            raise ValueError(f"channels is {self.channels}; GroupNorm(32) needs a multiple of 32")

    @property
    def downsampling(self) -> int:
        """Pixels a token in each direction."""
        return int(2 ** (len(self.channel_multipliers) - 1))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {**asdict(self), "channel_multipliers": list(self.channel_multipliers)}
