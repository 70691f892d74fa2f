"""The training images as codes, computed once and cached on disk.

The tokenizer is frozen while the model trains, so several augmented variants of every image are
encoded beforehand: NumPy files, memory-mapped, and a JSON file that says what they were made from
and what they hash to. A cache that was made from anything else, or whose bytes are not those that
were written, is made anew.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from aim_training.code_files import BadImage, Codes, Encoding, Layout
from aim_training.data import (
    BadImages,
    Crop,
    DataError,
    Draws,
    ImageError,
    ImageSet,
    centre_draws,
    epoch_draws,
    file_hash,
    open_images,
    shown,
    ten_crop_draws,
)
from aim_training.data.errors import Name
from aim_training.data.parallel import ordered_map
from aim_training.progress import Progress
from aim_training.replacing import replacing
from aim_training.tokenizer import VQTokenizer

# Images encoded at once, at most.
_BATCH = 64
# Seconds between looks at what other processes have encoded, and without any change in it until
# one of them is taken for dead.
_LOOK_EVERY_S, _PATIENCE_S = 0.5, 300.0
# That hash files.
_THREADS = 8


@dataclass(frozen=True)
class CodeRequest:
    """What is to be encoded, and how.

    Attributes:
        folder: the images, in a folder or in shards.
        crop: how they are cut and mirrored.
        variants: versions of every image; 0: its centre crop alone.
        seed: decides the random versions.
        batch: images encoded at once, which memory bounds and codes do not depend on.
        ten_crop: the versions are the first `variants` of ten-crop instead of random ones.
    """

    folder: ImageSet
    crop: Crop
    variants: int
    seed: int
    batch: int = _BATCH
    ten_crop: bool = False

    def draws(self, numbers: Iterable[int]) -> Iterator[Draws]:
        """The draws of some batches; those of a variant come after those of the one before."""
        count = len(self.folder)
        a_variant = -(-count // self.batch)
        drawn, of = None, None
        for number in numbers:
            variant, place = divmod(number, a_variant)
            if drawn is None or of != variant:
                drawn, of = self._variant(variant), variant
            part = slice(place * self.batch, (place + 1) * self.batch)
            yield Draws(drawn.index[part], drawn.uniform[part])

    def _variant(self, variant: int) -> Draws:
        count = len(self.folder)
        if self.ten_crop:
            return ten_crop_draws(variant, np.arange(count))
        return (
            epoch_draws(self.seed, variant, count)
            if self.variants
            else centre_draws(np.arange(count))
        )


def weights_digest(network: nn.Module) -> str:
    """sha256 over a network's tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Processes:
    """The processes that encode together, each its part.

    Attributes:
        rank: this one.
        world: how many there are.
        wait: returns once all have called it.
    """

    rank: int = 0
    world: int = 1
    wait: Callable[[], None] = lambda: None


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
    processes: Processes = Processes(),
) -> Codes:
    """The codes of `request`, from the cache if it holds just these.

    A cache that does not fit or was damaged is replaced, once its successor is whole. Encoding that
    was stopped goes on where it was, with any number of processes, and ends with the same bytes.

    Args:
        path: the `.npy` file; its JSON file has the same stem, and so have the several files of
            many codes.
        request: what to encode.
        tokenizer: encodes, in float32.
        device: where to encode.
        workers: as in `aim_training.data.open_images`.
        resident_limit_mb: likewise.
        bad_images: likewise.
        tokenizer_sha256: the tokenizer's `weights_digest`, where it is known already.
        quiet: show nothing.
        processes: that encode together; each calls this.

    Returns:
        (variants, images, T), uint16 or int32, memory-mapped read-only.

    Raises:
        DataError: an image cannot be read, or the disk has no room for the codes.
        OSError: the cache cannot be written; it names the file.
    """
    side = request.crop.size // tokenizer.config.downsampling
    dtype = "uint16" if tokenizer.config.codebook_size <= 2**16 else "int32"
    layout = Layout.plan(
        max(1, request.variants),
        len(request.folder),
        side * side,
        dtype,
        request.batch,
        processes.world,
    )
    wanted = _describe(request, tokenizer_sha256 or weights_digest(tokenizer))
    progress = Progress(0, layout.variants * layout.images, quiet=quiet)
    work = _Work(path, request, wanted, layout, bad_images, progress)
    if processes.rank == 0:
        work.prepare()
    processes.wait()
    encoding = Encoding.resume(path, wanted, layout)
    processes.wait()  # all have seen the same parts unfinished before any of them grows
    if encoding is not None:
        with _naming(path, encoding.folder):
            work.encode(encoding, tokenizer.to(device), workers, resident_limit_mb, processes)
            processes.wait()
            if processes.rank == 0:
                work.finish(encoding)
    processes.wait()
    return _opened(path, layout.variants)


class _Work:
    """One call of `cached_codes`."""

    def __init__(
        self,
        path: Path,
        request: CodeRequest,
        wanted: Mapping[str, Any],
        layout: Layout,
        bad_images: BadImages | None,
        progress: Progress,
    ) -> None:
        self.path = path
        self.request = request
        self.wanted = wanted
        self.layout = layout
        self.bad_images = bad_images
        self.progress = progress
        self.shown_at = 0.0

    def prepare(self) -> None:
        """Leave behind either a cache that fits and no encoding, or an encoding to go on with."""
        root = shown(self.request.folder.root)
        policy = "stop" if self.bad_images is None else self.bad_images.policy
        description = _description_that_fits(self.path, self.wanted, policy)
        if description is not None:
            if _is_whole(self.path, description):
                around = description["bad_images"]
                skipped = "1 image" if around == 1 else f"{around:,} images"
                note = f" (made around {skipped} that could not be read)" if around else ""
                self.progress.say(f"Codes of {root}: using {shown(self.path)}{note}")
                Encoding.discard(self.path)
                return
            self.progress.say(f"Codes of {root}: {shown(self.path)} is damaged and made anew")
        encoding = Encoding.resume(self.path, self.wanted, self.layout)
        if encoding is not None and policy == "stop" and any(part.bad for part in encoding.parts):
            encoding = None
        done = 0 if encoding is None else encoding.images_done()
        goes_on = f", going on after {done:,} of {self.progress.total:,} images" if done else ""
        self.progress.say(f"Codes of {root}: encoding into {shown(self.path)}{goes_on}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _require_room(self.path.parent, (self.progress.total - done) * self.layout.row_bytes)
        if encoding is None:
            with _naming(self.path, Encoding.folder_of(self.path)):
                Encoding.begin(self.path, self.wanted, self.layout)

    @torch.no_grad()
    def encode(
        self,
        encoding: Encoding,
        tokenizer: VQTokenizer,
        workers: int,
        resident_limit_mb: int,
        processes: Processes,
    ) -> None:
        """Encode this process's share of the parts, and wait for the others'."""
        request = replace(self.request, batch=encoding.layout.batch)
        unfinished = [part for part in encoding.parts if not part.whole]
        share = unfinished[processes.rank :: processes.world]
        if share:
            bad = None if self.bad_images is None else _Recorded(self.bad_images)
            images = open_images(
                request.folder,
                request.crop,
                next(tokenizer.parameters()).device,
                workers=workers,
                resident_limit_mb=resident_limit_mb,
                bad_images=bad,
            )
            todo = [n for part in share for n in range(part.first + part.done, part.last)]
            batches = images.batches(request.draws(todo))
            try:
                for part in share:
                    while not part.whole:
                        codes = tokenizer.encode(next(batches)).cpu().numpy()
                        met = [] if bad is None else bad.taken()
                        part.append(codes.astype(encoding.layout.dtype).tobytes(), met)
                        self._show(encoding)
            finally:
                for part in share:
                    part.close()
        # Not in a collective, which gives up after minutes, as long as there is any progress.
        done, since = -1, time.monotonic()
        while processes.world > 1 and done < self.progress.total:
            if (now := encoding.images_done()) > done:
                done, since = now, time.monotonic()
            elif time.monotonic() - since > _PATIENCE_S:
                break
            time.sleep(_LOOK_EVERY_S)
            self.progress.count(done)

    def _show(self, encoding: Encoding) -> None:
        """Show what all processes have encoded, looking at their files now and then."""
        now = time.monotonic()
        if not self.progress.quiet and now - self.shown_at >= _LOOK_EVERY_S:
            self.shown_at = now
            self.progress.count(encoding.images_done())

    def finish(self, encoding: Encoding) -> None:
        """Put the parts in their places and describe them."""
        for part in encoding.parts:
            part.read()
            if not part.whole:
                raise OSError(errno.EIO, "what was written cannot be read back", str(self.path))
        self.progress.count(self.progress.total)
        files = encoding.file_names(self.path)
        hashes = list(ordered_map(file_hash, [part.path for part in encoding.parts], _THREADS))
        stale = _files_of(self.path, _read_json(self.path.with_suffix(".json")))
        for part, file in zip(encoding.parts, files, strict=True):
            os.replace(part.path, file)
        bad = {name: (why, kind) for part in encoding.parts for name, why, kind in part.bad}
        described: dict[str, Any] = {**self.wanted}
        if len(files) == 1:
            described["sha256"] = hashes[0].hex()
        else:
            described["files"] = {
                file.name: digest.hex() for file, digest in zip(files, hashes, strict=True)
            }
        described["bad_images"] = len(bad)
        with replacing(self.path.with_suffix(".json")) as new:
            new.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        for file in stale:
            if file not in files:
                file.unlink(missing_ok=True)
        Encoding.discard(self.path)
        self._note(bad)

    def _note(self, bad: Mapping[str, tuple[str, str]]) -> None:
        """List what other processes, or earlier calls, could not read."""
        if self.bad_images is None:
            return
        for name, (why, kind) in bad.items():
            known: Name = Path(name) if isinstance(self.request.folder.root, Path) else name
            self.bad_images.note(
                ImageError(known, why, "oversized" if kind == "oversized" else "damaged")
            )


class _Recorded(BadImages):
    """Bad images as another takes them up, those met since the last look among them."""

    def __init__(self, inner: BadImages) -> None:
        super().__init__(inner.policy, quiet=True)
        self.inner = inner
        self.met: list[BadImage] = []

    def note(self, fault: ImageError) -> None:
        self.inner.note(fault)
        self.met.append((str(fault.path), fault.reason, fault.kind))

    def say(self, line: str) -> None:
        self.inner.say(line)

    def taken(self) -> list[BadImage]:
        met, self.met = self.met, []
        return met


@contextlib.contextmanager
def _naming(path: Path, folder: Path) -> Iterator[None]:
    """What cannot be written on the way to a cache is called by the cache's name."""
    try:
        yield
    except OSError as error:
        name = error.filename
        if name is not None and not Path(str(name)).is_relative_to(folder):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _opened(path: Path, variants: int) -> Codes:
    """The codes of a whole cache."""
    files = _files_of(path, _read_json(path.with_suffix(".json")))
    return Codes([np.load(file, mmap_mode="r") for file in files], variants)


def _files_of(path: Path, description: Any) -> list[Path]:
    """The files that a description is about, in their order."""
    names = description.get("files") if isinstance(description, dict) else None
    if not isinstance(names, dict):
        return [path]
    # Only the files' own names: a description may be anybody's.
    return [path.with_name(Path(str(name)).name) for name in names]


def _is_whole(path: Path, description: Mapping[str, Any]) -> bool:
    """Whether the files are those that were written."""
    hashes = description.get("files", {path.name: description.get("sha256")})
    files = [path.with_name(Path(name).name) for name in hashes]
    if not all(file.is_file() for file in files):
        return False
    found = ordered_map(file_hash, files, _THREADS)
    return all(digest.hex() == told for digest, told in zip(found, hashes.values(), strict=True))


def _describe(request: CodeRequest, tokenizer_sha256: str) -> dict[str, Any]:
    """What decides the codes."""
    crop = asdict(request.crop)
    if not request.crop.square:  # caches of earlier versions do not say so
        del crop["square"]
    wanted = {
        "tokenizer_sha256": tokenizer_sha256,
        "data_digest": request.folder.digest,
        "crop": crop,
        "variants": request.variants,
        "seed": request.seed,
    }
    return wanted | ({"ten_crop": True} if request.ten_crop else {})


def _description_that_fits(
    path: Path, wanted: Mapping[str, Any], bad_images: Literal["skip", "stop"]
) -> dict[str, Any] | None:
    """What the cache says of itself, if that is what is asked for."""
    found = _read_json(path.with_suffix(".json"))
    if not isinstance(found, dict) or not all(map(Path.is_file, _files_of(path, found))):
        return None
    made_around = found.get("bad_images")
    hashed = isinstance(found.get("sha256"), str) or isinstance(found.get("files"), dict)
    whole = hashed and isinstance(made_around, int)
    names = {*wanted, "ten_crop"}
    fits = whole and all(wanted.get(name) == found.get(name) for name in names)
    return found if fits and (bad_images == "skip" or made_around == 0) else None


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
