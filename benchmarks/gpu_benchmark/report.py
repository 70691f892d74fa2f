"""What is printed and kept of the sections."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from aim_cli import human
from aim_cli.commands.bench import machine
from gpu_benchmark.request import SETTINGS

# Seconds of the published code in bf16 on an H100 80GB: sampling with its CUDA graph kept between
# calls, its `generate` as shipped, decoding. Printed only where it cannot run, and marked so.
RECORDED = {
    ("B", 1): (0.390, 0.752, 0.012),
    ("B", 16): (0.505, 0.955, 0.048),
    ("B", 64): (0.885, 1.386, 0.174),
    ("L", 1): (0.678, 1.219, 0.014),
    ("L", 16): (0.912, 1.412, 0.048),
    ("L", 64): (1.677, 2.315, 0.174),
    ("XL", 1): (0.749, 1.213, 0.011),
    ("XL", 16): (1.160, 1.699, 0.049),
}


class Report:
    """Prints each section as it comes and keeps all of it in a file."""

    def __init__(self, target: Path | None, model: str, repeats: int) -> None:
        self.target, self.model = target, model
        self.found: dict[str, Any] = machine() | {
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": model,
            "repeats": repeats,
            "settings": SETTINGS,
            "sections": {},
        }

    def add(self, name: str, found: dict[str, Any]) -> None:
        """Print and keep what a section found, its error included."""
        self.found["sections"][name] = found
        for line in self._lines(name, found):
            click.echo(line)
        if error := found.get("error"):
            click.echo(f"{name}: {'failed: ' if len(found) > 1 else ''}{error}")
        sys.stdout.flush()
        self._write()

    def finish(self) -> None:
        """Print the tables, and the JSON where no file takes it."""
        click.echo()
        click.echo("\n".join(self._tables()))
        if self.target is None:
            click.echo()
            click.echo(json.dumps(self.found))

    def _write(self) -> None:
        if self.target is not None:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self.target.write_text(json.dumps(self.found, indent=1), encoding="utf-8")

    def _lines(self, name: str, found: dict[str, Any]) -> Iterator[str]:
        if name == "copy" and "bytes_per_second" in found:
            yield f"{found['gpu']}: copies {found['bytes_per_second'] / 1e12:.2f} TB/s, both ways"
        for row in found.get("rows", []):
            words = [f"{name}: {human.count(row['images'], 'image')}"]
            for key, unit in (
                ("seconds", "s"),
                ("as_shipped_seconds", "s as shipped"),
                ("step_ms", "ms a step"),
                ("decode_ms_per_image", "ms decoding an image"),
            ):
                if key in row:
                    words.append(f"{row[key]:.3f} {unit}")
            yield ", ".join(words)
        if "first_image_seconds" in found:
            yield (
                f"{name}: load {found['load_seconds']:.2f} s, first image "
                f"{found['first_image_seconds']:.2f} s after the call of load, "
                f"{found['process_seconds']:.2f} s after the start of the process"
            )
        if "compared" in found:
            yield f"{name}: {describe_agreement(found)}"

    def _tables(self) -> Iterator[str]:
        sections = self.found["sections"]
        copy = sections.get("copy", {})
        bandwidth = copy.get("bytes_per_second")
        yield f"**AiM-{self.model}**, guidance on, {copy.get('gpu', 'no GPU measured')}"
        yield ""
        yield (
            "| what | images | s | images/s | ms a step | GB a step | of copy bandwidth "
            "| ms decoding an image | load s | first image s | GPU memory |"
        )
        yield "|---" * 11 + "|"
        for name, found in sections.items():
            for index, row in enumerate(found.get("rows", [])):
                once = found if index == 0 else {}
                yield table_row(name, row, once, bandwidth)
        if "rows" not in sections.get("published", {"rows": 0}):
            for (size, images), (kept, shipped, decode) in RECORDED.items():
                if size == self.model:
                    yield (
                        f"| published, recorded earlier, NOT measured in this run | {images} "
                        f"| {kept + decode:.3f} (as shipped {shipped + decode:.3f}) "
                        f"| {images / (kept + decode):.1f} | | | | {decode / images * 1e3:.1f} "
                        "| | | |"
                    )
        yield ""
        yield "The model in the box:"
        for name, found in sections.items():
            if "compared" in found:
                yield f"- {name.removeprefix('agreement ')}: {describe_agreement(found)}"


def table_row(name: str, row: dict[str, Any], once: dict[str, Any], copy: float | None) -> str:
    """One line of the table; `once` has what is measured once a process, in its first line."""

    def number(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    step_ms, traffic = row.get("step_ms"), row.get("step_bytes")
    share = ""
    if step_ms and traffic and copy:
        share = f"{sum(traffic.values()) / (step_ms / 1e3) / copy:.0%}"
    peak = row.get("peak_gpu_bytes")
    seconds = number(row["seconds"], 3)
    if "as_shipped_seconds" in row:
        seconds += f" (as shipped {row['as_shipped_seconds']:.3f})"
    cells = (
        name.removeprefix("speed "),
        str(row["images"]),
        seconds,
        number(row["images"] / row["seconds"], 1),
        number(step_ms, 3),
        number(sum(traffic.values()) / 1e9 if traffic else None, 3),
        share,
        number(row.get("decode_ms_per_image"), 2),
        number(once.get("load_seconds"), 2),
        number(once.get("first_image_seconds"), 2),
        "" if peak is None else human.size(peak),
    )
    return f"| {' | '.join(cells)} |"


def describe_agreement(found: dict[str, Any]) -> str:
    """Sentences from what `compare_formats` found."""
    text = (
        f"{found['differing_tokens']} of {found['tokens']} tokens, in {found['differing_images']} "
        f"of {found['compared']} images, are not those that the CPU draws"
    )
    if "reference" not in found:
        return text
    return (
        f"{text}; given the same tokens, against {found['reference']}: "
        f"KL {found['kl_guided']:.2e} nats with guidance, {found['kl_plain']:.2e} without, "
        f"equal best token {found['argmax_guided']:.3%}, equal draw {found['draw_guided']:.3%}"
    )
