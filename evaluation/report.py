"""A report: figures with all that they depend on, as JSON and as tables in Markdown."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from aim_runtime import __version__
from aim_runtime.replacing import replacing

FORMAT, VERSION = "aim-evaluation", 1
_LIBRARIES = ("numpy", "torch", "torchmetrics", "torch-fidelity", "torchvision", "pillow")
_FIGURES = (
    ("fid", "FID", "{:.3f}", "lower is better"),
    ("kid", "KID x 1000", "{:.3f}", "lower is better; about 0 for equal distributions"),
    ("inception_score", "Inception score", "{:.2f}", "higher is better"),
    ("precision", "Precision", "{:.3f}", "generated pictures that look real"),
    ("recall", "Recall", "{:.3f}", "real pictures that could have been generated"),
    ("density", "Density", "{:.3f}", "1 for equal distributions"),
    ("coverage", "Coverage", "{:.3f}", "real pictures with a generated one near"),
)
_RECONSTRUCTION = (
    ("rfid", "rFID", "{:.3f}"),
    ("psnr_db", "PSNR, mean over pictures", "{:.2f} dB"),
    ("pooled_psnr_db", "PSNR, of the pooled error", "{:.2f} dB"),
    ("ssim", "SSIM", "{:.4f}"),
    ("lpips", "LPIPS (AlexNet)", "{:.4f}"),
)
_NAMES = {
    "sha256": "sha256",
    "cfg_scale": "guidance",
    "top_k": "top-k",
    "top_p": "top-p",
    "weights_sha256": "weights' sha256",
    "bundle_sha256": "bundle's sha256",
    "checkpoint_sha256": "checkpoint's sha256",
}


def versions() -> dict[str, str]:
    """What computed."""
    found = {"aim-runtime": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def head(seconds: float) -> dict[str, Any]:
    """What every report begins with."""
    return {
        "format": FORMAT,
        "format_version": VERSION,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "versions": versions(),
    }


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write the report as JSON and as Markdown, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "json": json.dumps(report, indent=2, ensure_ascii=False) + "\n",
        "md": markdown(report) + "\n",
    }
    for ending, text in texts.items():
        with replacing(folder / f"report.{ending}") as new:
            new.write_text(text, encoding="utf-8")


def markdown(report: Mapping[str, Any], *, classes: bool = True) -> str:
    """The report as tables: figures, with `classes` a row for each, and all they depend on."""
    parts = [
        *_comparison(report),
        *_memorisation(report),
        *_reconstruction(report),
        *_likelihood(report),
        *(_classes(report) if classes else ()),
        *_measured_with(report),
    ]
    return "\n\n".join(parts)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = True) -> str:
    """A table in Markdown; with `numbers` all columns but the first are to the right."""
    rule = ["---"] + ["---:" if numbers else "---"] * (len(header) - 1)
    lines = [header, rule, *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _comparison(report: Mapping[str, Any]) -> Iterator[str]:
    found = report.get("figures")
    if found is None:
        return
    rows = [
        (name, form.format(found[key] * (1000 if key == "kid" else 1)), about)
        for key, name, form, about in _FIGURES
        if key in found
    ]
    title = f"Generated against real, features {report['features']['name']}"
    yield table((title, "", ""), rows, numbers=False)
    yield from report.get("notes", [])


def _memorisation(report: Mapping[str, Any]) -> Iterator[str]:
    found = report.get("memorisation")
    if found is None:
        return
    rows = []
    for key, name in (("generated", "generated pictures"), ("real", "real pictures")):
        one = found.get(key)
        if one is not None:
            rows.append(
                (name, str(one["pictures"]), f"{one['median_distance']:.1f}", _share(one["nearer"]))
            )
    title = f"Nearest picture of {found['references']['path']} to"
    yield table((title, "Pictures", "Median distance", found["nearer_means"]), rows)


def _reconstruction(report: Mapping[str, Any]) -> Iterator[str]:
    found = report.get("reconstruction")
    if found is None:
        return
    rows = [
        (name, form.format(found[key]))
        for key, name, form in _RECONSTRUCTION
        if found.get(key) is not None
    ]
    codes = found["codes"]
    rows.append(("Codes in use", f"{codes['share_used']:.1%} of {codes['vocab_size']}"))
    rows.append(("Perplexity of the codes", f"{codes['perplexity']:.0f}"))
    yield table((f"Reconstruction of {found['pictures']['pictures']:,} pictures", ""), rows)


def _likelihood(report: Mapping[str, Any]) -> Iterator[str]:
    found = report.get("likelihood")
    if found is None:
        return
    rows = []
    for key, name in (("given_class", "given the class"), ("without_class", "without the class")):
        one = found[key]
        bits = f"{one['bits_per_token']:.4f} ± {one['standard_error']:.4f}"
        rows.append((name, bits, f"{one['bits_per_picture']:.1f}"))
    count = found["pictures"]["pictures"]
    yield table((f"Likelihood of {count:,} pictures", "Bits a token", "Bits a picture"), rows)


def _classes(report: Mapping[str, Any]) -> Iterator[str]:
    rows = report.get("classes")
    if not rows:
        return
    columns = ("precision", "recall", "coverage", "nearest_is_own")
    names = ("Precision", "Recall", "Coverage", "Nearest real is of the class")
    yield table(
        ("Class", "Generated", "Real", *names),
        [
            (
                row["class"],
                str(row["generated"]),
                str(row["real"]),
                *(_share(row.get(column)) for column in columns),
            )
            for row in rows
        ],
    )


def _measured_with(report: Mapping[str, Any]) -> Iterator[str]:
    """Everything that figures depend on."""
    rows: list[tuple[str, str]] = []
    for key, title in (
        ("samples", "Samples"),
        ("real", "Real pictures"),
        ("features", "Features"),
        ("model", "Model"),
    ):
        if report.get(key) is not None:
            rows += _flattened(title, report[key])
    for key in ("reconstruction", "likelihood"):
        if report.get(key) is not None:
            rows += _flattened(f"{key.capitalize()}, pictures", report[key]["pictures"])
    if report.get("memorisation") is not None:
        rows += _flattened("Training pictures", report["memorisation"]["references"])
    rows += [("Computed by", ", ".join(f"{n} {v}" for n, v in report["versions"].items()))]
    rows += [("Date", report["date"])]
    yield table(("Measured with", ""), rows, numbers=False)


def _flattened(title: str, found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in found.items():
        name = _NAMES.get(key, key.replace("_", " "))
        if isinstance(value, Mapping):
            yield from _flattened(f"{title}, {name}", value)
        else:
            yield f"{title}: {name}", "not recorded" if value is None else str(value)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
