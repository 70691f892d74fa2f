"""Runs the commands of README's section on training as they stand, on a small folder of pictures.

    python tests/readme_training.py

`aim` must be installed with what the section installs; its `pip install` line is the only one left
out. Every number of minutes is cut to a few seconds, and nothing else is changed. Ends in an error
unless the commands end in pictures.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

_README = Path(__file__).parents[1] / "README.md"
_SECTION = "## Train on your own pictures"
_MINUTES = re.compile(r"(--(?:max-)?minutes) [0-9.]+")


def commands(readme: str) -> list[str]:
    """The section's shell commands, continued lines joined."""
    section = readme.split(_SECTION, 1)[1].split("\n## ", 1)[0]
    blocks = re.findall(r"```sh\n(.*?)```", section, flags=re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line.strip()]


def shortened(command: str, minutes: float) -> str:
    """The command with every number of minutes replaced."""
    return _MINUTES.sub(rf"\1 {minutes:g}", command)


def draw_pictures(root: Path, each: int = 24, side: int = 72) -> None:
    """A folder a class: discs and bars of random colours."""
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[:side, :side]
    for name in ("bar", "disc"):
        (root / name).mkdir(parents=True)
        for number in range(each):
            place, width = generator.integers(side // 4, 3 * side // 4, 2), side // 5
            inside = abs(rows - place[0]) < width
            if name == "disc":
                inside = (rows - place[0]) ** 2 + (columns - place[1]) ** 2 < width**2
            colours = generator.integers(0, 256, (2, 3), np.uint8)
            Image.fromarray(colours[inside.astype(int)]).save(root / name / f"{number:03d}.png")


def main() -> None:
    """Runs them all in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        draw_pictures(here / "pictures")
        for command in commands(_README.read_text(encoding="utf-8")):
            if command.startswith("pip install"):
                continue
            shown = shortened(command, 0.2)
            print(f"$ {shown}", flush=True)
            done = subprocess.run(["bash", "-c", shown], cwd=here, check=False)
            if done.returncode:
                sys.exit(f"exit code {done.returncode}: {shown}")
        drawn = sorted(path.relative_to(here) for path in here.glob("**/*_seed*.png"))
        if not drawn or not (here / "my-run" / "sheet.png").is_file():
            sys.exit("the commands drew no pictures")
        print(f"{len(drawn)} pictures, {drawn[0]} the first")


if __name__ == "__main__":
    main()
