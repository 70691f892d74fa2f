"""Fixtures of a server; where its packages are missing, each module of tests skips."""

from __future__ import annotations

import contextlib

from ..browser import browser, npm, watched  # noqa: F401 - fixtures

with contextlib.suppress(ModuleNotFoundError):
    from .parts import gate, gen, live, service, serving, tiny  # noqa: F401 - fixtures
