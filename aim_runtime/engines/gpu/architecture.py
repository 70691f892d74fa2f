"""Which compiled kernels a GPU can run.

A binary (cubin) compiled for compute capability X.Y runs on X.Y, and on X.Z with Z > Y: one for 8.0
serves 8.6, 8.7 and 8.9. From 9.0 on, kernels use what only one architecture has (sm_90a, sm_100a,
sm_120a) and run nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable

_FIRST_EXACT_MAJOR = 9


def choose(compiled: Iterable[str], capability: tuple[int, int]) -> str | None:
    """Of the architectures `compiled` ("80", "90"), the best for `capability`, or None."""
    major, minor = capability
    fits = []
    for architecture in compiled:
        of_major, of_minor = int(architecture[:-1]), int(architecture[-1])
        exact = (of_major, of_minor) == capability
        older = of_major == major < _FIRST_EXACT_MAJOR and of_minor < minor
        if exact or older:
            fits.append((of_minor, architecture))
    return max(fits)[1] if fits else None


def describe(compiled: Iterable[str]) -> str:
    """The architectures `compiled` as compute capabilities: "8.0, 9.0"."""
    found = sorted((int(item[:-1]), int(item[-1])) for item in set(compiled))
    return ", ".join(f"{major}.{minor}" for major, minor in found)
