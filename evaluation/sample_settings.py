"""How the pictures of a sample were drawn, as their files and their folder's record say it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aim_evaluation.errors import EvaluationError
from aim_evaluation.picture_sets import PictureFolder
from aim_runtime.images import read_settings
from aim_runtime.quoting import shown

_COMMON = (
    "bundle",
    "bundle_sha256",
    "cfg_scale",
    "temperature",
    "top_k",
    "top_p",
    "backend",
    "precision",
)
"""What the pictures of one sample have in common, by the names in their files."""
_FACTS = ("weights", "checkpoint_sha256", "tokenizer_sha256", "position_offset")
"""What the record of `aim sample` says besides."""
_MAX_RECORD_BYTES = 1 << 20


@dataclass(frozen=True)
class SampleSettings:
    """What the pictures of a sample say about how they were drawn.

    Attributes:
        common: what holds for all, by the names of `Result.settings`.
        classes: (N,) class numbers.
        class_names: by class number, as far as there are pictures of it.
        seeds: (N,) seeds.
    """

    common: dict[str, Any]
    classes: NDArray[np.int64]
    class_names: dict[int, str]
    seeds: list[int]

    def describe(self) -> dict[str, Any]:
        """The settings for a report."""
        first, last = min(self.seeds), max(self.seeds)
        whole = last - first + 1 == len(self.seeds)
        return self.common | {
            "seeds": f"{first} to {last}" + ("" if whole else f", {len(self.seeds)} of these")
        }


def read_sample_settings(pictures: PictureFolder) -> SampleSettings | None:
    """The settings in the pictures' files; None where none of them carries any.

    Raises EvaluationError when some lack them, they are of different settings, or two pictures were
    drawn from one seed.
    """
    found = [read_settings(file) for file in pictures.files]
    bare = sum(not settings for settings in found)
    if bare == len(found):
        return None
    if bare:
        lacking = next(file for file, told in zip(pictures.files, found, strict=True) if not told)
        raise EvaluationError(
            f"{bare} of the {len(found)} pictures in {pictures.path} do not say how they were "
            f"drawn, such as {lacking.name}, and the others do; keep them apart"
        )
    common = {name: found[0].get(name) for name in _COMMON}
    for file, settings in zip(pictures.files, found, strict=True):
        for name, value in common.items():
            if settings.get(name) != value:
                raise EvaluationError(
                    f"{pictures.path} holds pictures of two settings: {name} is {shown(value)} in "
                    f"{pictures.files[0].name} and {shown(settings.get(name))} in {file.name}"
                )
    try:
        classes = np.array([int(settings["class"]) for settings in found], np.int64)
        seeds = [int(settings["seed"]) for settings in found]
    except (KeyError, TypeError, ValueError):
        raise EvaluationError(f"the settings in {pictures.path}'s files are not aim's") from None
    repeated = [seed for seed, times in Counter(seeds).items() if times > 1]
    if repeated:
        raise EvaluationError(
            f"{pictures.path} holds more than one picture of the seed {repeated[0]} "
            f"({len(repeated)} seeds are repeated): such pictures do not vary as samples must"
        )
    names = {
        int(settings["class"]): str(settings["class_name"])
        for settings in found
        if "class_name" in settings
    }
    return SampleSettings(_record(pictures) | common, classes, names, seeds)


def _record(pictures: PictureFolder) -> dict[str, Any]:
    """The preset and the facts that `aim sample` wrote down; empty where it did not."""
    if pictures.record is None:
        return {}
    with pictures.record.open("rb") as file:
        data = file.read(_MAX_RECORD_BYTES)
    try:
        found = json.loads(data)
        settings, facts = found["settings"], found["facts"]
        return {"preset": settings["preset"], **{name: facts.get(name) for name in _FACTS}}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise EvaluationError(f"{pictures.record} is not the record of a sample") from error
