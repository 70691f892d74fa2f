"""The sizes of a network, by the letters that the kernels use."""

from __future__ import annotations

from dataclasses import dataclass

from aim_runtime.bundle.manifest import ModelCard


@dataclass(frozen=True)
class Geometry:
    """Sizes of the network, in the letters of `aim_export.cuda.kernels.step`.

    `groups` is the number of modulation groups, L where every layer has its own; `position_offset`
    is the manifest's.
    """

    D: int
    L: int
    S: int
    P: int
    K: int
    V: int
    T: int
    groups: int
    position_offset: int
    num_classes: int = 1000

    @classmethod
    def of(cls, model: ModelCard, groups: int) -> Geometry:
        """From a manifest."""
        return cls(
            D=model.d_model,
            L=model.num_layers,
            S=model.d_state,
            P=model.head_dim,
            K=model.conv_width,
            V=model.vocab_size,
            T=model.num_tokens,
            groups=groups,
            position_offset=model.position_offset,
            num_classes=model.num_classes,
        )

    @property
    def inner(self) -> int:
        """I, the channels inside a layer."""
        return 2 * self.D

    @property
    def H(self) -> int:
        """Heads."""
        return self.inner // self.P

    @property
    def X(self) -> int:
        """Channels of the convolution."""
        return self.inner + 2 * self.S

    @property
    def E(self) -> int:
        """Outputs of `in_proj`."""
        return self.inner + self.X + self.H
