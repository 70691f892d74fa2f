"""The weights on the device: uploaded once an engine, from the files that the other engines read.

They pass through two small buffers of pinned memory in turn, so that the host fills one while the
device takes the other, and through kernels of the plan where they are stored in another type.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from aim_runtime.bundle import Bundle
from aim_runtime.engines.cuda.plan import CAST_BLOCK, DTYPE_BYTES, Plan, Weight, flat
from aim_runtime.engines.cuda.program import Kernels
from aim_runtime.engines.gpu.device import Allocation, Device, Event, Stream, aligned

# Bytes of each of the two buffers; at least _QUANTISED_ROWS of the longest row there may be.
_CHUNK_BYTES = 16 << 20
# Rows are quantised in multiples of this many, which keeps every pointer aligned.
_QUANTISED_ROWS = 64


class Weights:
    """The weights of a plan, and the buffers that its setup fills: what requests share.

    `addresses` has those that buckets use; what only conversions and setup need is free again once
    they have run. Raises OutOfDeviceMemory when there is not enough for all together.
    """

    def __init__(self, device: Device, bundle: Bundle, plan: Plan, kernels: Kernels) -> None:
        sizes = {name: _allocated_size(weight) for name, weight in plan.weights.items()}
        sizes |= {name: tensor.size for name, tensor in plan.setup.buffers.items()}
        used = _used_by_buckets(plan)
        lasting = [name for name in sizes if name in used]
        passing = [name for name in sizes if name not in used]
        self._memory: Allocation = device.allocate([sizes[name] for name in lasting])
        self.addresses = dict(zip(lasting, self._memory.addresses, strict=True))
        scratch = device.allocate([sizes[name] for name in passing])
        addresses = self.addresses | dict(zip(passing, scratch.addresses, strict=True))
        stream = device.stream()
        _upload(device, stream, bundle, plan, kernels, addresses)
        for name, tensor in plan.setup.buffers.items():
            stream.clear(addresses[name], tensor.size)
        for launch in kernels.program(plan.setup.launches, addresses):
            stream.launch(launch)
        stream.synchronize()


def _upload(
    device: Device,
    stream: Stream,
    bundle: Bundle,
    plan: Plan,
    kernels: Kernels,
    at: Mapping[str, int],
) -> None:
    """Bring all weights to their addresses `at`; done when it returns."""
    names = {part.file for weight in plan.weights.values() for part in weight.parts}
    files = {name: np.frombuffer(bundle.read(name), np.uint8) for name in names}
    pinned = [device.pinned(_CHUNK_BYTES) for _ in range(2)]
    staging = device.allocate([_CHUNK_BYTES] * 2)
    busy: list[Event | None] = [None, None]
    turn = 0
    for name, weight in plan.weights.items():
        for start, count in _chunks(weight):
            event = busy[turn]
            if event is not None:
                event.wait()
            source = pinned[turn].array[: count * DTYPE_BYTES[weight.stored]]
            _fill(source, weight, files, start)
            target = at[name] + start * DTYPE_BYTES[weight.tensor.dtype]
            if weight.conversion is None:
                stream.upload(target, source)
            else:
                stored = staging.addresses[turn]
                stream.upload(stored, source)
                blocks, addresses = -(-count // CAST_BLOCK), [stored, target]
                if weight.scales is not None:
                    blocks = count // weight.columns
                    addresses.append(at[weight.scales] + start // weight.columns * 4)
                stream.launch(kernels.launch(weight.conversion, (blocks, 1, 1), addresses))
            busy[turn] = stream.record()
            turn = 1 - turn
    stream.synchronize()  # before the pinned memory goes


def _used_by_buckets(plan: Plan) -> set[str]:
    programs = [bucket.begin + bucket.step for bucket in plan.buckets]
    programs += [bucket.launches for bucket in plan.decoder]
    launches = itertools.chain.from_iterable(flat(program) for program in programs)
    return {name for launch in launches for name, _ in launch.arguments}


def allocated_size(plan: Plan) -> int:
    """Bytes of device memory that loading the weights of `plan` takes, setup included."""
    sizes = [_CHUNK_BYTES] * 2
    sizes += [_allocated_size(weight) for weight in plan.weights.values()]
    sizes += [tensor.size for tensor in plan.setup.buffers.values()]
    return sum(map(aligned, sizes))


def _allocated_size(weight: Weight) -> int:
    """Whole blocks: cast kernels fill them."""
    blocks = -(-weight.tensor.count // CAST_BLOCK)
    return blocks * CAST_BLOCK * DTYPE_BYTES[weight.tensor.dtype]


def _chunks(weight: Weight) -> Iterator[tuple[int, int]]:
    """Pieces (first element, elements) of a weight that fit a buffer and suit its conversion."""
    if not weight.parts:
        return  # written by another weight's conversion
    unit = CAST_BLOCK
    if weight.scales is not None:
        unit = _QUANTISED_ROWS * weight.columns
    most = _CHUNK_BYTES // DTYPE_BYTES[weight.stored] // unit * unit
    for start in range(0, weight.tensor.count, most):
        yield start, min(most, weight.tensor.count - start)


def _fill(
    target: NDArray[np.uint8], weight: Weight, files: Mapping[str, NDArray[np.uint8]], start: int
) -> None:
    """Copy the bytes of the parts, end to end, from element `start` on, until `target` is full."""
    row = weight.columns * DTYPE_BYTES[weight.stored]
    skip = start * DTYPE_BYTES[weight.stored]
    done = 0
    for part in weight.parts:
        size = part.rows * row
        if skip >= size:
            skip -= size
            continue
        taken = min(size - skip, len(target) - done)
        first = part.offset + skip
        target[done : done + taken] = files[part.file][first : first + taken]
        done, skip = done + taken, 0
