"""The sizes of a network, by the letters that the kernels use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from aim_export.cuda.stored import StoredTensor, shortest
from aim_export.onnx.graph import NORM_EPS
from aim_runtime.bundle.manifest import ModelCard


@dataclass(frozen=True)
class Geometry:
    """Sizes of the network, in the letters of `aim_export.cuda.kernels.step`.

    `groups` is the number of modulation groups, L where every layer has its own; `position_offset`
    is the manifest's; `norm_eps` is what every norm adds to the mean square before its root, in
    all bundles that do not say it 1e-5.
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
    norm_eps: float = 1e-5

    @classmethod
    def of(cls, model: ModelCard, stored: Mapping[str, Mapping[str, StoredTensor]]) -> Geometry:
        """From a manifest, and the tensors of the graphs "prologue" and "step"."""
        bias, eps = stored["prologue"].get("adaln_group.bias"), stored["step"].get(NORM_EPS)
        groups = model.num_layers if bias is None else bias.values.size // (3 * model.d_model)
        norm_eps = cls.norm_eps if eps is None else shortest(eps.values.item())
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
            norm_eps=norm_eps,
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
