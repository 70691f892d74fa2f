"""TensorRT made of ONNX Runtime, on the GPU that `simulated_cuda` makes of NumPy.

An engine's bytes name a graph of a bundle folder and its optimisation profiles. Contexts read and
write the simulated device's memory when their stream gets there. Misuse raises AssertionError: a
context that is changed after it was captured, a capture before the first run at that shape, memory
that is missing or too small, an output over an input.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from enum import Enum, auto
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime

from aim_runtime.bundle import Bundle, add_engine
from aim_runtime.engines.tensorrt import TensorRTEngine
from aim_runtime.engines.tensorrt.library import Library, engine_file, engine_folder

from .simulated_cuda import SimulatedDevice, SimulatedStream

VERSION = "11.4.0"
SCRATCH = 1000  # bytes, for each row of a profile's upper end
_TYPES = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(uint8)": "uint8"}
PROFILES = {
    "prologue": [(1, 32)],
    "step": [(1, 2), (3, 8), (9, 32)],
    "decoder": [(1, 1), (2, 4)],
}


class TensorIOMode(Enum):
    INPUT = auto()
    OUTPUT = auto()


class ExecutionContextAllocationStrategy(Enum):
    STATIC = auto()
    USER_MANAGED = auto()


class DynamicShapesKernelSpecializationStrategy(Enum):
    LAZY = auto()
    EAGER = auto()


class ILogger:
    ERROR = "error"
    INTERNAL_ERROR = "internal error"

    def log(self, severity: str, message: str) -> None:
        raise NotImplementedError


class SimulatedDeviceWithHandles(SimulatedDevice):
    """Finds its streams again by their handles, as another library must."""

    def __init__(self, **options: Any) -> None:
        super().__init__(lambda code, symbol: lambda grid, arguments: None, **options)
        self.streams: dict[int, SimulatedStream] = {}

    def stream(self) -> SimulatedStream:
        made = super().stream()
        self.streams[made.handle] = made
        return made


class SimulatedTensorRT:
    """The module. `contexts` are all that were made; `fail` makes the next run fail."""

    def __init__(self, device: SimulatedDeviceWithHandles, *, portable: bool = False) -> None:
        self.device = device
        self.contexts: list[_Context] = []
        self.fail = False
        self.refuse = False
        module: Any = ModuleType("simulated_tensorrt")
        for item in (
            TensorIOMode,
            ExecutionContextAllocationStrategy,
            DynamicShapesKernelSpecializationStrategy,
            ILogger,
        ):
            setattr(module, item.__name__, item)
        module.Runtime = lambda logger: _Runtime(self, logger)
        module.nptype = lambda name: np.dtype(name).type
        name = "TensorRT for RTX" if portable else "TensorRT"
        self.loaded = Library(module, name, VERSION, portable)


def add_simulated_engines(
    bundle_dir: Path, library: Library, scratch: Path, capability: tuple[int, int] = (9, 0)
) -> Bundle:
    """Put engines into a bundle, as `aim export --trt` would."""
    scratch.mkdir()
    for graph, profiles in PROFILES.items():
        text = json.dumps({"graph": str(bundle_dir / f"{graph}.onnx"), "profiles": profiles})
        (scratch / engine_file(graph)).write_text(text)
    return add_engine(bundle_dir, engine_folder(library, capability), scratch)


def simulated_tensorrt_engine(bundle_dir: Path, folder: Path) -> tuple[TensorRTEngine, Bundle]:
    """An engine on stand-ins, and the copy of a bundle in `folder` that it is of."""
    copy = shutil.copytree(bundle_dir, folder / "bundle")
    device = SimulatedDeviceWithHandles()
    library = SimulatedTensorRT(device).loaded
    bundle = add_simulated_engines(copy, library, folder / "engines")
    return TensorRTEngine(bundle, library, device), bundle


class _Runtime:
    def __init__(self, tensorrt: SimulatedTensorRT, logger: ILogger) -> None:
        self._tensorrt, self._logger = tensorrt, logger

    def deserialize_cuda_engine(self, data: bytes) -> _Engine | None:
        self._tensorrt.device.check_current()
        if self._tensorrt.refuse:
            self._logger.log("warning", "not this")
            self._logger.log(ILogger.ERROR, "The engine was made\nby somebody else")
            return None
        return _Engine(self._tensorrt, self._logger, **json.loads(data))


class _RuntimeConfig:
    dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY
    _strategy = ExecutionContextAllocationStrategy.STATIC

    def set_execution_context_allocation_strategy(
        self, strategy: ExecutionContextAllocationStrategy
    ) -> None:
        self._strategy = strategy


class _Engine:
    def __init__(
        self,
        tensorrt: SimulatedTensorRT,
        logger: ILogger,
        graph: str,
        profiles: list[tuple[int, int]],
    ) -> None:
        self.tensorrt, self.logger, self.profiles = tensorrt, logger, profiles
        self.session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        self.inputs = {item.name: item for item in self.session.get_inputs()}
        self.tensors = self.inputs | {item.name: item for item in self.session.get_outputs()}
        self.num_io_tensors = len(self.tensors)
        self.num_optimization_profiles = len(profiles)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> str:
        return _TYPES[self.tensors[name].type]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, *self.tensors[name].shape[1:])

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        assert name in self.inputs
        low, high = self.profiles[index]
        rest = self.tensors[name].shape[1:]
        return [(low, *rest), (high, *rest), (high, *rest)]

    def get_device_memory_size_for_profile_v2(self, index: int) -> int:
        return SCRATCH * self.profiles[index][1]

    def create_runtime_config(self) -> _RuntimeConfig:
        assert self.tensorrt.loaded.portable
        return _RuntimeConfig()

    def create_execution_context(self, how: Any) -> _Context:
        if self.tensorrt.loaded.portable:
            kind = how.dynamic_shapes_kernel_specialization_strategy
            assert kind is DynamicShapesKernelSpecializationStrategy.EAGER
            how = how._strategy
        assert how is ExecutionContextAllocationStrategy.USER_MANAGED
        context = _Context(self)
        self.tensorrt.contexts.append(context)
        return context


class _Context:
    def __init__(self, engine: _Engine) -> None:
        self.engine, self._device = engine, engine.tensorrt.device
        self.profile = -1
        self.addresses: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._scratch = False
        self._ran = self._captured = False

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert stream in self._device.streams
        self._change()
        self.profile = index
        return True

    def set_device_memory(self, address: int, size: int) -> None:
        self._change()
        needed = self.engine.get_device_memory_size_for_profile_v2(self.profile)
        assert size >= needed, "too little working memory"
        self._device.resolve(address, size)
        self._scratch = True

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        self._change()
        low, high = self.engine.profiles[self.profile]
        self._shapes[name] = tuple(shape)
        return low <= shape[0] <= high

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._change()
        assert address % 256 == 0
        self.addresses[name] = address
        return name in self.engine.tensors

    def infer_shapes(self) -> list[str]:
        return [name for name in self.engine.inputs if name not in self._shapes]

    def execute_async_v3(self, stream: int) -> bool:
        assert self._scratch, "no working memory"
        assert len(set(self.addresses.values())) == len(self.engine.tensors) == len(self.addresses)
        if self.engine.tensorrt.fail:
            self.engine.logger.log(ILogger.ERROR, "Cuda Runtime (an illegal instruction)")
            return False
        target = self._device.streams[stream]
        if target.capturing:
            assert self._ran, "captured before the first run"
            self._captured = True
        self._ran = True
        target.add(self._work())
        return True

    def _change(self) -> None:
        assert not self._captured, "a context changed after it was captured"

    def _work(self) -> Callable[[], None]:
        def view(name: str, shape: Sequence[int]) -> np.ndarray:
            dtype = np.dtype(self.engine.get_tensor_dtype(name))
            size = math.prod(shape)
            pointer = self._device.resolve(self.addresses[name], size * dtype.itemsize)
            return pointer.view(dtype)[:size].reshape(shape)

        def run() -> None:
            feeds = {name: view(name, self._shapes[name]) for name in self.engine.inputs}
            outputs = [name for name in self.engine.tensors if name not in self.engine.inputs]
            found = self.engine.session.run(outputs, feeds)
            for name, array in zip(outputs, found, strict=True):
                view(name, array.shape)[:] = array

        return run
