"""What pyproject.toml cannot say: the README as a package index shows it, its links absolute."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
# A link or picture of Markdown whose target lies in the repository.
_RELATIVE_LINK = re.compile(r"(!?)(\[[^\]]*\])\((?![a-z]+:|#)([^)\s]+)\)")


def readme() -> str:
    """README.md with its links to files of the repository leading to where that is published."""
    project = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    repository = project["urls"]["Repository"]

    def absolute(link: re.Match[str]) -> str:
        picture, text, target = link.groups()
        return f"{picture}{text}({repository}/{'raw' if picture else 'blob'}/HEAD/{target})"

    return _RELATIVE_LINK.sub(absolute, (HERE / "README.md").read_text(encoding="utf-8"))


setup(long_description=readme(), long_description_content_type="text/markdown")
