"""What keeps the code easy to find one's way in: small parts, and imports that lead one way."""

from __future__ import annotations

import ast
import graphlib
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))[
    "tool"
]["setuptools"]["package-dir"]
LINES_A_MODULE, LINES_A_FUNCTION = 450, 70
# Which of the project's packages each may import.
ARROWS = {
    "aim_runtime": set[str](),
    "aim_training": set[str](),
    "aim_export": {"aim_runtime", "aim_training"},
    "aim_serve": {"aim_runtime"},
    "aim_web": {"aim_runtime", "aim_serve"},
    "aim_evaluation": {"aim_runtime"},
    "aim_cli": {
        "aim_runtime",
        "aim_training",
        "aim_export",
        "aim_serve",
        "aim_web",
        "aim_evaluation",
    },
}
# What each part of the engines may import of the others; `base` is open to all.
ENGINES = {
    "gpu": set[str](),
    "cuda": {"gpu", "slots"},
    "tensorrt": {"gpu"},
    "onnxruntime": {"gpu", "slots"},
    "backends": set[str](),
    "slots": set[str](),
    "base": {"slots"},
}


@cache
def modules() -> dict[str, Path]:
    """The files of the project's packages by the names that they are imported by."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join((package, *(part for part in parts if part != "__init__")))
            found[name] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(module: str, *, when_loaded: bool) -> Iterator[str]:
    """The modules of the project that one imports; with `when_loaded` only those outside functions.

    Those that only a type checker imports do not count.
    """
    pending: list[ast.AST] = [tree(modules()[module])]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name in modules())
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} imports by a relative name"
            source = node.module or ""
            for name in node.names:
                whole = f"{source}.{name.name}"
                yield from (found for found in (whole, source) if found in modules())
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            pending += node.orelse
        elif not (when_loaded and isinstance(node, ast.FunctionDef | ast.Lambda)):
            pending += ast.iter_child_nodes(node)


def test_modules_and_functions_are_small() -> None:
    long = []
    for path in modules().values():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > LINES_A_MODULE:
            long.append(f"{path.relative_to(ROOT)} has {lines} lines")
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > LINES_A_FUNCTION:
                    long.append(f"{path.relative_to(ROOT)}: {node.name} has {lines} lines")
    assert not long


@pytest.mark.parametrize("package", FOLDERS)
def test_packages_import_only_those_below_them(package: str) -> None:
    allowed = ARROWS[package] | {package}
    wrong = [
        f"{module} imports {other}"
        for module in modules()
        if module.partition(".")[0] == package
        for other in imported(module, when_loaded=False)
        if other.partition(".")[0] not in allowed
    ]
    assert not wrong


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {module: {*imported(module, when_loaded=True)} - {module} for module in modules()}
    for module, others in graph.items():
        # A package's own modules may take from it what stands above its imports of them.
        others -= {other for other in others if module.startswith(f"{other}.")}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the way


@pytest.mark.parametrize("part", ENGINES)
def test_engines_import_only_what_lies_below_them(part: str) -> None:
    place = "aim_runtime.engines."
    own = [module for module in modules() if f"{module}.".startswith(f"{place}{part}.")]
    assert own
    wrong = [
        f"{module} imports {other}"
        for module in own
        for other in imported(module, when_loaded=False)
        if other.startswith(place)
        and other.removeprefix(place).partition(".")[0] not in ENGINES[part] | {part, "base"}
    ]
    assert not wrong


@pytest.mark.parametrize("part", ["aim_export.cuda", "aim_export.tensorrt"])
def test_engines_are_made_from_bundles_alone(part: str) -> None:
    """What adds engines to a bundle needs nothing of training, and so no PyTorch."""
    reached, pending = set[str](), [module for module in modules() if module.startswith(part)]
    while pending:
        module = pending.pop()
        if module not in reached:
            reached.add(module)
            pending += imported(module, when_loaded=False)
    assert not [module for module in reached if module.startswith("aim_training")]
