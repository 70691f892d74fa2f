"""AiM in PyTorch: the whole-sequence forward for training and the single-step cell.

Parameters carry the names of the published checkpoints (without the `mamba.` prefix). The head is
tied to the word table, so there is no parameter for it. The mathematics is the AiM paper's
(arXiv 2408.12245, section 3) over the Mamba-2 block (arXiv 2405.21060, section 7); letters are
those of `aim_training.config`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aim_training.config import EPS, ModelConfig
from aim_training.kernels.add_norm import GatedUpdate, add_norm
from aim_training.kernels.mixer import MixerSizes, MixerWeights, has_kernels, mix


class Conditioning(NamedTuple):
    """What the class alone decides, computed once an image.

    Attributes:
        class_embedding: (R, D), the input at position 0.
        modulation: (R, L, 3, D): shift, scale and gate of every layer.
        final_modulation: (R, 2, D): shift and scale before the head.
    """

    class_embedding: Tensor
    modulation: Tensor
    final_modulation: Tensor


class LayerState(NamedTuple):
    """All that one layer remembers of a row: constant in size, however many tokens are drawn.

    Attributes:
        conv: (R, K - 1, X), the last inputs of the causal convolution, oldest first.
        ssm: (R, H, P, S).
    """

    conv: Tensor
    ssm: Tensor


class AiM(nn.Module):
    """The autoregressive model over VQ codes.

    Args:
        config: geometry.
        dropout: probability of dropping an element of a layer's output while training.
        checkpoint_activations: keep of each layer what it gives to the next only, and compute the
            rest again for the gradient: less memory, a third more work.
    """

    def __init__(
        self, config: ModelConfig, dropout: float = 0.0, *, checkpoint_activations: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config, dropout)
        for layer in self.backbone.layers:
            layer.checkpoint_activations = checkpoint_activations

    def forward(self, tokens: Tensor, classes: Tensor, position_offset: int = 0) -> Tensor:
        """Teacher-forced logits of every token of every image.

        Args:
            tokens: (B, T) int64; token T - 1 is predicted, never read.
            classes: (B,) int64 in 0..C, C being "no class".
            position_offset: as in `ModelConfig`; training uses 0.

        Returns:
            (B, T, V) logits.
        """
        net = self.backbone
        conditioning = self.prologue(classes)
        previous = tokens[:, :-1]
        positions = torch.arange(previous.shape[1], device=tokens.device) + position_offset
        embedded = net.embeddings(previous, positions)  # (B, T-1, D)
        residual = torch.cat([conditioning.class_embedding[:, None], embedded], 1).float()
        update = None
        # Taken apart at once: the gradient of a slice is a whole tensor of zeros around it.
        for layer, modulation in zip(net.layers, conditioning.modulation.unbind(1), strict=True):
            residual, update = layer(residual, update, modulation)
        _, hidden = add_norm(residual, update, net.norm_f.weight, dtype=residual.dtype)
        shift, scale = conditioning.final_modulation.unbind(1)  # each (B, D)
        _, hidden = add_norm(hidden, None, net.final_layer.norm_final.weight, (shift, scale))
        return self.head(hidden)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of what the last norm and its modulation leave, (..., D)."""
        return F.linear(hidden, self.backbone.embeddings.word_embeddings.weight)

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile each layer by itself, if its geometry has no kernels: they leave nothing to fuse.

        As one graph, forty-eight layers take many minutes.
        """
        if not has_kernels(_sizes(self.config), self.config.conv_width):
            for layer in self.backbone.layers:
                layer.compile(*args, **options)

    def prologue(self, classes: Tensor) -> Conditioning:
        """Conditioning of (R,) int64 class ids."""
        net = self.backbone
        embedding = net.cls_embed(classes)  # (R, D)
        if self.config.adaln_groups:
            grouped = net.adaln_group(embedding).unflatten(1, (-1, 3, self.config.d_model))
            modulation = torch.stack(
                [
                    layer.scale_shift_table + grouped[:, index % self.config.adaln_groups]
                    for index, layer in enumerate(net.layers)
                ],
                dim=1,
            )
        else:
            modulation = torch.stack(
                [layer.adaLN_modulation(embedding).unflatten(1, (3, -1)) for layer in net.layers],
                dim=1,
            )  # (R, L, 3, D)
        final = net.final_layer.adaLN_modulation(embedding).unflatten(1, (2, -1))
        return Conditioning(embedding, modulation, final)

    def init_state(self, rows: int) -> list[LayerState]:
        """Zero state for `rows` rows, float32, on the model's device."""
        cfg = self.config
        like = self.backbone.norm_f.weight
        return [
            LayerState(
                like.new_zeros(rows, cfg.conv_width - 1, cfg.conv_channels),
                like.new_zeros(rows, cfg.num_heads, cfg.head_dim, cfg.d_state),
            )
            for _ in range(cfg.num_layers)
        ]

    def step(
        self,
        token: Tensor,
        position: Tensor,
        conditioning: Conditioning,
        state: list[LayerState],
        position_offset: int = 0,
    ) -> tuple[Tensor, list[LayerState]]:
        """One token of every row; pure: the given state is left as it was.

        Args:
            token: (R,) int64, the token drawn at `position - 1`; ignored at position 0.
            position: (R,) int64, each row's own position in 0..T-1; 0 starts an image, and what
                the row remembered counts as zero.
            conditioning: from `prologue`.
            state: one `LayerState` a layer.
            position_offset: as in `ModelConfig`.

        Returns:
            (R, V) logits of the token at `position`, and the new state.
        """
        net = self.backbone
        started = (position > 0)[:, None]
        embedded = net.embeddings(token, (position - 1 + position_offset).clamp(min=0))
        residual = torch.where(started, embedded, conditioning.class_embedding).float()  # (R, D)
        new_state = []
        for index, layer in enumerate(net.layers):
            residual, layer_state = layer.step(
                residual, conditioning.modulation[:, index], state[index], started
            )
            new_state.append(layer_state)
        hidden = net.final_layer.norm_final(net.norm_f(residual))
        shift, scale = conditioning.final_modulation.unbind(1)
        hidden = hidden * (1 + scale) + shift
        return self.head(hidden), new_state

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> AiM:
        """Fill every parameter as the published training code does; returns self."""
        cfg, net = self.config, self.backbone

        def normal(weight: Tensor, std: float) -> None:
            weight.normal_(0.0, std, generator=generator)

        def uniform(weight: Tensor, fan_in: int, gain: float = 1.0) -> None:
            bound = gain / math.sqrt(fan_in)  # kaiming_uniform_ with a = sqrt(5)
            weight.uniform_(-bound, bound, generator=generator)

        for table in (net.embeddings.word_embeddings, net.embeddings.position_embeddings):
            normal(table.weight, 0.02)
        normal(net.cls_embed.embedding_table.weight, 0.02)
        if cfg.adaln_groups:
            uniform(net.adaln_group.linear.weight, cfg.d_model)
            net.adaln_group.linear.bias.zero_()
        for layer in net.layers:
            layer.norm.weight.fill_(1.0)
            if cfg.adaln_groups:
                normal(layer.scale_shift_table, cfg.d_model**-0.5)
            else:
                layer.adaLN_modulation.linear.weight.zero_()
                layer.adaLN_modulation.linear.bias.zero_()
            mixer = layer.mixer
            uniform(mixer.in_proj.weight, cfg.d_model)
            uniform(mixer.out_proj.weight, cfg.d_inner, gain=cfg.num_layers**-0.5)
            uniform(mixer.conv1d.weight, cfg.conv_width)
            uniform(mixer.conv1d.bias, cfg.conv_width)
            mixer.A_log.uniform_(1.0, 16.0, generator=generator).log_()
            mixer.D.fill_(1.0)
            mixer.norm.weight.fill_(1.0)
            low, high = math.log(1e-3), math.log(1e-1)
            dt = mixer.dt_bias.uniform_(low, high, generator=generator).exp().clamp(min=1e-4)
            mixer.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse softplus
        net.norm_f.weight.fill_(1.0)
        net.final_layer.norm_final.weight.fill_(1.0)
        net.final_layer.adaLN_modulation.linear.weight.zero_()
        net.final_layer.adaLN_modulation.linear.bias.zero_()
        return self


class Backbone(nn.Module):
    """Everything under `backbone.` in a checkpoint."""

    def __init__(self, config: ModelConfig, dropout: float) -> None:
        super().__init__()
        width = config.d_model
        self.embeddings = Embeddings(config)
        self.cls_embed = ClassEmbedding(config)
        if config.adaln_groups:
            self.adaln_group = Modulation(width, 3 * config.adaln_groups)
        layers = nn.ModuleList(Layer(config, dropout) for _ in range(config.num_layers))
        self.layers = cast("Sequence[Layer]", layers)  # PyTorch forgets what a list holds
        self.norm_f = RMSNorm(width)
        self.final_layer = FinalLayer(width)


class Embeddings(nn.Module):
    """Word and position tables; the word table is the head's weight too."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.d_model)
        # The published table has one row more than there are tokens.
        self.position_embeddings = nn.Embedding(config.num_tokens + 1, config.d_model)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Embed (..., ) tokens at (..., ) positions: (..., D)."""
        embedded: Tensor = self.word_embeddings(tokens) + self.position_embeddings(positions)
        return embedded


class ClassEmbedding(nn.Module):
    """Class table with the "no class" row last."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.d_model)

    def forward(self, classes: Tensor) -> Tensor:
        """Embed (R,) class ids: (R, D)."""
        embedded: Tensor = self.embedding_table(classes)
        return embedded


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, in float32 or wider."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., width)."""
        return F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, EPS)


class Modulation(nn.Sequential):
    """Shifts, scales and gates from the class embedding, `parts` of them side by side."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(width, parts * width))

    @property
    def linear(self) -> nn.Linear:
        """Its layer with weights."""
        return cast("nn.Linear", self[1])


class FinalLayer(nn.Module):
    """The last norm and its modulation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_final = RMSNorm(width)
        self.adaLN_modulation = Modulation(width, 2)


class Layer(nn.Module):
    """Modulated norm, mixer, gated residual."""

    def __init__(self, config: ModelConfig, dropout: float) -> None:
        super().__init__()
        width = config.d_model
        self.norm = RMSNorm(width)
        self.mixer = Mixer(config)
        self.dropout = dropout
        self.checkpoint_activations = False
        if config.adaln_groups:
            self.scale_shift_table = nn.Parameter(torch.zeros(1, 3, width))
        else:
            self.adaLN_modulation = Modulation(width, 3)

    def forward(
        self, residual: Tensor, update: GatedUpdate | None, modulation: Tensor
    ) -> tuple[Tensor, GatedUpdate]:
        """Add the last layer's update to the residual (B, T, D), and make this one's.

        Args:
            residual: (B, T, D), without the update.
            update: of the layer before; None in the first.
            modulation: (B, 3, D).
        """
        shift, scale, gate = modulation.unbind(1)  # each (B, D)
        if self.checkpoint_activations and torch.is_grad_enabled():
            # Nothing random is inside: what dropout drops need not be drawn again.
            residual, mixed = checkpoint(
                self._mixed,
                residual,
                update,
                shift,
                scale,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        else:
            residual, mixed = self._mixed(residual, update, shift, scale)
        mixed = F.dropout(mixed, self.dropout, self.training)
        return residual, GatedUpdate(mixed, gate)

    def _mixed(
        self, residual: Tensor, update: GatedUpdate | None, shift: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The residual with the update, and the mixer's output over it, both (B, T, D)."""
        residual, hidden = add_norm(residual, update, self.norm.weight, (shift, scale))
        return residual, self.mixer(hidden)

    def step(
        self, residual: Tensor, modulation: Tensor, state: LayerState, started: Tensor
    ) -> tuple[Tensor, LayerState]:
        """The same for one position: residual (R, D), modulation (R, 3, D), started (R, 1)."""
        shift, scale, gate = modulation.unbind(1)  # each (R, D)
        mixed, state = self.mixer.step(self.norm(residual) * (1 + scale) + shift, state, started)
        return residual + gate * mixed, state


class DepthwiseConv(nn.Conv1d):
    """A convolution of each channel by itself; it always has a bias."""

    bias: nn.Parameter

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(channels, channels, width, groups=channels)


def _sizes(config: ModelConfig) -> MixerSizes:
    return MixerSizes(config.num_heads, config.head_dim, config.d_state)


class Mixer(nn.Module):
    """The Mamba-2 block with one group: projection, causal conv, state space, gated norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        inner, channels, heads = config.d_inner, config.conv_channels, config.num_heads
        self.in_proj = nn.Linear(config.d_model, inner + channels + heads, bias=False)
        self.conv1d = DepthwiseConv(channels, config.conv_width)
        self.dt_bias = nn.Parameter(torch.zeros(heads))
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = RMSNorm(inner)
        self.out_proj = nn.Linear(inner, config.d_model, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        """Mix (B, T, D) over positions."""
        cfg = self.config
        weights = MixerWeights(
            taps=self.conv1d.weight[:, 0],
            bias=self.conv1d.bias,
            dt_bias=self.dt_bias,
            a_log=self.A_log,
            skip=self.D,
            norm=self.norm.weight,
        )
        mixed: Tensor = self.out_proj(mix(self.in_proj(u), _sizes(cfg), weights))
        return mixed

    def step(self, u: Tensor, state: LayerState, started: Tensor) -> tuple[Tensor, LayerState]:
        """Mix one position (R, D); `started` (R, 1) is False where the state counts as zero."""
        cfg = self.config
        z, xbc, dt = self.in_proj(u).split([cfg.d_inner, cfg.conv_channels, cfg.num_heads], -1)
        past = state.conv * started[..., None]
        window = torch.cat([past, xbc[:, None]], dim=1)  # (R, K, X)
        convolved = (window * self.conv1d.weight[:, 0].T).sum(1) + self.conv1d.bias
        x, b, c = F.silu(convolved).split([cfg.d_inner, cfg.d_state, cfg.d_state], -1)
        x = x.unflatten(-1, (cfg.num_heads, cfg.head_dim))
        dt = F.softplus(dt.to(self.dt_bias.dtype) + self.dt_bias)  # (R, H)
        decay = torch.exp(dt * -torch.exp(self.A_log)) * started
        written = (dt[..., None] * x)[..., None] * b[:, None, None]  # (R, H, P, S)
        ssm = decay[..., None, None] * state.ssm + written
        y = ssm @ c[:, None, :, None]  # (R, H, P, 1)
        y = y[..., 0] + self.D[:, None] * x
        mixed: Tensor = self.out_proj(self.norm(y.flatten(-2) * F.silu(z)))
        return mixed, LayerState(window[:, 1:], ssm)
