"""Which TensorRT is installed, and what its engines are called in a bundle."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from aim_runtime.bundle.manifest import ENGINES_FOLDER
from aim_runtime.errors import BackendError
from aim_runtime.quoting import first_line

ENGINES_PREFIX = "tensorrt-"
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
                reasons.append(f"{name} does not import ({first_line(error)})")
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


def engine_folder(library: Library, capability: tuple[int, int]) -> str:
    """The name of the folder of engines that `library` runs on GPUs of `capability`.

    An engine runs on the version that made it and no other; those of TensorRT for RTX fit any GPU
    that it supports.
    """
    if library.portable:
        return f"{ENGINES_PREFIX}rtx-{library.version}"
    return f"{ENGINES_PREFIX}{library.version}-sm{capability[0]}{capability[1]}"


def describe_folder(folder: str) -> str:
    """What the engines in `folder` are for: "TensorRT 11.4.0 and compute capability 9.0"."""
    found = re.fullmatch(r"tensorrt-(rtx-)?([\d.]+)(?:-sm(\d+)(\d))?", folder)
    if found is None:
        return folder
    name = f"TensorRT {'for RTX ' if found[1] else ''}{found[2]}"
    return f"{name} and compute capability {found[3]}.{found[4]}" if found[3] else name


def engine_file(graph: str) -> str:
    """The name of a graph's engine in its folder."""
    return f"{graph}.engine"


def engine_path(folder: str, graph: str) -> str:
    """The name of a graph's engine in a bundle."""
    return f"{ENGINES_FOLDER}/{folder}/{engine_file(graph)}"


def collecting_logger(library: Library, keep: Callable[[str], object]) -> Any:
    """A logger for the library's objects that prints nothing and hands errors to `keep`."""
    base = library.module.ILogger
    errors = (base.ERROR, base.INTERNAL_ERROR)

    class Logger(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            base.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in errors:
                keep(message)

    return Logger()
