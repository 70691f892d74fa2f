"""The sample batch that ADM's evaluator reads: a `.npz` whose `arr_0` is uint8, NHWC."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from aim_runtime.replacing import replacing


def write_npz(
    path: Path, images: Iterable[NDArray[np.uint8]], shape: tuple[int, int, int, int]
) -> None:
    """Write images one after another, so that 50,000 of them need the memory of one.

    `numpy.load(path)["arr_0"]` gives them back. The file appears under its name when complete.

    Args:
        path: target, replaced if it exists.
        images: N arrays, uint8, (height, width, 3).
        shape: (N, height, width, 3).

    Raises:
        ValueError: an image has another shape, or there are more or fewer than N.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    written = 0
    with replacing(path) as partial:
        with (
            zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
            archive.open("arr_0.npy", "w", force_zip64=True) as member,
        ):
            npy.write_array_header_1_0(member, header)
            for image in images:
                if image.shape != shape[1:] or image.dtype != np.uint8:
                    raise ValueError(
                        f"image {written} is {image.dtype} {image.shape}; "
                        f"expected uint8 {shape[1:]}"
                    )
                member.write(np.ascontiguousarray(image).data)
                written += 1
        if written != shape[0]:
            raise ValueError(f"got {written} images, expected {shape[0]}")
