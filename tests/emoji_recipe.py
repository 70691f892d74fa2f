"""The scripts of the emoji's recipe, as their tests import them."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

RECIPE = Path(__file__).parents[1] / "recipes" / "emoji"


def load_script(name: str) -> ModuleType:
    """Import a recipe, which is a script and finds its siblings beside it."""
    sys.path.insert(0, str(RECIPE))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(RECIPE))
