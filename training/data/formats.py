"""Which kinds of files are read as images: what the installed Pillow reads, but for a few."""

from __future__ import annotations

import contextlib
import functools
import importlib

from PIL import Image

# Not read, whatever a file is called. EPS is a program that Pillow hands to Ghostscript; WMF is
# drawn by Windows alone; the others are data for other programs, which Pillow only recognises.
EXCLUDED = frozenset({"EPS", "WMF", "BUFR", "GRIB", "HDF5", "IPTC", "MPEG"})


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read, HEIF among them if pillow-heif is installed."""
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
    Image.init()
    return tuple(sorted(set(Image.OPEN) - EXCLUDED))


@functools.cache
def readable_suffixes() -> frozenset[str]:
    """Endings, lower case with their dot, of files in these formats."""
    formats = {*readable_formats(), "MPO"}  # JPEG's reader opens these too
    endings = Image.registered_extensions()
    return frozenset(suffix for suffix, format in endings.items() if format in formats)
