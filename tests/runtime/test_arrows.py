"""Which way the engines import each other, read from their sources."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import aim_runtime

ROOT = Path(aim_runtime.__file__).parent
ENGINES = "aim_runtime.engines"
# What each part of the engines may import of the others; `base` is open to all.
ALLOWED = {
    "gpu": set(),
    "cuda": {"gpu"},
    "tensorrt": {"gpu"},
    "onnxruntime": {"gpu"},
    "backends": set(),
    "base": set(),
}


def name_of(path: Path) -> str:
    parts = ("aim_runtime", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def imported_by(module: str) -> set[str]:
    """The modules of the runtime that `module` imports, inside of functions too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else str(node.module))
    return found & set(MODULES)


def test_the_sources_are_read() -> None:
    assert f"{ENGINES}.base" in imported_by(f"{ENGINES}.gpu.engine")
    assert f"{ENGINES}.gpu.libcuda" in imported_by(f"{ENGINES}.cuda")
    assert f"{ENGINES}.gpu.driver" in imported_by(f"{ENGINES}.cuda")  # inside of a function


@pytest.mark.parametrize("part", ALLOWED)
def test_engines_import_only_what_lies_below_them(part: str) -> None:
    modules = [name for name in MODULES if f"{name}.".startswith(f"{ENGINES}.{part}.")]
    assert modules
    for module in modules:
        others = {
            name.removeprefix(f"{ENGINES}.").split(".")[0]
            for name in imported_by(module)
            if name.startswith(f"{ENGINES}.")
        }
        assert others <= ALLOWED[part] | {part, "base"}, module
