"""Which TensorRT is installed, and what its engines are called in a bundle."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from aim_runtime.errors import BackendError

GRAPHS = ("prologue", "step", "decoder")
_MINIMUM_VERSION = (10, 9)
_MODULES = {
    "TensorRT": ("tensorrt",),
    "TensorRT for RTX": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}


@dataclass(frozen=True)
class Library:
    """An installed TensorRT.

    `portable`: it is TensorRT for RTX, whose engines fit every GPU that it supports.
    """

    module: ModuleType
    name: str
    version: str
    portable: bool

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    def capability(self, gpu: int) -> tuple[int, int]:
        """The compute capability of GPU number `gpu`, (9, 0). Raises BackendError."""
        try:
            from aim_runtime.engines.cuda.driver import capability
        except ImportError as error:
            raise BackendError(
                "cuda-bindings does not import; pip install 'aim-runtime[tensorrt]'"
            ) from error
        return capability(gpu)

    def dtype_name(self, dtype: Any) -> str:
        """What NumPy and the manifest call one of the library's element types."""
        return str(self.module.nptype(dtype).__name__)


def find_library() -> Library:
    """The TensorRT that is installed; the full one if both are. Raises BackendError."""
    reasons = []
    for name, modules in _MODULES.items():
        for module_name in modules:
            try:
                module = importlib.import_module(module_name)
            except ModuleNotFoundError as error:
                if error.name != module_name:
                    reasons.append(f"{name} does not import ({error})")
                continue
            except Exception as error:  # its libraries may be missing or too new for the driver
                reasons.append(f"{name} does not import ({_first_line(error)})")
                continue
            version = str(module.__version__)
            numbers = tuple(int(part) for part in version.split(".")[:2])
            if name == "TensorRT" and numbers < _MINIMUM_VERSION:
                reasons.append(f"TensorRT {version} is too old; it must be 10.9 or later")
                break
            return Library(module, name, version, portable=name != "TensorRT")
    raise BackendError(
        "; ".join(reasons) or "TensorRT is not installed; pip install 'aim-runtime[tensorrt]'"
    )


def engine_folder(library: Library, capability: tuple[int, int] | None) -> str:
    """The name of the folder of engines that `library` makes for GPUs of `capability`."""
    if library.portable or capability is None:
        return f"tensorrt-rtx-{library.version}"
    return f"tensorrt-{library.version}-sm{capability[0]}{capability[1]}"


def engine_file(graph: str) -> str:
    """The name of a graph's engine in its folder."""
    return f"{graph}.engine"


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
