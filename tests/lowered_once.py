"""A tokenizer's decoder is lowered once a run of the tests, however many exports it is part of.

PyTorch's exporter takes ten seconds for the smallest one, nine tenths of such an export, and writes
the same graph each time. A graph is kept for the tokenizer that it was made of, its weights
included, where all processes of the run find it. What calls `aim_export.onnx.decoder.lower_decoder`
itself, and processes of their own, still lower.
"""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import ModelProto

    from aim_training.tokenizer import VQTokenizer


def kept(
    lower: Callable[[VQTokenizer, int], ModelProto], folder: Path
) -> Callable[[VQTokenizer, int], ModelProto]:
    """`lower_decoder`, whose graphs are kept in a folder."""
    from onnx import load_model_from_string

    folder.mkdir(exist_ok=True)

    def lower_once(tokenizer: VQTokenizer, num_tokens: int) -> ModelProto:
        path = folder / digest(tokenizer, num_tokens)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # who comes second waits for the first
            if not path.exists():
                content = lower(tokenizer, num_tokens).SerializeToString()
                path.with_suffix(".new").write_bytes(content)
                path.with_suffix(".new").rename(path)
        return load_model_from_string(path.read_bytes())

    return lower_once


def digest(tokenizer: VQTokenizer, num_tokens: int) -> str:
    """Of all that the graph is made of."""
    found = hashlib.sha256(f"{num_tokens} {tokenizer}".encode())
    for name, tensor in tokenizer.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
