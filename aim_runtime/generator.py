"""The Generator: classes in, images out.

What is to be drawn is a `Request`, which `Generator.request` makes and checks once. One inner loop
(`Generator._draw`) advances it by the blocks of tokens that the engine decides, on a CPU step by
step; `generate` drains it, `stream` looks at it on the way. Each drawing owns its rows, tokens and
noise, the generator itself never changes, so any number of threads may use one generator, and a
drawing that was cancelled, abandoned or failed leaves nothing behind.

Image i of a request uses the seed `seed + i` and depends on (bundle, class, that seed, options)
only. Images are decoded as many at a time as the engine asks for. On a CPU that is one, which keeps
the decoder's memory small and makes an image's pixels independent of its batch.
"""

from __future__ import annotations

import collections.abc
import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from types import TracebackType
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from aim_runtime import forks
from aim_runtime.arguments import instance, number, optional_method, room_for, whole_number
from aim_runtime.batching import BatchPlan, check_memory_limit
from aim_runtime.bundle import Bundle
from aim_runtime.bundle.manifest import Manifest
from aim_runtime.class_names import ClassLike, ClassNames, listed
from aim_runtime.engines.backends import load_engine
from aim_runtime.engines.base import Engine
from aim_runtime.errors import AimError, BackendError
from aim_runtime.noise import uniforms
from aim_runtime.quoting import shown
from aim_runtime.request import MAX_IMAGES, Request, RequestOptions, check_cancel, check_seed
from aim_runtime.result import UNDECIDED, Preview, Result, decoding_work
from aim_runtime.sampling import MAX_CFG_SCALE, SamplingOptions

Classes = ClassLike | Sequence[ClassLike]
Progress = Callable[[int, int], None]


class Generator:
    """A loaded bundle that draws images. Thread-safe.

    `memory_limit_mb` bounds what one request takes on top of the model (see `plan`), None leaves it
    to the engine; requests that run at the same time each take their own. A `Batcher` draws them
    together instead.

    Attributes:
        backend: Name of the backend that computes.
        device: Where it computes: "cpu", "cuda:0".
        precision: What it computes in: "fp32", "fp16".
        sampling: How tokens are drawn where a request says nothing else.
    """

    def __init__(
        self, bundle: Bundle, engine: Engine, *, memory_limit_mb: float | None = None
    ) -> None:
        instance("bundle", bundle, Bundle, "a Bundle; Generator.load makes one from a path")
        instance("engine", engine, Engine, "an Engine; Generator.load chooses one")
        if memory_limit_mb is not None:
            memory_limit_mb = check_memory_limit(memory_limit_mb)
        self.bundle = bundle
        self.manifest: Manifest = bundle.manifest
        self.backend = engine.backend
        self.device = engine.device
        self.precision = engine.precision
        self.class_names = bundle.manifest.class_names
        self.sampling = bundle.manifest.sampling
        self._memory_limit_mb = memory_limit_mb
        self._engine: Engine | None = engine
        self._load_again: Callable[..., Engine] | None = None

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
                means a quarter of what is free on a CPU and most of it on a GPU.

        A backend that should work but fails is passed over under "auto", with a RuntimeWarning.
        After a fork, the child loads the model again when it first uses it; on a GPU it cannot,
        and gets a BackendError.

        Raises:
            BundleError: The bundle is missing, damaged, unsafe or too new.
            BackendError: The backend is unknown or cannot run here.
            ValueError: An argument is out of range.
        """
        if threads is not None:
            threads = whole_number("threads", threads, 1, 1024)
        if memory_limit_mb is not None:
            memory_limit_mb = check_memory_limit(memory_limit_mb)
        bundle = Bundle.open(path)
        load = functools.partial(load_engine, bundle, threads=threads)
        engine = load(backend=backend, device=device, precision=precision)
        generator = cls(bundle, engine, memory_limit_mb=memory_limit_mb)
        generator._load_again = load
        return generator

    def close(self) -> None:
        """Let go of the model; its memory is free once requests still running have ended.

        Requests made afterwards raise AimError.
        """
        self._engine = None

    def __reduce__(self) -> Any:
        raise TypeError(
            "a Generator cannot be pickled or copied: its model lives in this process; "
            "load the bundle where it is needed"
        )

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
        """The index of a class given by number, by name or by one of a name's synonyms.

        Synonyms are parted by commas in the name. Case does not matter. A number, 7 or "7", is the
        index itself; only where the names of all classes are whole numbers it is a name.
        Raises ValueError, with close matches, when there is no such class.
        """
        return self._classes_by_name.index(class_)

    def class_number(self, index: int) -> int:
        """The number that means the class of `index`: `class_index` the other way around."""
        return self._classes_by_name.number(index)

    def plan(self, n: int, cfg_scale: float | None = None) -> BatchPlan:
        """How `n` images are batched within the memory limit, and the memory that takes.

        On a CPU the plan is that of `plan_batches`, which needs no engine, except that the decoder
        counts with what its graph says that it takes where that graph is a large one.
        Raises ValueError when not even one image fits, BackendError when a GPU has too little
        memory for one.
        """
        engine, options = self._open_engine(), self._options(cfg_scale=cfg_scale)
        return engine.plan(n, options.cfg_scale, self._memory_limit_mb)

    def request(
        self,
        classes: Classes,
        *,
        seed: int = 0,
        cfg_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> Request:
        """Resolve and check what is to be drawn, one image for each of `classes`; draw nothing yet.

        `generate` and `stream` take the result in the place of classes and options.

        Args:
            classes: Classes by number or name as in `class_index`, one an image.
            seed: Image i uses seed + i, so each image can be drawn again alone.
            cfg_scale: Guidance, as in `SamplingOptions`; None takes the bundle's default.
            temperature: As in `SamplingOptions`; None takes the bundle's default.
            top_k: As in `SamplingOptions`; None takes the bundle's default.
            top_p: As in `SamplingOptions`; None takes the bundle's default.

        Raises:
            ValueError: An argument is out of range, or one image exceeds the memory limit.
            BackendError: A GPU has too little memory for one image.
        """
        engine = self._open_engine()
        wanted = listed(classes, MAX_IMAGES)
        found = tuple(self.class_index(item) for item in wanted)
        seed = check_seed(seed, len(found))
        options = self._options(cfg_scale, temperature, top_k, top_p)
        return Request(
            classes=found,
            seeds=tuple(range(seed, seed + len(found))),
            options=options,
            batching=engine.plan(len(found), options.cfg_scale, self._memory_limit_mb),
            bundle=self.manifest.name,
            bundle_sha256=self.bundle.manifest_sha256,
            backend=self.backend,
        )

    def generate(
        self,
        classes: Classes | Request,
        *,
        progress: Progress | None = None,
        cancel: threading.Event | None = None,
        **options: Unpack[RequestOptions],
    ) -> Result:
        """Draw one image for each of `classes`.

        Args:
            classes: Classes by number or name as in `class_index`, one an image; or a `Request`,
                which has its options already.
            progress: Called after each step and after each decoded image with (work done, work in
                all). A token counts 1; once all are drawn, decoding an image counts T / 4 more. An
                engine on a GPU may take several steps, or decode several images, at a time.
            cancel: Once set, the drawing ends before the next of these with RequestCancelled.
            options: `seed`, `cfg_scale`, `temperature`, `top_k` and `top_p`, as in `request`.

        Raises:
            ValueError: An argument is out of range, or one image exceeds the memory limit, or all
                images together the memory.
            RequestCancelled: `cancel` was set.
            BackendError: The backend failed.
        """
        started = time.perf_counter()
        optional_method("progress", progress, "__call__", "a function of two numbers")
        optional_method("cancel", cancel, "is_set", "a threading.Event")
        request, engine = self._requested(classes, options), self._open_engine()
        tokens, images = self._undecided(request), self._undrawn(request)
        decoding = decoding_work(tokens.shape[1])

        def report(done: int) -> None:
            if progress is not None:
                progress(done, tokens.size + len(tokens) * decoding)

        def decoded(count: int) -> None:
            report(tokens.size + count * decoding)
            if count < len(tokens):
                check_cancel(cancel)

        # Images that are drawn at a time need not wait for the host before they are decoded.
        pictures = images if len(tokens) <= request.batching.batch_size else None
        draw = functools.partial(engine.draw, pictures=pictures, decoded=decoded)
        with contextlib.closing(self._draw(request, draw, tokens, cancel)) as steps:
            for _, done in steps:
                report(done)
        if pictures is None:
            engine.decode_into(tokens, images, decoded)
        return self._result(request, tokens, images, time.perf_counter() - started)

    def stream(
        self,
        classes: Classes | Request,
        *,
        every: int = 16,
        cancel: threading.Event | None = None,
        **options: Unpack[RequestOptions],
    ) -> collections.abc.Generator[Preview]:
        """Like `generate`, but yields a preview every `every` steps; the last one is `done`.

        An engine that decides several steps at a time yields it as soon as it has so many.
        Its tokens and images are those of `generate`. Arguments are checked by the call itself;
        the work is done as the previews are asked for, and closing the iterator stops it.
        """
        every = whole_number("every", every, 1, 2**31)
        optional_method("cancel", cancel, "is_set", "a threading.Event")
        request = self._requested(classes, options)
        return self._previews(request, self._open_engine(), every, cancel)

    def logits(
        self,
        tokens: Any,
        classes: Classes,
        *,
        cfg_scale: float | None = None,
    ) -> NDArray[np.float32]:
        """Teacher-forced scores: [n, s] are those of token s of image n, given those before it.

        `tokens` is (N, T) whole numbers, `classes` one class an image, `cfg_scale` as in
        `generate`. Returns (N, T, V) float32, before temperature, top-k and top-p.
        Raises ValueError for arguments out of range.
        """
        model = self.manifest.model
        request, engine = self.request(classes, cfg_scale=cfg_scale), self._open_engine()
        shape = (len(request), model.num_tokens)
        allowed = f"whole numbers of shape {shape}, one row for each of classes"
        try:
            # Lists are measured first: NumPy would walk through a range of a billion.
            if not hasattr(tokens, "shape") and len(tokens) == shape[0]:
                fits = all(len(row) == shape[1] for row in tokens)
            else:
                fits = hasattr(tokens, "shape")
            forced = np.asarray(tokens) if fits else None
        except Exception:  # no lists, or whatever a stranger's object raises
            forced = None
        if forced is None:
            raise ValueError(f"tokens is {shown(tokens)}; it must be {allowed}")
        if forced.shape != shape or forced.dtype.kind not in "iu":
            what = f"{shown(forced.dtype)} of shape {shown(forced.shape)}"
            raise ValueError(f"tokens is {what}; it must be {allowed}")
        if forced.min() < 0 or forced.max() >= model.vocab_size:
            raise ValueError(
                f"tokens has values from {forced.min()} to {forced.max()}; "
                f"they must be from 0 to {model.vocab_size - 1}"
            )
        forced = forced.astype(np.int64)
        out = room_for("classes", request, (*shape, model.vocab_size), np.float32)  # (N, T, V)
        for batch in request.batches():
            class_ids = np.array(request.classes[batch], np.int64)  # (n,)
            steps = engine.scores(class_ids, forced[batch], request.options.cfg_scale)
            for step, scores in enumerate(steps):
                out[batch, step] = scores
        return out

    # -- inside -----------------------------------------------------------------------------------

    @cached_property
    def _classes_by_name(self) -> ClassNames:
        return ClassNames(self.class_names)

    def _open_engine(self) -> Engine:
        engine = self._engine
        if engine is None:
            raise AimError("this generator is closed; load it again")
        return self._again(engine) if engine.inherited else engine

    def _again(self, inherited: Engine) -> Engine:
        """The engine of a child process, which cannot use the one it has from its parent."""
        if self._load_again is None or inherited.device != "cpu":
            raise BackendError(
                "the model was loaded before this process was forked; load it after the fork"
            )
        with forks.reloading():
            if self._engine is inherited:
                self._engine = self._load_again(
                    backend=self.backend, device=self.device, precision=self.precision
                )
        return self._open_engine()

    def _options(
        self,
        cfg_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> SamplingOptions:
        if cfg_scale is not None:
            allowed = f"a number from 0 to {MAX_CFG_SCALE}"
            cfg_scale = number("cfg_scale", cfg_scale, 0, MAX_CFG_SCALE, allowed)
        return self.sampling.replace(
            cfg_scale=cfg_scale, temperature=temperature, top_k=top_k, top_p=top_p
        )

    def _requested(self, classes: Classes | Request, options: RequestOptions) -> Request:
        """The request that a call's arguments mean."""
        if not isinstance(classes, Request):
            return self.request(classes, **options)
        for name, value in options.items():
            if value is not None:
                raise ValueError(
                    f"{name} is {shown(value)}; it must be left out where classes is a Request, "
                    "which has its own"
                )
        if classes.bundle_sha256 != self.bundle.manifest_sha256 or classes.backend != self.backend:
            raise ValueError(
                f"classes is a Request for the bundle {shown(classes.bundle)} on backend "
                f"{shown(classes.backend)}; it must be one for this generator's, "
                f"{shown(self.manifest.name)} on {self.backend!r}"
            )
        return classes

    def _undecided(self, request: Request) -> NDArray[np.int64]:
        """Room for the tokens (N, T) of a request."""
        shape = (len(request), self.manifest.model.num_tokens)
        tokens = room_for("classes", request, shape, np.int64)
        tokens[:] = UNDECIDED
        return tokens

    def _undrawn(self, request: Request) -> NDArray[np.uint8]:
        """Room for the images (N, height, width, 3) of a request."""
        model = self.manifest.model
        shape = (len(request), model.image_height, model.image_width, 3)
        return room_for("classes", request, shape, np.uint8)

    def _result(
        self, request: Request, tokens: NDArray[np.int64], images: NDArray[np.uint8], seconds: float
    ) -> Result:
        return Result(
            tokens=tokens,
            array=images,
            classes=request.classes,
            class_names=tuple(self.class_names[index] for index in request.classes),
            seeds=request.seeds,
            options=request.options,
            seconds=seconds,
            backend=self.backend,
            precision=self.precision,
            bundle=request.bundle,
            bundle_sha256=request.bundle_sha256,
        )

    def _draw(
        self,
        request: Request,
        draw: Callable[..., collections.abc.Generator[NDArray[np.int64]]],
        tokens: NDArray[np.int64],
        cancel: threading.Event | None,
    ) -> collections.abc.Generator[tuple[int, int]]:
        """Fill `tokens` (N, T) batch by batch, block by block, by an engine's `draw`.

        Yields for each block how many steps it took and how many tokens are decided by now.
        """
        steps = tokens.shape[1]
        check_cancel(cancel)
        for batch in request.batches():
            ids = np.array(request.classes[batch], np.int64)  # (n,)
            noise = functools.partial(uniforms, request.seeds[batch], steps)  # (n, T)
            done = 0
            with contextlib.closing(draw(ids, noise, request.options)) as blocks:
                for block in blocks:  # (n, k)
                    size = block.shape[1]
                    tokens[batch, done : done + size] = block
                    done += size
                    yield size, batch.start * steps + done * len(ids)
                    check_cancel(cancel)

    def _previews(
        self, request: Request, engine: Engine, every: int, cancel: threading.Event | None
    ) -> collections.abc.Generator[Preview]:
        tokens = self._undecided(request)
        since = 0  # steps since the last preview
        with contextlib.closing(self._draw(request, engine.draw, tokens, cancel)) as blocks:
            for size, done in blocks:
                since += size
                if since >= every or done == tokens.size:
                    since %= every
                    yield Preview(tokens.copy(), done, tokens.size, engine)
