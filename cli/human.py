"""Numbers as people read them, always with their unit."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """`8.4 ms`, `0.42 s`, `12.3 s`, `4 min 05 s`, `2 h 13 min`."""
    if seconds < 0.0995:
        return f"{seconds * 1000:.2g} ms"
    if seconds < 9.995:
        return f"{seconds:.2f} s"
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(count: float) -> str:
    """Bytes in binary units: `512 B`, `1.5 MiB`, `36 MiB`."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return _three_digits(count, unit)
        count /= 1024
    return _three_digits(count, "GiB")


def quantity(count: float) -> str:
    """Large counts: `950`, `71.9 M`, `1.31 B`."""
    for unit in ("", "k", "M"):
        if count < 999.5:
            return _three_digits(count, unit).strip()
        count /= 1000
    return _three_digits(count, "B")


def rate(per_second: float, unit: str = "") -> str:
    """`1.3 images/s`; slow rates keep their digits: `0.042 images/s`."""
    number = f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.3g}"
    return f"{number} {unit}/s" if unit else number


def count(number: int, noun: str) -> str:
    """`1 image`, `16 images`, `98 classes`."""
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {noun}{'es' if noun.endswith('s') else 's'}"


def _three_digits(value: float, unit: str) -> str:
    if value == int(value) or value >= 100:
        return f"{value:.0f} {unit}"
    return f"{value:.3g} {unit}"
