"""What a package index shows, and what a distribution holds."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LINK = re.compile(r"\]\(([^)\s]+)\)")


def test_links_of_the_readme_lead_somewhere() -> None:
    """Relative in the repository, to files that exist; absolute in the package's description."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    relative = [link for link in LINK.findall(readme) if not urlsplit(link).scheme]
    assert relative
    for link in relative:
        assert (ROOT / link.partition("#")[0]).exists(), link
    shown = str(importlib.metadata.metadata("aim-runtime").get_payload())
    absolute = LINK.findall(shown)
    assert len(absolute) == len(LINK.findall(readme))
    assert all(urlsplit(link).scheme == "https" for link in absolute), absolute
    repository = PROJECT["project"]["urls"]["Repository"]
    for link in relative:
        assert any(f"{repository}/{kind}/HEAD/{link}" in absolute for kind in ("blob", "raw")), link


def test_every_package_of_the_tree_is_distributed() -> None:
    named = PROJECT["tool"]["setuptools"]
    listed = set(named["packages"])
    for package, folder in named["package-dir"].items():
        for module in (ROOT / folder).rglob("*.py"):
            parts = module.parent.relative_to(ROOT / folder).parts
            assert ".".join((package, *parts)) in listed, module


@pytest.mark.parametrize(
    "folder", [*PROJECT["tool"]["setuptools"]["package-dir"].values(), "benchmarks"]
)
def test_the_text_of_the_code_is_one_dialect_and_names_what_there_is(folder: str) -> None:
    """Names in single backticks, no Sphinx roles, and no document that is not in the repository."""
    documents = {path.name for path in ROOT.glob("*.md")} | {
        path.name for place in ("docs", "benchmarks") for path in (ROOT / place).rglob("*.md")
    }
    for module in (ROOT / folder).rglob("*.py"):
        text = module.read_text(encoding="utf-8")
        assert not re.search(r"``|:(?:func|class|meth|mod):`|^ *#: ", text, re.MULTILINE), module
        assert set(re.findall(r"\b[\w-]+\.md\b", text)) <= documents, module


@pytest.mark.parametrize("extra", ["export", "train"])
def test_pytorch_is_free_to_bring_the_triton_that_it_pins(extra: str) -> None:
    """Every CUDA build of PyTorch pins one Triton: asking for another leaves pip no solution."""
    requirements = PROJECT["project"]["optional-dependencies"][extra]
    assert any(line.startswith("torch") for line in requirements)
    assert not any("triton" in line for line in requirements)
