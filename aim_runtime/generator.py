"""The Generator: classes in, images out.

One inner loop (`Generator._draw`) advances a request by the blocks of tokens that its engine
decides, on a CPU step by step; `generate` drains it, `stream` looks at it on the way. A request
owns its rows, tokens and noise, the generator itself never changes, so any number of threads may
use one generator, and a request that was cancelled, abandoned or failed leaves nothing behind.

Image i of a request uses the seed `seed + i` and depends on (bundle, class, that seed, options)
only. Images are decoded as many at a time as the engine asks for. On a CPU that is one, which keeps
the decoder's memory small and makes an image's pixels independent of its batch.
"""

from __future__ import annotations

import collections.abc
import contextlib
import difflib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aim_runtime.arguments import whole_number
from aim_runtime.bundle import Bundle
from aim_runtime.engine import Engine, load_engine
from aim_runtime.errors import AimError, RequestCancelled
from aim_runtime.manifest import Manifest
from aim_runtime.noise import uniforms
from aim_runtime.plan import BatchPlan, check_memory_limit
from aim_runtime.sampling import SamplingOptions
from aim_runtime.version import __version__

if TYPE_CHECKING:
    from PIL.Image import Image

UNDECIDED = -1
"""Stands for a token that is not drawn yet."""

UNDECIDED_GRAY = 128
"""The value of all three channels where the token is not drawn yet."""

MAX_SEED = 2**64 - 1

# In progress, decoding an image counts as the T tokens over this: a guess, the true share of the
# time varies with the model.
_DECODING_SHARE = 4

ClassLike = int | str
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Result:
    """The images of one request and what it takes to draw each of them again."""

    tokens: NDArray[np.int64]
    """(N, T)"""
    array: NDArray[np.uint8]
    """(N, height, width, 3)"""
    classes: tuple[int, ...]
    class_names: tuple[str, ...]
    seeds: tuple[int, ...]
    options: SamplingOptions
    seconds: float
    backend: str
    precision: str
    bundle: str
    """Name of the bundle."""
    bundle_sha256: str
    """Checksum of the bundle's manifest, which holds those of all its files."""

    @cached_property
    def images(self) -> list[Image]:
        """The images as PIL images."""
        return _pil_images(self.array)

    def settings(self, index: int) -> dict[str, Any]:
        """Everything that reproduces image `index`, ready for JSON."""
        return {
            "class": self.classes[index],
            "class_name": self.class_names[index],
            "seed": self.seeds[index],
            "cfg_scale": self.options.cfg_scale,
            "temperature": self.options.temperature,
            "top_k": self.options.top_k,
            "top_p": self.options.top_p,
            "bundle": self.bundle,
            "bundle_sha256": self.bundle_sha256,
            "backend": self.backend,
            "precision": self.precision,
            "version": __version__,
        }


@dataclass(frozen=True, eq=False)
class Preview:
    """A request on its way. Images are decoded when asked for, so progress alone costs nothing."""

    tokens: NDArray[np.int64]
    """(N, T), -1 where undecided."""
    done_tokens: int
    total_tokens: int
    _engine: Engine

    @property
    def done(self) -> bool:
        """Whether every token of every image is decided."""
        return self.done_tokens == self.total_tokens

    @cached_property
    def array(self) -> NDArray[np.uint8]:
        """(N, height, width, 3); flat gray where undecided."""
        return _preview(self._engine, self.tokens)

    @cached_property
    def images(self) -> list[Image]:
        """The images as PIL images; flat gray where undecided."""
        return _pil_images(self.array)


@dataclass(frozen=True)
class _Request:
    engine: Engine
    class_ids: NDArray[np.int64]  # (N,)
    seeds: tuple[int, ...]
    options: SamplingOptions
    plan: BatchPlan


class Generator:
    """A loaded bundle that draws images. Thread-safe.

    `memory_limit_mb` bounds what one request takes on top of the model (see `plan`), None leaves it
    to the engine; requests that run at the same time each take their own.

    Attributes:
        backend: Name of the backend that computes.
        device: Where it computes: "cpu", "cuda:0".
        precision: What it computes in: "fp32", "fp16".
    """

    def __init__(
        self, bundle: Bundle, engine: Engine, *, memory_limit_mb: float | None = None
    ) -> None:
        if memory_limit_mb is not None:
            check_memory_limit(memory_limit_mb)
        self.bundle = bundle
        self.manifest: Manifest = bundle.manifest
        self.backend = engine.backend
        self.device = engine.device
        self.precision = engine.precision
        self.class_names = bundle.manifest.class_names
        defaults = bundle.manifest.sampling
        self.sampling = SamplingOptions(
            defaults.cfg_scale, defaults.temperature, defaults.top_k, defaults.top_p
        )
        self._memory_limit_mb = memory_limit_mb
        self._engine: Engine | None = engine

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        backend: str = "auto",
        device: str = "auto",
        precision: str = "auto",
        threads: int | None = None,
        memory_limit_mb: float | None = None,
    ) -> Generator:
        """Load the bundle at `path` (a folder or a .zip), or the model installed with the package.

        Args:
            path: The bundle; None for the model in the box.
            backend: "auto" for the fastest that works here, or the name of one.
            device: Where to run: "cpu", "cuda" or "cuda:1"; "auto" leaves it to the backend.
            precision: What to compute in, such as "fp32" or "fp16", as far as backend and bundle
                have it; "auto" leaves it to the backend.
            threads: CPU threads; None for all cores this process may use.
            memory_limit_mb: Working memory of one request, in MiB; longer ones are split. None
                means 512 on a CPU and most of what is free on a GPU.

        A backend that should work but fails is passed over under "auto", with a RuntimeWarning.

        Raises:
            BundleError: The bundle is missing, damaged, unsafe or too new.
            BackendError: The backend is unknown or cannot run here.
            ValueError: An argument is out of range.
        """
        if threads is not None:
            threads = whole_number("threads", threads, 1, 1024)
        bundle = Bundle.open(path)
        engine = load_engine(
            bundle, backend=backend, device=device, threads=threads, precision=precision
        )
        return cls(bundle, engine, memory_limit_mb=memory_limit_mb)

    def close(self) -> None:
        """Let go of the model; its memory is free once requests still running have ended.

        Requests made afterwards raise AimError.
        """
        self._engine = None

    def __enter__(self) -> Generator:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def class_index(self, class_: ClassLike) -> int:
        """The index of a class given by index, by name or by one of a name's comma-parted synonyms.

        Case does not matter. Raises ValueError, with close matches, when there is no such class.
        """
        names = self.class_names
        if isinstance(class_, str):
            wanted = class_.strip().casefold()
            found = self._classes_by_name.get(wanted)
            if found is None and wanted.isascii() and wanted.isdigit() and len(wanted) < 10:
                return self.class_index(int(wanted))
            if found is None:
                close = difflib.get_close_matches(wanted, self._classes_by_name, n=3)
                hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
                raise ValueError(
                    f"class {class_!r} is unknown: it must be a class name "
                    f"or a whole number from 0 to {len(names) - 1}{hint}"
                )
            if len(found) > 1:
                raise ValueError(
                    f"class {class_!r} is the name of several classes; "
                    f"give one of the numbers {', '.join(map(str, found))}"
                )
            return found[0]
        return whole_number("class", class_, 0, len(names) - 1, "or a class name")

    def plan(self, n: int, cfg_scale: float | None = None) -> BatchPlan:
        """How `n` images are batched within the memory limit, and the memory that takes.

        On a CPU the plan is that of `plan_batches`, which needs no engine.
        Raises ValueError when not even one image fits, BackendError when a GPU has too little
        memory for one.
        """
        return self._open_engine().plan(n, cfg_scale, self._memory_limit_mb)

    def generate(
        self,
        classes: ClassLike | Sequence[ClassLike],
        *,
        seed: int = 0,
        cfg_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        progress: Progress | None = None,
        cancel: threading.Event | None = None,
    ) -> Result:
        """Draw one image for each of `classes`.

        Args:
            classes: Class indices or names, one an image.
            seed: Image i uses seed + i, so each image can be drawn again alone.
            cfg_scale: Guidance, as in `SamplingOptions`; None takes the bundle's default.
            temperature: As in `SamplingOptions`; None takes the bundle's default.
            top_k: As in `SamplingOptions`; None takes the bundle's default.
            top_p: As in `SamplingOptions`; None takes the bundle's default.
            progress: Called after each step and after each decoded image with (work done, work in
                all). A token counts 1; once all are drawn, decoding an image counts T / 4 more. An
                engine on a GPU may take several steps, or decode several images, at a time.
            cancel: Once set, the request ends before the next of these with RequestCancelled.

        Raises:
            ValueError: An argument is out of range, or one image exceeds the memory limit.
            RequestCancelled: `cancel` was set.
            BackendError: The backend failed.
        """
        started = time.perf_counter()
        request = self._request(classes, seed, cfg_scale, temperature, top_k, top_p)
        tokens = self._undecided(request)  # (N, T)
        decoding = -(-tokens.shape[1] // _DECODING_SHARE)

        def report(done: int) -> None:
            if progress is not None:
                progress(done, tokens.size + len(tokens) * decoding)

        with contextlib.closing(self._draw(request, tokens, cancel)) as steps:
            for _, done in steps:
                report(done)
        model = self.manifest.model
        images = np.empty((len(tokens), model.image_height, model.image_width, 3), np.uint8)
        for start in range(0, len(tokens), request.engine.decode_batch):
            _check_cancel(cancel)
            stop = min(start + request.engine.decode_batch, len(tokens))
            images[start:stop] = request.engine.decode(tokens[start:stop])
            report(tokens.size + stop * decoding)
        return Result(
            tokens=tokens,
            array=images,
            classes=tuple(request.class_ids.tolist()),
            class_names=tuple(self.class_names[index] for index in request.class_ids),
            seeds=request.seeds,
            options=request.options,
            seconds=time.perf_counter() - started,
            backend=self.backend,
            precision=self.precision,
            bundle=self.manifest.name,
            bundle_sha256=self.bundle.manifest_sha256,
        )

    def stream(
        self,
        classes: ClassLike | Sequence[ClassLike],
        *,
        every: int = 16,
        seed: int = 0,
        cfg_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        cancel: threading.Event | None = None,
    ) -> collections.abc.Generator[Preview]:
        """Like `generate`, but yields a preview every `every` steps; the last one is `done`.

        An engine that decides several steps at a time yields it as soon as it has so many.
        Its tokens and images are those of `generate`. Arguments are checked by the call itself;
        the work is done as the previews are asked for, and closing the iterator stops it.
        """
        every = whole_number("every", every, 1, 2**31)
        request = self._request(classes, seed, cfg_scale, temperature, top_k, top_p)
        return self._previews(request, every, cancel)

    def logits(
        self,
        tokens: Any,
        classes: ClassLike | Sequence[ClassLike],
        *,
        cfg_scale: float | None = None,
    ) -> NDArray[np.float32]:
        """Teacher-forced scores: [n, s] are those of token s of image n, given those before it.

        `tokens` is (N, T) whole numbers, `classes` one class an image, `cfg_scale` as in
        `generate`. Returns (N, T, V) float32, before temperature, top-k and top-p.
        Raises ValueError for arguments out of range.
        """
        model = self.manifest.model
        request = self._request(classes, 0, cfg_scale, None, None, None)
        forced = np.asarray(tokens)
        shape = (len(request.seeds), model.num_tokens)
        if forced.shape != shape or forced.dtype.kind not in "iu":
            raise ValueError(
                f"tokens is {forced.dtype} of shape {forced.shape}; "
                f"it must be whole numbers of shape {shape}, one row for each of classes"
            )
        if forced.min() < 0 or forced.max() >= model.vocab_size:
            raise ValueError(
                f"tokens has values from {forced.min()} to {forced.max()}; "
                f"they must be from 0 to {model.vocab_size - 1}"
            )
        forced = forced.astype(np.int64)
        out = np.empty((*shape, model.vocab_size), np.float32)  # (N, T, V)
        for start, stop in _batches(request):
            steps = request.engine.scores(
                request.class_ids[start:stop], forced[start:stop], request.options.cfg_scale
            )
            for step, scores in enumerate(steps):
                out[start:stop, step] = scores
        return out

    # -- inside -----------------------------------------------------------------------------------

    @cached_property
    def _classes_by_name(self) -> dict[str, list[int]]:
        """Casefolded names, and the synonyms within them, to indices; whole names win."""
        whole: dict[str, list[int]] = {}
        parts: dict[str, list[int]] = {}
        for index, name in enumerate(self.class_names):
            whole.setdefault(name.strip().casefold(), []).append(index)
            for part in {part.strip().casefold() for part in name.split(",")} - {""}:
                parts.setdefault(part, []).append(index)
        return parts | whole

    def _open_engine(self) -> Engine:
        engine = self._engine
        if engine is None:
            raise AimError("this generator is closed; load it again")
        return engine

    def _request(
        self,
        classes: ClassLike | Sequence[ClassLike],
        seed: int,
        cfg_scale: float | None,
        temperature: float | None,
        top_k: int | None,
        top_p: float | None,
    ) -> _Request:
        engine = self._open_engine()
        alone = isinstance(classes, str) or not hasattr(classes, "__iter__")
        wanted: list[Any] = [classes] if alone else list(classes)  # type: ignore[arg-type]
        if not wanted:
            raise ValueError("classes is empty; it must name at least one class")
        class_ids = np.array([self.class_index(item) for item in wanted], np.int64)
        n = len(wanted)
        seed = whole_number("seed", seed, 0, MAX_SEED - (n - 1))
        options = self.sampling.replace(
            cfg_scale=cfg_scale, temperature=temperature, top_k=top_k, top_p=top_p
        )
        plan = engine.plan(n, options.cfg_scale, self._memory_limit_mb)
        return _Request(engine, class_ids, tuple(range(seed, seed + n)), options, plan)

    def _undecided(self, request: _Request) -> NDArray[np.int64]:
        shape = (len(request.seeds), self.manifest.model.num_tokens)
        return np.full(shape, UNDECIDED, np.int64)

    def _draw(
        self, request: _Request, tokens: NDArray[np.int64], cancel: threading.Event | None
    ) -> collections.abc.Generator[tuple[int, int]]:
        """Fill `tokens` (N, T) batch by batch, block by block.

        Yields for each block how many steps it took and how many tokens are decided by now.
        """
        steps = tokens.shape[1]
        _check_cancel(cancel)
        for start, stop in _batches(request):
            noise = uniforms(request.seeds[start:stop], steps)  # (n, T)
            drawing = request.engine.draw(request.class_ids[start:stop], noise, request.options)
            done = 0
            with contextlib.closing(drawing) as blocks:
                for block in blocks:  # (n, k)
                    size = block.shape[1]
                    tokens[start:stop, done : done + size] = block
                    done += size
                    yield size, start * steps + done * (stop - start)
                    _check_cancel(cancel)

    def _previews(
        self, request: _Request, every: int, cancel: threading.Event | None
    ) -> collections.abc.Generator[Preview]:
        tokens = self._undecided(request)
        since = 0  # steps since the last preview
        with contextlib.closing(self._draw(request, tokens, cancel)) as blocks:
            for size, done in blocks:
                since += size
                if since >= every or done == tokens.size:
                    since %= every
                    yield Preview(tokens.copy(), done, tokens.size, request.engine)


def _preview(engine: Engine, tokens: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Images of partly decided `tokens`, gray where they are undecided."""
    model = engine.manifest.model
    shape = (len(tokens), model.image_height, model.image_width, 3)
    array = np.full(shape, UNDECIDED_GRAY, np.uint8)
    square = np.ones((model.token_side, model.token_side), bool)
    decided = tokens != UNDECIDED  # (N, T)
    begun = np.flatnonzero(decided.any(axis=1))
    for start in range(0, len(begun), engine.decode_batch):
        some = begun[start : start + engine.decode_batch]
        # The decoder wants all tokens; the last one drawn disturbs its neighbours least.
        last = [row[known][-1:] for row, known in zip(tokens[some], decided[some], strict=True)]
        images = engine.decode(np.where(decided[some], tokens[some], last))
        for index, image in zip(some, images, strict=True):
            pixels = np.kron(decided[index].reshape(model.grid), square)  # (height, width)
            array[index][pixels] = image[pixels]
    return array


def _batches(request: _Request) -> Iterator[tuple[int, int]]:
    n, size = len(request.seeds), request.plan.batch_size
    for start in range(0, n, size):
        yield start, min(start + size, n)


def _check_cancel(cancel: threading.Event | None) -> None:
    if cancel is not None and cancel.is_set():
        raise RequestCancelled("the request was cancelled")


def _pil_images(array: NDArray[np.uint8]) -> list[Image]:
    from PIL import Image  # here: importing the package stays quick

    return [Image.fromarray(image) for image in array]
