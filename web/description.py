"""What the page is told: the model and its classes as by `aim serve`, and where files are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from aim_runtime import Bundle
from aim_runtime.class_names import ClassNames
from aim_runtime.sampling import MAX_CFG_SCALE
from aim_runtime.version import __version__
from aim_serve.settings import MAX_SEED, MAX_TEMPERATURE

MAX_IMAGES = 16
"""Of one order: a browser draws them for minutes, and a phone has little memory."""


def model(bundle: Bundle) -> dict[str, Any]:
    """An entry of `/v1/models`, as far as the page reads it."""
    manifest = bundle.manifest
    card = manifest.model
    limits = {
        "n": MAX_IMAGES,
        "cfg_scale": (0, MAX_CFG_SCALE),
        "temperature": (0, MAX_TEMPERATURE),
        "top_k": (0, card.vocab_size),
        "top_p": (0, 1),
        "seed": (0, MAX_SEED),
    }
    about = {
        "width": card.image_width,
        "height": card.image_height,
        "num_tokens": card.num_tokens,
        "grid": card.grid,
        "num_classes": card.num_classes,
        "defaults": asdict(manifest.sampling),
        "limits": limits,
        "version": __version__,
    }
    return {"id": manifest.name, "aim": about}


def classes(bundle: Bundle) -> list[dict[str, Any]]:
    """The classes in the order of their indices, each with the number that means it."""
    names = bundle.manifest.class_names
    numbers = ClassNames(names)
    return [{"id": numbers.number(index), "name": name} for index, name in enumerate(names)]


def description(
    bundle: Bundle,
    files: Mapping[str, str],
    runtime: Mapping[str, Any],
    bytes_to_load: int,
) -> dict[str, Any]:
    """All of it, ready for JSON.

    Args:
        bundle: the model.
        files: where the files of the bundle are, by their names in it; relative to the page.
        runtime: the same of ONNX Runtime, as the engine's `load` takes it.
        bytes_to_load: about how much comes before the first picture.
    """
    return {
        "model": model(bundle),
        "classes": classes(bundle),
        "precision": bundle.manifest.precision,
        "files": files,
        "runtime": runtime,
        "bytes": bytes_to_load,
    }
