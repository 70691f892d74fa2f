"""`CudaEngine`: a bundle's launch plan on one GPU."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from aim_runtime.bundle import Bundle
from aim_runtime.engines.base import Conditioning, Decoded, Noise
from aim_runtime.engines.cuda import decoding, slots, step, weights, workspace
from aim_runtime.engines.cuda.plan import Bucket, DecoderBucket
from aim_runtime.engines.cuda.plan_reader import read_plan
from aim_runtime.engines.cuda.program import Kernels
from aim_runtime.engines.cuda.workspace import ProgramWorkspace
from aim_runtime.engines.gpu.architecture import describe
from aim_runtime.engines.gpu.device import Device, Event, OutOfDeviceMemory
from aim_runtime.engines.gpu.engine import GpuEngine
from aim_runtime.engines.slots import Slots
from aim_runtime.errors import BackendError
from aim_runtime.sampling import SamplingOptions

_AnyBucket = TypeVar("_AnyBucket", Bucket[str], DecoderBucket[str])


class CudaEngine(GpuEngine[ProgramWorkspace]):
    """The launch plan for `precision` in `bundle` on `device`. Thread-safe.

    Raises BackendError when the device cannot run the plan, BundleError when the plan is not one.
    """

    backend = "cuda"
    _even_batches = False

    def __init__(self, bundle: Bundle, device: Device, precision: str) -> None:
        super().__init__(bundle.manifest, device)
        self.precision = precision
        self._launch_plan = read_plan(bundle, precision)
        self.continuous = self._launch_plan.continuous
        self._decoder = self._runnable_decoder()
        self.decode_batch = self._decoder[-1].images
        with device.current():
            self._kernels = Kernels(device, bundle, self._launch_plan)
            self._buckets = self._runnable_buckets()
            try:
                self._weights = weights.Weights(device, bundle, self._launch_plan, self._kernels)
            except OutOfDeviceMemory:
                needed = weights.allocated_size(self._launch_plan)
                raise self._too_little("the model", needed) from None
        # Counted once: a request that added up all buffers would take longer over it than over all
        # else before its first launch.
        size_of = workspace.allocated_size
        self._step_sizes = {bucket.rows: size_of(bucket.buffers) for bucket in self._buckets}
        self._decoder_size = size_of(self._decoder[0].buffers)
        self._sizes = {rows: self._capacities(rows) for rows in (1, 2)}  # by rows of an image

    def start(self, rows: int, conditioning: Conditioning) -> step.CudaRows:
        """Rows of their own; `conditioning` is what `prologue` returned."""
        bucket = self._bucket(rows, 1)
        classes: NDArray[np.int64] = conditioning["class_id"]
        return step.CudaRows(self.manifest, self._device, self._step_lease(bucket, 1), classes)

    def _draw(
        self, class_ids: NDArray[np.int64], noise: Noise, options: SamplingOptions
    ) -> Generator[NDArray[np.int64]]:
        bucket = self._bucket(len(class_ids), options.rows_per_image)
        no_class = self.manifest.model.num_classes
        with self._step_lease(bucket, options.rows_per_image) as leased:
            yield from step.draw(self._device, leased, class_ids, noise, options, no_class)

    def _draw_pictures(
        self,
        class_ids: NDArray[np.int64],
        noise: Noise,
        options: SamplingOptions,
        pictures: NDArray[np.uint8],
        decoded: Decoded,
    ) -> Generator[NDArray[np.int64]]:
        """The decoder waits behind the last step: it has begun before the host sees its tokens."""
        n, rows_per_image = len(class_ids), options.rows_per_image
        no_class = self.manifest.model.num_classes
        decoder, count = decoding.next_run(self._decoder, n)
        blocks: list[NDArray[np.int64]] = []
        behind: list[decoding.Decoding] = []  # of the first `count` images, once it is queued
        done = 0
        with ExitStack() as leases:
            steps = leases.enter_context(
                self._step_lease(self._bucket(n, rows_per_image), rows_per_image)
            )

            def follow(end: Event) -> None:
                with suppress(OutOfDeviceMemory):  # what is not decoded here will be after this
                    leased = leases.enter_context(self._decoder_lease(decoder))
                    bring = partial(decoding.hand_over, leased, steps)
                    behind.append(decoding.Decoding(self._device, leased, bring, pictures[:count]))
                    leased.stream.wait_for(end)
                    behind[0].queue()

            drawing = step.draw(self._device, steps, class_ids, noise, options, no_class, follow)
            for block in leases.enter_context(closing(drawing)):
                if not blocks:  # memory is slow at the first touch: now, while the device draws
                    pictures.fill(0)
                blocks.append(block)
                yield block
            with suppress(OutOfDeviceMemory):
                for size in behind[0].batches() if behind else ():
                    done += size
                    decoded(done)
        tokens = np.concatenate(blocks, axis=1)  # (n, T)
        self._decode_into(tokens[done:], pictures[done:], lambda more: decoded(done + more))

    def _prologue(self, class_ids: NDArray[np.int64]) -> Conditioning:
        return {"class_id": class_ids}  # the device computes the rest when rows start

    def _decode(self, tokens: NDArray[np.int64]) -> NDArray[np.uint8]:
        model = self.manifest.model
        images = np.empty((len(tokens), model.image_height, model.image_width, 3), np.uint8)
        self._decode_into(tokens, images, lambda _: None)
        return images

    def _decode_into(
        self, tokens: NDArray[np.int64], images: NDArray[np.uint8], decoded: Decoded
    ) -> None:
        """A batch is queued before the host copies the last; smaller ones where memory is short."""
        buckets, done = list(self._decoder), 0
        while done < len(tokens):
            bucket, count = decoding.next_run(buckets, len(tokens) - done)
            part = slice(done, done + count)
            try:
                with self._decoder_lease(bucket) as leased:
                    bring = partial(decoding.upload, leased, tokens[part])
                    work = decoding.Decoding(self._device, leased, bring, images[part])
                    for size in work.batches():
                        done += size
                        decoded(done)
            except OutOfDeviceMemory:
                buckets = [smaller for smaller in buckets if smaller.images < bucket.images]
                if not buckets:
                    needed = workspace.allocated_size(bucket.buffers)
                    raise self._too_little("decoding an image", needed) from None

    def _decoder_lease(
        self, bucket: DecoderBucket[str]
    ) -> AbstractContextManager[ProgramWorkspace]:
        """Buffers for `bucket` for a while. Raises OutOfDeviceMemory when it is entered."""

        def make() -> ProgramWorkspace:
            shared = self._weights.addresses
            return decoding.make_workspace(self._device, self._kernels, bucket, shared)

        return self._pool.lease(("decoder", bucket.images), make)

    def _slots(self, rows: int) -> Slots:
        if not self.continuous:
            return super()._slots(rows)
        largest = self._bucket(rows, 1)
        buckets = [
            bucket
            for bucket in self._buckets
            if bucket.rows < largest.rows and slots.movable(bucket, largest)
        ]
        try:
            return slots.CudaSlots(
                self.manifest, self._device, [*buckets, largest], self._lease, rows
            )
        except OutOfDeviceMemory:
            raise self._too_little_for(largest, min(rows, 2)) from None

    @contextmanager
    def _step_lease(self, bucket: Bucket[str], rows_per_image: int) -> Iterator[ProgramWorkspace]:
        try:
            with self._lease(bucket) as leased:
                yield leased
        except OutOfDeviceMemory:
            raise self._too_little_for(bucket, rows_per_image) from None

    def _lease(self, bucket: Bucket[str]) -> AbstractContextManager[ProgramWorkspace]:
        """Buffers for `bucket` for a while. Raises OutOfDeviceMemory when it is entered."""

        def make() -> ProgramWorkspace:
            shared = self._weights.addresses
            return step.make_workspace(self._device, self._kernels, bucket, shared)

        return self._pool.lease(("step", bucket.rows), make)

    def _too_little_for(self, bucket: Bucket[str], rows_per_image: int) -> BackendError:
        size = step.capacity(bucket.rows, rows_per_image)
        free = self._device.free_memory()
        fits = [
            step.capacity(rows, rows_per_image)
            for rows, taken in self._step_sizes.items()
            if taken <= free
        ]
        hint = f"; {fits[-1]} at a time fit" if fits and fits[-1] else ""
        return self._too_little(f"a batch of {size} images", self._step_sizes[bucket.rows], hint)

    def _batch_sizes(self, rows_per_image: int) -> Sequence[int]:
        sizes = self._sizes[rows_per_image]
        if not sizes:
            raise BackendError("the bundle's CUDA plan has no batch for images with guidance")
        return sizes

    def _capacities(self, rows_per_image: int) -> Sequence[int]:
        found = {step.capacity(bucket.rows, rows_per_image) for bucket in self._buckets}
        return sorted(found - {0})

    def _step_bytes(self, images: int, rows_per_image: int) -> int:
        return self._step_sizes[self._bucket(images, rows_per_image).rows]

    def _decoder_bytes(self) -> int:
        return self._decoder_size

    def _bucket(self, images: int, rows_per_image: int) -> Bucket[str]:
        """The smallest bucket for so many images."""
        for bucket in self._buckets:
            if step.capacity(bucket.rows, rows_per_image) >= images:
                return bucket
        most = step.capacity(self._buckets[-1].rows, rows_per_image)
        raise BackendError(
            f"{images} images at a time are asked for; the bundle's CUDA plan has at most {most}"
        )

    def _runnable_buckets(self) -> list[Bucket[str]]:
        """Those that this device can run, without any that is no larger than one before it."""
        found: list[Bucket[str]] = []
        capability = self._device.capability
        for bucket in self._launch_plan.buckets:
            programs = bucket.begin + bucket.step
            if found and bucket.rows <= found[-1].rows:
                continue
            if self._launch_plan.runs(programs, capability) and self._kernels.stay(programs):
                found.append(bucket)
        return self._or_no_kernels(found)

    def _runnable_decoder(self) -> list[DecoderBucket[str]]:
        found: dict[int, DecoderBucket[str]] = {}
        for bucket in self._launch_plan.decoder:
            if self._launch_plan.runs(bucket.launches, self._device.capability):
                found.setdefault(bucket.images, bucket)
        return self._or_no_kernels(list(found.values()))

    def _or_no_kernels(self, buckets: list[_AnyBucket]) -> list[_AnyBucket]:
        if not buckets:
            major, minor = self._device.capability
            compiled = describe(self._launch_plan.architectures())
            raise BackendError(
                f"the bundle's {self.precision} CUDA kernels are not for {self._device.name} "
                f"(compute capability {major}.{minor}, it has {compiled}); "
                "export it again with 'aim export --cuda'"
            )
        return buckets
