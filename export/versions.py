"""Whether the packages that lower the decoder are new enough for the PyTorch beside them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from aim_export.errors import ExportError

# Older ones fail inside PyTorch's exporter, each in its own way.
OLDEST = {"onnx": (1, 18), "onnxscript": (0, 7)}


def check_versions() -> None:
    """Refuse packages that are too old, before work is spent.

    Raises:
        ExportError: one is; the message says how to get a newer one.
    """
    for name, oldest in OLDEST.items():
        try:
            found = version(name)
        except PackageNotFoundError:  # imported from somewhere else: let it try
            continue
        numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
        if numbers < oldest:
            needed = ".".join(map(str, oldest))
            raise ExportError(
                f"{name} {found} is too old to export with: pip install --upgrade "
                f"'{name}>={needed}'"
            )
