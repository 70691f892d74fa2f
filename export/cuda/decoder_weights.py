"""The decoder's weights as its kernels read them, and the launches that repack them once."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from aim_export.cuda.decoder_network import PREFIX
from aim_export.cuda.decoder_tiles import Storage
from aim_export.cuda.kernels import packing
from aim_export.cuda.launch import KernelSpec, Launcher
from aim_export.cuda.stored import StoredTensor
from aim_runtime.engines.cuda.plan import DTYPE_BYTES, Argument, Launch, Setup, Tensor, Weight

# Side of the blocks in which weights are repacked.
PACK_BLOCK = 64
# Codes, and outputs, of a program of `code_table`.
_CODE_BLOCKS = (16, 32)
_VECTORS = "decoder/vectors"


class DecoderWeights:
    """Collects what the launches of all buckets read, each weight when it is first asked for.

    Attributes:
        tensors: the decoder's parameters by their names in the tokenizer.
        storage: type of the repacked weights.
        weights: matrices in the bundle; needed by `setup` only.
        known: the tensors of everything that launches may name.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor], storage: Storage) -> None:
        self.tensors, self.storage = tensors, storage
        self.weights: dict[str, Weight] = {}
        self.known: dict[str, Tensor] = {}
        self._vectors: list[np.ndarray] = []
        self._vector_at: dict[str, Argument] = {}
        self._constants: dict[str, np.ndarray] = {}
        self._packed: dict[str, Tensor] = {}
        self._launches: list[Launch[KernelSpec]] = []
        self._launch = Launcher(self.known, num_stages=3)

    def setup(self) -> Setup[KernelSpec]:
        """Repack the weights."""
        return Setup(self._packed, tuple(self._launches))

    def constants(self) -> dict[str, np.ndarray]:
        """Tensors that the bundle keeps nowhere by themselves, or in fewer bits."""
        return {_VECTORS: np.concatenate(self._vectors), **self._constants}

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the weight `name`, as PyTorch has it."""
        return self.tensors[f"{name}.weight"].values.shape

    def vector(self, name: str, scale: float = 1.0, length: int | None = None) -> Argument:
        """A float32 vector (a bias, a norm's parameters), times `scale`, zeros up to `length`.

        Several names, separated by `+`, follow one another.
        """
        key = f"{name}*{scale}"
        if key not in self._vector_at:
            parts = [self.tensors[part].values.reshape(-1) for part in name.split("+")]
            values = np.concatenate(parts).astype(np.float32) * np.float32(scale)
            count = sum(part.size for part in self._vectors)
            # Vector loads want every start on 16 bytes; 64 keeps one to a cache line's half.
            missing = (length or values.size) - values.size
            missing += -(values.size + missing) % 16
            self._vectors.append(np.pad(values, (0, missing)))
            self.known[_VECTORS] = Tensor("float32", (count + self._vectors[-1].size,))
            self._vector_at[key] = Argument(_VECTORS, count * DTYPE_BYTES["float32"])
        return self._vector_at[key]

    def matrix(self, name: str, inputs: int, outputs: int | None = None) -> str:
        """A convolution's weight for `convolution`: (outputs, taps, inputs).

        Several names, separated by `+`, follow one another along the outputs.
        """
        target = f"decoder/{name}"
        if target in self._packed:
            return target
        parts = name.split("+")
        rows, columns, taps, _ = self.shape(parts[0])
        row_bytes = taps * taps * inputs * DTYPE_BYTES[self.storage]
        self._pack(target, outputs or rows * len(parts), taps * taps, inputs)
        for index, part in enumerate(parts):
            self._launches.append(
                self._launch(
                    packing.pack_weight,
                    (-(-rows // PACK_BLOCK), -(-columns // PACK_BLOCK), taps * taps),
                    source=self._stored(part),
                    target=Argument(target, index * rows * row_bytes),
                    OUTPUTS=rows,
                    INPUTS=columns,
                    STORED=inputs,
                    TAPS=taps,
                    BLOCK_N=PACK_BLOCK,
                    BLOCK_K=PACK_BLOCK,
                )
            )
        return target

    def upsampling_matrix(self, name: str) -> str:
        """The weight of a convolution after doubling: (4, outputs, 4, inputs)."""
        target = f"decoder/{name}"
        if target in self._packed:
            return target
        outputs, inputs, _, _ = self.shape(name)
        self._pack(target, 4, outputs, 4, inputs)
        self._launches.append(
            self._launch(
                packing.pack_upsampling_weight,
                (-(-outputs // PACK_BLOCK), -(-inputs // PACK_BLOCK), 16),
                source=self._stored(name),
                target=target,
                OUTPUTS=outputs,
                INPUTS=inputs,
                BLOCK_N=PACK_BLOCK,
                BLOCK_K=PACK_BLOCK,
            )
        )
        return target

    def codes(self, channels: int) -> str:
        """What tokens are looked up in: (codes, channels), filled up with zeros."""
        target = "decoder/codes"
        if target in self._packed:
            return target
        codes, code_dim = self.shape("quantize.embedding")
        outputs, *_ = self.shape("post_quant_conv")
        block_v, block_n = _CODE_BLOCKS
        self._launches.append(
            self._launch(
                packing.code_table,
                (-(-codes // block_v), -(-outputs // block_n)),
                codes=self._stored("quantize.embedding"),
                weight=self._stored("post_quant_conv"),
                bias=self.vector("post_quant_conv.bias"),
                table=self._pack(target, codes, channels),
                CODES=codes,
                CODE_DIM=code_dim,
                OUTPUTS=outputs,
                STORED=channels,
                BLOCK_V=block_v,
                BLOCK_N=block_n,
            )
        )
        return target

    def _pack(self, name: str, *shape: int) -> str:
        """A buffer for a repacked weight."""
        self._packed[name] = self.known[name] = Tensor(self.storage, shape)
        return name

    def _stored(self, name: str) -> str:
        """The weight `name` as the bundle holds it, among the plan's weights or constants."""
        stored = self.tensors[f"{name}.weight"]
        key = f"{PREFIX}{name}.weight"
        if stored.part is None:
            self._constants[key] = stored.values
            self.known[key] = Tensor(stored.dtype, stored.values.shape)
        else:
            self.known[key] = Tensor(stored.dtype, stored.values.shape)
            self.weights[key] = Weight(self.known[key], stored.dtype, (stored.part,))
        return key
