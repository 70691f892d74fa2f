"""`Device` on NVIDIA's driver, through its own Python bindings (cuda-bindings), nothing in between.

Uses the device's primary context, which PyTorch and other libraries of the process use too, and
makes it current only while it works. Every call is checked. What is handed out frees itself when it
is dropped.

Needs a driver for CUDA 12.4 or later: older ones cannot say how many parameters a kernel has, which
must be known before a stranger's kernel is launched.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from cuda.bindings import driver
from numpy.typing import NDArray

from aim_runtime.engines.gpu import libcuda
from aim_runtime.engines.gpu.device import DeviceLaunch, OutOfDeviceMemory, Spaced, aligned
from aim_runtime.errors import BackendError, BundleError

# More dynamic shared memory a block than this has to be asked for.
_SHARED_WITHOUT_ASKING = 48 << 10
# Of the memory that shared memory and L1 cache share, per cent: as much as there can be.
_ALL_SHARED = 100
# After these nothing works on the GPU any more until the process ends.
_FATAL = frozenset(
    getattr(driver.CUresult, f"CUDA_ERROR_{name}")
    for name in (
        "ILLEGAL_ADDRESS",
        "MISALIGNED_ADDRESS",
        "ILLEGAL_INSTRUCTION",
        "INVALID_ADDRESS_SPACE",
        "INVALID_PC",
        "LAUNCH_FAILED",
        "LAUNCH_TIMEOUT",
        "ASSERT",
        "HARDWARE_STACK_ERROR",
        "ECC_UNCORRECTABLE",
    )
)
# What the driver says about a binary that it cannot use.
_REFUSALS = frozenset(
    getattr(driver.CUresult, f"CUDA_ERROR_{name}")
    for name in (
        "INVALID_IMAGE",
        "NO_BINARY_FOR_GPU",
        "INVALID_PTX",
        "UNSUPPORTED_PTX_VERSION",
        "INVALID_SOURCE",
        "NOT_FOUND",
    )
)


class _DriverError(BackendError):
    """A call of the driver failed with `code`."""

    def __init__(self, code: Any, message: str) -> None:
        super().__init__(message)
        self.code = code


def _call(function: Any, *arguments: Any) -> Any:
    """Call the driver: the result of `function`, a tuple if it has several, None if it has none.

    Raises OutOfDeviceMemory or _DriverError.
    """
    code, *results = function(*arguments)
    if code == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        raise OutOfDeviceMemory
    if code != driver.CUresult.CUDA_SUCCESS:
        _, text = driver.cuGetErrorString(code)
        reason = f"{code.name}: {text.decode() if text else 'unknown error'}"
        message = f"the NVIDIA driver failed in {function.__name__} ({reason})"
        if code in _FATAL:
            message = (
                f"the GPU stopped while running the bundle's kernels ({reason}); "
                "this process cannot use it any more"
            )
        raise _DriverError(code, message)
    return results[0] if len(results) == 1 else tuple(results) or None


class _Context:
    """A device's primary context, retained as long as anything refers to this object.

    It belongs to the process that retained it: a forked child has nothing to give back.
    """

    def __init__(self, device: Any) -> None:
        self.handle = _call(driver.cuDevicePrimaryCtxRetain, device)
        self.process = os.getpid()
        weakref.finalize(self, _release_context, self.process, device)

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        _call(driver.cuCtxPushCurrent, self.handle)
        try:
            yield
        finally:
            _call(driver.cuCtxPopCurrent)

    def free_with(self, owner: object, function: Any, *arguments: Any) -> None:
        """Call `function` in this context once `owner` is dropped."""
        weakref.finalize(owner, _release, self, function, *arguments)


def _release_context(process: int, device: Any) -> None:
    if process == os.getpid():
        driver.cuDevicePrimaryCtxRelease(device)


def _release(context: _Context, function: Any, *arguments: Any) -> None:
    if context.process != os.getpid():
        return
    # Nobody could handle an error here; after a fault on the GPU every call reports it again.
    with contextlib.suppress(BackendError), context.current():
        function(*arguments)


class CudaDevice:
    """GPU number `gpu`; see `aim_runtime.engines.gpu.device.Device`.

    `one_block`: allocations of many buffers take one block of memory, which wastes the least. Apart
    they let tools that watch for accesses out of bounds (compute-sanitizer) see each buffer's end.
    """

    def __init__(self, gpu: int, *, one_block: bool = True) -> None:
        self.name = libcuda.gpu_name(gpu)
        self.label = f"cuda:{gpu}"
        self.capability = libcuda.capability(gpu)
        self._overlaps = self.capability >= (9, 0)
        try:
            self._context = _Context(_call(driver.cuDeviceGet, gpu))
        except OutOfDeviceMemory:
            raise BackendError(
                f"{self.label} ({self.name}) has too little free memory to start with; "
                "other processes use it"
            ) from None
        self._one_block = one_block

    def current(self) -> contextlib.AbstractContextManager[None]:
        """See `Device`."""
        return self._context.current()

    def free_memory(self) -> int:
        """See `Device`."""
        with self.current():
            free, _ = _call(driver.cuMemGetInfo)
        return int(free)

    def allocate(self, sizes: Sequence[int]) -> _CudaAllocation:
        """See `Device`."""
        rounded = [aligned(size) for size in sizes]
        if not self._one_block or not sizes:
            return _CudaAllocation(self._context, rounded)
        block = _CudaAllocation(self._context, [sum(rounded)])
        starts = np.cumsum([block.addresses[0], *rounded[:-1]]).tolist()
        block.addresses = tuple(starts)
        return block

    def pinned(self, size: int) -> _CudaPinned:
        """See `Device`."""
        return _CudaPinned(self._context, size)

    def stream(self) -> _CudaStream:
        """See `Device`."""
        return _CudaStream(self._context, overlaps=self._overlaps)

    def load(self, code: bytes, symbol: str, shared: int, pointers: int) -> _CudaFunction:
        """See `Device`."""
        return _CudaFunction(self._context, code, symbol, shared, pointers, overlaps=self._overlaps)

    def resident_programs(self, function: _CudaFunction, threads: int, shared: int) -> int:
        """See `Device`."""
        attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
        with self.current():
            device = _call(driver.cuCtxGetDevice)
            each = _call(
                driver.cuOccupancyMaxActiveBlocksPerMultiprocessor,
                function.handle,
                threads,
                shared,
            )
            return int(each) * int(_call(driver.cuDeviceGetAttribute, attribute, device))


class _CudaAllocation:
    def __init__(self, context: _Context, sizes: Sequence[int]) -> None:
        self.addresses: tuple[int, ...] = ()
        for size in sizes:
            address = _call(driver.cuMemAlloc, size)
            context.free_with(self, driver.cuMemFree, address)
            self.addresses += (int(address),)


class _CudaPinned:
    def __init__(self, context: _Context, size: int) -> None:
        address = _call(driver.cuMemHostAlloc, size, 0)
        # Every view of the array refers to this in the end: the memory goes with the last of them.
        memory = (ctypes.c_uint8 * size).from_address(int(address))
        context.free_with(memory, driver.cuMemFreeHost, address)
        self.array: NDArray[np.uint8] = np.ctypeslib.as_array(memory)


def _address(array: NDArray[Any]) -> int:
    """Where a contiguous, writable array is, in half the time that `array.ctypes.data` takes."""
    return ctypes.addressof(ctypes.c_char.from_buffer(array.data))


class _CudaFunction:
    def __init__(
        self,
        context: _Context,
        code: bytes,
        symbol: str,
        shared: int,
        pointers: int,
        *,
        overlaps: bool,
    ) -> None:
        attributes = driver.CUfunction_attribute
        try:
            module = _call(driver.cuModuleLoadData, code)
            context.free_with(self, driver.cuModuleUnload, module)
            self.handle = _call(driver.cuModuleGetFunction, module, symbol.encode())
            _check_parameters(self.handle, symbol, pointers)
            if shared > _SHARED_WITHOUT_ASKING:
                limit = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                _call(driver.cuFuncSetAttribute, self.handle, limit, shared)
            if overlaps:
                # Shared memory and L1 cache share a memory. A launch begins beside another only on
                # multiprocessors that divide it as the launch would: so all divide it in one way.
                share = attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
                _call(driver.cuFuncSetAttribute, self.handle, share, _ALL_SHARED)
            # Now, because a lazy load would fall into the capture of a graph.
            _call(driver.cuFuncLoad, self.handle)
        except _DriverError as error:
            if error.code in _REFUSALS:
                raise BackendError(
                    f"the NVIDIA driver refuses the bundle's kernel {symbol!r} "
                    f"({error.code.name}); update the driver or export the bundle again"
                ) from error
            raise


def _check_parameters(function: Any, symbol: str, pointers: int) -> None:
    """The driver reads as many parameters as the kernel declares: there must not be more."""
    for index in range(pointers + 1):
        code, *found = driver.cuFuncGetParamInfo(function, index)
        known = code == driver.CUresult.CUDA_SUCCESS
        if known != (index < pointers) or (known and found[1] != ctypes.sizeof(ctypes.c_void_p)):
            raise BundleError(
                f"the bundle's kernel {symbol!r} does not take {pointers} pointers, "
                "as the CUDA plan says; get the bundle again"
            )


class _CudaGraph:
    def __init__(self, context: _Context, handle: Any, launches: Sequence[DeviceLaunch]) -> None:
        self._launches = launches  # their kernels must stay loaded
        self.handle = _call(driver.cuGraphInstantiate, handle, 0)
        context.free_with(self, driver.cuGraphExecDestroy, self.handle)


class _CudaEvent:
    def __init__(self, context: _Context, stream: Any) -> None:
        flags = driver.CUevent_flags
        # A wait that sleeps: the host has nothing to do meanwhile, other threads may have.
        self.handle = _call(
            driver.cuEventCreate,
            flags.CU_EVENT_DISABLE_TIMING.value | flags.CU_EVENT_BLOCKING_SYNC.value,
        )
        context.free_with(self, driver.cuEventDestroy, self.handle)
        _call(driver.cuEventRecord, self.handle, stream)

    def wait(self) -> None:
        _call(driver.cuEventSynchronize, self.handle)


class _CudaStream:
    def __init__(self, context: _Context, overlaps: bool) -> None:
        self._context = context
        self._overlaps = overlaps
        flag = driver.CUstream_flags.CU_STREAM_NON_BLOCKING.value
        self._handle = _call(driver.cuStreamCreate, flag)
        context.free_with(self, driver.cuStreamDestroy, self._handle)

    def clear(self, address: int, size: int) -> None:
        _call(driver.cuMemsetD8Async, address, 0, size, self._handle)

    def upload(self, address: int, source: NDArray[Any]) -> None:
        _call(driver.cuMemcpyHtoDAsync, address, _address(source), source.nbytes, self._handle)

    def download(self, target: NDArray[Any], address: int) -> None:
        _call(driver.cuMemcpyDtoHAsync, _address(target), address, target.nbytes, self._handle)

    def copy(self, pieces: int, size: int, source: Spaced, target: Spaced) -> None:
        memory = driver.CUmemorytype.CU_MEMORYTYPE_DEVICE
        copy = driver.CUDA_MEMCPY2D()
        copy.srcMemoryType, copy.srcDevice, copy.srcPitch = memory, *source
        copy.dstMemoryType, copy.dstDevice, copy.dstPitch = memory, *target
        copy.WidthInBytes, copy.Height = size, pieces
        _call(driver.cuMemcpy2DAsync, copy, self._handle)

    def launch(self, launch: DeviceLaunch) -> None:
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = launch.grid
        config.blockDimX, config.blockDimY, config.blockDimZ = launch.threads, 1, 1
        config.sharedMemBytes = launch.shared
        config.hStream = self._handle
        attributes = self._attributes(launch)
        config.attrs, config.numAttrs = attributes, len(attributes)
        # The driver wants pointers to the parameters; it copies them before it returns.
        values = np.array(launch.addresses, np.uint64)
        pointers = values.ctypes.data + 8 * np.arange(len(values), dtype=np.uint64)
        _call(driver.cuLaunchKernelEx, config, launch.function.handle, pointers.ctypes.data, 0)

    @property
    def handle(self) -> int:
        return int(self._handle)

    def capture(self, launches: Sequence[DeviceLaunch]) -> _CudaGraph:
        def enqueue() -> None:
            for launch in launches:
                self.launch(launch)

        return self._capture(enqueue, launches)

    def capture_work(self, enqueue: Callable[[], None]) -> _CudaGraph:
        return self._capture(enqueue, ())

    def _capture(self, enqueue: Callable[[], None], launches: Sequence[DeviceLaunch]) -> _CudaGraph:
        # Relaxed: other threads may allocate meanwhile, and the garbage collector free in this one.
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        _call(driver.cuStreamBeginCapture, self._handle, mode)
        try:
            enqueue()
        except BaseException:  # nothing else works on the stream before the capture has ended
            driver.cuStreamEndCapture(self._handle)  # reports the same once more
            raise
        graph = _call(driver.cuStreamEndCapture, self._handle)
        try:
            return _CudaGraph(self._context, graph, launches)
        finally:
            driver.cuGraphDestroy(graph)

    def replay(self, graph: _CudaGraph) -> None:
        _call(driver.cuGraphLaunch, graph.handle, self._handle)

    def record(self) -> _CudaEvent:
        return _CudaEvent(self._context, self._handle)

    def wait_for(self, event: Any) -> None:
        _call(driver.cuStreamWaitEvent, self._handle, event.handle, 0)

    def synchronize(self) -> None:
        _call(driver.cuStreamSynchronize, self._handle)

    def _attributes(self, launch: DeviceLaunch) -> list[Any]:
        attributes = []
        if launch.overlaps and self._overlaps:
            attribute = driver.CUlaunchAttribute()
            name = driver.CUlaunchAttributeID
            attribute.id = name.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            attributes.append(attribute)
        if launch.resident:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
            attribute.value.cooperative = 1
            attributes.append(attribute)
        return attributes
