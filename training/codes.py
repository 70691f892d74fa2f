"""The training images as codes, computed once and cached on disk.

The tokenizer is frozen while the model trains, so several augmented variants of every image are
encoded beforehand: one NumPy file (variants, images, T), memory-mapped, and a JSON file that says
what it was made from. A cache that was made from anything else is made anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aim_training.data import (
    Crop,
    Draws,
    ImageFolder,
    centre_draws,
    epoch_draws,
    open_images,
)
from aim_training.progress import Progress
from aim_training.tokenizer import VQTokenizer

#: Images encoded at once.
_BATCH = 64


@dataclass(frozen=True)
class CodeRequest:
    """What is to be encoded, and how.

    Attributes:
        folder: the images.
        crop: how they are cut and mirrored.
        variants: random versions of every image; 0: its centre crop alone.
        seed: decides the random versions.
    """

    folder: ImageFolder
    crop: Crop
    variants: int
    seed: int

    def draws(self) -> Iterator[Draws]:
        """Batches of draws, all images of one variant after the other."""
        count = len(self.folder)
        for variant in range(max(1, self.variants)):
            draws = (
                epoch_draws(self.seed, variant, count)
                if self.variants
                else centre_draws(np.arange(count))
            )
            for first in range(0, count, _BATCH):
                part = slice(first, first + _BATCH)
                yield Draws(draws.index[part], draws.uniform[part])


def weights_digest(tokenizer: VQTokenizer) -> str:
    """sha256 over the tokenizer's tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tokenizer.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def cached_codes(
    path: Path,
    request: CodeRequest,
    tokenizer: VQTokenizer,
    device: torch.device,
    *,
    workers: int,
    resident_limit_mb: int,
    quiet: bool = False,
) -> NDArray[Any]:
    """The codes of ``request``, from the cache if it holds just these.

    Args:
        path: the ``.npy`` file; its JSON file has the same stem.
        request: what to encode.
        tokenizer: encodes, in float32.
        device: where to encode.
        workers: as in :func:`aim_training.data.open_images`.
        resident_limit_mb: likewise.
        quiet: show nothing.

    Returns:
        (variants, images, T), uint16 or int32, memory-mapped read-only.

    Raises:
        DataError: an image cannot be read.
    """
    description = {
        "tokenizer_sha256": weights_digest(tokenizer),
        "data_digest": request.folder.digest,
        "crop": asdict(request.crop),
        "variants": request.variants,
        "seed": request.seed,
    }
    progress = Progress(0, sum(1 for _ in request.draws()), quiet=quiet)
    described = path.with_suffix(".json")
    if path.is_file() and _read_json(described) == description:
        progress.say(f"Codes of {request.folder.root}: using {path}")
        return np.load(path, mmap_mode="r")
    progress.say(f"Codes of {request.folder.root}: encoding into {path}")
    images = open_images(
        request.folder,
        request.crop,
        device,
        workers=workers,
        resident_limit_mb=resident_limit_mb,
    )
    side = request.crop.size // tokenizer.config.downsampling
    dtype = np.uint16 if tokenizer.config.codebook_size <= 2**16 else np.int32
    shape = (max(1, request.variants), len(request.folder), side * side)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without its description a half-made or outdated file counts for nothing.
    described.unlink(missing_ok=True)
    partial = path.with_suffix(".part")
    try:
        codes = np.lib.format.open_memmap(partial, mode="w+", dtype=dtype, shape=shape)
        flat = codes.reshape(-1, side * side)
        _encode(images.batches(request.draws()), tokenizer.to(device), flat, progress)
        codes.flush()
        del codes, flat
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    partial.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, described)
    return np.load(path, mmap_mode="r")


@torch.no_grad()
def _encode(
    batches: Iterator[Tensor], tokenizer: VQTokenizer, codes: NDArray[Any], progress: Progress
) -> None:
    first = 0
    for number, batch in enumerate(batches, 1):
        indices = tokenizer.encode(batch).cpu().numpy()  # (B, T)
        codes[first : first + len(indices)] = indices
        first += len(indices)
        if number % 50 == 0 or first == len(codes):
            progress.show(number, {}, _BATCH, float("inf"))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
