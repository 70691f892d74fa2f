"""The training images as codes, computed once and cached on disk.

The tokenizer is frozen while the model trains, so several augmented variants of every image are
encoded beforehand: one NumPy file (variants, images, T), memory-mapped, and a JSON file that says
what it was made from and what it hashes to. A cache that was made from anything else, or whose
bytes are not those that were written, is made anew.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aim_training.data import (
    BadImages,
    Crop,
    DataError,
    Draws,
    ImageFolder,
    centre_draws,
    epoch_draws,
    file_hash,
    open_images,
    shown,
)
from aim_training.progress import Progress
from aim_training.replacing import replacing
from aim_training.tokenizer import VQTokenizer

# Images encoded at once, at most.
_BATCH = 64


@dataclass(frozen=True)
class CodeRequest:
    """What is to be encoded, and how.

    Attributes:
        folder: the images.
        crop: how they are cut and mirrored.
        variants: random versions of every image; 0: its centre crop alone.
        seed: decides the random versions.
        batch: images encoded at once, which memory bounds and codes do not depend on.
    """

    folder: ImageFolder
    crop: Crop
    variants: int
    seed: int
    batch: int = _BATCH

    def draws(self) -> Iterator[Draws]:
        """Batches of draws, all images of one variant after the other."""
        count = len(self.folder)
        for variant in range(max(1, self.variants)):
            draws = (
                epoch_draws(self.seed, variant, count)
                if self.variants
                else centre_draws(np.arange(count))
            )
            for first in range(0, count, self.batch):
                part = slice(first, first + self.batch)
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
    bad_images: BadImages | None = None,
    tokenizer_sha256: str | None = None,
    quiet: bool = False,
) -> NDArray[Any]:
    """The codes of `request`, from the cache if it holds just these.

    A cache that does not fit or was damaged is replaced, once its successor is whole.

    Args:
        path: the `.npy` file; its JSON file has the same stem.
        request: what to encode.
        tokenizer: encodes, in float32.
        device: where to encode.
        workers: as in `aim_training.data.open_images`.
        resident_limit_mb: likewise.
        bad_images: likewise.
        tokenizer_sha256: the tokenizer's `weights_digest`, where it is known already.
        quiet: show nothing.

    Returns:
        (variants, images, T), uint16 or int32, memory-mapped read-only.

    Raises:
        DataError: an image cannot be read, or the disk has no room for the codes.
        OSError: the cache cannot be written; it names the file.
    """
    progress = Progress(0, sum(1 for _ in request.draws()), quiet=quiet)
    root = shown(request.folder.root)
    policy = "stop" if bad_images is None else bad_images.policy
    wanted = _describe(request, tokenizer_sha256 or weights_digest(tokenizer))
    description = _description_that_fits(path, wanted, policy)
    if description is not None:
        if file_hash(path).hex() == description["sha256"]:
            around = description["bad_images"]
            skipped = "1 image" if around == 1 else f"{around:,} images"
            note = f" (made around {skipped} that could not be read)" if around else ""
            progress.say(f"Codes of {root}: using {shown(path)}{note}")
            return np.load(path, mmap_mode="r")
        progress.say(f"Codes of {root}: {shown(path)} is damaged and made anew")
    progress.say(f"Codes of {root}: encoding into {shown(path)}")
    side = request.crop.size // tokenizer.config.downsampling
    shape = (max(1, request.variants), len(request.folder), side * side)
    dtype = np.dtype(np.uint16 if tokenizer.config.codebook_size <= 2**16 else np.int32)
    path.parent.mkdir(parents=True, exist_ok=True)
    _require_room(path.parent, math.prod(shape) * dtype.itemsize)
    known = 0 if bad_images is None else len(bad_images.found)
    images = open_images(
        request.folder,
        request.crop,
        device,
        workers=workers,
        resident_limit_mb=resident_limit_mb,
        bad_images=bad_images,
    )
    codes = _encode(images.batches(request.draws()), tokenizer.to(device), progress, request.batch)
    with replacing(path) as new, new.open("wb") as file:
        digest = _write(file, codes, shape, dtype)
    met = 0 if bad_images is None else len(bad_images.found) - known
    described = wanted | {"sha256": digest, "bad_images": met}
    with replacing(path.with_suffix(".json")) as new:
        new.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    return np.load(path, mmap_mode="r")


def _describe(request: CodeRequest, tokenizer_sha256: str) -> dict[str, Any]:
    """What decides the codes."""
    return {
        "tokenizer_sha256": tokenizer_sha256,
        "data_digest": request.folder.digest,
        "crop": asdict(request.crop),
        "variants": request.variants,
        "seed": request.seed,
    }


def _description_that_fits(
    path: Path, wanted: Mapping[str, Any], bad_images: Literal["skip", "stop"]
) -> dict[str, Any] | None:
    """What the cache says of itself, if that is what is asked for."""
    found = _read_json(path.with_suffix(".json"))
    if not path.is_file() or not isinstance(found, dict):
        return None
    made_around = found.get("bad_images")
    whole = isinstance(found.get("sha256"), str) and isinstance(made_around, int)
    fits = whole and wanted == {name: found.get(name) for name in wanted}
    return found if fits and (bad_images == "skip" or made_around == 0) else None


@torch.no_grad()
def _encode(
    batches: Iterator[Tensor], tokenizer: VQTokenizer, progress: Progress, at_once: int
) -> Iterator[NDArray[np.int64]]:
    """Codes (B, T) of every batch."""
    for number, batch in enumerate(batches, 1):
        yield tokenizer.encode(batch).cpu().numpy()
        if number % 50 == 0 or number == progress.total:
            progress.show(number, {}, at_once, float("inf"))


def _write(
    file: IO[bytes],
    codes: Iterator[NDArray[np.int64]],
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
) -> str:
    """A `.npy` file of the codes, which come in order; returns its sha256.

    Not through a memory map: where the disk is full, that kills the process.
    """
    head = io.BytesIO()
    facts = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(head, facts)
    digest = hashlib.sha256()
    written = 0
    for part in itertools.chain(
        [head.getvalue()], (batch.astype(dtype).tobytes() for batch in codes)
    ):
        digest.update(part)
        written += file.write(part)
    assert written == len(head.getvalue()) + math.prod(shape) * dtype.itemsize
    return digest.hexdigest()


def _require_room(folder: Path, size: int) -> None:
    """Find out before hours of encoding."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise DataError(
            f"the codes take {size / 2**20:,.0f} MiB in {shown(folder)}, where {free / 2**20:,.0f} "
            "MiB are free; free some space or keep them elsewhere (cache)"
        )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None
