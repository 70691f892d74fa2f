"""What a bundle says of a graph that is made for the `cpu` backend: read as a stranger's."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from aim_runtime.bundle import Bundle
from aim_runtime.bundle.checked_json import CheckedJson
from aim_runtime.bundle.manifest import Manifest
from aim_runtime.engines.onnxruntime.library import installed_version, is_older
from aim_runtime.errors import BundleError

T = TypeVar("T")

_VERSION = re.compile(r"[0-9]{1,4}\.[0-9]{1,4}")


@dataclass(frozen=True)
class Description:
    """A kind of description.

    Attributes:
        json: reads its file, whose name it has.
        graph: what it describes, "step graph".
        format: the document's `format`.
        version: the newest `format_version` that is understood.
        most_bytes: that its file may have.
    """

    json: CheckedJson
    graph: str
    format: str
    version: int
    most_bytes: int

    def read(self, bundle: Bundle, file: str, made: Callable[[Any, Manifest], T]) -> T | None:
        """What `made` makes of the document in `file`; None for one of a newer format.

        Raises BundleError where it is damaged or does not belong to the bundle.
        """
        size = bundle.manifest.files[file].size
        if size > self.most_bytes:
            raise BundleError(
                f"{bundle.path}: {file} has {size} bytes; at most {self.most_bytes} fit"
            )
        try:
            value = self.json.parse(str(bundle.read(file), "utf-8"), self.most_bytes)
            if not isinstance(value, dict) or value.get("format") != self.format:
                raise BundleError(f'{file} is no {self.graph}: it lacks "format": "{self.format}"')
            version = self.json.integer(value.get("format_version"), "format_version", 1, 1 << 31)
            return made(value, bundle.manifest) if version <= self.version else None
        except UnicodeDecodeError:
            raise BundleError(f"{bundle.path}: {file} is not UTF-8 text") from None
        except BundleError as error:
            raise BundleError(f"{bundle.path}: {error}") from None

    def onnxruntime(self, value: Any, example: str) -> str:
        """The version of ONNX Runtime that a document asks for, such as `example`."""
        sentence = f"a version of two numbers, '{example}'"
        return self.json.matching(value, "onnxruntime", _VERSION, sentence)


def lacking(onnxruntime: str) -> str:
    """Why a graph for this version does not run here, in words; "" where it does."""
    if not is_older(installed_version(), onnxruntime):
        return ""
    return (
        f"onnxruntime {installed_version()} lacks operators of the faster one, "
        f"{onnxruntime} or later has them; pip install --upgrade onnxruntime"
    )
